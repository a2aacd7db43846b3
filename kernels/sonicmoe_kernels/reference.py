"""The eight SonicMoE steps in plain PyTorch: the oracle, and what runs where our kernels do not.

Legend: T tokens, D model width, F expert width, E experts, R routed rows (its static bound is
R_max), H halves of the pre-activation (2 when gated). Rows in [R, R_max) hold garbage: they are
never read as data, and what is written there has no meaning.

Matrix products run per expert on the CPU (half-precision operands multiplied in fp32, rounded once
where the kernels store, so A comes from the unrounded H as in the fused epilogue) and through
`torch.nn.functional.grouped_mm` on CUDA (which rounds H and dA' as well), where nothing here asks
the host.
Source: SonicMoE (arXiv 2512.14080), Algorithms 2, 3 and 5.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sonicmoe_kernels.activations import get_activation

__all__ = [
    "ExpertGradients",
    "PlanTensors",
    "activate",
    "aggregate",
    "backward",
    "d_hidden",
    "d_input_rows",
    "d_weight2",
    "d_weight13",
    "down",
    "forward",
    "up",
]

_HALF = (torch.bfloat16, torch.float16)


class PlanTensors(NamedTuple):
    """The tensors of a `RoutingPlan`, in the order in which the ops pass them."""

    token_idx_R: Tensor
    score_R: Tensor
    expert_offsets: Tensor
    token_offsets: Tensor
    token_rows_R: Tensor


class ExpertGradients(NamedTuple):
    """Gradients of `moe_experts`; an entry is None when its input needs none."""

    dx_TD: Tensor | None
    dw1_EFD: Tensor | None
    dw3_EFD: Tensor | None
    dw2_EDF: Tensor | None
    dscore_R: Tensor | None


def _valid_rows(plan: PlanTensors) -> Tensor:
    """(R_max,) bool: rows that belong to an expert; computed on the device."""
    rows = torch.arange(plan.token_idx_R.shape[0], device=plan.token_idx_R.device)
    return rows < plan.expert_offsets[-1]


def _gather_rows(x_TD: Tensor, plan: PlanTensors) -> Tensor:
    """X[idx] (R_max, D) with zeros in the garbage rows."""
    valid_R = _valid_rows(plan)
    token_R = torch.where(valid_R, plan.token_idx_R, 0)
    return torch.where(valid_R[:, None], x_TD[token_R], 0)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least fp32, not rounded back (a CPU multiplies bf16 30x slower than fp32)."""
    wide = _accumulate_dtype(a.dtype)
    return a.to(wide) @ b.to(wide)


def _rows_times_weight(a_RK: Tensor, b_EKN: Tensor, plan: PlanTensors) -> Tensor:
    """C[r] = A[r] B[expert of r], (R_max, N): a grouped GEMM with ragged M; fp32 on the CPU."""
    if a_RK.is_cuda:
        return F.grouped_mm(a_RK, b_EKN, offs=plan.expert_offsets[1:])
    wide = _accumulate_dtype(a_RK.dtype)
    c_RN = a_RK.new_zeros((a_RK.shape[0], b_EKN.shape[2]), dtype=wide)
    bounds = plan.expert_offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            c_RN[begin:end] = _matmul(a_RK[begin:end], b_EKN[expert])
    return c_RN


def _rows_outer(a_RM: Tensor, b_RN: Tensor, plan: PlanTensors) -> Tensor:
    """C[e] = A[rows of e]^T B[rows of e], (E, M, N): a grouped GEMM with ragged K."""
    num_experts = plan.expert_offsets.shape[0] - 1
    if a_RM.is_cuda:
        c_EMN = F.grouped_mm(a_RM.t(), b_RN, offs=plan.expert_offsets[1:])
        # Some grouped_mm kernels leave the product of an expert without rows unwritten.
        empty_E = plan.expert_offsets[1:] == plan.expert_offsets[:-1]
        return c_EMN.masked_fill_(empty_E[:, None, None], 0)
    c_EMN = a_RM.new_zeros((num_experts, a_RM.shape[1], b_RN.shape[1]))
    bounds = plan.expert_offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            c_EMN[expert] = _matmul(a_RM[begin:end].t(), b_RN[begin:end]).to(a_RM.dtype)
    return c_EMN


def up(x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor | None, plan: PlanTensors) -> Tensor:
    """Kernel 1 without its epilogue: H (R_max, halves, F) = X[idx] [W1; W3]^T."""
    x_RD = _gather_rows(x_TD, plan)
    weights = (w1_EFD,) if w3_EFD is None else (w1_EFD, w3_EFD)
    halves = [_rows_times_weight(x_RD, weight.transpose(1, 2), plan) for weight in weights]
    return torch.stack(halves, dim=1)


def activate(h_RHF: Tensor, *, activation: str) -> Tensor:
    """Kernel 1's epilogue: A (R_max, F) from H, in at least fp32."""
    return get_activation(activation).forward(h_RHF.to(_accumulate_dtype(h_RHF.dtype)))


def down(a_RF: Tensor, w2_EDF: Tensor, plan: PlanTensors) -> Tensor:
    """Kernel 2: Y (R_max, D) = A W2^T."""
    return _rows_times_weight(a_RF, w2_EDF.transpose(1, 2), plan).to(a_RF.dtype)


