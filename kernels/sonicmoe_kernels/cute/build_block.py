"""Compiles the stages of the fused block: their classes and the tensors they are called with.

Legend: B batch, L sequence, T = B * L tokens, D model width, F expert width, E experts, R_max
bound on routed rows. B, L, T and R_max are symbols: nothing is compiled for them.
"""

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.block_stages import BlockStage, halves_of, why_illegal_block
from sonicmoe_kernels.cute import block
from sonicmoe_kernels.cute.token_rounding import STOCHASTIC
from sonicmoe_kernels.tiles import STATISTICS_CTAS

ALIGN = 16  # bytes, of every tensor: what TMA and the widest loads need
CLASSES: dict[str, Callable[..., Any]] = {
    "forward": block.Forward,
    "gradients": block.Gradients,
    "input_gradient": block.Gradients,
    "weight_gradients": block.WeightGradients,
}


def dense(element: type, *shape: Any) -> cute.Tensor:
    """A contiguous tensor."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=ALIGN)


def given(extent: Any) -> cute.Tensor:
    """Numbers of a caller, of which nothing but the element's alignment is known."""
    return make_fake_tensor(Float32, (extent,), stride=(1,), assumed_align=4)


def arguments(spec: BlockStage) -> tuple:
    """Stand-ins for a stage's arguments, in the order of its call, without the stream."""
    layer, half = spec.layer, cutlass.BFloat16
    E, d, f, gated = layer.routing.num_experts, layer.d, layer.f, halves_of(layer) == 2
    batch, length, tokens, experts = (cute.sym_int() for _ in range(4))
    x = dense(half, batch, length, d)
    w1, w2 = dense(half, E, f, d), dense(half, E, d, f)
    w3 = w1 if gated else None
    dw1, dw2 = dense(half, experts, f, d), dense(half, experts, d, f)
    dw3 = dw1 if gated else None
    gate, logits = dense(half, E, d), dense(Float32, tokens, E)
    kept, scratch = dense(Int32, cute.sym_int64()), dense(Int32, cute.sym_int64())
    number = Int32(0)
    match spec.stage:
        case "forward":
            bias = dense(Float32, E) if layer.routing.has_bias else None
            uniform = given(E) if layer.rounding in STOCHASTIC else None
            sums = (given(cute.sym_int()), given(STATISTICS_CTAS), *(given(E) for _ in range(5)))
            numbers = (number, Float32(1.0), *(number for _ in range(4)))
            return x, logits, bias, uniform, w1, w3, w2, kept, scratch, x, *sums, *numbers
        case "gradients" | "input_gradient":
            read = logits if block.topk_gradient(layer).reads_logits else None
            inputs, numbers = (x, x, read, gate, w1, w3, w2), (number, Float32(1.0), number)
            others = (None, None, None) if spec.stage == "input_gradient" else (gate, dw1, dw3)
            return *inputs, kept, scratch, dw2, x, *others, *numbers
        case "weight_gradients":
            return x, kept, dw1, dw3, number, number


def build(spec: BlockStage) -> Any:
    """Compiles `spec`.

    Raises:
        ValueError: E, K, D or F is outside of what the kernels serve.
    """
    reason = why_illegal_block(spec.layer)
    if reason is not None:
        raise ValueError(f"{spec.kernel}: {reason}")
    stage = CLASSES[spec.stage](spec.layer)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(stage, *arguments(spec), stream, options="--enable-tvm-ffi")
