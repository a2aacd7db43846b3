"""The router's top-k kernels on a GPU, against torch and float64 autograd.

Legend: T tokens, E experts, K experts per token.

Outputs are poisoned before a launch by filling the memory that the allocator hands out next.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import routing_ops, tiles
from sonicmoe_kernels.backends import HOPPER_CAPABILITY
from sonicmoe_kernels.routing import TopK
from torch import Tensor

from tests.gpu.topk_cases import (
    CASES,
    GRADIENT_CASES,
    GRADIENTS,
    SIZE_CASES,
    Case,
    sort_by_loop,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER_CAPABILITY,
    reason="needs compute capability 9.0",
)

REPEATS = 20
SCORE_TOLERANCE = 1e-6  # relative
GRADIENT_TOLERANCE = 2e-6  # of the greatest gradient of a row's kind
SOME = Case(128, 8)
SEARCHED = Case(512, 8)


@pytest.fixture(autouse=True)
def _compile_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not, as a run does, at once what the same options may need later."""
    monkeypatch.setattr(routing_ops, "make_ready", lambda specs: None)


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN (as integers: experts that do not exist) where the next tensors will lie."""
    for shape in shapes:
        for dtype in (torch.float32, torch.float64):
            torch.full(shape, math.nan, dtype=dtype, device="cuda")


def check_forward(case: Case, logits_TE: Tensor) -> TopK:
    """Ids to the bit (with a bias: of values as good), weights and scores to SCORE_TOLERANCE."""
    T, E = logits_TE.shape
    poison((T, case.top_k), (T, E))
    topk = case.route(logits_TE)
    ids_TK = topk.ids_TK
    assert ids_TK.dtype == torch.int64 and ids_TK.shape == topk.scores_TK.shape == (T, case.top_k)
    assert topk.scores_TK.dtype == topk.scores_TE.dtype == torch.float32
    check_distinct(ids_TK, E)
    float_TE = logits_TE.float()
    values_TE = case.choice_values(float_TE)
    if case.biased:
        want_TK = values_TE.topk(case.top_k, dim=-1).values
        torch.testing.assert_close(values_TE.gather(1, ids_TK), want_TK, rtol=1e-6, atol=1e-6)
    else:
        want = case.route(logits_TE, backend="torch")
        wrong = (ids_TK != want.ids_TK).nonzero()
        assert not len(wrong), f"{case}: first wrong (token, k) {wrong[0].tolist()}"
    close = dict(rtol=SCORE_TOLERANCE, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(topk.scores_TK, case.weights_of(float_TE, ids_TK), **close)
    if case.all_scores:
        torch.testing.assert_close(topk.scores_TE, 2.5 * case.score_all(float_TE), **close)
    else:
        assert topk.scores_TE.shape == (T, 0)
    return topk


def check_distinct(ids_TK: Tensor, num_experts: int) -> None:
    ordered_TK = ids_TK.sort(dim=1).values
    assert ((ordered_TK >= 0) & (ordered_TK < num_experts)).all()
    assert (ordered_TK.diff(dim=1) > 0).all()


def check_backward(case: Case, num_tokens: int, gradients: str, *, one_row: bool = False) -> None:
    """dlogits against float64; one_row: all tokens share the gradient of their scores."""
    logits_TE = case.logits(num_tokens).requires_grad_()
    topk = case.route(logits_TE)
    d_weights, d_all = GRADIENTS[gradients]
    dweights = torch.randn_like(topk.scores_TK) if d_weights else None
    dscores = torch.randn_like(topk.scores_TE) if d_all else None
    if one_row and dscores is not None:
        dscores = dscores[:1].expand_as(topk.scores_TE)
    outputs = [
        t for t, d in ((topk.scores_TK, dweights), (topk.scores_TE, dscores)) if d is not None
    ]
    poison(tuple(logits_TE.shape))
    (got_TE,) = torch.autograd.grad(
        outputs, logits_TE, [d for d in (dweights, dscores) if d is not None]
    )
    want_TE = case.gradient(logits_TE, topk.ids_TK, dweights, dscores)
    assert got_TE.dtype == logits_TE.dtype and got_TE.shape == want_TE.shape
    rounding = 4e-3 if case.dtype == torch.bfloat16 else 0.0
    atol = GRADIENT_TOLERANCE * (want_TE.abs().max().item() if want_TE.numel() else 1.0)
    torch.testing.assert_close(got_TE.double(), want_TE, rtol=2e-5 + rounding, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_choice_and_scores_are_those_of_torch(case: Case) -> None:
    check_forward(case, case.logits(1000))


@pytest.mark.parametrize(("case", "gradients"), GRADIENT_CASES, ids=str)
def test_gradient_is_that_of_float64(case: Case, gradients: str) -> None:
    check_backward(case, 300, gradients)


@pytest.mark.parametrize("gradients", ["scores", "both"])
def test_one_gradient_row_for_all_tokens_is_read_where_it_lies(gradients: str) -> None:
    check_backward(SOME, 300, gradients, one_row=True)


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 1000, 4097])
@pytest.mark.parametrize("case", [SOME, SEARCHED], ids=str)
def test_every_number_of_tokens_runs_the_same_kernel(case: Case, num_tokens: int) -> None:
    check_forward(case, case.logits(num_tokens))
    check_backward(case, num_tokens, "both")


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("case", [c for c in SIZE_CASES if not c.biased], ids=str)
def test_of_equal_logits_the_lowest_expert_wins(case: Case, levels: int) -> None:
    generator = torch.Generator("cuda").manual_seed(levels)
    shape = (200, case.num_experts)
    logits_TE = torch.randint(levels, shape, generator=generator, device="cuda").float() - 1
    logits_TE = torch.where(logits_TE == 0, logits_TE * (1 - 2 * (logits_TE[:1] == 0)), logits_TE)
    topk = check_forward(case, logits_TE)
    for ids, values in zip(topk.ids_TK.tolist()[:20], logits_TE.tolist()[:20], strict=True):
        assert ids == sort_by_loop(values, case.top_k)


@pytest.mark.parametrize("case", [SOME, SEARCHED, Case(200, 8)], ids=str)
def test_infinite_logits_are_ordered_and_scored_as_torch_does(case: Case) -> None:
    logits_TE = case.logits(400)
    logits_TE[::4, ::3] = -math.inf
    logits_TE[1::4] = -math.inf
    logits_TE[2::4, 5] = math.inf
    logits_TE[3::8] *= 1e4
    check_forward(case, logits_TE)


@pytest.mark.parametrize("case", [SOME, SEARCHED, Case(128, 8, "sigmoid", True)], ids=str)
def test_nan_logits_still_choose_distinct_experts(case: Case) -> None:
    logits_TE = case.logits(400)
    logits_TE[::4, ::3] = math.nan
    logits_TE[1::4] = math.nan
    logits_TE[2::4, 7] = -math.nan
    logits_TE[3::4] = torch.full((), -1, dtype=torch.int32, device="cuda").view(torch.float32)
    check_distinct(case.route(logits_TE).ids_TK, case.num_experts)


def test_rows_of_other_tokens_do_not_leak() -> None:
    for case in (SOME, SEARCHED):
        logits_TE = case.logits(1000)
        logits_TE[::2] = math.nan
        alone = case.route(logits_TE[1::2].contiguous())
        for got, want in zip(case.route(logits_TE), alone, strict=True):
            assert got[1::2].equal(want)


def test_a_view_that_starts_anywhere_is_routed() -> None:
    logits = SOME.logits(101).flatten()
    view_TE = logits[3 : 3 + 100 * 128].view(100, 128)
    assert view_TE.data_ptr() % 16
    check_forward(SOME, view_TE)
    check_forward(SOME, SOME.logits(128).T)


def test_repeats_are_bitwise_equal_beside_other_work() -> None:
    logits_TE = SOME.logits(20_000).requires_grad_()
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    first = None
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        topk = SOME.route(logits_TE)
        outputs = (topk.scores_TK.square().sum() + topk.scores_TE.square().sum(), logits_TE)
        got = [*topk, *torch.autograd.grad(*outputs)]
        first = first or got
        assert all(a.equal(b) for a, b in zip(got, first, strict=True))
    torch.cuda.synchronize()


def test_forward_and_backward_wait_for_nobody() -> None:
    logits_TE = SOME.logits(100).requires_grad_()
    SOME.route(logits_TE).scores_TK.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        SOME.route(logits_TE).scores_TK.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [SOME, Case(512, 8, "sigmoid_renormalised", True)], ids=str)
def test_a_captured_graph_routes_new_logits(case: Case) -> None:
    logits_TE = case.logits(1000).requires_grad_()

    def run() -> list[Tensor]:
        topk = case.route(logits_TE)
        loss = topk.scores_TK.square().sum() + topk.scores_TE.square().sum()
        return [*topk, *torch.autograd.grad(loss, logits_TE)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (5, 6):
        with torch.no_grad():
            logits_TE.copy_(case.logits(1000, seed=seed))
        graph.replay()
        assert all(got.equal(want) for got, want in zip(captured, run(), strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("choice", ["auto", "hopper"])
def test_routing_compiles_without_a_graph_break(choice: str, backend: str) -> None:
    logits_TE = SOME.logits(300).requires_grad_()

    def run(logits_TE: Tensor) -> TopK:
        return SOME.route(logits_TE * 2, backend=choice)

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend=backend)(logits_TE), run(logits_TE)
    for one, other in zip(got, want, strict=True):
        assert one.equal(other)
    gradients = [
        torch.autograd.grad(t.scores_TK.square().sum() + t.scores_TE.mean(0)[3], logits_TE)[0]
        for t in (got, want)
    ]
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused() -> None:
    logits_TE = SOME.logits(30).requires_grad_()
    loss = SOME.route(logits_TE).scores_TK.square().sum()
    (gradient_TE,) = torch.autograd.grad(loss, logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient_TE.sum().backward()


@st.composite
def rows(draw: st.DrawFn, num_experts: int) -> list[float]:
    """A row with many equals, both zeros, extremes and subnormal numbers."""
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, math.inf, -math.inf, 1e-40])
    numbers = st.one_of(special, st.floats(width=32, allow_nan=False))
    few = draw(st.lists(numbers, min_size=1, max_size=12))
    return draw(st.lists(st.sampled_from(few), min_size=num_experts, max_size=num_experts))


@pytest.mark.parametrize("case", [Case(7, 3), Case(96, 8), Case(128, 8), Case(512, 8)], ids=str)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_row_is_chosen_as_a_plain_sort_does(case: Case, data: st.DataObject) -> None:
    drawn = [data.draw(rows(case.num_experts)) for _ in range(3)]
    logits_TE = torch.tensor(drawn, device="cuda")
    ids_TK = case.route(logits_TE).ids_TK
    want_TK = case.route(logits_TE, backend="torch").ids_TK
    assert ids_TK.tolist() == [sort_by_loop(row, case.top_k) for row in logits_TE.tolist()]
    assert ids_TK.equal(want_TK)


# ------------------------------------------------------------------ broken copies must fail

FOLDER = Path(tiles.__file__).parent / "cute"
BROKEN_FORWARD = {
    "equals change places": (SOME, "topk", "less = first < second", "less = first <= second"),
    "negative logits in the wrong order": (
        SOME,
        "expert_row",
        "return select(order < 0, Int32(SMALLEST) - order, order)",
        "return select(order < 0, order, order)",
    ),
    "every lane loses its head": (
        SOME,
        "topk",
        "select(best_expert == head_expert, Int32(1), Int32(0))",
        "select(head_expert < LARGEST, Int32(1), Int32(0))",
    ),
    "the search keeps the last of equals": (
        Case(4096, 8),  # 128 experts a lane: the warp looks four times
        "topk",
        "greater = sOrder[i, owner] > left",
        "greater = sOrder[i, owner] >= left",
    ),
    "weights without the route scale": (SOME, "topk", "weight * scale", "weight"),
    "scores without the route scale": (SOME, "topk", "rX[i] = rX[i] * scale", "rX[i] = rX[i]"),
}
BROKEN_BACKWARD = {
    "no mean of the weights": ("weight * (dweight - mean)", "weight * dweight"),
    "no mean of the scores": ("rX[i] * (rG[i] - mean)", "rX[i] * rG[i]"),
    "the chosen replace the rest": ("rG[i] = rG[i] + own[i]", "rG[i] = own[i]"),
    "scores without the route scale": ("rG[i] = rG[i] * scale", "rG[i] = rG[i]"),
}


def broken_kernel(spec: kernel_cache.KernelSpec, folder: Path, module: str, old: str, new: str):
    """`spec` compiled from a copy of the sources in which `old` reads `new`."""
    package = folder / f"broken_{folder.name}"
    package.mkdir()
    for name in ("__init__", "expert_row", "topk", "topk_backward", "build_topk"):
        source = (FOLDER / f"{name}.py").read_text()
        if name == module:
            assert source.count(old) == 1, f"{old!r} is not once in {name}.py"
            source = source.replace(old, new)
        source = source.replace("sonicmoe_kernels.cute.", f"{package.name}.")
        (package / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        kernel_cache.prepare_dsl()  # before the builder imports cutlass
        builder = importlib.import_module(f"{package.name}.build_topk")
        return getattr(builder, spec.builder.split(":")[1])(spec)
    finally:
        sys.path.remove(str(folder))
        shutil.rmtree(package)


@pytest.mark.parametrize("name", BROKEN_FORWARD)
def test_a_broken_forward_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, *change = BROKEN_FORWARD[name]
    kernel = broken_kernel(case.specs()[0], tmp_path, *change)
    monkeypatch.setattr(routing_ops, "_forward_kernel", lambda *_: kernel)
    logits_TE = case.logits(300).round()
    logits_TE[::3].clamp_(-1, 1)  # more equals than are chosen
    logits_TE[1::3] -= 20  # several values are chosen, all negative
    with pytest.raises(AssertionError):
        check_forward(case, logits_TE)


@pytest.mark.parametrize("name", BROKEN_BACKWARD)
def test_a_broken_backward_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SOME.specs(["both"])[-1]
    kernel = broken_kernel(spec, tmp_path, "topk_backward", *BROKEN_BACKWARD[name])
    monkeypatch.setattr(routing_ops, "_backward_kernel", lambda *_: (spec, kernel))
    with pytest.raises(AssertionError):
        check_backward(SOME, 300, "both")
