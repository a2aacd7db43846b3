"""The hopper backend's host side: launches the kernels on torch tensors, on the current stream.

Legend: T tokens, D model width, F expert width, E experts, R routed rows (static bound R_max),
halves 2 when the activation is gated.

Every function launches one kernel into tensors its caller allocated (where units are drawn, their
counter is cleared before); nothing here waits for the device or reads from it. Rows in [R, R_max)
of every tensor stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.kernel_lists import experts_specs
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.tiles import (
    CLUSTER,
    Aggregation,
    RowGemm,
    RowKernel,
    WeightGemm,
    WeightKernel,
    pick_rows,
    pick_weights,
)

__all__ = [
    "aggregate",
    "d_hidden",
    "d_input_rows",
    "d_weight2",
    "d_weight13",
    "down",
    "dscore_parts",
    "num_ctas",
    "prepare",
    "up",
]

_DTYPES: dict[torch.dtype, Literal["bfloat16", "float16"]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@functools.cache
def num_ctas(device_index: int) -> int:
    """One CTA a multiprocessor, in whole clusters."""
    count = torch.cuda.get_device_properties(device_index).multi_processor_count
    return count // CLUSTER * CLUSTER


@functools.cache
def prepare(
    d: int,
    f: int,
    num_experts: int,
    dtype: torch.dtype,
    activation: str,
    rows_per_token: int | None,
) -> None:
    """Compiles what a layer of these sizes launches, forward and backward, all at once."""
    make_ready(
        experts_specs(
            d=d,
            f=f,
            num_experts=num_experts,
            rows_per_token=rows_per_token,
            dtype=_DTYPES[dtype],
            activation=activation,
        )
    )


@functools.cache
def row_gemm(
    kernel: RowKernel, d: int, f: int, num_experts: int, dtype: torch.dtype, activation: str
) -> RowGemm:
    """The configuration that serves these sizes."""
    return pick_rows(
        kernel, d=d, f=f, num_experts=num_experts, dtype=_DTYPES[dtype], activation=activation
    )


@functools.cache
def row_kernel(
    kernel: RowKernel, d: int, f: int, num_experts: int, dtype: torch.dtype, activation: str
) -> Callable[..., None]:
    """The loaded kernel that serves these sizes; one look-up a launch."""
    gemm = row_gemm(kernel, d, f, num_experts, dtype, activation)
    loaded = kernel_cache.load(gemm)
    return _with_counter(loaded) if gemm.tile.dynamic else functools.partial(loaded, None)


def _with_counter(loaded: Callable[..., None]) -> Callable[..., None]:
    """The kernel with a zero of its own at every launch, from which it draws units.

    A counter that stays would serve all launches of a stream, but a graph's memory pool, which may
    be in use when it is made, does not expect what stays.
    """

    def launch(*operands: Tensor | int | None) -> None:
        loaded(torch.zeros(1, dtype=torch.int32, device="cuda"), *operands)

    return launch


def up(
    x_TD: Tensor,
    token_idx_R: Tensor,
    expert_offsets: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
    h_RHF: Tensor,
    a_RF: Tensor,
    *,
    activation: str,
) -> None:
    """Kernel 1: writes H = X[idx] [W1; W3]^T and A = act(H)."""
    num_experts, f, d = w1_EFD.shape
    kernel = row_kernel("up", d, f, num_experts, w1_EFD.dtype, activation)
    ctas = num_ctas(x_TD.device.index)
    kernel(x_TD, token_idx_R, expert_offsets, w1_EFD, w3_EFD, h_RHF, a_RF, ctas)


def down(
    a_RF: Tensor, expert_offsets: Tensor, w2_EDF: Tensor, y_RD: Tensor, *, activation: str
) -> None:
    """Kernel 2: writes Y = A W2^T."""
    num_experts, d, f = w2_EDF.shape
    kernel = row_kernel("down", d, f, num_experts, w2_EDF.dtype, activation)
    kernel(a_RF, expert_offsets, w2_EDF, y_RD, num_ctas(a_RF.device.index))


def dscore_parts(w2_EDF: Tensor, activation: str) -> int:
    """Number of partial sums of dS per row that `d_hidden` writes."""
    num_experts, d, f = w2_EDF.shape
    return row_gemm("d_hidden", d, f, num_experts, w2_EDF.dtype, activation).n_tiles


def d_hidden(
    dout_TD: Tensor,
    token_idx_R: Tensor,
    expert_offsets: Tensor,
    w2_EDF: Tensor,
    score_R: Tensor,
    h_RHF: Tensor,
    dh_RHF: Tensor,
    a_scaled_RF: Tensor,
    dscore_NR: Tensor,
    *,
    activation: str,
) -> None:
    """Kernel 4: writes dH (which may be H itself), A' = s A and dS in parts (parts, R_max)."""
    num_experts, d, f = w2_EDF.shape
    kernel = row_kernel("d_hidden", d, f, num_experts, w2_EDF.dtype, activation)
    kernel(
        dout_TD,
        token_idx_R,
        expert_offsets,
        w2_EDF,
        score_R,
        h_RHF,
        dh_RHF,
        a_scaled_RF,
        dscore_NR,
        num_ctas(dout_TD.device.index),
    )


