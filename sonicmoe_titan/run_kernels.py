"""The kernels that a run launches on Hopper GPUs: their list, and making them ready in a rank."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from sonicmoe_kernels.backends import HOPPER_MULTIPLE, resolve_backend
from sonicmoe_kernels.compile import KernelSpec
from sonicmoe_kernels.kernel_lists import block_specs, plan_specs, specs, topk_specs
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.tiles import TopKOptions

from sonicmoe_titan.fused import is_wanted
from sonicmoe_titan.model_args import ModelArgs

if TYPE_CHECKING:
    from sonicmoe_titan.trainer import SonicTrainer


def prepare_run(config: SonicTrainer.Config) -> None:
    """Compile in a rank what its run lacks; other ranks that come with the same wish wait.

    Call it before the process group exists, whose timeouts then meet no compilation.
    """
    if config.model.moe != "sonic" or not torch.cuda.is_available():
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    model, (width, _) = config.model, local_sizes(config)
    if resolve_backend(model.backend, device, torch.bfloat16, model.dim, width) == "hopper":
        make_ready(run_specs(config))


def why_nothing_to_compile(config: SonicTrainer.Config) -> str | None:
    """Why a run launches no kernel of ours on a Hopper GPU, or None when it does."""
    model, (width, _) = config.model, local_sizes(config)
    if model.moe != "sonic":
        return f'model.moe = "{model.moe}" is TorchTitan\'s own block'
    if model.backend == "torch":
        return 'model.backend = "torch" compiles nothing beforehand'
    if model.backend == "auto" and (model.dim % HOPPER_MULTIPLE or width % HOPPER_MULTIPLE):
        return (
            f"D = {model.dim} and F = {width} of a rank are not both multiples of "
            f"{HOPPER_MULTIPLE}, so the experts run on backend 'torch'"
        )
    return None


def run_specs(config: SonicTrainer.Config) -> list[KernelSpec]:
    """Every kernel that a rank of this run may launch.

    Raises:
        ValueError: no kernel serves the run's sizes.
    """
    model, (width, experts) = config.model, local_sizes(config)
    wanted = specs(d=model.dim, f=width, num_experts=experts, top_k=model.top_k, dtype="bfloat16")
    rounding = model.rounding if model.router == "token_rounding" else None
    routing = TopKOptions(
        model.num_experts,
        model.top_k,
        score_func=model.score_func,
        softmax_order=model.softmax_order,
        renormalize=model.renormalize,
        has_bias=model.load_balance_coeff is not None,
    )
    if model.num_expert_groups is None:  # else torch routes
        wanted += topk_specs(routing)
    wanted += plan_specs(num_experts=model.num_experts, top_k=model.top_k, rounding=rounding)
    if _fuses_blocks(config):
        wanted += block_specs(routing, d=model.dim, f=width, rounding=rounding)
    return wanted


def _fuses_blocks(config: SonicTrainer.Config) -> bool:
    """Whether eager blocks of this run may be one operator, see `fused`."""
    model, p = config.model, config.parallelism
    pass_tokens = config.training.local_batch_size * config.training.seq_len
    if not is_wanted(model.fused_block, pass_tokens // p.context_parallel_degree):
        return False
    if config.compile.enable and "model" in config.compile.components:
        return False
    if p.expert_parallel_degree > 1 or p.tensor_parallel_degree > 1:
        return False
    losses = model.aux_loss_coeff > 0 or model.z_loss_coeff > 0
    return not losses and model.num_expert_groups is None


def local_sizes(config: SonicTrainer.Config) -> tuple[int, int]:
    """(expert width, experts) of one rank: tensor parallelism splits F unless experts are split."""
    model: ModelArgs = config.model
    p = config.parallelism
    if p.expert_parallel_degree > 1:
        return model.expert_dim, model.num_experts // p.expert_parallel_degree
    return model.expert_dim // p.tensor_parallel_degree, model.num_experts
