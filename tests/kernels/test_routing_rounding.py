"""Token rounding: each variant's guarantee, the loop it must agree with, gradients, errors.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels.routing import ROUNDINGS, RoutingPlan, r_max, route_topk, token_rounding_plan
from torch import Tensor

from tests.kernels.routing_cases import (
    OpRecorder,
    check_structure,
    rounded_rows_by_loop,
    rows_of,
    topk_rows,
)

STOCHASTIC = ("stochastic", "score_stochastic")


@dataclass(frozen=True)
class Problem:
    """A routing to round; the scores have ties on purpose and may forbid pairs."""

    T: int
    E: int
    K: int
    tile: int
    skew: float
    forbidden: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids_TK, scores_TK, scores_TE: multiples of 1/8, so sums are exact and ties common."""
        generator = torch.Generator().manual_seed(self.seed)

        def eighths(*shape: int) -> Tensor:
            return torch.randint(0, 9, shape, generator=generator) / 8

        liking_TE = torch.rand(self.T, self.E, generator=generator)
        liking_TE += self.skew * torch.rand(self.E, generator=generator)
        ids_TK = liking_TE.topk(self.K, dim=1).indices
        forbidden_TE = torch.rand(self.T, self.E, generator=generator) < self.forbidden
        forbidden_TE = forbidden_TE.scatter(1, ids_TK, False)
        scores_TE = eighths(self.T, self.E).masked_fill(forbidden_TE, float("-inf"))
        return ids_TK, 100 + eighths(self.T, self.K), scores_TE

    def uniform_E(self) -> Tensor:
        return torch.rand(self.E, generator=torch.Generator().manual_seed(self.seed + 1))


@st.composite
def problems(draw: st.DrawFn, *, max_T: int = 40, max_E: int = 9) -> Problem:
    T, E = draw(st.integers(1, max_T)), draw(st.integers(1, max_E))
    return Problem(
        T=T,
        E=E,
        K=draw(st.integers(1, E)),
        tile=draw(st.integers(1, T)),
        skew=draw(st.sampled_from([0.0, 0.3, 2.0])),
        forbidden=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        seed=draw(st.integers(0, 10**6)),
    )


def round_problem(problem: Problem, rounding: str) -> RoutingPlan:
    return token_rounding_plan(
        *problem.tensors(),
        rounding=rounding,
        tile=problem.tile,
        uniform_E=problem.uniform_E() if rounding in STOCHASTIC else None,
    )


def counts_of(plan: RoutingPlan) -> list[int]:
    return plan.expert_offsets.diff().tolist()


def columns(*chosen_E: int, T: int, scores_TE: Tensor | None = None) -> tuple[Tensor, ...]:
    """A K=1 routing in which expert e is chosen by the next ``chosen_E[e]`` tokens."""
    assert sum(chosen_E) == T
    ids_TK = torch.arange(len(chosen_E)).repeat_interleave(torch.tensor(chosen_E)).unsqueeze(1)
    if scores_TE is None:
        scores_TE = torch.rand(T, len(chosen_E), generator=torch.Generator().manual_seed(0))
    return ids_TK, torch.ones(T, 1), scores_TE


