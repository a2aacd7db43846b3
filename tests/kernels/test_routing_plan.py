"""RoutingPlan: structure, gradients, and what its builders may not do.

Legend: T tokens, E experts, K experts per token, P pairs, R routed rows.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels.routing import RoutingPlan
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.kernels.routing_cases import OpRecorder, check_structure, rows_of, topk_rows

TENSORS = ("token_idx_R", "score_R", "expert_offsets", "token_offsets", "token_rows_R")


def draw_topk(T: int, E: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    return ids_TK, torch.rand(T, K, generator=generator)


def assert_same_plan(got: RoutingPlan, want: RoutingPlan) -> None:
    R = int(want.expert_offsets[-1])
    assert got.expert_offsets.equal(want.expert_offsets)
    assert got.token_offsets.equal(want.token_offsets)
    for name in ("token_idx_R", "score_R", "token_rows_R"):
        assert getattr(got, name)[:R].equal(getattr(want, name)[:R]), name


@pytest.mark.parametrize(
    ("T", "E", "K"), [(1, 1, 1), (7, 5, 5), (40, 16, 3), (33, 3, 1), (5, 64, 2), (0, 4, 2)]
)
def test_topk_plan_lists_every_pair_once_expert_major(T: int, E: int, K: int) -> None:
    ids_TK, scores_TK = draw_topk(T, E, K)
    plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=E)
    check_structure(plan)
    assert rows_of(plan) == topk_rows(ids_TK, scores_TK, E)
    assert (plan.r_max, plan.num_experts, plan.num_tokens, plan.rows_per_token) == (T * K, E, T, K)


def test_topk_plan_hands_an_expert_that_got_nothing_an_empty_range() -> None:
    ids_TK = torch.tensor([[4, 1], [1, 4], [4, 1]])
    plan = RoutingPlan.from_topk(ids_TK, torch.ones(3, 2), num_experts=6)
    assert plan.expert_offsets.tolist() == [0, 0, 3, 3, 3, 6, 6]


@given(
    T=st.integers(1, 12),
    E=st.integers(1, 6),
    keep=st.floats(0, 1),
    extra=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_pairs_in_any_order_make_the_same_plan(
    T: int, E: int, keep: float, extra: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(T * E, generator=generator)
    valid_P = torch.rand(T * E, generator=generator) < keep
    score_P = torch.rand(T * E, generator=generator)
    token_P, expert_P = pairs % T, pairs // T
    plan = RoutingPlan.from_pairs(
        torch.where(valid_P, token_P, -7),  # what is left out may hold any index
        torch.where(valid_P, expert_P, 10**6),
        torch.where(valid_P, score_P, float("nan")),
        num_tokens=T,
        num_experts=E,
        valid_P=valid_P,
        r_max=int(valid_P.sum()) + extra,
    )
    check_structure(plan)
    want = [[] for _ in range(E)]
    for token, expert, score, valid in zip(
        token_P.tolist(), expert_P.tolist(), score_P.tolist(), valid_P.tolist(), strict=True
    ):
        if valid:
            want[expert].append((token, score))
    assert rows_of(plan) == [sorted(rows) for rows in want]
    assert plan.rows_per_token is None and plan.r_max == int(valid_P.sum()) + extra


def test_pairs_without_mask_or_bound_agree_with_topk() -> None:
    ids_TK, scores_TK = draw_topk(20, 7, 3)
    order_P = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    token_P = torch.arange(20).repeat_interleave(3)
    plan = RoutingPlan.from_pairs(
        token_P[order_P].int(),
        ids_TK.flatten()[order_P].int(),
        scores_TK.flatten()[order_P],
        num_tokens=20,
        num_experts=7,
    )
    assert_same_plan(plan, RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=7))
    assert plan.r_max == 60


@pytest.mark.parametrize("r_max", [0, 5])
def test_no_pairs_at_all_make_an_empty_plan(r_max: int) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    plan = RoutingPlan.from_pairs(
        empty, empty, torch.empty(0), num_tokens=3, num_experts=4, r_max=r_max
    )
    check_structure(plan)
    assert plan.r_max == r_max and plan.expert_offsets.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_become_float32_and_keep_float64(dtype: torch.dtype) -> None:
    ids_TK, scores_TK = draw_topk(9, 4, 2)
    plan = RoutingPlan.from_topk(ids_TK, scores_TK.to(dtype), num_experts=4)
    assert plan.score_R.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sorted(plan.score_R.tolist()) == sorted(scores_TK.to(dtype).flatten().tolist())


def test_gradient_returns_to_the_pair_that_owns_the_row() -> None:
    ids_TK, scores_TK = draw_topk(11, 5, 2)
    scores_TK = scores_TK.double().requires_grad_()
    weight_R = torch.randn(22, dtype=torch.float64)
    plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=5)
    (plan.score_R * weight_R).sum().backward()
    for expert in range(5):
        for row in range(*plan.expert_offsets[expert : expert + 2].tolist()):
            token = int(plan.token_idx_R[row])
            k = ids_TK[token].tolist().index(expert)
            assert scores_TK.grad[token, k] == weight_R[row]


def test_gradient_on_rows_that_nobody_owns_goes_nowhere() -> None:
    score_P = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    plan = RoutingPlan.from_pairs(
        torch.tensor([0, 1, 1]),
        torch.tensor([1, 0, 1]),
        score_P,
        num_tokens=2,
        num_experts=2,
        valid_P=torch.tensor([True, False, True]),
        r_max=6,
    )
    gradient_R = torch.full((6,), float("nan"))
    gradient_R[:2] = torch.tensor([10.0, 20.0])
    plan.score_R.backward(gradient_R)
    assert score_P.grad.tolist() == [10.0, 0.0, 20.0]


def test_builders_never_wait_for_the_device() -> None:
    ids_TK, scores_TK = draw_topk(16, 8, 2)
    valid_P = torch.rand(32) < 0.5
    with OpRecorder() as recorder:
        RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=8)
        RoutingPlan.from_pairs(
            torch.arange(16).repeat_interleave(2),
            ids_TK.flatten(),
            scores_TK.flatten(),
            num_tokens=16,
            num_experts=8,
            valid_P=valid_P,
            r_max=40,
        )
    assert recorder.count > 10
    assert recorder.synchronising == []


def test_the_recorder_itself_notices_a_wait() -> None:
    x = torch.ones(3)
    with OpRecorder() as recorder:
        x.sum().item()
        x.nonzero()
        x[x > 0]
    assert len(recorder.synchronising) >= 3


def test_plan_is_built_inside_a_compiled_function_and_returned() -> None:
    def build(ids_TK: Tensor, scores_TK: Tensor) -> RoutingPlan:
        return RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=6)

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    for T in (10, 13, 17):  # the later ones may trace with a dynamic shape
        ids_TK, scores_TK = draw_topk(T, 6, 2, seed=T)
        scores_TK.requires_grad_()
        plan = compiled(ids_TK, scores_TK)
        assert isinstance(plan, RoutingPlan) and plan.num_tokens == T and plan.rows_per_token == 2
        assert_same_plan(plan, build(ids_TK, scores_TK))
        plan.score_R.sum().backward()
        assert scores_TK.grad.equal(torch.ones(T, 2))


def test_plan_is_an_argument_of_a_compiled_function() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def rows_times_score(plan: RoutingPlan) -> Tensor:
        return plan.score_R.sum() * plan.num_tokens * (plan.rows_per_token or 1)

    ids_TK, scores_TK = draw_topk(10, 6, 2)
    scores_TK.requires_grad_()
    total = rows_times_score(RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=6))
    torch.testing.assert_close(total, scores_TK.sum() * 20)
    total.backward()
    assert scores_TK.grad.equal(torch.full((10, 2), 20.0))


def test_plan_is_a_pytree_of_its_five_tensors() -> None:
    plan = RoutingPlan.from_topk(*draw_topk(10, 6, 2), num_experts=6)
    leaves, spec = pytree.tree_flatten(plan)
    assert [id(leaf) for leaf in leaves] == [id(getattr(plan, name)) for name in TENSORS]
    moved = pytree.tree_map(lambda t: t + 0, plan)
    assert_same_plan(moved, plan)
    assert (moved.num_tokens, moved.rows_per_token) == (10, 2)
    assert pytree.tree_unflatten(leaves, spec).num_experts == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_P": torch.zeros(3, dtype=torch.int64)}, r"token_P \(3,\).*expert_P \(4,\)"),
        ({"score_P": torch.zeros(2, 2)}, r"score_P \(2, 2\)"),
        ({"valid_P": torch.zeros(5, dtype=torch.bool)}, r"valid_P \(5,\)"),
        ({"expert_P": torch.zeros(4)}, "expert_P is torch.float32"),
        ({"token_P": torch.zeros(4, dtype=torch.bool)}, "token_P is torch.bool"),
        ({"score_P": torch.zeros(4, dtype=torch.int64)}, "scores are torch.int64"),
        ({"valid_P": torch.zeros(4)}, "valid_P is torch.float32"),
        ({"r_max": -1}, "r_max is -1"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(change: dict, words: str) -> None:
    arguments = {
        "token_P": torch.zeros(4, dtype=torch.int64),
        "expert_P": torch.zeros(4, dtype=torch.int64),
        "score_P": torch.zeros(4),
        "num_tokens": 2,
        "num_experts": 2,
    } | change
    with pytest.raises(ValueError, match=words):
        RoutingPlan.from_pairs(**arguments)


@pytest.mark.parametrize(
    ("ids_TK", "scores_TK", "words"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4), r"must both be \(T, K\)"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 3), r"\(4, 2\).*\(4, 3\)"),
        (torch.zeros(4, 2), torch.zeros(4, 2), "float32; it must be int32 or int64"),
        (torch.zeros(4, 2).int(), torch.zeros(4, 2).int(), "scores are torch.int32"),
    ],
)
def test_topk_that_does_not_fit_is_refused(ids_TK: Tensor, scores_TK: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=4)
