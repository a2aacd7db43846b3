"""Compiles the router's top-k kernels: their classes and the tensors they are called with.

Legend: T tokens, E experts, K experts per token. T is a symbol: no kernel is compiled for it.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from sonicmoe_kernels.cute.topk import TopK
from sonicmoe_kernels.cute.topk_backward import TopKGradient
from sonicmoe_kernels.tiles import TopKBackward, TopKForward, TopKOptions

_DTYPES = {"float32": Float32, "bfloat16": cutlass.BFloat16}


def _rows(spec: TopKOptions, element: type, tokens: Any) -> cute.Tensor:
    """(T, E), of an alignment that lets a lane load its experts at once."""
    align = spec.vector * element.width // 8
    shape = (tokens, spec.num_experts)
    return make_fake_tensor(element, shape, stride=(spec.num_experts, 1), assumed_align=align)


def _chosen(spec: TopKOptions, element: type, tokens: Any) -> cute.Tensor:
    """(T, K)."""
    return make_fake_tensor(element, (tokens, spec.top_k), stride=(spec.top_k, 1))


def _compile(kernel: Any, *arguments: Any) -> Any:
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments, Float32(1.0), stream, options="--enable-tvm-ffi")


def build_forward(spec: TopKForward) -> Any:
    """Compiles `spec`: logits, bias or None, ids, weights, scores or None, route scale.

    Raises:
        ValueError: E or K is out of range.
    """
    kernel, tokens = TopK(spec), cute.sym_int()
    bias = None
    if spec.has_bias:
        align = spec.vector * Float32.width // 8
        bias = make_fake_tensor(Float32, (spec.num_experts,), stride=(1,), assumed_align=align)
    return _compile(
        kernel,
        _rows(spec, _DTYPES[spec.dtype], tokens),
        bias,
        _chosen(spec, Int64, tokens),
        _chosen(spec, Float32, tokens),
        _rows(spec, Float32, tokens) if spec.all_scores else None,
    )


def build_backward(spec: TopKBackward) -> Any:
    """Compiles `spec`: dweights, dscores, ids, weights, logits (or None each), dlogits, scale.

    dscores may have any row stride that keeps a lane's loads aligned, 0 included.

    Raises:
        ValueError: E or K is out of range.
    """
    kernel, tokens = TopKGradient(spec), cute.sym_int()
    d_all = None
    if spec.d_all:
        align = spec.vector * Float32.width // 8
        stride = (cute.sym_int64(divisibility=spec.vector), 1)
        shape = (tokens, spec.num_experts)
        d_all = make_fake_tensor(Float32, shape, stride=stride, assumed_align=align)
    dtype = _DTYPES[spec.dtype]
    return _compile(
        kernel,
        _chosen(spec, Float32, tokens) if spec.d_weights else None,
        d_all,
        _chosen(spec, Int64, tokens) if spec.d_weights else None,
        _chosen(spec, Float32, tokens) if spec.reads_weights else None,
        _rows(spec, dtype, tokens) if spec.reads_logits else None,
        _rows(spec, dtype, tokens),
    )
