"""`moe_experts`: the experts of one MoE layer for a given routing, with autograd.

Legend: T tokens, D model width, F expert width, E experts, R routed rows (bound R_max).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe_kernels import ops
from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.backends import BACKENDS
from sonicmoe_kernels.routing import RoutingPlan

__all__ = ["moe_experts"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check(
    x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor | None, w2_EDF: Tensor, plan: RoutingPlan
) -> None:
    if x_TD.ndim != 2 or w1_EFD.ndim != 3:
        raise ValueError(
            f"x must be (T, D) and w1 (E, F, D), got x {tuple(x_TD.shape)} and "
            f"w1 {tuple(w1_EFD.shape)}; flatten batch and sequence first"
        )
    num_tokens, dim = x_TD.shape
    num_experts, expert_dim, _ = w1_EFD.shape
    up_shape, down_shape = (num_experts, expert_dim, dim), (num_experts, dim, expert_dim)
    dtype, device = x_TD.dtype, x_TD.device
    for name, weight, shape in (
        ("w1", w1_EFD, up_shape),
        ("w3", w3_EFD, up_shape),
        ("w2", w2_EDF, down_shape),
    ):
        if weight is None:
            continue
        if weight.shape != shape:
            raise ValueError(
                f"{name} is {tuple(weight.shape)}, expected {shape} for D={dim}, F={expert_dim}, "
                f"E={num_experts}"
            )
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device} but x is {x_TD.dtype} on "
                f"{x_TD.device}; cast or move one of them"
            )
    if dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"x is {x_TD.dtype}; accepted: {accepted}")
    if plan.num_tokens != num_tokens or plan.num_experts != num_experts:
        raise ValueError(
            f"the plan routes {plan.num_tokens} tokens to {plan.num_experts} experts, but x has "
            f"{num_tokens} tokens and w1 {num_experts} experts; build the plan for this batch"
        )
    if plan.token_idx_R.device != device:
        raise ValueError(
            f"the plan is on {plan.token_idx_R.device} but x is on {x_TD.device}; "
            "build the plan where x is"
        )


def moe_experts(
    x_TD: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
    w2_EDF: Tensor,
    plan: RoutingPlan,
    *,
    activation: str = "swiglu",
    backend: str = "auto",
    inplace_dh: bool = True,
) -> Tensor:
    """O_t = sum over t's rows of score * W2 act(W1 x_t, W3 x_t) (SonicMoE, Algorithms 2 and 3).

    Differentiable once in x, the weights and `plan.score_R`. Kept for backward: x, the
    pre-activation H (R_max, 2, F) and the plan's tensors; nothing else.

    Args:
        x_TD: (T, D) tokens; bf16 or fp16 (fp32 and fp64 on the CPU).
        w1_EFD, w3_EFD: (E, F, D) gate and up weights, dtype of x; w3 is None for an ungated
            activation.
        w2_EDF: (E, D, F) down weights, dtype of x.
        plan: routing of these T tokens to these E experts, see `RoutingPlan`.
        activation: "swiglu", "geglu", "reglu" (gated), "silu" or "relu2".
        backend: "auto" picks by device; "hopper" or "torch" insist.
        inplace_dh: outside a traced graph dH may overwrite H, so that a second backward through
            the same graph raises; False keeps H.

    Returns:
        (T, D) in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices, activation or backend that do not fit together.
    """
    gated = get_activation(activation).gated
    if gated == (w3_EFD is None):
        need = "needs w3 (the up weights)" if gated else "has no gate: pass w3_EFD=None"
        raise ValueError(f"activation {activation!r} {need}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; accepted: {', '.join(BACKENDS)}")
    _check(x_TD, w1_EFD, w3_EFD, w2_EDF, plan)
    needs_h = torch.is_grad_enabled() and (
        x_TD.requires_grad
        or w1_EFD.requires_grad
        or w2_EDF.requires_grad
        or plan.score_R.requires_grad
        or (w3_EFD is not None and w3_EFD.requires_grad)
    )
    out_TD, _ = ops.experts(
        x_TD.contiguous(),
        w1_EFD.contiguous(),
        None if w3_EFD is None else w3_EFD.contiguous(),
        w2_EDF.contiguous(),
        plan.token_idx_R,
        plan.score_R,
        plan.expert_offsets,
        plan.token_offsets,
        plan.token_rows_R,
        plan.rows_per_token,
        activation,
        backend,
        needs_h,
        inplace_dh,
    )
    return out_TD
