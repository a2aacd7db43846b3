"""The ops around the top-k kernels on a CPU: gradients, bytes kept, tracing, what is launched.

Legend: T tokens, E experts, K experts per token. The kernels themselves are played by torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sonicmoe_kernels import routing_ops
from sonicmoe_kernels.routing import TopK, route_topk
from torch import Tensor

from tests.emulated_topk import emulate
from tests.saved_bytes import saved_bytes

T, E, K = 40, 12, 3
ROUTINGS: dict[str, dict[str, Any]] = {
    "before": {"renormalize": False},
    "before renormalised": {"renormalize": True, "route_scale": 2.5},
    "before renormalised biased": {"renormalize": True, "expert_bias_E": torch.linspace(-1, 1, E)},
    "after": {"renormalize": False, "softmax_order": "after"},
    "after biased": {
        "renormalize": False,
        "softmax_order": "after",
        "expert_bias_E": torch.linspace(-1, 1, E),
    },
    "sigmoid": {"renormalize": True, "score_func": "sigmoid", "route_scale": 0.5},
}
OVER_CHOSEN = ("before renormalised", "after", "after biased")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple]]:
    return emulate(monkeypatch)


def draw(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, E, generator=generator).to(dtype).requires_grad_()


def loss_of(topk: TopK, used: str) -> Tensor:
    """Of the weights, of all scores or of both; every entry has its own gradient."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    if used != "scores":
        loss = loss + (topk.scores_TK * torch.randn(T, K, generator=generator)).sum()
    if used != "weights":
        loss = loss + (topk.scores_TE * torch.randn(T, E, generator=generator)).sum()
    return loss


@pytest.mark.parametrize("used", ["weights", "scores", "both"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_those_of_the_torch_backend(
    routing: str, used: str, launches: list
) -> None:
    logits_TE, options = draw(), ROUTINGS[routing]
    got = route_topk(logits_TE, top_k=K, **options)
    want = route_topk(logits_TE, top_k=K, backend="torch", **options)
    assert [name for name, _ in launches] == ["topk"]
    assert all(one.equal(other) for one, other in zip(got, want, strict=True))
    assert not got.ids_TK.requires_grad
    gradients = [torch.autograd.grad(loss_of(topk, used), logits_TE) for topk in (got, want)]
    assert [name for name, _ in launches] == ["topk", "topk_backward"]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("all_scores", [True, False], ids=["all", "chosen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bytes_kept_are_the_ids_and_either_weights_or_logits_or_both(
    routing: str, dtype: torch.dtype, all_scores: bool, launches: list
) -> None:
    bare_TE = draw(dtype)

    def forward() -> Tensor:
        options = ROUTINGS[routing]
        return route_topk(bare_TE * 1, top_k=K, all_scores=all_scores, **options).scores_TK

    over_chosen = routing in OVER_CHOSEN
    expected = 8 * T * K
    expected += 4 * T * K if over_chosen else 0
    expected += dtype.itemsize * T * E if all_scores or not over_chosen else 0
    assert saved_bytes(forward, [bare_TE]) == expected


def test_scores_that_nobody_asked_for_have_no_columns(launches: list) -> None:
    for backend in ("hopper", "torch"):
        topk = route_topk(draw(), top_k=K, renormalize=True, all_scores=False, backend=backend)
        assert topk.scores_TE.shape == (T, 0) and topk.scores_TK.shape == (T, K)


def test_low_precision_logits_get_a_gradient_of_their_dtype(launches: list) -> None:
    logits_TE = draw(torch.bfloat16)
    topk = route_topk(logits_TE, top_k=K, renormalize=True)
    assert topk.scores_TK.dtype == topk.scores_TE.dtype == torch.float32
    (gradient_TE,) = torch.autograd.grad(loss_of(topk, "both"), logits_TE)
    assert gradient_TE.dtype == torch.bfloat16


def test_no_token_launches_nothing(launches: list) -> None:
    logits_TE = torch.zeros(0, E, requires_grad=True)
    topk = route_topk(logits_TE, top_k=K, renormalize=True)
    assert [tuple(t.shape) for t in topk] == [(0, K), (0, K), (0, E)]
    assert torch.autograd.grad(topk.scores_TK.sum(), logits_TE)[0].shape == (0, E)
    assert launches == []


def test_groups_are_routed_by_torch(launches: list) -> None:
    route_topk(draw(), top_k=K, renormalize=True, num_groups=3, num_limited_groups=2)
    assert launches == []


def test_kernels_get_rows_that_a_lane_can_load_at_once(launches: list) -> None:
    shifted = torch.randn(T * E + 1)[1:].view(T, E)
    for logits_TE in (shifted, torch.randn(E, T).T):
        topk = route_topk(logits_TE, top_k=K, renormalize=True)
        given = launches[-1][1][0]
        assert given.is_contiguous() and given.data_ptr() % 16 == 0
        assert given.equal(logits_TE) and topk.ids_TK.shape == (T, K)


@pytest.mark.parametrize("rows", [T, 1])
def test_a_gradient_that_all_tokens_share_is_not_copied(rows: int, launches: list) -> None:
    logits_TE = draw()
    topk = route_topk(logits_TE, top_k=K, renormalize=True)
    dscores_TE = torch.randn(rows, E)
    torch.autograd.grad(topk.scores_TE, logits_TE, dscores_TE.expand(T, E))
    given = launches[-1][1][1]
    assert given.data_ptr() == dscores_TE.data_ptr() and given.stride() == (E if rows > 1 else 0, 1)


@pytest.mark.parametrize("used", ["weights", "both"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_traces_as_one_graph(routing: str, used: str, launches: list) -> None:
    logits_TE, options = draw(), ROUTINGS[routing]

    def run(logits_TE: Tensor) -> TopK:
        return route_topk(logits_TE * 2, top_k=K, **options)

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(logits_TE)
    want = run(logits_TE)
    assert all(one.equal(other) for one, other in zip(got, want, strict=True))
    gradients = [torch.autograd.grad(loss_of(topk, used), logits_TE) for topk in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("all_scores", [True, False], ids=["all", "chosen"])
def test_op_keeps_the_promises_of_its_schema(all_scores: bool, launches: list) -> None:
    bias_E = torch.linspace(-1, 1, E)
    arguments = (draw(), bias_E, K, "sigmoid", "before", True, 2.0, all_scores)
    # the fourth of torch's checks sums the outputs and has no way with the ids' integers
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(routing_ops.route_topk.op, arguments, test_utils=checks)


def test_a_second_derivative_is_refused(launches: list) -> None:
    logits_TE = draw()
    loss = route_topk(logits_TE, top_k=K, renormalize=True).scores_TK.square().sum()
    (gradient_TE,) = torch.autograd.grad(loss, logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient_TE.sum().backward()


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("hopper", "cannot route here: the tensors are on cpu. Use backend 'torch'"),
        ("hoper", "backend 'hoper' is unknown; accepted: auto, hopper, torch"),
    ],
)
def test_a_backend_that_cannot_route_is_refused(backend: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        route_topk(draw(), top_k=K, renormalize=True, backend=backend)
