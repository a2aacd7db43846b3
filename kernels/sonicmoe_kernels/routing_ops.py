"""The only door between torch and the router's top-k kernels: two torch.library ops.

Legend: T tokens, E experts, K experts per token.

`sonicmoe::route_topk` returns ids (T, K) int64, weights (T, K) fp32 and all scores (T, E) fp32, or
(T, 0) where nobody asked for them. `sonicmoe::route_topk_backward` takes what autograd kept.

Bytes kept for backward: the ids, 8 T K; where the weights are a softmax over the chosen
(`TopKOptions.over_chosen`) the weights, 4 T K, and the logits only if all scores were asked for;
else the logits. The logits are the gate's output in their own dtype, which z-loss keeps anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.kernel_lists import topk_kernels
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.thin_autograd import ThinOp
from sonicmoe_kernels.tiles import TopKBackward, TopKForward, TopKOptions

__all__ = ["SAVE_OPS", "route_topk"]

LOAD_BYTES = 16  # of one lane at most; what a pointer must be a multiple of

_CHOICE = "int top_k, str score_func, str softmax_order, bool renormalize"
_library = torch.library.Library("sonicmoe", "FRAGMENT")
_library.define(
    f"route_topk(Tensor logits, Tensor? bias, {_CHOICE}, float route_scale, bool all_scores)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "route_topk_backward(Tensor? dweights, Tensor? dscores, Tensor ids, Tensor? weights, "
    f"Tensor? logits, int num_experts, ScalarType dtype, {_CHOICE}, float route_scale, "
    "bool has_bias) -> Tensor"
)

_DTYPES: dict[torch.dtype, Literal["float32", "bfloat16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


@functools.cache
def _options(
    num_experts: int,
    dtype: torch.dtype,
    top_k: int,
    score_func: Any,
    softmax_order: Any,
    renormalize: bool,
    has_bias: bool,
) -> TopKOptions:
    return TopKOptions(
        num_experts, top_k, _DTYPES[dtype], score_func, softmax_order, renormalize, has_bias
    )


@functools.cache
def _forward_kernel(options: TopKOptions, all_scores: bool) -> Callable[..., None]:
    """The loaded kernel; one look-up a launch. The first compiles the backward's too."""
    make_ready(topk_kernels(options))
    return kernel_cache.load(TopKForward(**dataclasses.asdict(options), all_scores=all_scores))


@functools.cache
def _backward_kernel(
    options: TopKOptions, d_weights: bool, d_all: bool
) -> tuple[TopKBackward, Callable[..., None]]:
    spec = TopKBackward(**dataclasses.asdict(options), d_weights=d_weights, d_all=d_all)
    return spec, kernel_cache.load(spec)


def _loadable(rows: Tensor) -> Tensor:
    """Contiguous numbers that a lane can load several of at once."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % LOAD_BYTES == 0 else rows.clone()


def _loadable_rows(rows: Tensor) -> Tensor:
    """The same for rows of any distance, 0 included: a mean over tokens has one row of gradient."""
    in_place = rows.stride(1) == 1 and (rows.stride(0) * rows.itemsize) % LOAD_BYTES == 0
    return rows if in_place and rows.data_ptr() % LOAD_BYTES == 0 else _loadable(rows)


def _outputs(logits: Tensor, top_k: int, all_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    (num_tokens, num_experts), device = logits.shape, logits.device
    columns = num_experts if all_scores else 0
    return (
        torch.empty((num_tokens, top_k), dtype=torch.int64, device=device),
        torch.empty((num_tokens, top_k), dtype=torch.float32, device=device),
        torch.empty((num_tokens, columns), dtype=torch.float32, device=device),
    )


def _route_topk(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score_func: str,
    softmax_order: str,
    renormalize: bool,
    route_scale: float,
    all_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights, scores = _outputs(logits, top_k, all_scores)
    if ids.shape[0]:
        choice = (top_k, score_func, softmax_order, renormalize, bias is not None)
        kernel = _forward_kernel(_options(logits.shape[1], logits.dtype, *choice), all_scores)
        bias = None if bias is None else _loadable(bias)
        kernel(_loadable(logits), bias, ids, weights, scores if all_scores else None, route_scale)
    return ids, weights, scores


def _route_topk_fake(
    logits: Tensor, bias: Tensor | None, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, top_k, rest[-1])


def _route_topk_backward(
    dweights: Tensor | None,
    dscores: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
    top_k: int,
    score_func: str,
    softmax_order: str,
    renormalize: bool,
    route_scale: float,
    has_bias: bool,
) -> Tensor:
    num_tokens = ids.shape[0]
    dlogits = torch.empty((num_tokens, num_experts), dtype=dtype, device=ids.device)
    if num_tokens:
        choice = (top_k, score_func, softmax_order, renormalize, has_bias)
        options = _options(num_experts, dtype, *choice)
        spec, kernel = _backward_kernel(options, dweights is not None, dscores is not None)
        kernel(
            None if dweights is None else dweights.contiguous(),
            None if dscores is None else _loadable_rows(dscores),
            ids if spec.d_weights else None,
            weights if spec.reads_weights else None,
            _loadable(logits) if logits is not None and spec.reads_logits else None,
            dlogits,
            route_scale,
        )
    return dlogits


def _route_topk_backward_fake(
    dweights: Tensor | None, dscores: Tensor | None, ids: Tensor, *rest: Any
) -> Tensor:
    num_experts, dtype = rest[2:4]
    return ids.new_empty((ids.shape[0], num_experts), dtype=dtype)


class _RouteTopK(torch.autograd.Function):
    """The choice with its gradient; `register_autograd` would cost 30 us more a call."""

    @staticmethod
    def forward(
        ctx: Any, keys: Any, logits: Tensor, bias: Tensor | None, *static: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights, scores = route_topk.below_autograd(keys, logits, bias, *static)
        *choice, route_scale, all_scores = static
        has_bias = bias is not None
        ctx.static = (logits.shape[1], logits.dtype, *choice, route_scale, has_bias)
        over_chosen = _options(logits.shape[1], logits.dtype, *choice, has_bias).over_chosen
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            ids,
            weights if over_chosen else None,
            logits if all_scores or not over_chosen else None,
        )
        return ids, weights, scores

    @staticmethod
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, _dids: None, dweights: Tensor | None, dscores: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dscores is not None and not dscores.shape[1]:
            dscores = None  # of the scores that nobody asked for
        dlogits = None
        if dweights is not None or dscores is not None:
            dlogits = route_topk_backward(dweights, dscores, *ctx.saved_tensors, *ctx.static)
        return None, dlogits, *(None,) * 7


route_topk = ThinOp(_library, "sonicmoe::route_topk", _route_topk, _route_topk_fake, _RouteTopK)
route_topk_backward = ThinOp(
    _library,
    "sonicmoe::route_topk_backward",
    _route_topk_backward,
    _route_topk_backward_fake,
    refusal="route_topk has no second derivative on the hopper backend: take gradients without "
    "create_graph=True, or route with backend='torch'.",
)

# What selective activation checkpointing keeps, so that the choice cannot change in between.
SAVE_OPS = (route_topk.op,)