def d_input_rows(
    dh_RHF: Tensor,
    expert_offsets: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor | None,
    dx_RD: Tensor,
    *,
    activation: str,
) -> None:
    """Kernel 6: writes dX~ = dH [W1; W3]."""
    num_experts, f, d = w1_EFD.shape
    kernel = row_kernel("d_input", d, f, num_experts, w1_EFD.dtype, activation)
    kernel(dh_RHF, expert_offsets, w1_EFD, w3_EFD, dx_RD, num_ctas(dh_RHF.device.index))


@functools.cache
def weight_gemm(
    kernel: WeightKernel, d: int, f: int, halves: int, dtype: torch.dtype
) -> WeightGemm:
    """The configuration that serves these sizes."""
    return pick_weights(kernel, d=d, f=f, halves=halves, dtype=_DTYPES[dtype])


@functools.cache
def weight_kernel(
    kernel: WeightKernel, d: int, f: int, halves: int, dtype: torch.dtype
) -> Callable[..., None]:
    """The loaded kernel that serves these sizes; one look-up a launch."""
    return kernel_cache.load(weight_gemm(kernel, d, f, halves, dtype))


def d_weight2(
    dout_TD: Tensor,
    token_idx_R: Tensor,
    expert_offsets: Tensor,
    a_scaled_RF: Tensor,
    dw2_EDF: Tensor,
) -> None:
    """Kernel 5: writes dW2 = dO[idx]^T A' of every expert."""
    _, d, f = dw2_EDF.shape
    kernel = weight_kernel("d_weight2", d, f, 1, dw2_EDF.dtype)
    ctas = num_ctas(dout_TD.device.index)
    kernel(dout_TD, token_idx_R, expert_offsets, a_scaled_RF, dw2_EDF, None, ctas)


def d_weight13(
    x_TD: Tensor,
    token_idx_R: Tensor,
    expert_offsets: Tensor,
    dh_RHF: Tensor,
    dw1_EFD: Tensor,
    dw3_EFD: Tensor | None,
) -> None:
    """Kernel 7: writes dW1 and dW3 = dH^T X[idx] of every expert; dW1 alone without gate."""
    _, f, d = dw1_EFD.shape
    halves = 1 if dw3_EFD is None else 2
    kernel = weight_kernel("d_weight13", d, f, halves, dw1_EFD.dtype)
    ctas = num_ctas(x_TD.device.index)
    kernel(x_TD, token_idx_R, expert_offsets, dh_RHF, dw1_EFD, dw3_EFD, ctas)


@functools.cache
def aggregation(
    d: int, dtype: torch.dtype, rows_per_token: int | None, weighted: bool, residual: bool
) -> Aggregation:
    """The configuration that serves these sizes."""
    return Aggregation(d, _DTYPES[dtype], rows_per_token, weighted, residual)


@functools.cache
def aggregation_kernel(
    d: int, dtype: torch.dtype, rows_per_token: int | None, weighted: bool, residual: bool
) -> Callable[..., None]:
    """The loaded kernel that serves these sizes; one look-up a launch."""
    return kernel_cache.load(aggregation(d, dtype, rows_per_token, weighted, residual))


def aggregate(
    y_RD: Tensor,
    token_rows_R: Tensor,
    token_offsets: Tensor,
    out_TD: Tensor,
    *,
    rows_per_token: int | None,
    score_R: Tensor | None = None,
    add_TD: Tensor | None = None,
) -> None:
    """Kernels 3 and 8: writes the (weighted) sum of every token's rows, plus add_TD."""
    kernel = aggregation_kernel(
        y_RD.shape[1], y_RD.dtype, rows_per_token, score_R is not None, add_TD is not None
    )
    offsets = token_offsets if rows_per_token is None else None
    kernel(y_RD, token_rows_R, offsets, score_R, add_TD, out_TD)
