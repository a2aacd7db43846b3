"""The router: float32 on every device, stock's choices, statistics, and clear errors."""

import pytest
import torch

from sonicmoe_titan.aux_loss import set_loss_scale
from sonicmoe_titan.router import Float32Gate
from tests.titan.moe_blocks import STYLES, B, D, E, K, L, batch, build_pair


def test_gate_multiplies_bfloat16_inputs_in_float32():
    gate = Float32Gate.Config(in_features=D, out_features=E).build().bfloat16()
    torch.nn.init.normal_(gate.weight)
    x_BLD = batch().bfloat16()
    logits_BLE = gate(x_BLD)
    assert logits_BLE.dtype == torch.float32
    expected = x_BLD.double() @ gate.weight.double().T
    torch.testing.assert_close(logits_BLE.double(), expected, rtol=1e-6, atol=1e-5)


def test_gate_gradients_equal_those_of_a_float32_linear():
    gate = Float32Gate.Config(in_features=D, out_features=E, bias=True).build()
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    gradients = []
    for run in (gate, lambda x: torch.nn.functional.linear(x, gate.weight, gate.bias)):
        x_BLD = batch().requires_grad_()
        leaves = (x_BLD, gate.weight, gate.bias)
        gradients.append(torch.autograd.grad(run(x_BLD).square().sum(), leaves))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)


def test_gate_keeps_no_float32_copy_of_its_input():
    gate = Float32Gate.Config(in_features=D, out_features=E).build().bfloat16()
    torch.nn.init.normal_(gate.weight)
    kept = []
    x_BLD = batch().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate(x_BLD)
    assert {t.data_ptr() for t in kept} <= {x_BLD.data_ptr(), gate.weight.data_ptr()}


@pytest.mark.parametrize("style", STYLES)
def test_choices_and_scores_equal_stock(style):
    stock, ours = build_pair(style, router="token_rounding")
    expected_scores, expected_ids, _ = stock.router(batch(), stock.expert_bias_E)
    scores, ids, all_scores = ours.router(batch(), ours.expert_bias_E)
    dense = torch.zeros(B, L, E).scatter(-1, ids, scores)
    expected = torch.zeros(B, L, E).scatter(-1, expected_ids, expected_scores)
    torch.testing.assert_close(dense, expected)
    masked = all_scores.isneginf()
    assert masked.any().item() == (style == "deepseek_v3")
    assert not masked.gather(-1, ids).any()


def test_all_scores_are_computed_only_where_somebody_reads_them():
    for options, training, wanted in (
        ({}, True, False),
        ({"router": "token_rounding"}, True, True),
        ({"router": "token_rounding"}, False, False),
        ({"aux_loss_coeff": 0.1}, True, True),
        ({"aux_loss_coeff": 0.1}, False, False),
    ):
        _, block = build_pair("qwen3", **options)
        set_loss_scale([block], 0.5)
        _, _, all_scores = block.train(training).router(batch())
        assert all_scores.shape == (B, L, E)
        assert all_scores.bool().all().item() is wanted


@pytest.mark.parametrize("style", ["qwen3", "unnormalised"])
def test_forced_balance_gives_stock_s_round_robin(style):
    stock, ours = build_pair(style)
    stock.router._debug_force_load_balance = ours.router._debug_force_load_balance = True
    expected_scores, expected_ids, _ = stock.router(batch())
    scores, ids, _ = ours.router(batch())
    assert torch.equal(ids, expected_ids)
    assert torch.bincount(ids.flatten()).tolist() == [B * L * K // E] * E
    torch.testing.assert_close(scores, expected_scores)


def test_auxiliary_losses_without_a_scale_are_refused():
    _, block = build_pair("qwen3", aux_loss_coeff=0.1)
    with pytest.raises(ValueError, match="set_loss_scale"):
        block(batch())
    block.eval()
    block(batch())  # evaluation has no auxiliary loss


@pytest.mark.parametrize("style", STYLES)
def test_auxiliary_losses_leave_the_output_alone_and_reach_the_gate(style):
    _, plain = build_pair(style)
    _, block = build_pair(style, aux_loss_coeff=0.1, z_loss_coeff=0.1)
    set_loss_scale([block], 0.5)
    outputs, gradients = [], []
    for module in (plain, block):
        out_BLD = module(batch())
        out_BLD.sum().backward()
        outputs.append(out_BLD)
        gradients.append(module.router.gate.weight.grad)
    assert torch.equal(*outputs)
    assert gradients[1].isfinite().all()
    assert not torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_gate_gradient_is_that_of_main_loss_plus_scaled_auxiliary_losses(style):
    _, plain = build_pair(style)
    _, block = build_pair(style, aux_loss_coeff=0.3, z_loss_coeff=0.2)
    set_loss_scale([block], 0.5)
    block(batch()).sum().backward()

    logits_TE = plain.router.gate(batch()).flatten(0, 1)
    if plain.router.score_func == "sigmoid":
        raw_TE = logits_TE.sigmoid()
        probability_TE = raw_TE / raw_TE.sum(1, keepdim=True)
    else:
        probability_TE = logits_TE.softmax(1)
    _, ids_BLK, _ = plain.router(batch(), plain.expert_bias_E)
    fraction_E = torch.bincount(ids_BLK.flatten(), minlength=E) / (B * L * K)
    balance = E * (fraction_E * probability_TE.mean(0)).sum()
    z = logits_TE.exp().sum(1).log().square().mean()
    (plain(batch()).sum() + 0.5 * (0.3 * balance + 0.2 * z)).backward()
    torch.testing.assert_close(
        block.router.gate.weight.grad, plain.router.gate.weight.grad, rtol=1e-4, atol=1e-4
    )
