"""Token choice (route_topk) and the static bound on rows (r_max).

Legend: T tokens, E experts, G expert groups, K experts per token.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels.routing import (
    ROUNDINGS,
    RoutingPlan,
    TopK,
    r_max,
    route_topk,
    token_rounding_plan,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.routing_cases import OpRecorder


def draw_logits(T: int = 40, E: int = 12, *, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose_by_loop(value: list[float], K: int, groups: int | None, limited: int | None) -> set[int]:
    """The K best of one token's experts, within its best groups."""
    experts = range(len(value))
    if groups is not None and limited is not None:
        size = len(value) // groups

        def group_value(group: int) -> float:
            return sum(sorted(value[group * size : (group + 1) * size])[-2:])

        best = sorted(range(groups), key=group_value)[-limited:]
        experts = [expert for expert in experts if expert // size in best]
    return set(sorted(experts, key=lambda expert: value[expert])[-K:])


@pytest.mark.parametrize("groups", [None, 2, 3], ids=["no_groups", "2_groups", "3_groups"])
@pytest.mark.parametrize("bias", [0.0, 0.5], ids=["no_bias", "bias"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax_before", "softmax_after"])
def test_routing_equals_the_plain_loop(
    score: str, renormalize: bool, bias: float, groups: int | None
) -> None:
    logits_TE, K, scale = draw_logits(), 3, 2.5
    bias_E = bias * draw_logits(1, 12, seed=1)[0] if bias else None
    limited = None if groups is None else groups - 1
    topk = route_topk(
        logits_TE,
        top_k=K,
        score_func="sigmoid" if score == "sigmoid" else "softmax",
        softmax_order="after" if score == "softmax_after" else "before",
        renormalize=renormalize,
        route_scale=scale,
        expert_bias_E=bias_E,
        num_groups=groups,
        num_limited_groups=limited,
    )
    assert topk.ids_TK.dtype == torch.int64 and topk.ids_TK.shape == topk.scores_TK.shape == (40, K)
    biases = bias_E.tolist() if bias_E is not None else [0.0] * 12
    for token, logits in enumerate(logits_TE.tolist()):
        total = sum(math.exp(logit) for logit in logits)
        scores = (
            [1 / (1 + math.exp(-logit)) for logit in logits]
            if score == "sigmoid"
            else [math.exp(logit) / total for logit in logits]
        )
        value = logits if score == "softmax_after" else scores
        chosen = choose_by_loop(
            [v + b for v, b in zip(value, biases, strict=True)], K, groups, limited
        )
        ids = topk.ids_TK[token].tolist()
        assert set(ids) == chosen and len(ids) == K
        among = sum(scores[expert] for expert in chosen)
        divisor = among if renormalize or score == "softmax_after" else 1.0
        want = torch.tensor([scale * scores[e] / divisor for e in ids], dtype=torch.float64)
        torch.testing.assert_close(topk.scores_TK[token], want)

        open_groups = {expert // (12 // groups) for expert in chosen} if groups else set()
        for expert, raw in enumerate(topk.scores_TE[token].tolist()):
            if raw == float("-inf"):
                assert groups and expert // (12 // groups) not in open_groups
            else:
                assert raw == pytest.approx(scale * scores[expert], rel=1e-12)
        legal = 12 if groups is None else limited * (12 // groups)
        assert int((~topk.scores_TE[token].isneginf()).sum()) == legal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_best_come_first_and_of_equals_the_lowest_expert(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    """Python's sort is stable and takes 0 and -0 for equal."""
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, math.inf, -math.inf, 1e-40])
    few = data.draw(st.lists(st.one_of(special, st.floats(-9, 9)), min_size=1, max_size=6))
    E = data.draw(st.integers(1, 40))
    drawn = data.draw(st.lists(st.sampled_from(few), min_size=E, max_size=E))
    K = data.draw(st.integers(1, E))
    logits_TE = torch.tensor([drawn, drawn[::-1]], dtype=dtype)
    for options in ({}, {"softmax_order": "after"}, {"score_func": "sigmoid"}):
        ids_TK = route_topk(logits_TE, top_k=K, renormalize=True, **options).ids_TK
        for ids, row in zip(ids_TK.tolist(), logits_TE.tolist(), strict=True):
            assert ids == sorted(range(E), key=lambda expert: -row[expert])[:K]


def test_logits_decide_where_their_scores_are_equal() -> None:
    logits_TE = torch.tensor([[60.0, 61.0, 62.0, 0.0]])
    assert (logits_TE.sigmoid()[0, :3] == 1).all()
    topk = route_topk(logits_TE, top_k=2, score_func="sigmoid", renormalize=True)
    assert topk.ids_TK.tolist() == [[2, 1]]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nan_logits_still_choose_distinct_experts(bad: float) -> None:
    logits_TE = draw_logits().float()
    logits_TE[::2, ::3] = bad
    logits_TE[1] = bad
    for options in ({}, {"score_func": "sigmoid", "expert_bias_E": torch.ones(12)}):
        ids_TK = route_topk(logits_TE, top_k=5, renormalize=True, **options).ids_TK
        ordered_TK = ids_TK.sort(dim=1).values
        assert (ordered_TK.diff(dim=1) > 0).all() and 0 <= ordered_TK.min() <= ordered_TK.max() < 12


def test_softmax_after_and_renormalised_softmax_before_are_the_same() -> None:
    logits_TE = draw_logits()
    before = route_topk(logits_TE, top_k=4, renormalize=True)
    after = route_topk(logits_TE, top_k=4, renormalize=False, softmax_order="after")
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(after.scores_TK.sum(1), torch.ones(40, dtype=torch.float64))


def test_bias_chooses_but_neither_scales_nor_gets_a_gradient() -> None:
    logits_TE = draw_logits(30, 6).requires_grad_()
    bias_E = torch.tensor([0.0, 0, 0, 0, 100, 100]).requires_grad_()
    topk = route_topk(
        logits_TE, top_k=2, score_func="sigmoid", renormalize=False, expert_bias_E=bias_E
    )
    assert topk.ids_TK.sort(dim=1).values.equal(torch.tensor([[4, 5]]).expand(30, 2))
    torch.testing.assert_close(topk.scores_TE, logits_TE.sigmoid())
    torch.testing.assert_close(topk.scores_TK, logits_TE.sigmoid().gather(1, topk.ids_TK))
    (topk.scores_TK.sum() + topk.scores_TE.sum()).backward()
    assert bias_E.grad is None and logits_TE.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits_TE = draw_logits().to(dtype)
    topk = route_topk(logits_TE, top_k=2, renormalize=True)
    want = route_topk(logits_TE.float(), top_k=2, renormalize=True)
    assert topk.scores_TK.dtype == topk.scores_TE.dtype == torch.float32
    assert all(got.equal(expected) for got, expected in zip(topk, want, strict=True))


def test_scores_that_all_underflow_renormalise_to_zero_not_nan() -> None:
    topk = route_topk(torch.full((2, 4), -200.0), top_k=2, score_func="sigmoid", renormalize=True)
    assert topk.scores_TK.equal(torch.zeros(2, 2))


def test_gradient_through_every_output_is_finite_with_closed_groups() -> None:
    logits_TE = draw_logits(8, 6).requires_grad_()
    topk = route_topk(logits_TE, top_k=2, renormalize=True, num_groups=3, num_limited_groups=1)
    legal_TE = ~topk.scores_TE.isneginf()
    (topk.scores_TK.square().sum() + torch.where(legal_TE, topk.scores_TE, 0.0).sum()).backward()
    assert logits_TE.grad.isfinite().all() and logits_TE.grad.abs().sum() > 0


OPTIONS = [
    {"renormalize": True},
    {"renormalize": False, "softmax_order": "after"},
    {
        "renormalize": True,
        "score_func": "sigmoid",
        "num_groups": 4,
        "num_limited_groups": 2,
        "route_scale": 2.5,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=["before", "after", "groups"])
def test_routing_compiles_without_a_graph_break_or_a_wait(options: dict) -> None:
    logits_TE = draw_logits().float().requires_grad_()
    bias_E = draw_logits(1, 12, seed=1)[0].float()

    def route(logits_TE: Tensor) -> TopK:
        return route_topk(logits_TE, top_k=3, expert_bias_E=bias_E, **options)

    with OpRecorder() as recorder:
        want = route(logits_TE)
    assert recorder.count > 3 and recorder.synchronising == []
    got = torch.compile(route, fullgraph=True, backend="aot_eager")(logits_TE)
    for name in TopK._fields:
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    gradients = [
        torch.autograd.grad(topk.scores_TK.square().sum(), logits_TE) for topk in (got, want)
    ]
    torch.testing.assert_close(*gradients)


def test_everything_stays_on_the_device_of_the_logits() -> None:
    # Fake tensors know devices and refuse to be read, so this needs no GPU.
    with FakeTensorMode():
        logits_TE = torch.empty(50, 12, device="cuda", requires_grad=True)
        bias_E = torch.empty(12, device="cuda")
        topk = route_topk(
            logits_TE,
            top_k=3,
            renormalize=True,
            expert_bias_E=bias_E,
            num_groups=3,
            num_limited_groups=2,
        )
        plans = [RoutingPlan.from_topk(topk.ids_TK, topk.scores_TK, num_experts=12)]
        plans += [token_rounding_plan(*topk, rounding=name, tile=8) for name in ROUNDINGS]
    for plan in plans:
        assert plan.token_idx_R.is_cuda and plan.score_R.is_cuda and plan.expert_offsets.is_cuda
        assert plan.token_offsets.is_cuda and plan.token_rows_R.is_cuda


# ------------------------------------------------------------------ bound on rows


def test_r_max_follows_the_documented_formulas() -> None:
    T, K, E, tile = 4096, 8, 64, 129
    want = {
        "nearest": T * K + E * 64,
        "stochastic": T * K + E * 128,
        "score_stochastic": T * K + E * 128,
        "up": T * K + E * 128,
        "balance": T * K + 64,
        "down": T * K,
    }
    assert set(want) == set(ROUNDINGS)
    for rounding, rows in want.items():
        assert r_max(T, K, E, router="token_rounding", rounding=rounding, tile=tile) == rows
    assert r_max(T, K, E) == T * K


@given(T=st.integers(1, 50), E=st.integers(1, 20), data=st.data())
@settings(max_examples=50, deadline=None)
def test_r_max_never_exceeds_every_token_on_every_expert(
    T: int, E: int, data: st.DataObject
) -> None:
    K, tile = data.draw(st.integers(1, E)), data.draw(st.integers(1, T))
    for rounding in ROUNDINGS:
        rows = r_max(T, K, E, router="token_rounding", rounding=rounding, tile=tile)
        assert T * K <= rows <= T * E


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "roundabout"}, "router is 'roundabout'; accepted: 'topk', 'token_rounding'"),
        ({"router": "token_rounding", "tile": 4}, "rounding is None; accepted: nearest"),
        ({"router": "token_rounding", "rounding": "up"}, "tile is None"),
        ({"router": "token_rounding", "rounding": "up", "tile": 11}, "more than the 10 tokens"),
    ],
)
def test_r_max_refuses_what_no_router_does(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        r_max(10, 2, 4, **options)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits_TE": torch.zeros(2, 3, 4)}, r"of shape \(2, 3, 4\)"),
        ({"logits_TE": torch.zeros(3, 12, dtype=torch.int64)}, "logits are torch.int64"),
        ({"top_k": 0}, r"top_k is 0; it must lie in \[1, number of experts = 12\]"),
        ({"top_k": 13}, "top_k is 13"),
        ({"score_func": "tanh"}, "score_func is 'tanh'; accepted: 'softmax', 'sigmoid'"),
        ({"softmax_order": "during"}, "softmax_order is 'during'; accepted: 'before', 'after'"),
        ({"score_func": "sigmoid", "softmax_order": "after"}, "no meaning.*sigmoid"),
        ({"route_scale": 0.0}, "route_scale is 0.0; it must be above 0"),
        ({"route_scale": float("nan")}, "route_scale is nan"),
        ({"num_groups": 2}, "give both or neither"),
        ({"num_limited_groups": 2}, "give both or neither"),
        ({"num_groups": 5, "num_limited_groups": 1}, "num_groups is 5; it must divide the 12"),
        ({"num_groups": 12, "num_limited_groups": 4}, "groups of at least 2"),
        ({"num_groups": 0, "num_limited_groups": 1}, "num_groups is 0"),
        ({"num_groups": 3, "num_limited_groups": 4}, r"must lie in \[1, num_groups = 3\]"),
        ({"num_groups": 6, "num_limited_groups": 1}, "fewer experts than top_k = 3"),
        (
            {"expert_bias_E": torch.zeros(5)},
            r"expert_bias_E is \(5,\); it must be \(E,\) = \(12,\)",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(change: dict, words: str) -> None:
    arguments = {"logits_TE": torch.zeros(4, 12), "top_k": 3, "renormalize": True} | change
    with pytest.raises(ValueError, match=words):
        route_topk(**arguments)
