"""Compiles the kernels that build plans: their classes and the tensors they are called with.

Legend: T tokens, E experts, K experts per token, B blocks of 256 tokens, S columns of a table of
counts, R_max bound on routed rows. T, B and R_max are symbols: no kernel is compiled for them.
"""

from collections.abc import Callable
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.cute.balance import Balance
from sonicmoe_kernels.cute.membership import Membership
from sonicmoe_kernels.cute.plan_rows import PlanRows
from sonicmoe_kernels.cute.score_gradient import ScoreGradient
from sonicmoe_kernels.cute.token_rounding import STOCHASTIC, TokenRounding
from sonicmoe_kernels.tiles import (
    BLOCK_WORDS,
    TOKEN_BLOCK,
    RoutingKernel,
    count_columns,
    why_illegal_routing,
)

CLASSES: dict[str, Callable[[RoutingKernel], Any]] = {
    "membership": Membership,
    "balance": Balance,
    "token_rounding": TokenRounding,
    "plan_rows": PlanRows,
    "score_gradient": ScoreGradient,
}


def tensor(element: type, *shape: Any) -> cute.Tensor:
    """A contiguous tensor; torch allocates with more than 16 bytes of alignment."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=16)


def given(element: type, *shape: Any) -> cute.Tensor:
    """A contiguous tensor of a caller, of which nothing but the element's alignment is known."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    align = element.width // 8
    return make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=align)


def arguments(spec: RoutingKernel) -> tuple:
    """Stand-ins for a kernel's arguments, in the order of its call, without the stream."""
    tokens, blocks = cute.sym_int(), cute.sym_int()
    rows = cute.sym_int()
    if spec.kernel == "score_gradient":
        gradient = given(Float32, rows)
        parts = [
            tensor(Float32, cute.sym_int()) if part in (spec.scores or ()) else None
            for part in ("chosen", "added")
        ]
        return gradient, tensor(Int32, rows), *parts
    if spec.kernel == "token_rounding":
        experts, columns = cute.sym_int(), cute.sym_int(divisibility=4)
        bits = make_fake_tensor(
            Int32,
            (blocks, experts, BLOCK_WORDS),
            stride=(cute.sym_int64(divisibility=8), BLOCK_WORDS, 1),
            assumed_align=16,
        )
        return (
            keys(experts),
            bits,
            counts(blocks, columns),
            counts(blocks, columns),
            given(Float32, experts) if spec.rounding in STOCHASTIC else None,
            tensor(Int32, experts) if spec.rounding == "balance" else None,
            Int32(0),
        )
    assert spec.num_experts is not None
    experts, columns = spec.num_experts, count_columns(spec.num_experts)
    if spec.kernel == "balance":
        table = tensor(Int32, blocks, columns)
        return table, table, tensor(Int32, experts), Int32(0)
    ids = given({"int32": Int32, "int64": Int64}[spec.ids], tokens, spec.top_k)
    rounded = spec.rounding is not None
    bits, chosen = tensor(Int32, blocks, experts, BLOCK_WORDS), tensor(Int32, blocks, columns)
    if spec.kernel == "membership":
        return (
            ids,
            given(Float32, tokens, experts) if rounded else None,
            bits,
            chosen,
            chosen if rounded else None,
            keys(experts) if rounded else None,
        )
    return (
        ids,
        given(Float32, tokens, spec.top_k),
        given(Float32, tokens, experts) if rounded else None,
        bits,
        chosen,
        tensor(Int32, rows),
        tensor(Float32, rows),
        tensor(Int32, rows),
        tensor(Int32, experts + 1),
        tensor(Int32, cute.sym_int()),
        tensor(Int32, rows),
    )


def keys(experts: Any) -> cute.Tensor:
    """(E, 256 B), with a row stride of 64 bits."""
    stride = (cute.sym_int64(divisibility=TOKEN_BLOCK), 1)
    return make_fake_tensor(Int32, (experts, cute.sym_int()), stride=stride, assumed_align=16)


def counts(blocks: Any, columns: Any) -> cute.Tensor:
    """(B, S) for any S."""
    stride = (cute.sym_int(divisibility=4), 1)
    return make_fake_tensor(Int32, (blocks, columns), stride=stride, assumed_align=16)


def build(spec: RoutingKernel) -> Any:
    """Compiles `spec`.

    Raises:
        ValueError: E or K is outside of what the kernels serve.
    """
    if spec.num_experts is not None:
        reason = why_illegal_routing(spec.num_experts, spec.top_k or 1)
        if reason is not None:
            raise ValueError(f"{spec.kernel}: {reason}")
    kernel = CLASSES[spec.kernel](spec)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments(spec), stream, options="--enable-tvm-ffi")
