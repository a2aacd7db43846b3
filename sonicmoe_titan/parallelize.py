"""Shards, checkpoints and compiles the decoder: Qwen3's recipe, made to run on gloo too."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.models.qwen3.parallelize import parallelize_qwen3


def parallelize_decoder(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Apply TorchTitan's parallelisms to `model`; the arguments are `parallelize_qwen3`'s."""
    model = parallelize_qwen3(model, **kwargs)  # pyrefly: ignore [bad-argument-type]
    if dist.get_backend() == "gloo":
        # FSDP divides inside the reduction by default; gloo has no such reduction
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