def aggregate(
    y_RD: Tensor, plan: PlanTensors, *, weighted: bool, rows_per_token: int | None
) -> Tensor:
    """Kernels 3 and 8: (T, D) sum over each token's rows of score * Y (or of Y), in fp32.

    Each token gathers its rows in a fixed order, so the result is deterministic.
    """
    num_tokens, wide = plan.token_offsets.shape[0] - 1, _accumulate_dtype(y_RD.dtype)
    if rows_per_token is not None:
        rows_TK = plan.token_rows_R.view(num_tokens, rows_per_token).long()
        y_TKD = y_RD[rows_TK].to(wide)
        if weighted:
            y_TKD = y_TKD * plan.score_R[rows_TK].to(wide).unsqueeze(-1)
        return y_TKD.sum(dim=1).to(y_RD.dtype)
    valid_R = _valid_rows(plan)
    rows_R = torch.where(valid_R, plan.token_rows_R, 0).long()
    y = torch.where(valid_R[:, None], y_RD[rows_R].to(wide), 0)
    if weighted:
        y = y * torch.where(valid_R, plan.score_R[rows_R], 0).to(wide).unsqueeze(-1)
    # Garbage rows lie beyond the last token's segment; they are added to a segment that is cut off.
    lengths_T = plan.token_offsets.diff()
    rest = (y.shape[0] - plan.token_offsets[-1:]).to(lengths_T.dtype)
    sums = torch.segment_reduce(y, "sum", lengths=torch.cat((lengths_T, rest)), axis=0, unsafe=True)
    return sums[:num_tokens].to(y_RD.dtype)


def d_hidden(
    dout_TD: Tensor, w2_EDF: Tensor, h_RHF: Tensor, plan: PlanTensors, *, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel 4: dH (R_max, halves, F), A' = s A (R_max, F) and dS (R_max,) fp32.

    dA' = dO[idx] W2; dH = dact(s dA', H); dS = <dA', A>, which is <dO, Y> without Y.
    """
    act, wide = get_activation(activation), _accumulate_dtype(h_RHF.dtype)
    valid_R = _valid_rows(plan)
    # Garbage rows are blanked once here; everything below then stays finite there.
    score_R1 = torch.where(valid_R, plan.score_R, 0).to(wide)[:, None]
    h = torch.where(valid_R[:, None, None], h_RHF, 0).to(wide)
    da_prime = _rows_times_weight(_gather_rows(dout_TD, plan), w2_EDF, plan)
    da_prime = torch.where(valid_R[:, None], da_prime, 0).to(wide)
    a = act.forward(h)
    dh = act.backward(score_R1 * da_prime, h)
    dscore_R = (da_prime * a).sum(dim=1).to(plan.score_R.dtype)
    return dh.to(h_RHF.dtype), (score_R1 * a).to(h_RHF.dtype), dscore_R


def d_weight2(dout_TD: Tensor, a_scaled_RF: Tensor, plan: PlanTensors) -> Tensor:
    """Kernel 5: dW2 (E, D, F) = dO[idx]^T A' per expert."""
    return _rows_outer(_gather_rows(dout_TD, plan), a_scaled_RF, plan)


def d_input_rows(
    dh_RHF: Tensor, w1_EFD: Tensor, w3_EFD: Tensor | None, plan: PlanTensors
) -> Tensor:
    """Kernel 6: dX~ (R_max, D) = dH [W1; W3]."""
    if w3_EFD is None:
        return _rows_times_weight(dh_RHF[:, 0].contiguous(), w1_EFD, plan).to(dh_RHF.dtype)
    w13 = torch.cat((w1_EFD, w3_EFD), dim=1)
    return _rows_times_weight(dh_RHF.flatten(1), w13, plan).to(dh_RHF.dtype)


def d_weight13(dh_RHF: Tensor, x_TD: Tensor, plan: PlanTensors) -> list[Tensor]:
    """Kernel 7: dW1, and dW3 when gated, each (E, F, D) = dH^T X[idx] per expert."""
    x_RD = _gather_rows(x_TD, plan)
    return [_rows_outer(half.contiguous(), x_RD, plan) for half in dh_RHF.unbind(1)]


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
    """O (T, D) and the pre-activation H (R_max, halves, F)."""
    h_RHF = up(x_TD, w1_EFD, w3_EFD, plan)
    a_RF = activate(h_RHF, activation=activation).to(x_TD.dtype)
    h_RHF = h_RHF.to(x_TD.dtype)
    y_RD = down(a_RF, w2_EDF, plan)
    return aggregate(y_RD, plan, weighted=True, rows_per_token=rows_per_token), h_RHF


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
) -> ExpertGradients:
    """Gradients from X, H and the plan alone: A is recomputed, Y is never needed."""
    dh_RHF, a_scaled_RF, dscore_R = d_hidden(dout_TD, w2_EDF, h_RHF, plan, activation=activation)
    dw2 = d_weight2(dout_TD, a_scaled_RF, plan) if needs_dw2 else None
    dw13 = d_weight13(dh_RHF, x_TD, plan) if needs_dw13 else []
    dx = None
    if needs_dx:
        dx_RD = d_input_rows(dh_RHF, w1_EFD, w3_EFD, plan)
        dx = aggregate(dx_RD, plan, weighted=False, rows_per_token=rows_per_token)
    dw1 = dw13[0] if dw13 else None
    dw3 = dw13[1] if len(dw13) > 1 else None
    return ExpertGradients(dx, dw1, dw3, dw2, dscore_R)
