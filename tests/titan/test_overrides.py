"""The command line's override puts SonicMoE into TorchTitan's own models."""

import pytest
from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.moe import MoE
from torchtitan.models.deepseek_v3 import deepseekv3_configs
from torchtitan.models.gpt_oss import gptoss_configs
from torchtitan.models.qwen3 import qwen3_configs
from torchtitan.trainer import Trainer

from sonicmoe_titan.moe import SonicMoE
from sonicmoe_titan.selective_ac import SonicSelectiveAC
from tests.titan.block_runs import results, succeeded

MODELS = {
    "qwen3": (qwen3_configs, "debugmodel_moe"),
    "deepseek_v3": (deepseekv3_configs, "debugmodel"),
    "gpt_oss": (gptoss_configs, "debugmodel"),
}


def model_config(name):
    configs, flavor = MODELS[name]
    return configs[flavor](attn_backend="flex", moe_comm_backend="standard")


def override(config, *tokens):
    return apply_overrides(OverrideConfig(imports=parse_cli_imports(list(tokens))), config)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_every_moe_block_of_a_stock_model_is_replaced(name):
    config = model_config(name)
    stock = [cfg for _, cfg, _, _ in config.traverse(MoE.Config)]
    override(config, 'sonicmoe_titan.overrides.sonic_moe={"router": "token_rounding"}')
    blocks = [cfg for _, cfg, _, _ in config.traverse(MoE.Config)]
    assert len(blocks) == len(stock) > 0
    for block, original in zip(blocks, stock, strict=True):
        assert type(block) is SonicMoE.Config
        assert block.routed_experts.router == "token_rounding"
        assert block.router.score_func == original.router.score_func
        assert block.load_balance_coeff == original.load_balance_coeff
        assert block.shared_experts is original.shared_experts


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_stock_models_lose_with_the_override_what_they_lose_without(name, shared_folder):
    one = results(1, shared_folder)
    (stock,), (ours,) = one[f"{name}, stock"], one[f"{name}, topk"]
    assert succeeded(ours) == pytest.approx(succeeded(stock), rel=1e-5)
    assert ours[1] < ours[0]


def test_token_rounding_trains_a_stock_model_on_other_rows(shared_folder):
    one = results(1, shared_folder)
    (stock,), (rounded,) = one["deepseek_v3, stock"], one["deepseek_v3, token rounding"]
    assert succeeded(rounded) != pytest.approx(stock, rel=1e-5)
    assert rounded == pytest.approx(stock, rel=1e-2)


def test_selective_checkpointing_learns_to_keep_the_experts():
    config = Trainer.Config(activation_checkpoint=SelectiveAC.Config(determinism_check="none"))
    override(config, "sonicmoe_titan.overrides.sonic_selective_ac")
    assert type(config.activation_checkpoint) is SonicSelectiveAC.Config
    assert config.activation_checkpoint.determinism_check == "none"
    saved = config.activation_checkpoint.build().get_save_ops()
    assert any("sonicmoe" in str(op) for op in saved)
    assert saved > SelectiveAC.Config().build().get_save_ops()


def test_biased_experts_are_refused():
    with pytest.raises(ValueError, match="GptOss"):
        override(model_config("gpt_oss"), "sonicmoe_titan.overrides.sonic_moe")


def test_an_illegal_value_is_refused():
    with pytest.raises(ValueError, match="accepted: topk, token_rounding"):
        override(
            model_config("qwen3"), 'sonicmoe_titan.overrides.sonic_moe={"router": "roundabout"}'
        )


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="roter"):
        override(model_config("qwen3"), 'sonicmoe_titan.overrides.sonic_moe={"roter": "topk"}')
