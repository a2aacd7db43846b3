"""Forward and backward of one layer's experts on Hopper: eight kernels and what they write into.

Legend: T tokens, D model width, F expert width, E experts, R routed rows (static bound R_max),
halves 2 when the activation is gated.

Same functions, arguments and results as `sonicmoe_kernels.reference`. Nothing here waits for the
device; rows in [R, R_max) of what is allocated stay as the allocator left them.
Source: SonicMoE (arXiv 2512.14080), Algorithms 2, 3 and 5.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from sonicmoe_kernels import hopper
from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.reference import ExpertGradients, PlanTensors

__all__ = ["backward", "forward"]

TMA_ALIGN = 16  # bytes; tensors that start elsewhere are copied


_HERE = contextlib.nullcontext()


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, which costs 2 us where it already is."""
    index = tensor.device.index
    if index is None or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`like.new_empty(shape)`, which takes 3 us longer."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % TMA_ALIGN == 0 else tensor.clone()


def forward(
    x_TD: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
    w2_EDF: Tensor,
    plan: PlanTensors,
    *,
    activation: str,
    rows_per_token: int | None,
) -> tuple[Tensor, Tensor]:
    """O (T, D) and the pre-activation H (R_max, halves, F); A and Y are gone when it returns."""
    r_max, (num_experts, f, d) = plan.token_idx_R.shape[0], w1_EFD.shape
    h_RHF = _empty((r_max, get_activation(activation).halves, f), x_TD)
    if r_max == 0:
        return torch.zeros_like(x_TD), h_RHF
    hopper.prepare(d, f, num_experts, x_TD.dtype, activation, rows_per_token)
    x_TD, w1_EFD, w2_EDF = _aligned(x_TD), _aligned(w1_EFD), _aligned(w2_EDF)
    w3_EFD = None if w3_EFD is None else _aligned(w3_EFD)
    act = {"activation": activation}
    with _on_device_of(x_TD):
        a_RF = _empty((r_max, f), x_TD)
        offsets = plan.expert_offsets
        hopper.up(x_TD, plan.token_idx_R, offsets, w1_EFD, w3_EFD, h_RHF, a_RF, **act)
        y_RD = _empty((r_max, d), x_TD)
        hopper.down(a_RF, offsets, w2_EDF, y_RD, **act)
        del a_RF
        out_TD = torch.empty_like(x_TD)
        hopper.aggregate(
            y_RD,
            plan.token_rows_R,
            plan.token_offsets,
            out_TD,
            rows_per_token=rows_per_token,
            score_R=plan.score_R,
        )
    return out_TD, h_RHF


def backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
    w2_EDF: Tensor,
    h_RHF: Tensor,
    plan: PlanTensors,
    *,
    activation: str,
    rows_per_token: int | None,
    needs_dx: bool = True,
    needs_dw13: bool = True,
    needs_dw2: bool = True,
    overwrite_h: bool = False,
) -> ExpertGradients:
    """Gradients from X, H and the plan; with `overwrite_h` H holds dH when it returns."""
    r_max = plan.token_idx_R.shape[0]
    if r_max == 0:
        needed = (needs_dx, needs_dw13, needs_dw13, needs_dw2)
        inputs = (x_TD, w1_EFD, w3_EFD, w2_EDF)
        dx_TD, dw1, dw3, dw2 = (
            torch.zeros_like(t) if needs and t is not None else None
            for t, needs in zip(inputs, needed, strict=True)
        )
        return ExpertGradients(dx_TD, dw1, dw3, dw2, torch.zeros_like(plan.score_R))
    dx_TD = dw1 = dw3 = dw2 = None
    x_TD, dout_TD, w2_EDF, h_RHF = (_aligned(t) for t in (x_TD, dout_TD, w2_EDF, h_RHF))
    index, offsets, act = plan.token_idx_R, plan.expert_offsets, {"activation": activation}
    with _on_device_of(x_TD):
        dh_RHF = h_RHF if overwrite_h else torch.empty_like(h_RHF)
        a_scaled_RF = _empty((r_max, h_RHF.shape[2]), h_RHF)
        parts = hopper.dscore_parts(w2_EDF, activation)
        dscore_NR = torch.empty((parts, r_max), dtype=torch.float32, device=x_TD.device)
        outputs = (dh_RHF, a_scaled_RF, dscore_NR)
        hopper.d_hidden(
            dout_TD, index, offsets, w2_EDF, plan.score_R, h_RHF, *outputs, activation=activation
        )
        # In this order, each buffer made late and dropped early, least is live at once.
        if needs_dw2:
            dw2 = torch.empty_like(w2_EDF)
            hopper.d_weight2(dout_TD, index, offsets, a_scaled_RF, dw2)
        del a_scaled_RF, outputs
        if needs_dx:
            dx_RD = _empty((r_max, x_TD.shape[1]), x_TD)
            w1_EFD = _aligned(w1_EFD)
            w3_EFD = None if w3_EFD is None else _aligned(w3_EFD)
            hopper.d_input_rows(dh_RHF, offsets, w1_EFD, w3_EFD, dx_RD, **act)
            dx_TD = torch.empty_like(x_TD)
            hopper.aggregate(
                dx_RD, plan.token_rows_R, plan.token_offsets, dx_TD, rows_per_token=rows_per_token
            )
            del dx_RD
        if needs_dw13:
            dw1 = torch.empty_like(w1_EFD)
            dw3 = None if w3_EFD is None else torch.empty_like(w3_EFD)
            hopper.d_weight13(x_TD, index, offsets, dh_RHF, dw1, dw3)
        dscore_R = dscore_NR[0] if parts == 1 else dscore_NR.sum(0)
    return ExpertGradients(dx_TD, dw1, dw3, dw2, dscore_R)
