"""Shards, checkpoints and compiles the decoder: Qwen3's recipe, made to run on gloo too."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, derive
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    SelectiveAC,
)
from torchtitan.models.qwen3.parallelize import parallelize_qwen3

from sonicmoe_titan.moe import SonicRoutedExperts
from sonicmoe_titan.router import SonicRouter
from sonicmoe_titan.selective_ac import SonicSelectiveAC

SEEDS_PER_SHARD = 1 << 20  # pipeline stages already use the seeds that follow the run's own


def parallelize_decoder(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    ac_config: ActivationCheckpointing.Config | None,
    compile_config: CompileConfig,
    **kwargs: Any,
) -> nn.Module:
    """Apply TorchTitan's parallelisms to `model`; the arguments are `parallelize_qwen3`'s.

    Raises:
        ValueError: `redispatch_x` together with compilation or activation checkpointing.
    """
    _check_redispatch(model, ac_config, compile_config)
    if type(ac_config) is SelectiveAC.Config:
        ac_config = derive(ac_config, SonicSelectiveAC.Config)
    for module in model.modules():
        if isinstance(module, SonicRouter):
            module.connect(parallel_dims)
    model = parallelize_qwen3(
        model,  # pyrefly: ignore [bad-argument-type]
        parallel_dims=parallel_dims,
        ac_config=ac_config,  # pyrefly: ignore [bad-argument-type]
        compile_config=compile_config,
        **kwargs,
    )
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parallel_dims.world_size == 1:
        # TorchTitan has FSDP divide gradients by 1. Alone, FSDP does that in a pass of its own: 2.9
        # of 122 ms of a step of the 7B proxy (H200, 2026-11-27). Without a factor there is none.
        for module in sharded:
            module.set_gradient_divide_factor(None)  # pyrefly: ignore[bad-argument-type]
    if dist.get_backend() == "gloo":
        # FSDP divides inside the reduction by default; gloo has no such reduction
        for module in sharded:
            module.set_force_sum_reduction_for_comms(True)
        _draw_shards_apart(parallel_dims)
    return model


def _draw_shards_apart(parallel_dims: ParallelDims) -> None:
    """Give every shard a seed of its own before the weights are drawn; replicas share theirs.

    DTensor draws one tensor over all its shards on a GPU. On a CPU it draws each shard from the
    rank's generator: from equal seeds, half of the experts would be copies of the other half, and
    two copies are always chosen together, so that the router would learn nothing.
    """
    batch, cp = (parallel_dims.get_optional_mesh(axis) for axis in ("batch", "cp"))
    shard = 0 if batch is None else batch.get_local_rank() % parallel_dims.dp_shard
    shard = shard * parallel_dims.cp + (0 if cp is None else cp.get_local_rank())
    torch.manual_seed(torch.initial_seed() + SEEDS_PER_SHARD * shard)


def _check_redispatch(
    model: nn.Module,
    ac_config: ActivationCheckpointing.Config | None,
    compile_config: CompileConfig,
) -> None:
    experts = [m for m in model.modules() if isinstance(m, SonicRoutedExperts)]
    if not any(module.config.redispatch_x for module in experts):
        return
    if ac_config is not None:
        raise ValueError(
            "model.redispatch_x = true with activation checkpointing: full checkpointing sends x "
            "again by itself and selective keeps what it received; turn one of them off"
        )
    if compile_config.enable and "model" in compile_config.components:
        raise ValueError(
            "model.redispatch_x = true with compile.enable: a compiled block decides by itself "
            "what it keeps; turn one of them off"
        )
