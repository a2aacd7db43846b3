"""The order in which the Hopper backend runs its kernels, with the reference in place of each one.

What the kernels compute is tested on a GPU; here every launch writes what the reference computes
from the operands it was handed, so a wrong operand, a missing launch or a buffer used twice shows.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from sonicmoe_kernels import hopper, hopper_experts, ops, reference
from sonicmoe_kernels.activations import ACTIVATIONS, get_activation
from sonicmoe_kernels.moe import moe_experts

from tests.cases import Case, make_inputs, make_plan

CASE = Case(40, 64, 128, E=4, K=2, routing="zipf")
DSCORE_PARTS = 3


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    """Each launch calls the reference on the operands it gets and writes into its outputs."""

    def plan_of(index, offsets, score=None):
        return reference.PlanTensors(index, score, offsets, None, None)

    def rows(offsets):  # only the number of rows matters to kernels that gather nothing
        return torch.zeros(int(offsets[-1]), dtype=torch.int32)

    def up(x, index, offsets, w1, w3, h, a, *, activation):
        h.copy_(reference.up(x, w1, w3, plan_of(index, offsets)))
        a.copy_(get_activation(activation).forward(h))

    def down(a, offsets, w2, y, *, activation):
        y.copy_(reference.down(a, w2, plan_of(rows(offsets), offsets)))

    def d_hidden(dout, index, offsets, w2, score, h, dh, a, dscore, *, activation):
        plan = plan_of(index, offsets, score)
        results = reference.d_hidden(dout, w2, h.clone(), plan, activation=activation)
        dh.data.copy_(results[0])  # as a kernel writes: unseen by autograd
        a.copy_(results[1])
        dscore.copy_((results[2] / DSCORE_PARTS).expand(DSCORE_PARTS, -1))

    def d_input_rows(dh, offsets, w1, w3, dx, *, activation):
        dx.copy_(reference.d_input_rows(dh, w1, w3, plan_of(rows(offsets), offsets)))

    def d_weight2(dout, index, offsets, a, dw2):
        dw2.copy_(reference.d_weight2(dout, a, plan_of(index, offsets)))

    def d_weight13(x, index, offsets, dh, dw1, dw3):
        results = reference.d_weight13(dh, x, plan_of(index, offsets))
        for out, result in zip((dw1, dw3), results, strict=False):
            out.copy_(result)

    def aggregate(y, token_rows, token_offsets, out, *, rows_per_token, score_R=None, add_TD=None):
        ends = torch.tensor([0, len(token_rows)], dtype=torch.int32)
        plan = reference.PlanTensors(token_rows, score_R, ends, token_offsets, token_rows)
        weighted = score_R is not None
        out.copy_(reference.aggregate(y, plan, weighted=weighted, rows_per_token=rows_per_token))

    for fake in (up, down, d_hidden, d_input_rows, d_weight2, d_weight13, aggregate):
        monkeypatch.setattr(hopper, fake.__name__, fake)
    monkeypatch.setattr(hopper, "dscore_parts", lambda w2, activation: DSCORE_PARTS)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def prepare(case):
    gated = get_activation(case.activation).gated
    inputs = make_inputs(case, gated=gated, dtype=torch.float64)
    pairs = inputs.pairs._replace(score_P=inputs.pairs.score_P.double())
    plan = make_plan(case, pairs)
    tensors = reference.PlanTensors(
        plan.token_idx_R, plan.score_R, plan.expert_offsets, plan.token_offsets, plan.token_rows_R
    )
    keywords = {"activation": case.activation, "rows_per_token": plan.rows_per_token}
    return inputs, tensors, keywords


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_chain_the_kernels_as_the_reference_does(activation):
    case = dataclasses.replace(CASE, activation=activation)
    (x, w1, w3, w2, dout, _), plan, keywords = prepare(case)
    out, h = hopper_experts.forward(x, w1, w3, w2, plan, **keywords)
    expected_out, expected_h = reference.forward(x, w1, w3, w2, plan, **keywords)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(h, expected_h)
    got = hopper_experts.backward(dout, x, w1, w3, w2, h, plan, **keywords)
    expected = reference.backward(dout, x, w1, w3, w2, h, plan, **keywords)
    for name, mine, theirs in zip(expected._fields, got, expected, strict=True):
        if name == "dscore_R":  # partial sums are fp32 whatever the operands are
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
        elif theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs)


def test_h_changes_only_when_it_may_be_overwritten():
    (x, w1, w3, w2, dout, _), plan, keywords = prepare(CASE)
    _, h = hopper_experts.forward(x, w1, w3, w2, plan, **keywords)
    before = h.clone()
    apart = hopper_experts.backward(dout, x, w1, w3, w2, h, plan, **keywords)
    assert torch.equal(h, before)
    over = hopper_experts.backward(dout, x, w1, w3, w2, h, plan, **keywords, overwrite_h=True)
    assert not torch.equal(h, before)
    assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))


def test_a_second_backward_through_an_overwritten_h_raises_torchs_own_error(monkeypatch):
    monkeypatch.setattr(ops, "_resolve", lambda backend, x, w1: "hopper")
    inputs = make_inputs(CASE, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs[:4]]
    for inplace_dh in (False, True):
        out = moe_experts(*leaves, make_plan(CASE, inputs.pairs), inplace_dh=inplace_dh)
        torch.autograd.grad(out, leaves, inputs.dout_TD, retain_graph=True)
        refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
        with refused if inplace_dh else contextlib.nullcontext():
            torch.autograd.grad(out, leaves, inputs.dout_TD)


@pytest.mark.parametrize("unwanted", ["needs_dx", "needs_dw13", "needs_dw2"])
def test_gradients_nobody_needs_are_not_computed(unwanted, monkeypatch):
    launches = {"needs_dx": "d_input_rows", "needs_dw13": "d_weight13", "needs_dw2": "d_weight2"}
    monkeypatch.setattr(hopper, launches[unwanted], None)  # launching it would fail
    (x, w1, w3, w2, dout, _), plan, keywords = prepare(CASE)
    _, h = reference.forward(x, w1, w3, w2, plan, **keywords)
    got = hopper_experts.backward(dout, x, w1, w3, w2, h, plan, **keywords, **{unwanted: False})
    expected = reference.backward(dout, x, w1, w3, w2, h, plan, **keywords, **{unwanted: False})
    assert [g is None for g in got] == [g is None for g in expected]


def test_no_rows_at_all_give_zeros_without_a_launch(monkeypatch):
    for name in ("up", "down", "aggregate", "d_hidden"):
        monkeypatch.setattr(hopper, name, None)
    (x, w1, w3, w2, dout, _), plan, keywords = prepare(
        dataclasses.replace(CASE, routing="all_empty")
    )
    assert plan.token_idx_R.shape[0] == 0
    out, h = hopper_experts.forward(x, w1, w3, w2, plan, **keywords)
    gradients = hopper_experts.backward(dout, x, w1, w3, w2, h, plan, **keywords)
    assert out.count_nonzero() == 0 and out.shape == x.shape
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_tensors_that_tma_cannot_read_are_copied():
    storage = torch.arange(65, dtype=torch.bfloat16)
    aligned, odd = storage[:64], storage[1:]
    assert hopper_experts._aligned(aligned) is aligned
    copy = hopper_experts._aligned(odd)
    assert copy.data_ptr() % hopper_experts.TMA_ALIGN == 0 and torch.equal(copy, odd)