# ------------------------------------------------------------------ agreement and guarantees


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_rounding_equals_the_plain_loop(rounding: str, problem: Problem) -> None:
    plan = round_problem(problem, rounding)
    check_structure(plan)
    ids_TK, scores_TK, scores_TE = problem.tensors()
    want = rounded_rows_by_loop(
        ids_TK,
        scores_TK,
        scores_TE,
        rounding=rounding,
        tile=problem.tile,
        uniform_E=problem.uniform_E(),
    )
    assert rows_of(plan) == want


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(problem=problems(max_T=150, max_E=40))
@settings(max_examples=25, deadline=None)
def test_every_count_is_whole_tiles_and_every_row_legal(rounding: str, problem: Problem) -> None:
    ids_TK, scores_TK, scores_TE = problem.tensors()
    plan = round_problem(problem, rounding)
    assert plan.r_max == r_max(
        problem.T,
        problem.K,
        problem.E,
        router="token_rounding",
        rounding=rounding,
        tile=problem.tile,
    )
    assert sum(counts_of(plan)) <= plan.r_max

    before = topk_rows(ids_TK, scores_TK, problem.E)
    for expert, (rows, chosen) in enumerate(zip(rows_of(plan), before, strict=True)):
        tokens, carried = [t for t, _ in rows], dict(chosen)
        assert len(tokens) % problem.tile == 0, f"expert {expert}: {len(tokens)} rows"
        assert abs(len(tokens) - len(chosen)) < problem.tile
        assert len(set(tokens)) == len(tokens), f"expert {expert}: a token twice"
        kept = [t for t in tokens if t in carried]
        assert len(kept) == min(len(tokens), len(chosen)), "a chosen pair yielded to an added one"
        for token, score in rows:
            assert score == carried.get(token, scores_TE[token, expert].item())
            assert score != float("-inf")


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_down_only_drops_and_up_only_adds_unless_it_cannot(problem: Problem) -> None:
    ids_TK, _, scores_TE = problem.tensors()
    before = [{t for t, _ in rows} for rows in topk_rows(ids_TK, ids_TK.float(), problem.E)]
    down = [{t for t, _ in rows} for rows in rows_of(round_problem(problem, "down"))]
    up = [{t for t, _ in rows} for rows in rows_of(round_problem(problem, "up"))]
    assert all(few <= chosen for few, chosen in zip(down, before, strict=True))
    for expert, (many, chosen) in enumerate(zip(up, before, strict=True)):
        legal = chosen | set((~scores_TE[:, expert].isneginf()).nonzero().flatten().tolist())
        if -(-len(chosen) // problem.tile) * problem.tile <= len(legal):
            assert many >= chosen
        else:
            assert many == down[expert]


@given(
    T=st.integers(1, 20), E=st.integers(1, 64), tile=st.integers(1, 8), seed=st.integers(0, 10**6)
)
@settings(max_examples=50, deadline=None)
def test_balance_changes_the_total_by_at_most_half_a_tile(
    T: int, E: int, tile: int, seed: int
) -> None:
    # The tokens are whole tiles and no pair is forbidden, so every expert can go up.
    problem = Problem(T * tile, E, max(1, E // 4), tile, skew=0.3, forbidden=0.0, seed=seed)
    change = sum(counts_of(round_problem(problem, "balance"))) - problem.T * problem.K
    assert abs(change) <= tile / 2


def test_balance_carries_the_sum_where_nearest_would_drift() -> None:
    # 512 experts chosen by 3 tokens each: nearest with tile 4 adds 512 rows, balance none.
    T, E = 1536, 512
    routing = columns(*[3] * E, T=T)
    nearest = token_rounding_plan(*routing, rounding="nearest", tile=4)
    balance = token_rounding_plan(*routing, rounding="balance", tile=4)
    assert sum(counts_of(nearest)) == T + E
    assert sum(counts_of(balance)) == T
    # z: 0 + 1 = 1, then 1 + 1 and 1 - 3 are equally near: down, -2, then -1, then 0 again
    assert counts_of(balance)[:8] == [4, 0, 4, 4, 4, 0, 4, 4]


def test_balance_lets_later_experts_pay_for_one_that_cannot_go_up() -> None:
    # All 7 tokens choose expert 0, 2 choose expert 1 and 5 expert 2. Tile 4.
    ids_TK = torch.tensor([[0, 1]] * 2 + [[0, 2]] * 5)
    scores_TE = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    plan = token_rounding_plan(ids_TK, torch.ones(7, 2), scores_TE, rounding="balance", tile=4)
    # z: -3, as 8 rows would be more than 7 tokens; then -1 rather than -5; then -2, not 2 (a tie)
    assert counts_of(plan) == [4, 4, 4]


@given(
    T=st.integers(3, 9),
    E=st.integers(3, 12),
    forbidden=st.sampled_from([0.0, 0.6, 0.9]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_balance_equals_the_plain_loop_where_many_cannot_go_up(
    T: int, E: int, forbidden: float, seed: int, data: st.DataObject
) -> None:
    K, tile = data.draw(st.integers(E // 2, E)), data.draw(st.integers(2, T))
    problem = Problem(T, E, K, tile, skew=1.0, forbidden=forbidden, seed=seed)
    want = rounded_rows_by_loop(
        *problem.tensors(), rounding="balance", tile=tile, uniform_E=problem.uniform_E()
    )
    assert rows_of(round_problem(problem, "balance")) == want


# ------------------------------------------------------------------ ties and order


def test_nearest_drops_when_exactly_half_way() -> None:
    plan = token_rounding_plan(*columns(2, 6, 10, 3, 1, T=22), rounding="nearest", tile=4)
    assert counts_of(plan) == [0, 4, 8, 4, 0]  # half-to-even would give 0, 8, 8


def test_balance_drops_when_equally_near() -> None:
    plan = token_rounding_plan(*columns(2, 4, 2, T=8), rounding="balance", tile=4)
    assert counts_of(plan) == [0, 4, 4]  # |2 + 0| = |-2 + 0|: down; then |2 - 2| < |-2 - 2|: up


def test_counts_that_already_are_whole_tiles_do_not_change() -> None:
    for rounding in ROUNDINGS:
        plan = token_rounding_plan(
            *columns(4, 8, 0, 4, T=16), rounding=rounding, tile=4, uniform_E=torch.zeros(4)
        )
        assert counts_of(plan) == [4, 8, 0, 4], rounding


def test_equal_scores_go_by_token_index() -> None:
    scores_TE = torch.full((12, 2), 0.5)
    down = token_rounding_plan(*columns(7, 5, T=12, scores_TE=scores_TE), rounding="down", tile=4)
    assert [[t for t, _ in rows] for rows in rows_of(down)] == [[0, 1, 2, 3], [7, 8, 9, 10]]
    up = token_rounding_plan(*columns(7, 5, T=12, scores_TE=scores_TE), rounding="up", tile=4)
    assert [[t for t, _ in rows] for rows in rows_of(up)] == [[*range(8)], [0, 1, 2, *range(7, 12)]]


def test_a_chosen_pair_outranks_any_added_one_whatever_the_scores() -> None:
    scores_TE = torch.zeros(8, 2)
    scores_TE[3:, 0] = 0.9  # those who did not choose expert 0 score far higher on it
    plan = token_rounding_plan(*columns(3, 5, T=8, scores_TE=scores_TE), rounding="up", tile=4)
    assert [t for t, _ in rows_of(plan)[0]] == [0, 1, 2, 3]


def test_probabilities_too_small_for_subtracting_one_still_rank() -> None:
    # 1e-9 and 2e-9 minus 1 are both -1 in float32; the later token must win all the same.
    scores_TE = torch.full((8, 2), 1e-9)
    scores_TE[6, 0] = 2e-9
    plan = token_rounding_plan(*columns(3, 5, T=8, scores_TE=scores_TE), rounding="up", tile=4)
    assert [t for t, _ in rows_of(plan)[0]] == [0, 1, 2, 6]


def test_chosen_pairs_are_ranked_by_raw_score_not_by_the_score_they_carry() -> None:
    ids_TK, _, scores_TE = columns(5, 3, T=8)
    scores_TE[:5, 0] = torch.tensor([0.5, 0.4, 0.1, 0.3, 0.2])
    carried_TK = torch.tensor([[0.1], [0.2], [0.9], [0.3], [0.4], [1.0], [1.0], [1.0]])
    plan = token_rounding_plan(ids_TK, carried_TK, scores_TE, rounding="down", tile=4)
    assert [t for t, _ in rows_of(plan)[0]] == [0, 1, 3, 4]  # token 2, the lowest raw score, drops
    assert [s for _, s in rows_of(plan)[0]] == carried_TK[[0, 1, 3, 4], 0].tolist()


def test_rounding_up_past_all_tokens_rounds_down() -> None:
    # tile 4, T 6: expert 0 has 5 (up would be 8 > 6), expert 1 has 1.
    routing = columns(5, 1, T=6)
    for rounding in ("up", "nearest", "balance", *STOCHASTIC):
        plan = token_rounding_plan(*routing, rounding=rounding, tile=4, uniform_E=torch.zeros(2))
        assert counts_of(plan)[0] == 4, rounding


def test_rounding_up_without_enough_legal_tokens_rounds_down() -> None:
    ids_TK, scores_TK, scores_TE = columns(7, 9, T=16)
    scores_TE[:, 1] = scores_TE[:, 1].masked_fill(torch.arange(16) < 5, float("-inf"))
    up = token_rounding_plan(ids_TK, scores_TK, scores_TE, rounding="up", tile=4)
    assert counts_of(up) == [8, 8]  # expert 1 would need 3 more, and tokens 5 and 6 are all it has
    scores_TE[4, 1] = 0.0
    up = token_rounding_plan(ids_TK, scores_TK, scores_TE, rounding="up", tile=4)
    assert counts_of(up) == [8, 12]


def test_added_pairs_stay_inside_their_tokens_expert_groups() -> None:
    logits_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    topk = route_topk(logits_TE, top_k=2, renormalize=True, num_groups=4, num_limited_groups=1)
    plan = token_rounding_plan(*topk, rounding="up", tile=8)
    group_T = topk.ids_TK[:, 0] // 2
    for expert, rows in enumerate(rows_of(plan)):
        assert all(group_T[token] == expert // 2 for token, _ in rows)


# ------------------------------------------------------------------ draws


def test_stochastic_goes_up_below_the_fraction_of_a_tile() -> None:
    routing = columns(5, 5, 7, 7, 4, T=28)  # fractions 1/4, 1/4, 3/4, 3/4, 0
    uniform_E = torch.tensor([0.2499, 0.25, 0.7499, 0.75, 0.0])
    plan = token_rounding_plan(*routing, rounding="stochastic", tile=4, uniform_E=uniform_E)
    assert counts_of(plan) == [8, 4, 8, 4, 4]


def test_score_stochastic_weighs_what_would_drop_against_what_would_be_added() -> None:
    scores_TE = torch.zeros(16, 4)
    # Experts 0 and 1 are chosen by 5 tokens, 2 and 3 by 3. Tile 4.
    routing = columns(5, 5, 3, 3, T=16, scores_TE=scores_TE)
    scores_TE[:5, 0] = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.25])  # would drop 0.25
    scores_TE[13:, 0] = 0.25  # would add 3 * 0.25: probability 1/4
    scores_TE[5:10, 1] = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.25])
    scores_TE[13:, 1] = 0.25
    # expert 2: everything is 0, so the denominator is: probability 0
    scores_TE[13:, 3] = 0.25  # expert 3: would add nothing but zeros: probability 1
    uniform_E = torch.tensor([0.2499, 0.25, 0.0, 0.9999])
    plan = token_rounding_plan(*routing, rounding="score_stochastic", tile=4, uniform_E=uniform_E)
    assert counts_of(plan) == [8, 4, 0, 4]


@pytest.mark.parametrize("rounding", STOCHASTIC)
def test_draws_come_from_the_default_generator(rounding: str) -> None:
    problem = Problem(T=64, E=32, K=4, tile=8, skew=0.3, forbidden=0.0, seed=0)

    def counts(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return counts_of(token_rounding_plan(*problem.tensors(), rounding=rounding, tile=8))

    assert counts(1) == counts(1)
    assert len({tuple(counts(seed)) for seed in range(4)}) > 1
    torch.manual_seed(1)
    uniform_E = torch.rand(32)
    given_draws = token_rounding_plan(
        *problem.tensors(), rounding=rounding, tile=8, uniform_E=uniform_E
    )
    assert counts_of(given_draws) == counts(1)


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r not in STOCHASTIC])
def test_the_other_variants_draw_nothing(rounding: str) -> None:
    state = torch.get_rng_state()
    problem = Problem(T=20, E=4, K=2, tile=4, skew=0.3, forbidden=0.0, seed=0)
    first, second = round_problem(problem, rounding), round_problem(problem, rounding)
    assert rows_of(first) == rows_of(second)
    assert torch.get_rng_state().equal(state)


def test_stochastic_keeps_the_expected_count() -> None:
    routing = columns(13, 51, T=64)
    torch.manual_seed(0)
    counts = [
        counts_of(token_rounding_plan(*routing, rounding="stochastic", tile=8))[0]
        for _ in range(400)
    ]
    assert set(counts) == {8, 16}
    assert abs(sum(counts) / 400 - 13) < 5 * 8 * (0.625 * 0.375 / 400) ** 0.5


# ------------------------------------------------------------------ gradients


def route_and_round(logits_TE: Tensor, rounding: str, tile: int = 4, **route) -> RoutingPlan:
    topk = route_topk(logits_TE, **({"top_k": 2, "renormalize": True} | route))
    uniform_E = torch.linspace(0, 0.9, logits_TE.shape[1])
    return token_rounding_plan(*topk, rounding=rounding, tile=tile, uniform_E=uniform_E)


@pytest.mark.parametrize(
    ("rounding", "route"),
    [
        *((rounding, {}) for rounding in ROUNDINGS),
        ("up", {"renormalize": False, "route_scale": 2.5}),
        ("up", {"softmax_order": "after"}),
        ("up", {"score_func": "sigmoid", "route_scale": 0.5}),
        ("up", {"num_groups": 2, "num_limited_groups": 1}),
    ],
)
def test_gradient_of_the_scores_is_right(rounding: str, route: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits_TE: route_and_round(logits_TE, rounding, tile=3, **route).score_R, logits_TE
    )


def test_added_scores_carry_gradient_to_the_raw_scores() -> None:
    ids_TK, scores_TK, scores_TE = columns(3, 5, T=8)
    scores_TK.requires_grad_()
    scores_TE.requires_grad_()
    plan = token_rounding_plan(ids_TK, scores_TK, scores_TE, rounding="up", tile=4)
    plan.score_R.sum().backward()
    assert scores_TK.grad.equal(torch.ones(8, 1))
    added = torch.zeros(8, 2)
    for expert, rows in enumerate(rows_of(plan)):
        for token, _ in rows:
            if ids_TK[token, 0] != expert:
                added[token, expert] = 1.0
    assert scores_TE.grad.equal(added) and added.sum() == 4


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nan_gradient_beyond_the_last_row_reaches_no_logit(rounding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(50, 6, generator=generator, requires_grad=True)
    plan = route_and_round(logits_TE, rounding, tile=8, num_groups=3, num_limited_groups=2)
    R = int(plan.expert_offsets[-1])
    assert plan.r_max > R
    clean_R = torch.randn(plan.r_max, generator=generator)
    gradients = []
    for beyond in (0.0, float("nan"), float("inf")):
        gradient_R = clean_R.clone()
        gradient_R[R:] = beyond
        gradients += torch.autograd.grad(plan.score_R, logits_TE, gradient_R, retain_graph=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1].equal(gradients[0]) and gradients[2].equal(gradients[0])


# ------------------------------------------------------------------ devices, compilers, dtypes


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_never_waits_for_the_device(rounding: str) -> None:
    problem = Problem(T=24, E=6, K=2, tile=4, skew=0.3, forbidden=0.2, seed=0)
    routing = problem.tensors()
    with OpRecorder() as recorder:
        token_rounding_plan(*routing, rounding=rounding, tile=4)
    assert recorder.count > 10
    assert recorder.synchronising == []


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_compiles_without_a_graph_break(rounding: str) -> None:
    logits_TE = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(route_and_round, fullgraph=True, backend="aot_eager")
    got, want = compiled(logits_TE, rounding), route_and_round(logits_TE, rounding)
    assert isinstance(got, RoutingPlan)
    assert rows_of(got) == rows_of(want)
    got_gradient, want_gradient = (
        torch.autograd.grad(plan.score_R.square().sum(), logits_TE)[0] for plan in (got, want)
    )
    torch.testing.assert_close(got_gradient, want_gradient)


def test_a_number_of_experts_costs_no_more_operations() -> None:
    counts = []
    for E in (4, 256):
        problem = Problem(T=16, E=E, K=2, tile=4, skew=0.3, forbidden=0.0, seed=0)
        routing = problem.tensors()
        with OpRecorder() as recorder:
            token_rounding_plan(*routing, rounding="balance", tile=4)
        counts.append(recorder.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_float_dtype_are_rounded(dtype: torch.dtype) -> None:
    problem = Problem(T=40, E=5, K=2, tile=8, skew=0.3, forbidden=0.0, seed=3)
    ids_TK, scores_TK, scores_TE = problem.tensors()
    plan = token_rounding_plan(
        ids_TK.int(), scores_TK.to(dtype), scores_TE.to(dtype), rounding="nearest", tile=8
    )
    assert plan.score_R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = token_rounding_plan(
        ids_TK, scores_TK.to(dtype).float(), scores_TE.to(dtype).float(), rounding="nearest", tile=8
    )
    assert rows_of(plan) == rows_of(want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nan_scores_still_give_a_well_formed_plan(rounding: str) -> None:
    logits_TE = torch.full((24, 6), float("nan"))
    plan = route_and_round(logits_TE, rounding)
    check_structure(plan)
    assert all(count % 4 == 0 for count in counts_of(plan))


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounding": "sideways"}, "rounding is 'sideways'; accepted: nearest, stochastic"),
        ({"tile": 0}, "tile is 0; it must be at least 1"),
        ({"tile": 9}, "tile is 9, more than the 8 tokens"),
        ({"scores_TK": torch.ones(8, 2)}, r"ids_TK \(8, 1\) and scores_TK \(8, 2\)"),
        ({"scores_TE": torch.ones(7, 2)}, r"scores_TE is \(7, 2\).*T = 8"),
        ({"scores_TE": torch.ones(8)}, r"scores_TE is \(8,\)"),
        ({"scores_TE": torch.ones(8, 0)}, "K = 1 columns"),
        ({"uniform_E": torch.ones(3)}, r"uniform_E is \(3,\).*= \(2,\)"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(change: dict, words: str) -> None:
    ids_TK, scores_TK, scores_TE = columns(3, 5, T=8)
    arguments = {
        "ids_TK": ids_TK,
        "scores_TK": scores_TK,
        "scores_TE": scores_TE,
        "rounding": "nearest",
        "tile": 4,
    } | change
    with pytest.raises(ValueError, match=words):
        token_rounding_plan(**arguments)
