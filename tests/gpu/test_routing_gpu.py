"""Routing on a GPU: the CPU's plan, without a wait for the device, inside a CUDA graph.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

import pytest
import torch
from sonicmoe_kernels.routing import ROUNDINGS, RoutingPlan, route_topk, token_rounding_plan
from torch import Tensor

T, E, K, TILE = 4096, 64, 4, 128
ROUTINGS = ("topk", *ROUNDINGS)


def route(logits_TE: Tensor, uniform_E: Tensor, routing: str) -> RoutingPlan:
    topk = route_topk(logits_TE, top_k=K, renormalize=True, num_groups=8, num_limited_groups=4)
    if routing == "topk":
        return RoutingPlan.from_topk(topk.ids_TK, topk.scores_TK, num_experts=E)
    return token_rounding_plan(*topk, rounding=routing, tile=TILE, uniform_E=uniform_E)


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Logits with some experts preferred, and draws."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator) / 2
    return logits_TE, torch.rand(E, generator=generator)


def assert_same_plan(got: RoutingPlan, want: RoutingPlan) -> None:
    R = int(want.expert_offsets[-1])
    assert got.expert_offsets.cpu().equal(want.expert_offsets.cpu())
    assert got.token_offsets.cpu().equal(want.token_offsets.cpu())
    assert got.token_idx_R[:R].cpu().equal(want.token_idx_R[:R].cpu())
    assert got.token_rows_R[:R].cpu().equal(want.token_rows_R[:R].cpu())
    torch.testing.assert_close(got.score_R[:R].cpu(), want.score_R[:R].cpu(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_gpu_makes_the_plan_of_the_cpu(routing: str) -> None:
    logits_TE, uniform_E = draw(0)
    # float64: rounding of the softmax differs between devices, and must not decide a rank
    logits_TE = logits_TE.double()
    got = route(logits_TE.cuda(), uniform_E.cuda(), routing)
    assert_same_plan(got, route(logits_TE, uniform_E, routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_backward_wait_for_nobody(routing: str) -> None:
    logits_TE, uniform_E = (tensor.cuda() for tensor in draw(0))
    logits_TE.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(logits_TE, uniform_E, routing).score_R.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits_TE.grad.isfinite().all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_captured_graph_routes_new_logits(routing: str) -> None:
    logits_TE, uniform_E = (tensor.cuda() for tensor in draw(0))
    logits_TE.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(route(logits_TE, uniform_E, routing).score_R.sum(), logits_TE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = route(logits_TE, uniform_E, routing)
        (gradient_TE,) = torch.autograd.grad(plan.score_R.square().sum(), logits_TE)
    for seed in (1, 2):
        fresh_TE, _ = draw(seed)
        with torch.no_grad():
            logits_TE.copy_(fresh_TE)
        graph.replay()
        want = route(logits_TE, uniform_E, routing)
        assert_same_plan(plan, want)
        (want_TE,) = torch.autograd.grad(want.score_R.square().sum(), logits_TE)
        assert gradient_TE.equal(want_TE)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_torch_accepts_every_step_as_deterministic(routing: str) -> None:
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            logits_TE, uniform_E = (tensor.cuda() for tensor in draw(0))
            logits_TE.requires_grad_()
            score_R = route(logits_TE, uniform_E, routing).score_R
            gradients += torch.autograd.grad(score_R.square().sum(), logits_TE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradients[0].equal(gradients[1])
