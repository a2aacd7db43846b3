"""`moe_experts` on the torch backend: right on every routing, and wrong copies of it fail."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from sonicmoe_kernels import reference
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan

from tests.cases import ACTIVATION_CASES, SMALL_CASES, Case, make_inputs, make_plan
from tests.oracle import check_experts, convert
from tests.saved_bytes import saved_bytes

CASE = SMALL_CASES[0]
EDGES = SMALL_CASES[-1]


@pytest.mark.parametrize("case", SMALL_CASES + ACTIVATION_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_experts_agree_with_the_fp64_oracle(case: Case, dtype: torch.dtype) -> None:
    check_experts(case, dtype=dtype)


def _zeros(original: Callable) -> Callable:
    return lambda *args, **kwargs: torch.zeros_like(original(*args, **kwargs))


def _swap_two_experts(original: Callable) -> Callable:
    def mutated(a_RK, b_EKN, plan):
        order = torch.arange(b_EKN.shape[0])
        order[[0, 1]] = order[[1, 0]]
        return original(a_RK, b_EKN[order], plan)

    return mutated


def _swap_gate_and_up(original: Callable) -> Callable:
    return lambda x, w1, w3, plan: original(x, w3, w1, plan)


def _shift_last_offset(plan: reference.PlanTensors, expert: int, shift: int):
    offsets = plan.expert_offsets.clone()
    offsets[expert + 1] += shift
    return plan._replace(expert_offsets=offsets)


def _drop_the_last_tile(original: Callable) -> Callable:
    def mutated(a_RK, b_EKN, plan):
        c_RN = original(a_RK, b_EKN, plan)
        end = int(plan.expert_offsets[-1])
        c_RN[max(end - (end % 128 or 128), 0) : end] = 0
        return c_RN

    return mutated


def _drop_the_last_k_rows(original: Callable) -> Callable:
    return lambda a, b, plan: original(a, b, _shift_last_offset(plan, 7, -1))


def _read_one_row_beyond(original: Callable) -> Callable:
    def mutated(a_RM, b_RN, plan):
        c_EMN = original(a_RM, b_RN, plan)
        row = int(plan.expert_offsets[3])
        c_EMN[2] += torch.outer(a_RM[row].float(), b_RN[row].float()).to(c_EMN.dtype)
        return c_EMN

    return mutated


def _forget_the_score_in_dhidden(original: Callable) -> Callable:
    def mutated(dout, w2, h, plan, *, activation):
        ones = plan._replace(score_R=torch.ones_like(plan.score_R))
        return original(dout, w2, h, ones, activation=activation)

    return mutated


def _scale_ds_by_the_score(original: Callable) -> Callable:
    def mutated(dout, w2, h, plan, *, activation):
        dh, a_scaled, ds = original(dout, w2, h, plan, activation=activation)
        return dh, a_scaled, ds * plan.score_R

    return mutated


def _skip_one_row_of_a_token(original: Callable) -> Callable:
    def mutated(y_RD, plan, *, weighted, rows_per_token):
        y_RD = y_RD.clone()
        y_RD[int(plan.token_rows_R[0])] = 0
        return original(y_RD, plan, weighted=weighted, rows_per_token=rows_per_token)

    return mutated


MUTATIONS = {
    "aggregation returns zeros": ("aggregate", _zeros),
    "dW2 returns zeros": ("d_weight2", _zeros),
    "two experts swapped": ("_rows_times_weight", _swap_two_experts),
    "gate and up swapped": ("up", _swap_gate_and_up),
    "last tile dropped": ("_rows_times_weight", _drop_the_last_tile),
    "last row of a weight gradient dropped": ("_rows_outer", _drop_the_last_k_rows),
    "one row beyond an expert read": ("_rows_outer", _read_one_row_beyond),
    "score forgotten in dH and A'": ("d_hidden", _forget_the_score_in_dhidden),
    "dS scaled by the score": ("d_hidden", _scale_ds_by_the_score),
    "one row of one token lost": ("aggregate", _skip_one_row_of_a_token),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_copy_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, mutate = MUTATIONS[name]
    monkeypatch.setattr(reference, function, mutate(getattr(reference, function)))
    with pytest.raises(AssertionError):
        check_experts(CASE)


def _poisoned(plan: RoutingPlan, rows: int) -> RoutingPlan:
    """The plan with `rows` garbage rows behind R, as a bound R_max > R leaves them."""

    def extend(values: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.cat((values, torch.full((rows,), filler, dtype=values.dtype)))

    return RoutingPlan(
        token_idx_R=extend(plan.token_idx_R, 2**30),
        score_R=extend(plan.score_R, float("nan")),
        expert_offsets=plan.expert_offsets,
        token_offsets=plan.token_offsets,
        token_rows_R=extend(plan.token_rows_R, 2**30),
        rows_per_token=None,
        num_tokens=plan.num_tokens,
    )


def test_garbage_rows_reach_no_output_and_no_gradient() -> None:
    inputs = convert(make_inputs(EDGES), dtype=torch.float32)
    plan = make_plan(EDGES, inputs.pairs)
    results = []
    for this_plan in (plan, _poisoned(plan, 77)):
        leaves = [t.clone().requires_grad_() for t in inputs[:4]]
        out = moe_experts(*leaves, this_plan)
        results.append((out, *torch.autograd.grad(out, leaves, inputs.dout_TD)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu"])
def test_gradcheck_in_fp64(activation: str) -> None:
    case = Case(6, 8, 8, 3, 2)
    inputs = convert(make_inputs(case, gated=activation != "silu"), dtype=torch.float64)
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs[:4]]
    score_P = inputs.pairs.score_P.clone().requires_grad_()

    def run(x, w1, w3, w2, score):
        plan = make_plan(case, inputs.pairs, score_P=score)
        return moe_experts(x, w1, w3, w2, plan, activation=activation)

    assert torch.autograd.gradcheck(run, (*leaves, score_P))


@pytest.mark.parametrize("case", [SMALL_CASES[0], SMALL_CASES[-1]], ids=lambda case: case.name)
def test_backward_keeps_x_h_and_the_plan_and_nothing_else(case: Case) -> None:
    inputs = convert(make_inputs(case), dtype=torch.bfloat16)
    x, *weights = [t.clone().requires_grad_() for t in inputs[:4]]
    plan = make_plan(case, inputs.pairs)
    rows = plan.r_max
    expected = 2 * case.T * case.D + 2 * rows * 2 * case.F
    expected += 4 * (3 * rows + case.E + 1 + case.T + 1)
    assert saved_bytes(lambda: moe_experts(x, *weights, plan), weights) == expected


def test_without_gradients_no_pre_activation_is_kept() -> None:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)
    plan = make_plan(CASE, inputs.pairs)
    with torch.no_grad():
        out = moe_experts(*inputs[:4], plan)
    assert torch.equal(out, moe_experts(*[t.requires_grad_() for t in inputs[:4]], plan))


def test_frozen_inputs_get_no_gradient() -> None:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)
    x, w1, w3, w2 = (t.clone() for t in inputs[:4])
    w2.requires_grad_()
    moe_experts(x, w1, w3, w2, make_plan(CASE, inputs.pairs)).sum().backward()
    assert w2.grad is not None and w1.grad is None and x.grad is None


def test_second_derivative_raises() -> None:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)
    x = inputs.x_TD.clone().requires_grad_()
    out = moe_experts(x, *inputs[1:4], make_plan(CASE, inputs.pairs))
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_op_schemas_and_fake_kernels_are_consistent() -> None:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)
    plan = make_plan(CASE, inputs.pairs)
    tensors = [t.clone().requires_grad_() for t in inputs[:4]]
    arguments = (
        *tensors,
        plan.token_idx_R,
        plan.score_R.clone().requires_grad_(),
        plan.expert_offsets,
        plan.token_offsets,
        plan.token_rows_R,
        plan.rows_per_token,
        "swiglu",
        "torch",
        True,
        False,
    )
    torch.library.opcheck(torch.ops.sonicmoe.experts.default, arguments)


def test_compiled_as_one_graph_gives_the_same_gradients() -> None:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)

    def loss(x, w1, w3, w2, plan):
        return (moe_experts(x, w1, w3, w2, plan) * inputs.dout_TD).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs[:4]]
        run(*leaves, make_plan(CASE, inputs.pairs)).backward()
        results.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_what_backward_keeps_may_be_offloaded() -> None:
    inputs = convert(make_inputs(EDGES), dtype=torch.bfloat16)
    plan = make_plan(EDGES, inputs.pairs)
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    elsewhere: list[torch.Tensor] = []

    def offload(kept: torch.Tensor) -> int:
        elsewhere.append(kept.detach().clone())
        return len(elsewhere) - 1

    expected = torch.autograd.grad(moe_experts(*leaves, plan), leaves, inputs.dout_TD)
    with torch.autograd.graph.saved_tensors_hooks(offload, elsewhere.__getitem__):
        out = moe_experts(*leaves, plan)
    got = torch.autograd.grad(out, leaves, inputs.dout_TD)
    assert elsewhere
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_repeats_are_bitwise_equal() -> None:
    inputs = convert(make_inputs(EDGES), dtype=torch.bfloat16)
    plan = make_plan(EDGES, inputs.pairs)
    first, second = (moe_experts(*inputs[:4], plan) for _ in range(2))
    assert torch.equal(first, second)


def _arguments() -> SimpleNamespace:
    inputs = convert(make_inputs(CASE), dtype=torch.float32)
    x, w1, w3, w2 = inputs[:4]
    plan = make_plan(CASE, inputs.pairs)
    return SimpleNamespace(x=x, w1=w1, w3=w3, w2=w2, plan=plan, options={})


def _wrong_plan(a: SimpleNamespace) -> None:
    a.x = torch.cat((a.x, a.x))


def _to_integers(a: SimpleNamespace) -> None:
    for name in ("x", "w1", "w3", "w2"):
        setattr(a, name, getattr(a, name).int())


WRONG_CALLS = {
    "x must be": lambda a: setattr(a, "x", a.x[None]),
    "w2 is": lambda a: setattr(a, "w2", a.w2.transpose(1, 2)[:, :, :8]),
    "w1 is torch.float64": lambda a: setattr(a, "w1", a.w1.double()),
    "the plan routes 256 tokens": _wrong_plan,
    "activation 'tanh' is unknown; accepted: swiglu": lambda a: a.options.update(activation="tanh"),
    "needs w3": lambda a: setattr(a, "w3", None),
    "has no gate": lambda a: a.options.update(activation="relu2"),
    "backend 'fpga' is unknown": lambda a: a.options.update(backend="fpga"),
    "backend 'hopper' cannot run here": lambda a: a.options.update(backend="hopper"),
    "x is torch.int32": lambda a: [
        setattr(a, n, getattr(a, n).int()) for n in ("x", "w1", "w3", "w2")
    ],
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls_say_what_is_accepted(message: str) -> None:
    a = _arguments()
    WRONG_CALLS[message](a)
    with pytest.raises(ValueError, match=message):
        moe_experts(a.x, a.w1, a.w3, a.w2, a.plan, **a.options)
