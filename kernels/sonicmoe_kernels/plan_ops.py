"""The door between torch and the kernels that build plans: torch.library ops with fake kernels.

`sonicmoe::topk_plan` and `sonicmoe::rounding_plan` return a plan's five tensors and each row's
source; of these only `source_R` is kept for backward: 4 R_max bytes. Gradients reach the scores.

Legend: T tokens, E experts, K experts per token, R routed rows (suffix R: R_max entries).
`Library.define` is used and not `custom_op`: the call costs 4 us instead of 31 us.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sonicmoe_kernels import hopper_routing

__all__ = ["rounding_plan", "topk_plan"]

_PLAN = (
    "(Tensor token_idx, Tensor score, Tensor expert_offsets, Tensor token_offsets, "
    "Tensor token_rows, Tensor source)"
)
_NUM_OUTPUTS = 6

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
    make = torch.empty if every_pair_owns_a_row else torch.zeros
    dchosen = make(chosen, dtype=torch.float32, device=dscore.device)
    dadded = torch.zeros(added, dtype=torch.float32, device=dscore.device)
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
    return hopper_routing.empty_plan(ids, *all_scores.shape, static[-1])


def _plan_scores_backward_fake(
    dscore: Tensor, source: Tensor, chosen: int, added: int, every_pair_owns_a_row: bool
) -> tuple[Tensor, Tensor]:
    return dscore.new_empty(chosen), dscore.new_empty(added)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source = output[-1]
    ctx.save_for_backward(source)
    ctx.mark_non_differentiable(output[0], *output[2:])
    ctx.set_materialize_grads(False)
    ctx.chosen_shape = inputs[1].shape
    ctx.all_shape = None if len(inputs) == 3 else inputs[2].shape


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    dscore = gradients[1]
    nothing = (None,) * len(ctx.needs_input_grad)
    if dscore is None:
        return nothing
    (source,) = ctx.saved_tensors
    needs_chosen = ctx.needs_input_grad[1]
    is_topk = ctx.all_shape is None
    needs_added = not is_topk and ctx.needs_input_grad[2]
    dchosen, dadded = torch.ops.sonicmoe.plan_scores_backward(
        dscore,
        source,
        math.prod(ctx.chosen_shape) if needs_chosen else 0,  # numel() would fix a traced T
        math.prod(ctx.all_shape) if needs_added else 0,
        is_topk,
    )
    dscores = dchosen.view(ctx.chosen_shape) if needs_chosen else None
    if is_topk:
        return None, dscores, None
    return None, dscores, dadded.view(ctx.all_shape) if needs_added else None, *nothing[3:]


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "a plan's scores have no second derivative on the hopper backend: take gradients without "
        "create_graph=True, or build the plan with backend='torch'."
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


for _name, _kernel, _fake in (
    ("topk_plan", _topk_plan, _topk_plan_fake),
    ("rounding_plan", _rounding_plan, _rounding_plan_fake),
    ("plan_scores_backward", _plan_scores_backward, _plan_scores_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sonicmoe::{_name}", _fake, lib=_library)
for _name in ("topk_plan", "rounding_plan"):
    torch.library.register_autograd(
        f"sonicmoe::{_name}", _differentiate, setup_context=_keep_for_backward, lib=_library
    )
torch.library.register_autograd(
    "sonicmoe::plan_scores_backward",
    _refuse_second_derivative,
    setup_context=_keep_nothing,
    lib=_library,
)

topk_plan = torch.ops.sonicmoe.topk_plan.default
rounding_plan = torch.ops.sonicmoe.rounding_plan.default
