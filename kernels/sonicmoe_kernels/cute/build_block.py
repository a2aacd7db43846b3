"""Compiles the stages of the fused block: their classes and the tensors they are called with.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, R_max bound on
routed rows, halves 2 when gated. T and R_max are symbols: nothing is compiled for them.
"""

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.activations import get_activation
from sonicmoe_kernels.block_stages import BlockStage
from sonicmoe_kernels.cute import block
from sonicmoe_kernels.cute.token_rounding import STOCHASTIC
from sonicmoe_kernels.tiles import STATISTICS_CTAS, why_illegal_routing, why_illegal_topk

ALIGN = 16  # bytes, of every tensor: what TMA and the widest loads need
CLASSES: dict[str, Callable[..., Any]] = {
    "hidden": block.Hidden,
    "combine": block.Combine,
    "hidden_gradient": block.HiddenGradient,
    "input_gradient": block.InputGradient,
    "weight_gradients": block.WeightGradients,
}


def dense(element: type, *shape: Any) -> cute.Tensor:
    """A contiguous tensor."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=ALIGN)


def given(extent: int) -> cute.Tensor:
    """Numbers of a caller, of which nothing but the element's alignment is known."""
    return make_fake_tensor(Float32, (extent,), stride=(1,), assumed_align=4)


def arguments(spec: BlockStage) -> tuple:
    """Stand-ins for a stage's arguments, in the order of its call, without the stream."""
    layer, half = spec.layer, cutlass.BFloat16
    E, d, f = layer.routing.num_experts, layer.d, layer.f
    halves = get_activation(layer.activation).halves
    tokens, rows, kept, scratch = (cute.sym_int() for _ in range(4))
    x, y, h = dense(half, tokens, d), dense(half, rows, d), dense(half, rows, halves, f)
    w1, w2 = dense(half, E, f, d), dense(half, E, d, f)
    w3 = dense(half, E, f, d) if halves == 2 else None
    logits = dense(Float32, tokens, E)
    words, other_words = dense(Int32, kept), dense(Int32, scratch)
    ctas = Int32(0)
    if spec.stage == "hidden":
        bias = dense(Float32, E) if layer.routing.has_bias else None
        uniform = given(E) if layer.rounding in STOCHASTIC else None
        sums = (given(2), given(STATISTICS_CTAS), *(given(E) for _ in range(5)))
        numbers = (Float32(1.0), Int32(0), Int32(0), Int32(0), ctas)
        buffers = (words, other_words, h, y)
        return x, logits, bias, uniform, w1, w3, w2, *buffers, *sums, *numbers
    if spec.stage == "combine":
        return y, words, x
    experts = cute.sym_int()
    if spec.stage == "hidden_gradient":
        both = dense(half, tokens, 2 * E)
        reads_logits = block.topk_gradient(layer).reads_logits
        return (
            x,
            logits if reads_logits else None,
            w2,
            words,
            other_words,
            h,
            h,
            dense(half, experts, d, f),
            both,
            Float32(1.0),
            ctas,
        )
    if spec.stage == "input_gradient":
        return h, w1, w3, words, y, x, x, ctas
    dw1 = dense(half, experts, f, d)
    return x, words, h, dw1, dw1 if halves == 2 else None, ctas


def build(spec: BlockStage) -> Any:
    """Compiles `spec`.

    Raises:
        ValueError: E, K, D or F is outside of what the kernels serve.
    """
    routing = spec.layer.routing
    reason = why_illegal_topk(routing) or why_illegal_routing(routing.num_experts, routing.top_k)
    if reason is not None:
        raise ValueError(f"{spec.kernel}: {reason}")
    stage = CLASSES[spec.stage](spec.layer)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(stage, *arguments(spec), stream, options="--enable-tvm-ffi")
