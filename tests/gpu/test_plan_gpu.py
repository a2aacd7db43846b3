"""Plans built by the kernels on a GPU: tensor for tensor those of torch's own ops.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels import hopper_routing
from sonicmoe_kernels.backends import HOPPER_CAPABILITY
from sonicmoe_kernels.routing import ROUNDINGS, RoutingPlan, token_rounding_plan
from torch import Tensor

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != HOPPER_CAPABILITY,
    reason="needs compute capability 9.0",
)


@pytest.fixture(autouse=True)
def _kernels_loaded_anew() -> Iterator[None]:
    """No test meets a kernel that another one has damaged."""
    yield
    hopper_routing.kernel.cache_clear()


ROUTINGS = ("topk", *ROUNDINGS)
SIZES = [(1, 1), (2, 2), (7, 3), (64, 8), (96, 6), (128, 8), (512, 32), (1000, 8), (4096, 16)]
TOKENS = (0, 1, 31, 32, 33, 255, 256, 257, 1000)
TILES = (1, 2, 16, 64, 128, 256)
INT_POISON = 0x5A5A5A5A


@dataclass(frozen=True)
class Problem:
    """A routing to plan. levels: distinct scores (0: as many as floats give)."""

    T: int
    E: int
    K: int
    tile: int = 128
    levels: int = 0
    skew: float = 0.3
    forbidden: float = 0.0
    ids: torch.dtype = torch.int64
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids_TK, scores_TK, scores_TE on the GPU."""
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device="cuda")

        liking_TE = uniform(self.T, self.E) + self.skew * uniform(self.E)
        ids_TK = liking_TE.topk(self.K, dim=1).indices
        scores_TE = (6 * torch.randn(self.T, self.E, generator=generator, device="cuda")).softmax(1)
        if self.levels:
            scores_TE = (scores_TE * self.levels).ceil() / 8 - 0.125  # sums of eighths are exact
        forbidden_TE = uniform(self.T, self.E) < self.forbidden
        forbidden_TE = forbidden_TE.scatter(1, ids_TK, False)
        scores_TE = scores_TE.masked_fill(forbidden_TE, float("-inf"))
        return ids_TK.to(self.ids), 2 + uniform(self.T, self.K), scores_TE

    def uniform_E(self) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(self.seed + 1)
        return torch.rand(self.E, generator=generator, device="cuda")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch.empty makes holds garbage."""
    make = torch.empty

    def garbage(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype == torch.float32:
            return tensor.fill_(float("nan"))
        return tensor.fill_(INT_POISON)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", garbage)
        patch.setattr(torch, "empty_like", lambda t: garbage(t.shape, dtype=t.dtype, device="cuda"))
        yield


def plan_of(
    routing: str, routed: tuple[Tensor, Tensor, Tensor], problem: Problem, backend: str
) -> RoutingPlan:
    ids_TK, scores_TK, _ = routed
    if routing == "topk":
        return RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=problem.E, backend=backend)
    return token_rounding_plan(
        *routed,
        rounding=routing,
        tile=problem.tile,
        uniform_E=problem.uniform_E(),
        backend=backend,
    )


def check_same(got: RoutingPlan, want: RoutingPlan, what: object) -> None:
    R = int(want.expert_offsets[-1])
    wrong = (got.expert_offsets != want.expert_offsets).nonzero().flatten().tolist()
    assert not wrong, f"{what}: expert offsets differ first at {wrong[0]}"
    assert got.token_offsets.equal(want.token_offsets), f"{what}: token_offsets"
    for name in ("token_idx_R", "score_R", "token_rows_R"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, f"{what}: {name}"
        wrong = (mine[:R] != theirs[:R]).nonzero().flatten().tolist()
        assert not wrong, f"{what}: {name} differs in {len(wrong)} of {R} rows, first {wrong[0]}"
        # rows that nobody owns: whatever is there can be gathered by
        tail = mine[R:]
        assert bool(((tail >= 0) & (tail < max(got.num_tokens, got.r_max))).all()), f"{what}: tail"
    assert (got.rows_per_token, got.num_tokens) == (want.rows_per_token, want.num_tokens)
    assert bool((got.token_idx_R[R:] == 0).all()) and bool((got.score_R[R:] == 0).all())


def check(problem: Problem, routings: tuple[str, ...] = ROUTINGS) -> None:
    routed = problem.tensors()
    for routing in routings:
        if routing != "topk" and problem.tile > problem.T:
            continue
        with poisoned_memory():
            got = plan_of(routing, routed, problem, "hopper")
        check_same(got, plan_of(routing, routed, problem, "torch"), (routing, problem))


@pytest.mark.parametrize(("E", "K"), SIZES, ids=lambda n: str(n))
def test_every_number_of_tokens_gives_the_reference_plan(E: int, K: int) -> None:
    for index, T in enumerate(TOKENS):
        for tile in (TILES[index % 6], TILES[(index + 3) % 6]):
            check(Problem(T, E, K, tile=min(tile, max(T, 1)), seed=T + tile))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("levels", [0, 9, 1], ids=["distinct", "ties", "all_equal"])
@pytest.mark.parametrize("forbidden", [0.0, 0.6, 1.0])
def test_ties_and_forbidden_pairs_at_every_tile(tile: int, levels: int, forbidden: float) -> None:
    for T, E, K in ((1000, 64, 8), (300, 7, 3)):
        check(Problem(T, E, K, tile=min(tile, T), levels=levels, forbidden=forbidden, seed=tile))


@pytest.mark.parametrize("skew", [0.0, 0.5, 3.0], ids=["even", "skewed", "empty_experts"])
def test_a_whole_microbatch_gives_the_reference_plan(skew: float) -> None:
    check(Problem(24576, 128, 8, skew=skew))
    check(Problem(24576, 128, 8, skew=skew, levels=9, ids=torch.int32))


def test_everyone_choosing_one_expert_gives_the_reference_plan() -> None:
    problem = Problem(1000, 64, 8, tile=128)
    _, scores_TK, scores_TE = problem.tensors()
    ids_TK = torch.arange(8, device="cuda").expand(1000, 8)
    for routing in ROUTINGS:
        routed = (ids_TK, scores_TK, scores_TE)
        got, want = (plan_of(routing, routed, problem, b) for b in ("hopper", "torch"))
        check_same(got, want, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
@given(
    size=st.sampled_from([(2, 2), (7, 3), (64, 8)]),
    T=st.integers(1, 700),
    tile=st.integers(1, 300),
    levels=st.sampled_from([0, 1, 3, 30]),
    skew=st.sampled_from([0.0, 0.4, 2.0]),
    forbidden=st.sampled_from([0.0, 0.5, 0.95]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_any_routing_gives_the_reference_plan(
    routing: str,
    size: tuple[int, int],
    T: int,
    tile: int,
    levels: int,
    skew: float,
    forbidden: float,
    seed: int,
) -> None:
    problem = Problem(T, *size, min(tile, T), levels, skew, forbidden, seed=seed)
    check(problem, (routing,))


def test_scores_are_ranked_as_torch_sorts_them() -> None:
    odd = [0.0, -0.0, 1e-45, -1e-45, 1e-38, float("inf"), -1.0, -3e38, 3e38, float("nan"), 0.5]
    generator = torch.Generator("cuda").manual_seed(0)
    pick_TE = torch.randint(0, len(odd), (600, 7), generator=generator, device="cuda")
    scores_TE = torch.tensor(odd, device="cuda")[pick_TE]
    problem = Problem(600, 7, 3, tile=64)
    ids_TK, scores_TK, _ = problem.tensors()
    for routing in ("nearest", "up", "down", "balance"):
        got, want = (
            plan_of(routing, (ids_TK, scores_TK, scores_TE), problem, b)
            for b in ("hopper", "torch")
        )
        R = int(want.expert_offsets[-1])
        got, want = (
            RoutingPlan(
                p.token_idx_R,
                p.score_R.nan_to_num(nan=77.0),
                p.expert_offsets,
                p.token_offsets,
                p.token_rows_R,
                p.rows_per_token,
                p.num_tokens,
            )
            for p in (got, want)
        )
        assert R > 0
        check_same(got, want, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_equal_the_reference_and_garbage_reaches_no_score(routing: str) -> None:
    problem = Problem(1000, 64, 8, tile=64, forbidden=0.2)
    ids_TK, *scores = problem.tensors()
    gradients: dict[str, tuple[Tensor | None, ...]] = {}
    for backend in ("hopper", "torch"):
        leaves = [score.clone().requires_grad_() for score in scores]
        plan = plan_of(routing, (ids_TK, *leaves), problem, backend)
        R = int(plan.expert_offsets[-1])
        generator = torch.Generator("cuda").manual_seed(3)
        gradient_R = torch.randn(plan.r_max, generator=generator, device="cuda")
        gradient_R[R:] = float("nan")
        gradients[backend] = torch.autograd.grad(
            plan.score_R, leaves, gradient_R, allow_unused=True
        )
    for mine, theirs in zip(gradients["hopper"], gradients["torch"], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.equal(theirs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["chosen", "added"])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted: tuple[bool, bool]) -> None:
    problem = Problem(300, 7, 3, tile=64)
    gradients = []
    for backend in ("hopper", "torch"):
        ids_TK, *scores = problem.tensors()
        for score, needs in zip(scores, wanted, strict=True):
            score.requires_grad_(needs)
        plan_of("up", (ids_TK, *scores), problem, backend).score_R.square().sum().backward()
        gradients.append([score.grad for score in scores])
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.equal(theirs)


def test_second_derivatives_are_refused() -> None:
    problem = Problem(300, 7, 3)
    ids_TK, scores_TK, scores_TE = problem.tensors()
    scores_TK.requires_grad_()
    plan = plan_of("topk", (ids_TK, scores_TK, scores_TE), problem, "hopper")
    (first,) = torch.autograd.grad(plan.score_R.square().sum(), scores_TK, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_repeats_are_bitwise_equal_beside_other_work(routing: str) -> None:
    problem = Problem(24576, 128, 8, levels=9)
    routed = problem.tensors()
    first = plan_of(routing, routed, problem, "hopper")
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):
            noise @ noise
        check_same(plan_of(routing, routed, problem, "hopper"), first, routing)
    torch.cuda.synchronize()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_and_backward_wait_for_nobody(routing: str) -> None:
    problem = Problem(1000, 64, 8)
    ids_TK, scores_TK, scores_TE = problem.tensors()
    scores_TK.requires_grad_()
    uniform_E = problem.uniform_E()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if routing == "topk":
            plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=64, backend="hopper")
        else:
            plan = token_rounding_plan(
                ids_TK,
                scores_TK,
                scores_TE,
                rounding=routing,
                tile=128,
                uniform_E=uniform_E,
                backend="hopper",
            )
        plan.score_R.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_captured_graph_plans_new_routings(routing: str) -> None:
    problem = Problem(1000, 64, 8, tile=64)
    ids_TK, scores_TK, scores_TE = problem.tensors()
    scores_TK.requires_grad_()
    uniform_E = problem.uniform_E()

    def build(backend: str) -> tuple[RoutingPlan, Tensor]:
        if routing == "topk":
            plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=64, backend=backend)
        else:
            plan = token_rounding_plan(
                ids_TK,
                scores_TK,
                scores_TE,
                rounding=routing,
                tile=64,
                uniform_E=uniform_E,
                backend=backend,
            )
        (gradient,) = torch.autograd.grad(plan.score_R.square().sum(), scores_TK)
        return plan, gradient

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        build("hopper")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, gradient = build("hopper")
    for seed in (5, 6):
        fresh = Problem(1000, 64, 8, tile=64, seed=seed, levels=9).tensors()
        with torch.no_grad():
            for held, new in zip((ids_TK, scores_TK, scores_TE), fresh, strict=True):
                held.copy_(new)
        graph.replay()
        want, want_gradient = build("torch")
        check_same(plan, want, seed)
        assert gradient.equal(want_gradient)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_compiled_functions_build_plans_without_a_graph_break(routing: str) -> None:
    def loss_of(ids_TK: Tensor, scores_TK: Tensor, scores_TE: Tensor, uniform_E: Tensor) -> Tensor:
        if routing == "topk":
            plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=64)
        else:
            plan = token_rounding_plan(
                ids_TK, scores_TK, scores_TE, rounding=routing, tile=64, uniform_E=uniform_E
            )
        return (plan.score_R * plan.token_idx_R).sum()

    torch._dynamo.reset()  # all routings share the code of loss_of, and its limit of recompilations
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for T in (1000, 777):  # the second one may trace a dynamic number of tokens
        problem = Problem(T, 64, 8)
        ids_TK, scores_TK, scores_TE = problem.tensors()
        scores_TK.requires_grad_()
        gradients = []
        for function in (compiled, loss_of):
            loss = function(ids_TK, scores_TK, scores_TE, problem.uniform_E())
            gradients += torch.autograd.grad(loss, scores_TK)
        assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("damage", ["bits", "counts", "keys", "rows"])
def test_the_comparison_notices_a_damaged_step(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations: each kernel's output, changed in one place, must fail the comparison."""
    load = hopper_routing.kernel_cache.load
    changed = {
        "bits": ("membership", 2, lambda t: t[0, 0, 0].bitwise_xor_(1)),
        "counts": ("membership", 3, lambda t: t[0, 1].add_(64)),  # one would round to the same
        "keys": ("membership", 5, lambda t: t.neg_()),
        "rows": ("plan_rows", 10, lambda t: t[5:7].copy_(t[5:7].flip(0))),
    }
    kernel, argument, change = changed[damage]

    def broken(spec: object) -> object:
        run = load(spec)

        def call(*arguments: object) -> None:
            run(*arguments)
            if spec.kernel == kernel:
                change(arguments[argument])

        return call

    check(Problem(1000, 64, 8, tile=64), ("nearest",))
    monkeypatch.setattr(hopper_routing.kernel_cache, "load", broken)
    hopper_routing.kernel.cache_clear()
    with pytest.raises(AssertionError, match="nearest"):
        check(Problem(1000, 64, 8, tile=64), ("nearest",))
