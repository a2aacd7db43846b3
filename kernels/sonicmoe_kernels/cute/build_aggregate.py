"""Compiles the aggregation kernel: its class and the tensors it is called with.

Legend: T tokens, D model width, R_max bound on routed rows. T and R_max are symbols: no kernel is
compiled for them.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.cute.aggregate import CHUNK_BYTES, Aggregate
from sonicmoe_kernels.tiles import Aggregation


def arguments(spec: Aggregation) -> tuple:
    """Stand-ins for y, token_rows, token_offsets, score, add and out, in the order of a call.

    token_offsets is None with rows_per_token, score when unweighted, add without residual.
    """
    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[spec.dtype]
    tokens, rows, offsets = cute.sym_int(), cute.sym_int(), cute.sym_int()

    def matrix(extent: Any) -> cute.Tensor:
        shape, stride = (extent, spec.d), (spec.d, 1)
        return make_fake_tensor(dtype, shape, stride=stride, assumed_align=CHUNK_BYTES)

    def vector(element: type, extent: Any) -> cute.Tensor:
        return make_fake_tensor(element, (extent,), stride=(1,), assumed_align=4)

    return (
        matrix(rows),
        vector(Int32, rows),
        vector(Int32, offsets) if spec.rows_per_token is None else None,
        vector(Float32, rows) if spec.weighted else None,
        matrix(tokens) if spec.residual else None,
        matrix(tokens),
    )


def build(spec: Aggregation) -> Any:
    """Compiles `spec`.

    Raises:
        ValueError: D is not a multiple of 8, or rows_per_token is not positive.
    """
    kernel = Aggregate(spec)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments(spec), stream, options="--enable-tvm-ffi")
