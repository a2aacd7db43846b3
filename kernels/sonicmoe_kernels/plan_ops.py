"""The door between torch and the kernels that build plans: torch.library ops with fake kernels.

`sonicmoe::topk_plan` and `sonicmoe::rounding_plan` return a plan's five tensors and each row's
source; of these only `source_R` is kept for backward: 4 R_max bytes. Gradients reach the scores.

Legend: T tokens, E experts, K experts per token, R routed rows (suffix R: R_max entries).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sonicmoe_kernels import hopper_routing
from sonicmoe_kernels.thin_autograd import ThinOp

__all__ = ["rounding_plan", "topk_plan"]

_PLAN = (
    "(Tensor token_idx, Tensor score, Tensor expert_offsets, Tensor token_offsets, "
    "Tensor token_rows, Tensor source)"
)

_library = torch.library.Library("sonicmoe", "FRAGMENT")
_library.define(f"topk_plan(Tensor ids, Tensor scores, int num_experts) -> {_PLAN}")
_library.define(
    "rounding_plan(Tensor ids, Tensor scores, Tensor all_scores, Tensor? uniform, str rounding, "
    f"int tile, SymInt r_max) -> {_PLAN}"
)
_library.define(
    "plan_scores_backward(Tensor dscore, Tensor source, SymInt chosen, SymInt added, "
    "bool every_pair_owns_a_row) -> (Tensor, Tensor)"
)


def _topk_plan(ids: Tensor, scores: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    return hopper_routing.plan_of_topk(ids.contiguous(), scores.contiguous(), num_experts)


def _rounding_plan(
    ids: Tensor,
    scores: Tensor,
    all_scores: Tensor,
    uniform: Tensor | None,
    rounding: str,
    tile: int,
    r_max: int,
) -> tuple[Tensor, ...]:
    return hopper_routing.plan_of_rounding(
        ids.contiguous(),
        scores.contiguous(),
        all_scores.contiguous(),
        None if uniform is None else uniform.contiguous(),
        rounding=rounding,
        tile=tile,
        r_max=r_max,
    )


def _plan_scores_backward(
    dscore: Tensor, source: Tensor, chosen: int, added: int, every_pair_owns_a_row: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `chosen` and of `added` scores, flat; an empty one where the number is 0."""

    def make(length: int, *, filled: bool) -> Tensor:
        # zeros of nothing take the host longer than nothing
        fill = torch.empty if filled or not length else torch.zeros
        return fill(length, dtype=torch.float32, device=dscore.device)

    dchosen, dadded = make(chosen, filled=every_pair_owns_a_row), make(added, filled=False)
    hopper_routing.score_gradient(
        dscore.contiguous(), source, dchosen if chosen else None, dadded if added else None
    )
    return dchosen, dadded


def _topk_plan_fake(ids: Tensor, scores: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    T, K = ids.shape
    return hopper_routing.empty_plan(ids, T, num_experts, T * K)


def _rounding_plan_fake(
    ids: Tensor, scores: Tensor, all_scores: Tensor, uniform: Tensor | None, *static: Any
) -> tuple[Tensor, ...]:
    T, E = all_scores.shape
    return hopper_routing.empty_plan(ids, T, E, static[-1])


def _plan_scores_backward_fake(
    dscore: Tensor, source: Tensor, chosen: int, added: int, every_pair_owns_a_row: bool
) -> tuple[Tensor, Tensor]:
    return dscore.new_empty(chosen), dscore.new_empty(added)


def _keep_source(ctx: Any, plan: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    token_idx, _, *others = plan
    ctx.mark_non_differentiable(token_idx, *others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(plan[-1])
    return plan


class _TopKPlan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys: Any, ids: Tensor, scores: Tensor, num_experts: int
    ) -> tuple[Tensor, ...]:
        ctx.shape = scores.shape
        return _keep_source(ctx, topk_plan.below_autograd(keys, ids, scores, num_experts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dscore, (source,) = gradients[1], ctx.saved_tensors
        if dscore is None:
            return None, None, None, None
        dscores, _ = plan_scores_backward(dscore, source, math.prod(ctx.shape), 0, True)
        return None, None, dscores.view(ctx.shape), None


class _RoundingPlan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys: Any, ids: Tensor, scores: Tensor, all_scores: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        ctx.chosen_shape, ctx.all_shape = scores.shape, all_scores.shape
        plan = rounding_plan.below_autograd(keys, ids, scores, all_scores, *rest)
        return _keep_source(ctx, plan)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dscore, (source,) = gradients[1], ctx.saved_tensors
        needs_chosen, needs_added = ctx.needs_input_grad[2:4]
        dchosen = dadded = None
        if dscore is not None:
            dchosen, dadded = plan_scores_backward(
                dscore,
                source,
                math.prod(ctx.chosen_shape) if needs_chosen else 0,
                math.prod(ctx.all_shape) if needs_added else 0,
                False,
            )
            dchosen = dchosen.view(ctx.chosen_shape) if needs_chosen else None
            dadded = dadded.view(ctx.all_shape) if needs_added else None
        return None, None, dchosen, dadded, None, None, None, None


topk_plan = ThinOp(_library, "sonicmoe::topk_plan", _topk_plan, _topk_plan_fake, _TopKPlan)
rounding_plan = ThinOp(
    _library, "sonicmoe::rounding_plan", _rounding_plan, _rounding_plan_fake, _RoundingPlan
)
plan_scores_backward = ThinOp(
    _library,
    "sonicmoe::plan_scores_backward",
    _plan_scores_backward,
    _plan_scores_backward_fake,
    refusal="a plan's scores have no second derivative on the hopper backend: take gradients "
    "without create_graph=True, or build the plan with backend='torch'.",
)
