"""Building plans on the hopper backend: allocates, launches on the current stream, never waits.

Legend: T tokens, E experts, K experts per token, B blocks of 256 tokens, R routed rows (suffix R:
R_max entries).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
    TOKEN_BLOCK,
    RoutingKernel,
    RoutingStep,
    count_columns,
    routing_kernels,
)

__all__ = ["PlanTensors", "plan_of_rounding", "plan_of_topk", "score_gradient"]

_IDS: dict[torch.dtype, Literal["int32", "int64"]] = {
    torch.int32: "int32",
    torch.int64: "int64",
}
_ANY_ROUNDING = "any"


@functools.cache
def kernel(
    step: RoutingStep,
    num_experts: int | None = None,
    top_k: int | None = None,
    ids: torch.dtype | None = None,
    rounding: str | None = None,
    scores: tuple[Literal["chosen", "added"], ...] | None = None,
) -> Callable[..., None]:
    """The loaded kernel; one look-up a launch."""
    ids_name = None if ids is None else _IDS[ids]
    return kernel_cache.load(RoutingKernel(step, num_experts, top_k, ids_name, rounding, scores))


@functools.cache
def prepare(num_experts: int, top_k: int, ids: torch.dtype, rounding: str | None) -> None:
    """Compiles what one kind of plan and its backward launch, all at once."""
    make_ready(routing_kernels(num_experts, top_k, rounding=rounding, ids=_IDS[ids]))


class PlanTensors(NamedTuple):
    """A RoutingPlan's tensors, and each row's source (see cute/plan_rows.py): (R_max,) int32."""

    token_idx_R: Tensor
    score_R: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    token_rows_R: Tensor
    source_R: Tensor


def empty_plan(like: Tensor, num_tokens: int, num_experts: int, r_max: int) -> PlanTensors:
    """Uninitialised tensors on the device of `like`."""
    empty, i32, device = torch.empty, torch.int32, like.device
    return PlanTensors(
        token_idx_R=empty(r_max, dtype=i32, device=device),
        score_R=empty(r_max, dtype=torch.float32, device=device),
        expert_offsets=empty(num_experts + 1, dtype=i32, device=device),
        token_offsets=empty(num_tokens + 1, dtype=i32, device=device),
        token_rows_R=empty(r_max, dtype=i32, device=device),
        source_R=empty(r_max, dtype=i32, device=device),
    )


def plan_of_topk(ids_TK: Tensor, scores_TK: Tensor, num_experts: int) -> PlanTensors:
    """The plan of a top-k routing in two launches; R = R_max = T * K.

    Args:
        ids_TK: (T, K) int32 or int64, contiguous.
        scores_TK: (T, K) float32, contiguous.
    """
    (T, K), E = ids_TK.shape, num_experts
    prepare(E, K, ids_TK.dtype, None)
    bits, counts = _empty_tables(ids_TK, E)
    if T:
        kernel("membership", E, K, ids_TK.dtype)(ids_TK, None, bits, counts, None, None)
    plan = empty_plan(ids_TK, T, E, T * K)
    _write_rows(ids_TK, scores_TK, None, bits, counts, plan, None)
    return plan


def plan_of_rounding(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor,
    uniform_E: Tensor | None,
    *,
    rounding: str,
    tile: int,
    r_max: int,
) -> PlanTensors:
    """The plan of token rounding in three launches, "balance" in four.

    Args:
        ids_TK: (T, K) int32 or int64, contiguous; T is at least 1.
        scores_TK, scores_TE: (T, K) and (T, E) float32, contiguous.
        uniform_E: (E,) float32 for the stochastic variants, None for the others.
        rounding, tile: see rounding.py.
        r_max: length of the row tensors.
    """
    (T, K), E = ids_TK.shape, scores_TE.shape[1]
    prepare(E, K, ids_TK.dtype, rounding)
    bits, counts = _empty_tables(ids_TK, E)
    addable = torch.empty_like(counts)
    keys = torch.empty(E, bits.shape[0] * TOKEN_BLOCK, dtype=torch.int32, device=ids_TK.device)
    membership = kernel("membership", E, K, ids_TK.dtype, _ANY_ROUNDING)
    membership(ids_TK, scores_TE, bits, counts, addable, keys)
    go_up_E = None
    if rounding == "balance":
        go_up_E = torch.empty(E, dtype=torch.int32, device=ids_TK.device)
        kernel("balance", E)(counts, addable, go_up_E, tile)
    round_tokens = kernel("token_rounding", rounding=rounding)
    round_tokens(keys, bits, counts, addable, uniform_E, go_up_E, tile)
    plan = empty_plan(ids_TK, T, E, r_max)
    _write_rows(ids_TK, scores_TK, scores_TE, bits, counts, plan, _ANY_ROUNDING)
    return plan


def score_gradient(
    dscore_R: Tensor, source_R: Tensor, dchosen_P: Tensor | None, dadded_P: Tensor | None
) -> None:
    """Writes the gradients of the pairs that own a row; at most one may be None: not wanted.

    Args:
        dscore_R: (R_max,) float32, contiguous.
        source_R: (R_max,) int32.
        dchosen_P: (T * K,) float32.
        dadded_P: (T * E,) float32.
    """
    if source_R.shape[0] == 0:
        return
    if dchosen_P is not None and dadded_P is not None:
        run = kernel("score_gradient", scores=("chosen", "added"))
    elif dadded_P is not None:
        run = kernel("score_gradient", scores=("added",))
    else:
        run = kernel("score_gradient", scores=("chosen",))
    run(dscore_R, source_R, dchosen_P, dadded_P)


def _empty_tables(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Uninitialised membership bits (B, E, 8) and counts (B, E rounded up)."""
    blocks = -(-ids_TK.shape[0] // TOKEN_BLOCK)
    bits = torch.empty(blocks, num_experts, BLOCK_WORDS, dtype=torch.int32, device=ids_TK.device)
    counts = torch.empty(
        blocks, count_columns(num_experts), dtype=torch.int32, device=ids_TK.device
    )
    return bits, counts


def _write_rows(
    ids_TK: Tensor,
    scores_TK: Tensor,
    scores_TE: Tensor | None,
    bits: Tensor,
    counts: Tensor,
    plan: PlanTensors,
    rounding: str | None,
) -> None:
    num_experts = plan.expert_offsets.shape[0] - 1
    kernel("plan_rows", num_experts, ids_TK.shape[1], ids_TK.dtype, rounding)(
        ids_TK,
        scores_TK,
        scores_TE,
        bits,
        counts,
        plan.token_idx_R,
        plan.score_R,
        plan.source_R,
        plan.expert_offsets,
        plan.token_offsets,
        plan.token_rows_R,
    )
