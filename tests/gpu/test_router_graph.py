"""Routing, auxiliary losses and statistics never wait for the device and replay in a CUDA graph."""

import pytest
import torch
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan, route_topk, token_rounding_plan

from sonicmoe_titan.aux_loss import attach_loss, load_balancing_loss, z_loss
from sonicmoe_titan.float32_product import float32_product
from sonicmoe_titan.stats import RouterStats

T, D, F, E, K, TILE = 1024, 128, 64, 16, 4, 128


class Layer:
    """What one block's forward and backward do, on plain tensors."""

    def __init__(self, rounding: str | None) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = ((T, D), (E, D), (E, F, D), (E, F, D), (E, D, F))
        self.leaves = [
            torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_()
            for s in shapes
        ]
        self.rounding = rounding
        self.stats = RouterStats(E)
        self.stats.allocate(torch.device("cuda"))
        self.scale = torch.full((), 0.5, device="cuda")

    def __call__(self) -> list[torch.Tensor]:
        x, gate, w1, w3, w2 = self.leaves
        logits_TE = float32_product(x, gate)
        ids, scores, all_scores = route_topk(logits_TE, top_k=K, renormalize=True)
        ones = torch.ones_like(ids, dtype=torch.float32).flatten()
        count_E = torch.zeros(E, device="cuda").scatter_add(0, ids.flatten(), ones)
        balance = load_balancing_loss(all_scores, count_E, top_k=K)
        scores = attach_loss(scores, balance + z_loss(logits_TE), self.scale)
        if self.rounding is None:
            plan = RoutingPlan.from_topk(ids, scores, num_experts=E)
        else:
            plan = token_rounding_plan(ids, scores, all_scores, rounding=self.rounding, tile=TILE)
        with torch.no_grad():
            self.stats.add(microbatches=1, tokens=T, aux_loss=balance)
            rows_E = plan.expert_offsets.diff()
            self.stats.add_rows(rows_E, None if self.rounding is None else count_E)
            self.stats.add_tiles(rows_E)
        out = moe_experts(x, w1, w3, w2, plan, backend="torch")
        return list(torch.autograd.grad(out.float().square().mean(), self.leaves))


@pytest.mark.parametrize("rounding", [None, "nearest", "balance", "score_stochastic"])
def test_layer_never_waits_for_the_device(rounding):
    layer = Layer(rounding)
    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rounding", [None, "nearest", "balance"])
def test_replays_equal_eager_and_keep_counting(rounding):
    layer = Layer(rounding)
    eager = layer()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    layer.stats.reset()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for actual, expected in zip(captured, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-4)
    seen = dict(zip(layer.stats.NAMES, layer.stats.values_V.tolist(), strict=True))
    assert (seen["microbatches"], seen["tokens"]) == (3, 3 * T)
    assert seen["rows"] == layer.stats.load_E.sum().item() > 0
    if rounding is None:
        assert seen["rows"] == 3 * T * K
    else:
        assert (layer.stats.load_E % TILE == 0).all()
        assert seen["rows_computed"] == seen["rows"]


def test_a_new_scale_reaches_a_captured_graph():
    layer = Layer(None)
    for _ in range(2):
        layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    gradients = []
    for scale in (0.0, 50.0):
        layer.scale.fill_(scale)
        graph.replay()
        gradients.append(captured[1].clone())
    assert not torch.allclose(*gradients, rtol=1e-2)
