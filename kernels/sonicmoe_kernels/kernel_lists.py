"""Which kernels a layer launches, so that all of them can be compiled at once.

Legend: D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.block_stages import STAGES, BlockLayer, BlockStage, why_illegal_block
from sonicmoe_kernels.compile import KernelSpec
from sonicmoe_kernels.tiles import (
    ROW_TILES,
    Aggregation,
    TopKBackward,
    TopKForward,
    TopKOptions,
    pick_rows,
    pick_weights,
    routing_kernels,
    why_illegal_routing,
    why_illegal_topk,
)

__all__ = ["block_specs", "experts_specs", "plan_specs", "specs", "topk_kernels", "topk_specs"]

Dtype = Literal["bfloat16", "float16"]


def experts_specs(
    *,
    d: int,
    f: int,
    num_experts: int,
    rows_per_token: int | None,
    dtype: Dtype = "bfloat16",
    activation: str = "swiglu",
) -> list[KernelSpec]:
    """Every kernel that `moe_experts` launches, forward and backward, for one kind of plan.

    rows_per_token: K, or None where tokens own different numbers of rows.

    Raises:
        ValueError: no kernel serves these sizes; the message says why.
    """
    halves = get_activation(activation).halves
    rows = [
        pick_rows(kernel, d=d, f=f, num_experts=num_experts, dtype=dtype, activation=activation)
        for kernel in ROW_TILES
    ]
    weights = [
        pick_weights("d_weight2", d=d, f=f, dtype=dtype),
        pick_weights("d_weight13", d=d, f=f, halves=halves, dtype=dtype),
    ]
    sums = [Aggregation(d, dtype, rows_per_token, weighted) for weighted in (True, False)]
    return [*rows, *weights, *sums]


def specs(
    *,
    d: int,
    f: int,
    num_experts: int,
    top_k: int,
    dtype: Dtype = "bfloat16",
    activation: str = "swiglu",
) -> list[KernelSpec]:
    """As `experts_specs`, for plans with K rows a token and for ragged ones."""
    every = [
        spec
        for rows_per_token in (top_k, None)
        for spec in experts_specs(
            d=d,
            f=f,
            num_experts=num_experts,
            rows_per_token=rows_per_token,
            dtype=dtype,
            activation=activation,
        )
    ]
    return list(dict.fromkeys(every))


def topk_kernels(options: TopKOptions) -> list[KernelSpec]:
    """Every kernel that `route_topk` launches with these options.

    With all scores and without; the backward with the gradient of the chosen, of all, of both.
    """
    static = dataclasses.asdict(options)
    wanted = ((True, False), (True, True), (False, True))
    return [
        *(TopKForward(**static, all_scores=all_scores) for all_scores in (False, True)),
        *(TopKBackward(**static, d_weights=chosen, d_all=every) for chosen, every in wanted),
    ]


def topk_specs(options: TopKOptions) -> list[KernelSpec]:
    """`topk_kernels`, but none where E or K is too large for the kernels."""
    return [] if why_illegal_topk(options) is not None else topk_kernels(options)


def plan_specs(*, num_experts: int, top_k: int, rounding: str | None = None) -> list[KernelSpec]:
    """Every kernel that builds plans for these sizes: of top-k and, if given, of one rounding.

    num_experts counts the experts of all ranks. None where E or K is too large for the kernels.
    """
    if why_illegal_routing(num_experts, top_k) is not None:
        return []
    wanted = dict.fromkeys((None, rounding))
    return [spec for r in wanted for spec in routing_kernels(num_experts, top_k, rounding=r)]


def block_specs(
    routing: TopKOptions, *, d: int, f: int, rounding: str | None = None
) -> list[KernelSpec]:
    """The stages of the fused block: of token choice and, if given, of one rounding.

    None where the block is not fused: it runs by modules then.
    """
    layers = [BlockLayer(routing, wanted, d, f) for wanted in dict.fromkeys((None, rounding))]
    if why_illegal_block(layers[0]) is not None:
        return []
    return [BlockStage(stage, layer) for layer in layers for stage in STAGES]
