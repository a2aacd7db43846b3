"""RoutingPlan: which token goes to which expert with which score, as the expert kernels read it.

Legend: T tokens, E experts, K experts per token, P (token, expert) pairs in any order,
R routed rows. A tensor with suffix R has R_max entries, the static bound; the last R_max - R
belong to no token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from sonicmoe_kernels import plan_ops
from sonicmoe_kernels.backends import Backend, resolve_plan_backend


@dataclass(frozen=True)
class RoutingPlan:
    """Expert-major, ragged routing with a static upper bound on its rows.

    Row r of expert e lies in ``expert_offsets[e] <= r < expert_offsets[e + 1]``. The true number of
    rows R is ``expert_offsets[-1]``: a value on the device that the host never reads, so that every
    buffer has the static length R_max. Rows in [R, R_max) belong to nobody: consumers neither read
    what is there nor let a gradient that arrives there flow on.

    The builders never synchronise with the host, trace under ``torch.compile(fullgraph=True)`` and
    capture in a CUDA graph. They cannot check values for the same reason: an index out of range is
    the caller's error.

    Attributes:
        token_idx_R: (R_max,) int32, the row's token; ascending within one expert.
        score_R: (R_max,) float32 (float64 if built from float64), the row's combine weight; may
            require grad.
        expert_offsets: (E + 1,) int32, where each expert's rows start.
        token_offsets: (T + 1,) int32, where each token's slice of ``token_rows_R`` starts.
        token_rows_R: (R_max,) int32, rows grouped by token, of ascending expert within one token.
        rows_per_token: K if every token owns exactly K rows, else None.
        num_tokens: T.
    """

    token_idx_R: Tensor
    score_R: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    token_rows_R: Tensor
    rows_per_token: int | None
    num_tokens: int

    @property
    def r_max(self) -> int:
        """The static bound on the number of rows."""
        return self.token_idx_R.shape[0]

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.shape[0] - 1

    @staticmethod
    def from_topk(
        ids_TK: Tensor, scores_TK: Tensor, *, num_experts: int, backend: Backend = "auto"
    ) -> "RoutingPlan":
        """Build the plan of a routing in which every token goes to exactly K experts.

        Args:
            ids_TK: (T, K) integer experts, distinct within one token.
            scores_TK: (T, K) float scores; gradients flow back through ``score_R``.
            num_experts: E.
            backend: "hopper" (two kernel launches), "torch" (the same plan from torch's own ops),
                or "auto": hopper where it can serve these tensors.

        Returns:
            A plan with R = R_max = T * K.

        Raises:
            ValueError: shapes that differ, ids that are no integers, scores that are no floats, a
                backend that is unknown or cannot run here.
        """
        if ids_TK.ndim != 2 or ids_TK.shape != scores_TK.shape:
            raise ValueError(
                f"from_topk: ids_TK {tuple(ids_TK.shape)} and scores_TK {tuple(scores_TK.shape)} "
                "must both be (T, K)"
            )
        T, K = ids_TK.shape
        if resolve_plan_backend(backend, ids_TK, num_experts, scores_TK) == "hopper":
            _check_ids_and_scores(ids_TK, scores_TK)
            tensors = plan_ops.topk_plan(ids_TK, scores_TK.float(), num_experts)
            return RoutingPlan(*tensors[:5], rows_per_token=K, num_tokens=T)
        token_T = torch.arange(T, device=ids_TK.device)
        return _plan_of_pairs(
            token_T.unsqueeze(1).expand(T, K).reshape(-1),
            ids_TK.reshape(-1),
            scores_TK.reshape(-1),
            num_tokens=T,
            num_experts=num_experts,
            valid_P=None,
            r_max=None,
            rows_per_token=K,
        )

    @staticmethod
    def from_pairs(
        token_P: Tensor,
        expert_P: Tensor,
        score_P: Tensor,
        *,
        num_tokens: int,
        num_experts: int,
        valid_P: Tensor | None = None,
        r_max: int | None = None,
    ) -> "RoutingPlan":
        """Build the plan of any routing, given as pairs in any order, from torch's own ops.

        Args:
            token_P: (P,) integers in [0, num_tokens).
            expert_P: (P,) integers in [0, num_experts).
            score_P: (P,) float scores; gradients flow back through ``score_R``.
            num_tokens: T.
            num_experts: E.
            valid_P: (P,) bool; a pair marked False is left out, whatever its indices. All valid if
                None.
            r_max: static bound on the number of valid pairs, P if None. The caller answers for it:
                valid pairs beyond the bound are lost.

        Raises:
            ValueError: shapes that differ, indices that are no integers, scores that are no floats,
                a ``valid_P`` that is not bool, an r_max below 0.
        """
        return _plan_of_pairs(
            token_P,
            expert_P,
            score_P,
            num_tokens=num_tokens,
            num_experts=num_experts,
            valid_P=valid_P,
            r_max=r_max,
            rows_per_token=None,
        )

    @staticmethod
    def from_rows(
        token_idx_R: Tensor,
        expert_offsets: Tensor,
        score_P: Tensor,
        source_R: Tensor,
        *,
        num_tokens: int,
        rows_per_token: int | None = None,
    ) -> "RoutingPlan":
        """Complete a plan from rows that already are expert-major, of ascending token per expert.

        Whatever is given for rows [R, R_max), the plan holds token 0 and score 0 there, and a
        gradient that arrives there goes nowhere, be it NaN.

        Args:
            token_idx_R: (R_max,) integers.
            expert_offsets: (E + 1,) integers, the last one R.
            score_P: (P,) float, the scores to take from; P below 2**31.
            source_R: (R_max,) integers, ``score_P[source_R[r]]`` is the score of row r.
            num_tokens: T.
            rows_per_token: K if every token owns exactly K rows, else None.
        """
        expert_offsets = expert_offsets.to(torch.int32)
        row_R = torch.arange(source_R.shape[0], device=source_R.device, dtype=torch.int32)
        in_use_R = row_R < expert_offsets[-1]
        token_idx_R = token_idx_R.to(torch.int32)
        # Sorting by token alone keeps each token's rows in row order, hence of ascending expert.
        sorted_token_R, token_rows_R = torch.where(in_use_R, token_idx_R, num_tokens).sort(
            stable=True
        )
        token_T1 = torch.arange(num_tokens + 1, device=source_R.device, dtype=torch.int32)
        source_R = torch.where(in_use_R, source_R, score_P.shape[0]).to(torch.int32)
        return RoutingPlan(
            token_idx_R=torch.where(in_use_R, token_idx_R, 0),
            score_R=_RowScores.apply(_at_least_float32(score_P), source_R),
            expert_offsets=expert_offsets,
            token_offsets=torch.searchsorted(sorted_token_R, token_T1, out_int32=True),
            token_rows_R=token_rows_R.to(torch.int32),
            rows_per_token=rows_per_token,
            num_tokens=num_tokens,
        )


class _RowScores(torch.autograd.Function):
    """Each row's score out of ``score_P``; source P stands for "no score" and reads 0.

    Keeps the int32 sources and nothing else for backward: plain indexing keeps them in 64 bits, and
    ``gather`` keeps the scores as well.
    """

    @staticmethod
    def forward(ctx: Any, score_P: Tensor, source_R: Tensor) -> Tensor:
        ctx.save_for_backward(source_R)
        ctx.num_pairs = score_P.shape[0]
        return F.pad(score_P, (0, 1)).index_select(0, source_R)

    @staticmethod
    def backward(ctx: Any, dscore_R: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        (source_R,) = ctx.saved_tensors
        # One row per pair, so plain writes do; the rows that nobody owns meet in slot P.
        dscore_P1 = dscore_R.new_zeros(ctx.num_pairs + 1).scatter(0, source_R.long(), dscore_R)
        return dscore_P1[: ctx.num_pairs], None


def _plan_of_pairs(
    token_P: Tensor,
    expert_P: Tensor,
    score_P: Tensor,
    *,
    num_tokens: int,
    num_experts: int,
    valid_P: Tensor | None,
    r_max: int | None,
    rows_per_token: int | None,
) -> RoutingPlan:
    _check_pairs(token_P, expert_P, score_P, valid_P, r_max)
    # One key orders the rows: by expert, then by token; what is left out comes last.
    left_out = num_experts * num_tokens
    key_P = expert_P.long() * num_tokens + token_P
    if valid_P is not None:
        key_P = torch.where(valid_P, key_P, left_out)
    if r_max is not None:
        missing = max(0, r_max - token_P.shape[0])
        key_P = F.pad(key_P, (0, missing), value=left_out)
        token_P = F.pad(token_P, (0, missing))
    sorted_key_P, order_P = key_P.sort(stable=True)
    expert_E1 = torch.arange(num_experts + 1, device=key_P.device)
    order_R = order_P[:r_max]
    return RoutingPlan.from_rows(
        token_P.gather(0, order_R),
        torch.searchsorted(sorted_key_P, expert_E1 * num_tokens),
        score_P,
        order_R,
        num_tokens=num_tokens,
        rows_per_token=rows_per_token,
    )


def _check_pairs(
    token_P: Tensor,
    expert_P: Tensor,
    score_P: Tensor,
    valid_P: Tensor | None,
    r_max: int | None,
) -> None:
    given = {"token_P": token_P, "expert_P": expert_P, "score_P": score_P}
    if valid_P is not None:
        given["valid_P"] = valid_P
    if token_P.ndim != 1 or any(t.shape != token_P.shape for t in given.values()):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ValueError(f"routing pairs must all be (P,); given {shapes}")
    for name in ("token_P", "expert_P"):
        _check_ids_and_scores(given[name], score_P, name=name)
    if valid_P is not None and valid_P.dtype != torch.bool:
        raise ValueError(f"valid_P is {valid_P.dtype}; it must be bool")
    if r_max is not None and r_max < 0:
        raise ValueError(f"r_max is {r_max}; it must be at least 0")


def _check_ids_and_scores(ids: Tensor, scores: Tensor, *, name: str = "ids_TK") -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {ids.dtype}; it must be int32 or int64")
    if not scores.dtype.is_floating_point:
        raise ValueError(f"scores are {scores.dtype}; they must be a floating-point dtype")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


_TENSORS = ("token_idx_R", "score_R", "expert_offsets", "token_offsets", "token_rows_R")


def _flatten(plan: RoutingPlan) -> tuple[list[Tensor], tuple[int | None, int]]:
    return [getattr(plan, name) for name in _TENSORS], (plan.rows_per_token, plan.num_tokens)


def _unflatten(tensors: Iterable[Any], static: tuple[int | None, int]) -> RoutingPlan:
    rows_per_token, num_tokens = static
    return RoutingPlan(
        **dict(zip(_TENSORS, tensors, strict=True)),
        rows_per_token=rows_per_token,
        num_tokens=num_tokens,
    )


# A plan crosses torch.compile, activation checkpointing and tree_map as its five tensors.
pytree.register_pytree_node(
    RoutingPlan, _flatten, _unflatten, serialized_type_name="sonicmoe_kernels.RoutingPlan"
)
