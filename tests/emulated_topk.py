"""Plays the router's top-k kernels in plain torch, so that what surrounds them runs on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sonicmoe_kernels import routing, routing_ops
from sonicmoe_kernels.tiles import RENORMALIZE_EPS, TopKBackward, TopKOptions
from torch import Tensor


def emulate(patch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    """Route with the ops on any device; returns the launches, as (kernel, arguments), from now."""
    launches: list[tuple[str, tuple]] = []

    def forward_kernel(options: TopKOptions, all_scores: bool) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            launches.append(("topk", arguments))
            _forward(options, all_scores, *arguments)

        return launch

    def backward_kernel(options: TopKOptions, d_weights: bool, d_all: bool) -> tuple:
        static = dataclasses.asdict(options)
        spec = TopKBackward(**static, d_weights=d_weights, d_all=d_all)

        def launch(*arguments: Any) -> None:
            launches.append(("topk_backward", arguments))
            backward(spec, *arguments)

        return spec, launch

    def resolve(requested: str, *_: Any) -> str:
        return "torch" if requested == "torch" else "hopper"

    patch.setattr(routing_ops, "_forward_kernel", forward_kernel)
    patch.setattr(routing_ops, "_backward_kernel", backward_kernel)
    patch.setattr(routing, "resolve_topk_backend", torch.compiler.assume_constant_result(resolve))
    return launches


def choice(
    options: TopKOptions, logits_TE: Tensor, bias_E: Tensor | None, scale: float
) -> routing.TopK:
    """What a router with these options chooses, by torch."""
    return routing.route_topk(
        logits_TE,
        top_k=options.top_k,
        score_func=options.score_func,
        softmax_order=options.softmax_order,
        renormalize=options.renormalize,
        route_scale=scale,
        expert_bias_E=bias_E,
        backend="torch",
    )


def _forward(
    options: TopKOptions,
    all_scores: bool,
    logits_TE: Tensor,
    bias_E: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor | None,
    scale: float,
) -> None:
    assert (scores_TE is not None) == all_scores and (bias_E is not None) == options.has_bias
    topk = choice(options, logits_TE, bias_E, scale)
    ids_TK.copy_(topk.ids_TK)
    weights_TK.copy_(topk.scores_TK)
    if scores_TE is not None:
        scores_TE.copy_(topk.scores_TE)


def backward(
    spec: TopKBackward,
    dweights_TK: Tensor | None,
    dscores_TE: Tensor | None,
    ids_TK: Tensor | None,
    weights_TK: Tensor | None,
    logits_TE: Tensor | None,
    dlogits_TE: Tensor,
    scale: float,
) -> None:
    assert (dweights_TK is not None) == (ids_TK is not None) == spec.d_weights
    assert (dscores_TE is not None) == spec.d_all
    assert (weights_TK is not None) == spec.reads_weights
    assert (logits_TE is not None) == spec.reads_logits
    # formulas, for autograd is off inside an op
    gradient_TE = torch.zeros(dlogits_TE.shape) if dscores_TE is None else scale * dscores_TE
    if ids_TK is not None and dweights_TK is not None and weights_TK is None:
        scores_TK = _scores(spec, logits_TE).gather(1, ids_TK)
        share_TK = scale * dweights_TK
        if spec.renormalize:
            total_T1 = scores_TK.sum(1, keepdim=True) + RENORMALIZE_EPS
            mean_T1 = (scores_TK / total_T1 * share_TK).sum(1, keepdim=True)
            share_TK = (share_TK - mean_T1) / total_T1
        gradient_TE = gradient_TE.scatter_add(1, ids_TK, share_TK)
    if logits_TE is not None:
        scores_TE = _scores(spec, logits_TE)
        if spec.score_func == "sigmoid":
            gradient_TE = scores_TE * (1 - scores_TE) * gradient_TE
        else:
            mean_T1 = (scores_TE * gradient_TE).sum(1, keepdim=True)
            gradient_TE = scores_TE * (gradient_TE - mean_T1)
    if ids_TK is not None and dweights_TK is not None and weights_TK is not None:
        flow_TK = weights_TK * dweights_TK
        flow_TK = flow_TK - weights_TK / scale * flow_TK.sum(1, keepdim=True)
        gradient_TE = gradient_TE.scatter_add(1, ids_TK, flow_TK)
    dlogits_TE.copy_(gradient_TE)


def _scores(spec: TopKBackward, logits_TE: Tensor) -> Tensor:
    sigmoid = spec.score_func == "sigmoid"
    return logits_TE.float().sigmoid() if sigmoid else logits_TE.float().softmax(dim=-1)
