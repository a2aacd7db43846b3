"""The MoE block equals TorchTitan's for every router style and refuses what it cannot stand for."""

from dataclasses import dataclass

import pytest
import torch
from torchtitan.config import derive
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import (
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    LocalTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
    TorchAOTokenDispatcher,
)
from torchtitan.models.gpt_oss import gptoss_configs

from sonicmoe_titan import moe
from sonicmoe_titan.conversion import to_sonic
from tests.titan.moe_blocks import (
    STYLES,
    E,
    F,
    K,
    batch,
    build_pair,
    grouped_experts_in_float32,
    stock_config,
)


def differentiate(block, x_BLD):
    x_BLD = x_BLD.clone().requires_grad_()
    out_BLD = block(x_BLD)
    gradient = torch.randn(out_BLD.shape, generator=torch.Generator().manual_seed(2))
    out_BLD.backward(gradient)
    return {
        "out": out_BLD,
        "x": x_BLD.grad,
        **{name: parameter.grad for name, parameter in block.named_parameters()},
    }


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("style", STYLES)
def test_output_and_gradients_equal_stock(style, monkeypatch):
    monkeypatch.setattr(GroupedExperts, "forward", grouped_experts_in_float32)
    stock, ours = build_pair(style)
    assert_close(differentiate(ours, batch()), differentiate(stock, batch()))
    assert torch.equal(ours.tokens_per_expert_E, stock.tokens_per_expert_E)


@pytest.mark.parametrize("style", STYLES)
def test_state_dict_has_stock_names_and_shapes(style):
    stock, ours = build_pair(style)
    shapes = {name: value.shape for name, value in stock.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_routes_token_choice_whatever_the_router(style):
    _, rounding = build_pair(style, router="token_rounding", rounding_tile=16)
    _, plain = build_pair(style)
    assert not torch.allclose(rounding(batch()), plain(batch()), atol=1e-4)
    rounding.eval()
    plain.eval()
    assert torch.equal(rounding(batch()), plain(batch()))


def test_rounding_respects_the_groups_a_token_may_use():
    _, block = build_pair("deepseek_v3", router="token_rounding", rounding="up", rounding_tile=8)
    plans = []
    original = block.routed_experts._plan
    block.routed_experts._plan = lambda *args: plans.append((original(*args), args)) or plans[-1][0]
    block(batch())
    ((plan, (_, _, scores_TE)),) = plans
    rows_E = plan.expert_offsets.diff()
    expert_R = torch.repeat_interleave(torch.arange(E), rows_E)
    token_R = plan.token_idx_R[: len(expert_R)].long()
    assert len(expert_R) > batch().shape[0] * batch().shape[1] * K
    assert not scores_TE[token_R, expert_R].isneginf().any()
    assert scores_TE.isneginf().any()


def test_weights_are_cast_to_the_dtype_of_the_tokens():
    _, block = build_pair("qwen3")
    assert block(batch().bfloat16()).dtype == torch.bfloat16


def test_a_fixed_top_k_dispatcher_moves_the_tokens_for_our_experts(monkeypatch):
    """Stock's local dispatcher stands in for DeepEP and the others, which need GPUs."""
    _, ours = build_pair("qwen3")
    expected = differentiate(ours, batch())
    monkeypatch.setattr(moe, "FIXED_TOP_K_DISPATCHERS", (LocalTokenDispatcher,))
    _, dispatched = build_pair("qwen3")
    called = []
    combine = dispatched.routed_experts.token_dispatcher.combine
    dispatched.routed_experts.token_dispatcher.combine = lambda *args: (
        called.append(True) or combine(*args)
    )
    assert_close(differentiate(dispatched, batch()), expected)
    assert called
    assert torch.equal(dispatched.stats.values_V, ours.stats.values_V)
    assert torch.equal(dispatched.stats.load_E, ours.stats.load_E)


@pytest.mark.parametrize(
    "dispatcher",
    [DeepEPTokenDispatcher, HybridEPTokenDispatcher, MinimalAsyncEPTokenDispatcher],
)
def test_fixed_top_k_dispatchers_are_refused_for_token_rounding(dispatcher):
    config = stock_config("qwen3")
    experts = config.routed_experts
    experts.token_dispatcher = derive(experts.token_dispatcher, dispatcher.Config)
    to_sonic(config, router="topk")
    with pytest.raises(ValueError, match="exactly top_k experts per token"):
        to_sonic(config, router="token_rounding")


def test_a_padding_dispatcher_is_refused():
    config = stock_config("qwen3")
    experts = config.routed_experts
    experts.token_dispatcher = derive(
        experts.token_dispatcher, TorchAOTokenDispatcher.Config, pad_multiple=16
    )
    with pytest.raises(ValueError, match="TorchAOTokenDispatcher"):
        to_sonic(config)


def test_quantised_experts_are_refused():
    class QuantisedExperts(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

    config = stock_config("qwen3")
    experts = config.routed_experts
    experts.inner_experts = derive(experts.inner_experts, QuantisedExperts.Config)
    with pytest.raises(ValueError, match=r"inner_experts is a .*QuantisedExperts"):
        to_sonic(config)


def test_biased_experts_are_refused():
    model = gptoss_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    with pytest.raises(ValueError, match="GptOss"):
        to_sonic(model.layers[0].moe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "roundabout"}, "router is 'roundabout'; accepted: topk, token_rounding"),
        ({"rounding": "sideways"}, "rounding is 'sideways'; accepted: nearest"),
        ({"backend": "cuda"}, "backend is 'cuda'; accepted: auto, hopper, torch"),
        ({"softmax_order": "during"}, "accepted: before, after"),
        ({"rounding_tile": 0}, "rounding_tile is 0"),
    ],
)
def test_illegal_options_name_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        to_sonic(stock_config("qwen3"), **options)


def test_hopper_backend_without_a_hopper_gpu_is_refused():
    block = to_sonic(stock_config("qwen3"), backend="hopper").build()
    with pytest.raises(ValueError, match="hopper"):
        block(batch())


def test_conversion_leaves_the_stock_configuration_alone():
    config = stock_config("deepseek_v3")
    before = repr(config)
    sonic = to_sonic(config, router="token_rounding")
    assert repr(config) == before
    assert sonic.routed_experts.inner_experts.hidden_dim == F
    assert sonic.shared_experts is config.shared_experts
