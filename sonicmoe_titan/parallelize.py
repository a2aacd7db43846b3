"""Shards, checkpoints and compiles the decoder: Qwen3's recipe, made to run on gloo too."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import derive
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    SelectiveAC,
)
from torchtitan.models.qwen3.parallelize import parallelize_qwen3

from sonicmoe_titan.router import SonicRouter
from sonicmoe_titan.selective_ac import SonicSelectiveAC


def parallelize_decoder(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    ac_config: ActivationCheckpointing.Config | None,
    **kwargs: Any,
) -> nn.Module:
    """Apply TorchTitan's parallelisms to `model`; the arguments are `parallelize_qwen3`'s."""
    if type(ac_config) is SelectiveAC.Config:
        ac_config = derive(ac_config, SonicSelectiveAC.Config)
    for module in model.modules():
        if isinstance(module, SonicRouter):
            module.connect(parallel_dims)
    model = parallelize_qwen3(
        model,  # pyrefly: ignore [bad-argument-type]
        parallel_dims=parallel_dims,
        ac_config=ac_config,  # pyrefly: ignore [bad-argument-type]
        **kwargs,
    )
    if dist.get_backend() == "gloo":
        # FSDP divides inside the reduction by default; gloo has no such reduction
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
