"""Plays the fused block's stages in plain torch, so that what surrounds them runs on a CPU.

Legend: T tokens, D model width, E experts, K experts per token, R routed rows, halves 2 when gated.

Every stage reads and writes the parts of its buffers where the kernels would; what they compute is
the references' of `sonicmoe_kernels`, and the statistics as their definitions say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sonicmoe_kernels import block, hopper_routing, reference
from sonicmoe_kernels.block_stages import (
    BlockLayer,
    BlockStage,
    gradient_parts,
    halves_of,
    kept_parts,
    scratch_parts,
    whole,
    words,
)
from sonicmoe_kernels.plan import RoutingPlan
from sonicmoe_kernels.rounding import STOCHASTIC, token_rounding_plan
from sonicmoe_kernels.router_sums import RouterSums
from sonicmoe_kernels.tiles import NO_SOURCE, TILE_M, TopKBackward
from torch import Tensor

from tests import emulated_topk

NUM_CTAS = 132
SCORE_PARTS = 1  # of dS, at the widths of the tests


def emulate(patch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    """Run the stages on any device; returns their calls, as (stage, arguments), from now."""
    calls: list[tuple[str, tuple]] = []

    def load(spec: BlockStage) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append((spec.stage, arguments))
            with torch.no_grad():
                STAGES[spec.stage](spec.layer, *arguments)

        return call

    patch.setattr(block, "make_ready", lambda specs: None)
    patch.setattr(block.kernel_cache, "load", load)
    patch.setattr(block.hopper, "num_ctas", lambda index: NUM_CTAS)
    patch.setattr(block, "product", lambda a, b: a.float() @ b.float())
    block.fused_block.cache_clear()
    return calls


def cut(buffer: Tensor, parts: dict[str, int]) -> dict[str, Tensor]:
    """The parts of a buffer, flat."""
    assert buffer.shape == (words(parts),) and buffer.dtype == torch.int32
    pieces = buffer.split([whole(part) for part in parts.values()])
    return {
        name: piece[:length] for (name, length), piece in zip(parts.items(), pieces, strict=True)
    }


def cut_kept(layer: BlockLayer, kept: Tensor, tokens: int, rows: int) -> dict[str, Tensor]:
    """Its parts in their dtypes and shapes."""
    parts = cut(kept, kept_parts(layer, tokens, rows))
    parts["h"] = parts["h"].view(torch.bfloat16).view(rows, halves_of(layer), layer.f)
    parts["ids"] = parts["ids"].view(torch.int64).view(tokens, -1)
    parts["score"] = parts["score"].view(torch.float32)
    if "weights" in parts:
        parts["weights"] = parts["weights"].view(torch.float32).view(tokens, -1)
    return parts


def plan_of(parts: dict[str, Tensor]) -> reference.PlanTensors:
    names = ("token_idx", "score", "expert_offsets", "token_offsets", "token_rows")
    return reference.PlanTensors(*(parts[name] for name in names))


def with_sources(plan: RoutingPlan, ids_TK: Tensor) -> hopper_routing.PlanTensors:
    """The plan as the kernels return it: a source for every row."""
    (_, K), E = ids_TK.shape, plan.num_experts
    row_R = torch.arange(plan.r_max)
    expert_R = torch.searchsorted(plan.expert_offsets[1:], row_R, right=True).clamp(max=E - 1)
    token_R = plan.token_idx_R.long()
    is_choice_RK = ids_TK[token_R] == expert_R.unsqueeze(1)
    choice_R = token_R * K + is_choice_RK.int().argmax(1)
    source_R = torch.where(is_choice_RK.any(1), choice_R, -1 - (token_R * E + expert_R))
    source_R = torch.where(row_R < plan.expert_offsets[-1], source_R, NO_SOURCE).int()
    return hopper_routing.PlanTensors(
        plan.token_idx_R,
        plan.score_R,
        plan.expert_offsets,
        plan.token_offsets,
        plan.token_rows_R,
        source_R,
    )


def forward(
    layer: BlockLayer,
    x_BLD: Tensor,
    logits_TE: Tensor,
    bias_E: Tensor | None,
    uniform_E: Tensor | None,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    kept: Tensor,
    scratch: Tensor,
    out_BLD: Tensor,
    *rest: Any,
) -> None:
    sums, (rows, scale, tile, sample_stride, counting, num_ctas) = rest[:7], rest[7:]
    x_TD, routing = x_BLD.flatten(0, 1), layer.routing
    tokens = x_TD.shape[0]
    assert num_ctas == NUM_CTAS and (bias_E is not None) == routing.has_bias
    assert (uniform_E is not None) == (layer.rounding in STOCHASTIC)
    assert scratch.shape == (words(scratch_parts(layer, tokens, rows)),)
    topk = emulated_topk.choice(routing, logits_TE, bias_E, scale)
    if layer.rounding is None:
        plan = RoutingPlan.from_topk(
            topk.ids_TK, topk.scores_TK, num_experts=routing.num_experts, backend="torch"
        )
    else:
        plan = token_rounding_plan(
            *topk, rounding=layer.rounding, tile=tile, uniform_E=uniform_E, backend="torch"
        )
    parts = cut_kept(layer, kept, tokens, rows)
    routed = with_sources(plan, topk.ids_TK)
    for name, value in zip(plan_names(), routed, strict=True):
        parts[name].copy_(value)
    parts["ids"].copy_(topk.ids_TK)
    if routing.over_chosen:
        parts["weights"].copy_(topk.scores_TK)
    if counting:
        chosen_E = torch.bincount(topk.ids_TK.flatten(), minlength=routing.num_experts)
        first_pass = counting == 2
        count(
            layer, logits_TE, plan.expert_offsets.diff(), chosen_E, sums, sample_stride, first_pass
        )
    h_RHF = reference.up(x_TD, w1, w3, plan_of(parts))
    a_RF = reference.activate(h_RHF, activation=layer.activation).to(x_TD.dtype)
    parts["h"].copy_(h_RHF)
    y_RD = reference.down(a_RF, w2, plan_of(parts))
    out_TD = reference.aggregate(
        y_RD, plan_of(parts), weighted=True, rows_per_token=layer.rows_per_token
    )
    out_BLD.copy_(out_TD.view_as(out_BLD))


def plan_names() -> tuple[str, ...]:
    """Of the kept parts, in the order of `hopper_routing.PlanTensors`."""
    return ("token_idx", "score", "expert_offsets", "token_offsets", "token_rows", "source")


def count(
    layer: BlockLayer,
    logits_TE: Tensor,
    rows_E: Tensor,
    chosen_E: Tensor,
    sums: tuple[Tensor, ...],
    sample_stride: int,
    first_pass: bool,
) -> None:
    """Adds a pass to the statistics."""
    sums = RouterSums(*sums)
    sums.choices_E.add_(chosen_E)
    if not first_pass:
        return
    num_tokens = logits_TE.shape[0]
    sample_SE = logits_TE[::sample_stride].double()
    probability_SE = sample_SE.softmax(1)
    if layer.routing.score_func == "sigmoid":
        probability_SE = sample_SE.sigmoid()
        probability_SE = probability_SE / probability_SE.sum(1, keepdim=True)
    nats = torch.special.entr(probability_SE).sum() * num_tokens / len(sample_SE)
    sums.passes[:2].add_(torch.tensor([1, num_tokens]))
    sums.entropy_P[-1].add_(nats)
    sums.load_E.add_(rows_E)
    sums.tiles_E.add_((rows_E + TILE_M - 1) // TILE_M)
    if layer.rounding is not None:
        sums.added_E.add_((rows_E - chosen_E).clamp(min=0))
        sums.change_E.add_(rows_E - chosen_E)


def gradients(
    layer: BlockLayer,
    dout_BLD: Tensor,
    x_BLD: Tensor,
    logits_TE: Tensor | None,
    gate_ED: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2: Tensor,
    kept: Tensor,
    scratch: Tensor,
    dw2: Tensor,
    dx_BLD: Tensor,
    dgate_ED: Tensor | None,
    dw1: Tensor | None,
    dw3: Tensor | None,
    rows: int,
    scale: float,
    num_ctas: int,
) -> None:
    dout_TD, x_TD = dout_BLD.flatten(0, 1), x_BLD.flatten(0, 1)
    (tokens, _), E, K = x_TD.shape, gate_ED.shape[0], layer.routing.top_k
    parts = cut_kept(layer, kept, tokens, rows)
    other = cut(scratch, gradient_parts(layer, tokens, rows, SCORE_PARTS))
    plan, activation = plan_of(parts), layer.activation
    dh_RHF, a_RF, dscore_R = reference.d_hidden(
        dout_TD, w2, parts["h"].clone(), plan, activation=activation
    )
    parts["h"].data.copy_(dh_RHF)
    dw2.copy_(reference.d_weight2(dout_TD, a_RF, plan))

    source_R = parts["source"].long()
    chosen_R, added_R = source_R >= 0, (source_R < 0) & (source_R != NO_SOURCE)
    dweights_TK, dscores_TE = torch.zeros(tokens * K), torch.zeros(tokens * E)
    dweights_TK[source_R[chosen_R]] = dscore_R[chosen_R]
    dscores_TE[-1 - source_R[added_R]] = dscore_R[added_R]
    d_all = layer.rounding is not None
    spec = TopKBackward(**dataclasses.asdict(layer.routing), d_all=d_all, through_plan=True)
    assert (logits_TE is not None) == spec.reads_logits
    dlogits_TE = torch.empty(tokens, E)
    emulated_topk.backward(
        spec,
        dweights_TK.view(tokens, K),
        dscores_TE.view(tokens, E) if d_all else None,
        parts["ids"],
        parts.get("weights") if spec.reads_weights else None,
        logits_TE,
        dlogits_TE,
        scale,
    )
    halves_T2E = other["halves"].view(torch.bfloat16).view(tokens, 2, E)
    halves_T2E[:, 0] = dlogits_TE
    halves_T2E[:, 1] = dlogits_TE - halves_T2E[:, 0].float()
    summed_TE = halves_T2E.double().sum(1)
    if dgate_ED is not None:
        dgate_ED.copy_(summed_TE.T @ x_TD.double())
    dx_RD = reference.d_input_rows(dh_RHF, w1, w3, plan).double()
    dx_TD = reference.aggregate(dx_RD, plan, weighted=False, rows_per_token=layer.rows_per_token)
    share_TD = (summed_TE @ gate_ED.double()).bfloat16()
    dx_BLD.copy_((dx_TD + share_TD).view_as(dx_BLD))
    if dw1 is not None:
        weight_gradients(layer, x_BLD, kept, dw1, dw3, rows, num_ctas)


def weight_gradients(
    layer: BlockLayer,
    x_BLD: Tensor,
    kept: Tensor,
    dw1: Tensor,
    dw3: Tensor | None,
    rows: int,
    num_ctas: int,
) -> None:
    x_TD = x_BLD.flatten(0, 1)
    parts = cut_kept(layer, kept, x_TD.shape[0], rows)
    results = reference.d_weight13(parts["h"], x_TD, plan_of(parts))
    for out, result in zip((dw1, dw3), results, strict=False):
        out.copy_(result)


STAGES: dict[str, Callable[..., None]] = {
    "forward": forward,
    "gradients": gradients,
    "input_gradient": gradients,
    "weight_gradients": weight_gradients,
}
