"""The only door between torch and the experts' kernels: two torch.library ops with fake kernels.

Legend: T tokens, D model width, F expert width, E experts, R routed rows (bound R_max).

`sonicmoe::experts` returns the output O (T, D) and the pre-activation H (R_max, halves, F).
`sonicmoe::experts_backward` takes what autograd kept: x, H, the weights and the plan.
`sonicmoe::experts_backward_` is the same but may overwrite H with dH: its schema declares it, so a
second backward through the same graph raises torch's own version-counter error.

Bytes kept for backward, beside parameters: x (T D) and H (R_max halves F) in their dtype, and the
plan: 4 (3 R_max + (E + 1) + (T + 1)).
`Library.define` is used and not `custom_op`: the call costs 4 us instead of 31 us. See also
`thin_autograd`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sonicmoe_kernels import hopper_experts, reference
from sonicmoe_kernels.backends import resolve_backend
from sonicmoe_kernels.thin_autograd import ThinOp

__all__ = ["SAVE_OPS", "experts"]

_PLAN = (
    "Tensor token_idx, Tensor score, Tensor expert_offsets, Tensor token_offsets, "
    "Tensor token_rows, int? rows_per_token"
)
_STATIC = "str activation, str backend"
_WEIGHTS = "Tensor w1, Tensor? w3, Tensor w2"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_NEEDS = "bool needs_dx, bool needs_dw13, bool needs_dw2"

_BACKENDS = {"torch": reference, "hopper": hopper_experts}

_library = torch.library.Library("sonicmoe", "DEF")
_library.define(
    f"experts(Tensor x, {_WEIGHTS}, {_PLAN}, {_STATIC}, bool needs_h, bool inplace_dh)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"experts_backward(Tensor dout, Tensor x, {_WEIGHTS}, Tensor h, {_PLAN}, {_STATIC}, {_NEEDS})"
    f" -> {_GRADIENTS}"
)
_library.define(
    f"experts_backward_(Tensor dout, Tensor x, {_WEIGHTS}, Tensor(a!) h, {_PLAN}, {_STATIC}, "
    f"{_NEEDS}) -> {_GRADIENTS}"
)


def _resolve(backend: str, x: Tensor, w1: Tensor) -> str:
    return resolve_backend(backend, x.device, x.dtype, x.shape[1], w1.shape[1])


def _experts(
    x: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    token_idx: Tensor,
    score: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    rows_per_token: int | None,
    activation: str,
    backend: str,
    needs_h: bool,
    inplace_dh: bool,
) -> tuple[Tensor, Tensor]:
    del inplace_dh  # for the backward
    plan = reference.PlanTensors(token_idx, score, expert_offsets, token_offsets, token_rows)
    chosen = _BACKENDS[_resolve(backend, x, w1)]
    out, h = chosen.forward(
        x, w1, w3, w2, plan, activation=activation, rows_per_token=rows_per_token
    )
    return out, h if needs_h else h.new_empty(0)


def _experts_fake(
    x: Tensor, w1: Tensor, w3: Tensor | None, w2: Tensor, token_idx: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_h = rest[-2]
    halves = 1 if w3 is None else 2
    shape = (token_idx.shape[0], halves, w1.shape[1]) if needs_h else (0,)
    return torch.empty_like(x), x.new_empty(shape)


def _experts_backward(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    h: Tensor,
    token_idx: Tensor,
    score: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    rows_per_token: int | None,
    activation: str,
    backend: str,
    needs_dx: bool,
    needs_dw13: bool,
    needs_dw2: bool,
    *,
    overwrite_h: bool = False,
) -> tuple[Tensor, ...]:
    plan = reference.PlanTensors(token_idx, score, expert_offsets, token_offsets, token_rows)
    resolved = _resolve(backend, x, w1)
    in_place = {"overwrite_h": True} if overwrite_h and resolved == "hopper" else {}
    if in_place:
        # torch does so by itself for its own ops and custom_op, not for Library.define
        torch.autograd.graph.increment_version(h)
    gradients = _BACKENDS[resolved].backward(
        dout,
        x,
        w1,
        w3,
        w2,
        h,
        plan,
        activation=activation,
        rows_per_token=rows_per_token,
        needs_dx=needs_dx,
        needs_dw13=needs_dw13,
        needs_dw2=needs_dw2,
        **in_place,
    )
    # An op's outputs are tensors: what nobody asked for is an empty one.
    return tuple([x.new_empty(0) if g is None else g for g in gradients])


def _experts_backward_fake(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    h: Tensor,
    token_idx: Tensor,
    score: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs_dx, needs_dw13, needs_dw2 = rest[-3:]
    empty = (0,)
    return (
        x.new_empty(x.shape if needs_dx else empty),
        w1.new_empty(w1.shape if needs_dw13 else empty),
        w1.new_empty(w3.shape if needs_dw13 and w3 is not None else empty),
        w2.new_empty(w2.shape if needs_dw2 else empty),
        torch.empty_like(score),
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, h = experts.below_autograd(keys, *inputs)
        x, w1, w3, w2, *plan = inputs[:9]
        ctx.rows_per_token, ctx.activation, ctx.backend, _, ctx.inplace_dh = inputs[9:]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)  # or autograd fills zeros for H: 3% of a step on an H100
        ctx.save_for_backward(x, w1, w3, w2, h, *plan)
        return out, h

    @staticmethod
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dout: Tensor | None, _dh: None
    ) -> tuple[Tensor | None, ...]:
        _, needs_dx, needs_dw1, needs_dw3, needs_dw2, _, needs_dscore = ctx.needs_input_grad[:7]
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x, w1, w3, w2, h, *plan = ctx.saved_tensors
        # Traced tensors are subclasses: a compiler may want H again, so it keeps it.
        eager = type(dout) is Tensor and type(h) is Tensor and not torch.is_grad_enabled()
        overwrite = ctx.inplace_dh and eager and _resolve(ctx.backend, x, w1) == "hopper"
        backward = experts_backward_in_place if overwrite else experts_backward
        dx, dw1, dw3, dw2, dscore = backward(
            dout.contiguous(),
            x,
            w1,
            w3,
            w2,
            h,
            *plan,
            ctx.rows_per_token,
            ctx.activation,
            ctx.backend,
            needs_dx,
            needs_dw1 or needs_dw3,
            needs_dw2,
        )
        return (
            None,
            dx if needs_dx else None,
            dw1 if needs_dw1 else None,
            dw3 if needs_dw3 else None,
            dw2 if needs_dw2 else None,
            None,
            dscore if needs_dscore else None,
            *(None,) * 8,
        )


experts = ThinOp(_library, "sonicmoe::experts", _experts, _experts_fake, _Experts)
experts_backward = ThinOp(
    _library,
    "sonicmoe::experts_backward",
    _experts_backward,
    _experts_backward_fake,
    refusal="moe_experts has no second derivative: its backward recomputes activations in a fused "
    "kernel. Take gradients without create_graph=True.",
)
# It runs where no gradient of its results can be asked for.
experts_backward_in_place = ThinOp(
    _library,
    "sonicmoe::experts_backward_",
    functools.partial(_experts_backward, overwrite_h=True),
    _experts_backward_fake,
)

# What selective activation checkpointing keeps: O and H. No listed op outputs A or Y.
SAVE_OPS = (experts.op,)
