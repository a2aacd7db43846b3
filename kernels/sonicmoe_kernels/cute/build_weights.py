"""Compiles a ragged-K kernel: its class and the tensors it is called with.

Legend: T tokens, D model width, F expert width, E experts, R_max bound on routed rows, halves 2
when gated. T, E and R_max are symbols: no kernel is compiled for them.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.cute.grouped_gemm_k import GroupedGemmK
from sonicmoe_kernels.tiles import WeightGemm, why_illegal_weights

TMA_ALIGN = 16  # bytes


def arguments(gemm: WeightGemm) -> tuple:
    """Stand-ins for the tensors of a call, in order.

    d_weight2:  dout (T, D), token_idx (R_max,), expert_offsets (E + 1,), a (R_max, F),
                dw2 (E, D, F), None
    d_weight13: x (T, D), token_idx (R_max,), expert_offsets (E + 1,), dh (R_max, halves, F),
                dw1 (E, F, D), dw3 (E, F, D) or None without gate
    """
    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[gemm.dtype]
    d, f, halves = gemm.d, gemm.f, gemm.halves
    tokens, rows, experts, offsets = (cute.sym_int() for _ in range(4))

    def dense(*shape: Any) -> cute.Tensor:
        strides = [1]
        for extent in reversed(shape[1:]):
            strides.insert(0, strides[0] * extent)
        return make_fake_tensor(dtype, shape, stride=tuple(strides), assumed_align=TMA_ALIGN)

    def vector(extent: Any) -> cute.Tensor:
        return make_fake_tensor(Int32, (extent,), stride=(1,), assumed_align=4)

    gathered, index, expert_offsets = dense(tokens, d), vector(rows), vector(offsets)
    if gemm.kernel == "d_weight2":
        return gathered, index, expert_offsets, dense(rows, f), dense(experts, d, f), None
    dw3 = dense(experts, f, d) if halves == 2 else None
    return gathered, index, expert_offsets, dense(rows, halves, f), dense(experts, f, d), dw3


def build(gemm: WeightGemm) -> Any:
    """Compiles `gemm`.

    Raises:
        ValueError: the configuration is illegal.
    """
    reason = why_illegal_weights(gemm)
    if reason is not None:
        raise ValueError(f"kernel {gemm.kernel} cannot be compiled: {reason} ({gemm})")
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(
        GroupedGemmK(gemm), *arguments(gemm), Int32(0), stream, options="--enable-tvm-ffi"
    )
