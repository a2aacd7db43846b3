"""A whole MoE layer, router included, of one implementation in a process of its own.

Started by bench_router.py. A request is one round of one router on one shape:
{"sizes": [T, D, F, E, K], "router": "topk" or a rounding, "seconds": 0.3, "details": true}.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.facts import versions
from bench.kernels import is_experts
from bench.measure import (
    Run,
    host_us,
    kernel_times,
    timed_loop,
    tune_briefly,
    use_earlier_choices,
    warm_up,
)
from bench.process import serve

TILE = 128  # rows that experts are rounded to, and that padding is counted in


class Layer(NamedTuple):
    """Tensors of one layer in bf16, drawn alike for every implementation."""

    x_TD: Tensor
    gate_ED: Tensor
    w1_EFD: Tensor
    w3_EFD: Tensor
    w2_EDF: Tensor
    dout_TD: Tensor
    top_k: int


class Routed(NamedTuple):
    """A forward pass of a layer and, for reports, the rows every expert got."""

    run: Run
    rows_E: Callable[[], Tensor]


def make_layer(T: int, D: int, F: int, E: int, K: int) -> Layer:
    """x, gate, weights and dO on the GPU; logits are N(0, 1)."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return drawn.mul_(scale).requires_grad_()

    return Layer(
        x_TD=normal(T, D),
        gate_ED=normal(E, D, scale=D**-0.5),
        w1_EFD=normal(E, F, D, scale=D**-0.5),
        w3_EFD=normal(E, F, D, scale=D**-0.5),
        w2_EDF=normal(E, D, F, scale=F**-0.5),
        dout_TD=normal(T, D).detach(),
        top_k=K,
    )


def ours(layer: Layer, router: str) -> Routed:
    """Gate, `route_topk`, plan (with rounding) and `moe_experts`."""
    from sonicmoe_kernels.moe import moe_experts
    from sonicmoe_kernels.routing import RoutingPlan, route_topk, token_rounding_plan

    weights = [layer.w1_EFD, layer.w3_EFD, layer.w2_EDF]

    def plan() -> RoutingPlan:
        logits_TE = torch.nn.functional.linear(layer.x_TD, layer.gate_ED)  # bf16, as the official's
        routed = route_topk(
            logits_TE, top_k=layer.top_k, renormalize=True, all_scores=router != "topk"
        )
        if router == "topk":
            experts = len(layer.gate_ED)
            return RoutingPlan.from_topk(routed.ids_TK, routed.scores_TK, num_experts=experts)
        return token_rounding_plan(*routed, rounding=router, tile=TILE)

    run = Run(
        lambda: moe_experts(layer.x_TD, *weights, plan()),
        [layer.gate_ED, *weights],
        [layer.x_TD],
        layer.dout_TD,
    )
    return Routed(run, lambda: plan().expert_offsets.diff())


def official(layer: Layer, router: str) -> Routed:
    """The package's own layer for top-k.

    It has no router for token rounding: that is Algorithm 4 of the paper in torch operations, as
    its benchmark computes it, before its experts for arbitrary routings.
    """
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs, moe_TC_softmax_topk_layer

    tune_briefly()
    use_earlier_choices()
    interleaved = torch.stack((layer.w1_EFD, layer.w3_EFD), dim=2).flatten(1, 2)
    w13 = interleaved.detach().requires_grad_()
    x, gate, w2 = layer.x_TD, layer.gate_ED, layer.w2_EDF
    swiglu, stream = ActivationType.SWIGLU, torch.cuda.current_stream().cuda_stream

    def call() -> tuple[Tensor, Tensor]:
        up, down = w13.permute(1, 2, 0), w2.permute(1, 2, 0)
        if router == "topk":
            out_TD, _, rows_E = moe_TC_softmax_topk_layer(
                x, gate, up, None, down, None, layer.top_k, stream, swiglu
            )
            return out_TD, rows_E
        pairs = rounded_pairs(x, gate, top_k=layer.top_k, rounding=router)
        return moe_general_routing_inputs(
            x, *pairs, up, None, down, None, len(gate), stream, swiglu
        )

    run = Run(lambda: call()[0], [gate, w13, w2], [x], layer.dout_TD)
    return Routed(run, lambda: call()[1])


def rounded_pairs(
    x_TD: Tensor, gate_ED: Tensor, *, top_k: int, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, token, expert) of all pairs by ascending token, after the paper's Algorithm 4.

    rounding: "nearest", "up" or "down". Sorts T x E scores and waits for the host, as the paper's
    benchmark does.
    """
    E = len(gate_ED)
    scores_TE = torch.nn.functional.linear(x_TD, gate_ED).softmax(-1, dtype=torch.float32)
    top_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    top_TK = top_TK / top_TK.sum(-1, keepdim=True)
    tiles_E = torch.bincount(ids_TK.view(-1), minlength=E) / TILE
    to_whole = {"nearest": torch.round, "up": torch.ceil, "down": torch.floor}[rounding]
    rows_E = to_whole(tiles_E) * TILE
    # Chosen pairs rank above all others, whatever the scores.
    ranked_TE = (scores_TE.detach() - 1).scatter(1, ids_TK, top_TK.detach())
    token_TE = ranked_TE.argsort(dim=0, descending=True)
    kept_TE = torch.arange(len(x_TD), device=x_TD.device)[:, None] < rows_E
    token, order = token_TE[kept_TE].sort()
    expert = torch.arange(E, device=x_TD.device).expand_as(kept_TE)[kept_TE][order]
    score = scores_TE.scatter(1, ids_TK, top_TK)[token, expert]
    return score, token.int(), expert.int()


def padding_waste(rows_E: Tensor) -> float:
    """Rows of whole tiles over the rows of tokens, less 1."""
    tiles_E = torch.div(rows_E + TILE - 1, TILE, rounding_mode="floor")
    return (tiles_E.sum() * TILE / rows_E.sum()).item() - 1


class Worker:
    """Holds the last shape's layer and its routers' runs."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.sizes: list[int] = []
        self.layer: Layer | None = None
        self.routed: dict[str, Routed] = {}

    def prepare(self, sizes: list[int], router: str) -> Routed:
        if sizes != self.sizes or self.layer is None:
            self.layer, self.routed = None, {}
            torch.cuda.empty_cache()
            self.layer, self.sizes = make_layer(*sizes), sizes
        if router not in self.routed:
            build = official if self.impl == "official" else ours
            self.routed[router] = build(self.layer, router)
        return self.routed[router]

    def measure(self, request: dict) -> dict[str, object]:
        """One round of one router."""
        run, rows_E = self.prepare(request["sizes"], request["router"])
        warm_up(run)
        answer: dict[str, object] = timed_loop(run, request["seconds"])
        answer["host_us"] = host_us(run.step)
        if request["details"]:
            rows = rows_E()
            kernels = kernel_times(run.step)
            forward = kernel_times(run.forward)
            answer |= {
                "kernels": kernels,
                "experts_ms": sum(
                    ms for name, (_, ms) in kernels.items() if is_experts(name, self.impl)
                ),
                "forward_launches": round(sum(count for count, _ in forward.values())),
                "rows": int(rows.sum()),
                "padding_waste": padding_waste(rows),
                "versions": versions(),
            }
        torch.cuda.empty_cache()
        return answer


if __name__ == "__main__":
    serve(Worker(sys.argv[1]).measure)
