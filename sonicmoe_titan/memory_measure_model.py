"""Measures one decoder layer of a config: what autograd keeps of it on this machine.

Legend: T tokens, B batch, L sequence, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor, nn
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from sonicmoe_titan.aux_loss import set_loss_scale
from sonicmoe_titan.memory_measure import SavedTensors, allocated_bytes
from sonicmoe_titan.memory_model import (
    Checkpointing,
    LayerShape,
    experts_terms,
    layer_terms,
    moe_terms,
    total,
)
from sonicmoe_titan.model import decoder_config

INIT_STD = 0.02
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Row = tuple[str, int, int]
"""What was measured, predicted bytes, measured bytes."""


def measured_shape(shape: LayerShape, *, tokens: int | None, cpu_tokens: int) -> LayerShape:
    """The layer as this machine can run it: on one rank, on a CPU with fewer tokens.

    Raises:
        ValueError: fewer tokens than a rounding tile.
    """
    on_gpu = torch.cuda.is_available()
    args = shape.args
    least = args.rounding_tile if args.router == "token_rounding" else 1
    if tokens is None:
        tokens = shape.num_tokens if on_gpu else max(min(shape.num_tokens, cpu_tokens), least)
    if tokens < least:
        raise ValueError(
            f"--tokens {tokens}: expected at least model.rounding_tile = {args.rounding_tile}"
        )
    return dataclasses.replace(
        shape,
        # flex and varlen attention need masks, and keep the same tensors
        args=dataclasses.replace(args, attention="sdpa"),
        num_tokens=tokens,
        on_gpu=on_gpu,
        expert_parallel=1,
    )


def measure_layer(
    shape: LayerShape,
    *,
    policy: ActivationCheckpointing | None = None,
    checkpointing: Checkpointing = "none",
) -> list[Row]:
    """Run the experts' op, the MoE block and the decoder layer on random data, and compare.

    With activation checkpointing (`policy`, named by `checkpointing`) the checkpointed layer is
    measured too, by what its forward leaves allocated.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = _build_block(shape, device)
    x_BLD = torch.randn(
        1, shape.num_tokens, shape.args.dim, dtype=DTYPES[shape.value_bytes], device=device
    ).requires_grad_()
    rows = [
        ("experts' op", total(experts_terms(shape)), _experts_bytes(block.moe, x_BLD)),
        ("MoE block", total(moe_terms(shape)), _saved_bytes(block.moe, x_BLD)),
        ("decoder layer", total(layer_terms(shape)), _saved_bytes(block, *_inputs(x_BLD))),
    ]
    if policy is not None:
        wrapped = policy._wrap_block(block, base_fqn="layers.0")
        inputs = _inputs(x_BLD)
        out_BLD, allocated = allocated_bytes(lambda: wrapped(*inputs), device=device)
        predicted = total(layer_terms(shape, checkpointing))
        x_bytes, out_bytes = (t.untyped_storage().nbytes() for t in (x_BLD, out_BLD))
        measured = allocated.live - out_bytes + x_bytes  # the policy keeps x, made before
        rows.append((f"decoder layer, {checkpointing} checkpointing", predicted, measured))
    return rows


def _build_block(shape: LayerShape, device: torch.device) -> Any:
    config = decoder_config(shape.args, seq_len=shape.num_tokens)
    block = config.layers[0].build().to(device=device, dtype=DTYPES[shape.value_bytes])
    block.attention.rope.float()  # FSDP casts parameters and no buffers
    block.moe.stats.allocate(device)
    set_loss_scale([block], 1.0)
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=INIT_STD)
    return block


def _inputs(x_BLD: Tensor) -> tuple[Tensor, None, Tensor]:
    batch, length, _ = x_BLD.shape
    return x_BLD, None, torch.arange(length, device=x_BLD.device).expand(batch, -1)


def _saved_bytes(module: nn.Module, *inputs: object) -> int:
    with SavedTensors([*module.parameters(), *module.buffers()]) as saved:
        out = module(*inputs)
    size = saved.bytes()
    del out
    return size


def _experts_bytes(moe: Any, x_BLD: Tensor) -> int:
    """The op alone, with the plan that the block's router makes."""
    x_TD = x_BLD.detach().flatten(0, 1).requires_grad_()
    routed = moe.routed_experts
    w1_EFD, w3_EFD, w2_EDF = routed.inner_experts.local_weights(x_TD.dtype)
    scores_BLK, ids_BLK, scores_BLE = moe.router(x_BLD, moe.expert_bias_E)
    plan: RoutingPlan = routed._plan(*(t.flatten(0, 1) for t in (ids_BLK, scores_BLK, scores_BLE)))
    with SavedTensors([w1_EFD, w3_EFD, w2_EDF]) as saved:
        out_TD = moe_experts(x_TD, w1_EFD, w3_EFD, w2_EDF, plan, backend=routed.config.backend)
    size = saved.bytes()
    del out_TD
    return size
