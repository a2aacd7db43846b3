"""Compiles a ragged-M kernel: its class and the tensors it is called with.

Legend: T tokens, D model width, F expert width, E experts, R_max bound on routed rows, halves 2
when gated. T and R_max are symbols: no kernel is compiled for them.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.cute.d_hidden import DHidden
from sonicmoe_kernels.cute.d_hidden_relayed import DHiddenRelayed
from sonicmoe_kernels.cute.d_input import DInput
from sonicmoe_kernels.cute.down import Down
from sonicmoe_kernels.cute.grouped_gemm_m import GroupedGemmM
from sonicmoe_kernels.cute.plain_turned import DInputTurned, DownTurned
from sonicmoe_kernels.cute.up import Up
from sonicmoe_kernels.cute.up_turned import UpTurned
from sonicmoe_kernels.tiles import RowGemm, why_illegal

KERNELS = {"up": Up, "down": Down, "d_hidden": DHidden, "d_input": DInput}
TURNED = {"up": UpTurned, "down": DownTurned, "d_input": DInputTurned}
TMA_ALIGN = 16  # bytes


def arguments(gemm: RowGemm) -> tuple:
    """Stand-ins for the tensors of a call, in the order of the kernel's `__call__`."""
    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[gemm.dtype]
    d, f, halves, experts = gemm.d, gemm.f, gemm.halves, gemm.num_experts
    tokens, rows = cute.sym_int(), cute.sym_int()

    def matrix(*shape: Any) -> cute.Tensor:
        strides = [1]
        for extent in reversed(shape[1:]):
            strides.insert(0, strides[0] * extent)
        return make_fake_tensor(dtype, shape, stride=tuple(strides), assumed_align=TMA_ALIGN)

    def vector(element: type, extent: Any) -> cute.Tensor:
        return make_fake_tensor(element, (extent,), stride=(1,), assumed_align=4)

    x, y, a = matrix(tokens, d), matrix(rows, d), matrix(rows, f)
    w1, w2 = matrix(experts, f, d), matrix(experts, d, f)
    w3 = matrix(experts, f, d) if halves == 2 else None
    h, dh = matrix(rows, halves, f), matrix(rows, halves, f)
    index, offsets, score = (
        vector(Int32, rows),
        vector(Int32, experts + 1),
        vector(Float32, rows),
    )
    partial_shape, partial_stride = (gemm.n_tiles, rows), (cute.sym_int64(), 1)
    counter = vector(Int32, 1) if gemm.tile.dynamic else None
    partials = make_fake_tensor(Float32, partial_shape, stride=partial_stride, assumed_align=4)
    return {
        "up": (counter, x, index, offsets, w1, w3, h, a),
        "down": (counter, a, offsets, w2, y),
        "d_hidden": (counter, x, index, offsets, w2, score, h, dh, a, partials),
        "d_input": (counter, dh, offsets, w1, w3, y),
    }[gemm.kernel]


def build(gemm: RowGemm) -> Any:
    """Compiles `gemm`.

    Raises:
        ValueError: the configuration is illegal.
    """
    reason = why_illegal(gemm)
    if reason is not None:
        raise ValueError(f"kernel {gemm.kernel} cannot be compiled: {reason} ({gemm})")
    return compile_instance(instance_of(gemm))


def instance_of(gemm: RowGemm) -> GroupedGemmM:
    """The kernel's object, by name and schedule."""
    if gemm.relayed:
        return DHiddenRelayed(gemm)
    return (TURNED if gemm.turned else KERNELS)[gemm.kernel](gemm)


def compile_instance(kernel: GroupedGemmM) -> Any:
    """Compiles an instance of a kernel's class."""
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    operands = arguments(kernel.gemm)
    return cute.compile(kernel, *operands, Int32(0), stream, options="--enable-tvm-ffi")
