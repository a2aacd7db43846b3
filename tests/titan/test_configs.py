"""The runs of the paper: every file checks, with the paper's sizes and rows per expert."""

from pathlib import Path

import pytest
import torch
from torchtitan.models.common.moe import MoE

from sonicmoe_titan.check import check_run
from sonicmoe_titan.config_registry import CONFIGS, RECIPES
from sonicmoe_titan.model import decoder_config
from sonicmoe_titan.model_args import ModelArgs, parameter_counts
from sonicmoe_titan.moe import SonicMoE
from sonicmoe_titan.run_sizes import microbatch_tokens
from sonicmoe_titan.toml_config import load_config

FILES = sorted(CONFIGS.glob("*.toml"))
PAPER_PARAMETERS = {
    "moe_0p5b_k8": 0.5e9,
    "moe_0p5b_k2": 0.5e9,
    "moe_1p8b_k8": 1.8e9,
    "moe_1p4b_k8": 1.4e9,
    "moe_1p4b_k2": 1.4e9,
    "moe_7b": 7e9,
}
# layers * 3 d n K of the experts that a token passes, + attention 4 d^2 a layer, + tied embedding
PAPER_ACTIVE_PARAMETERS = {
    "moe_0p5b_k8": 12 * (3 * 768 * 256 * 8 + 4 * 768**2) + 50304 * 768,
    "moe_0p5b_k2": 12 * (3 * 768 * 256 * 2 + 4 * 768**2) + 50304 * 768,
    "moe_1p8b_k8": 12 * (3 * 768 * 256 * 8 + 4 * 768**2) + 50304 * 768,
    "moe_1p4b_k8": 18 * (3 * 768 * 256 * 8 + 4 * 768**2) + 50304 * 768,
    "moe_1p4b_k2": 18 * (3 * 768 * 256 * 2 + 4 * 768**2) + 50304 * 768,
    "moe_7b": 40 * (3 * 1536 * 256 * 8 + 4 * 1536**2) + 50304 * 1536,
}
PAPER_ROWS_PER_EXPERT = {  # tables 2 and 9
    "moe_0p5b_k8": 4096,
    "moe_0p5b_k2": 512,
    "moe_1p8b_k8": 512,
    "moe_1p4b_k8": 2048,
    "moe_1p4b_k2": 512,
    "moe_7b": 24576 * 8 // 128,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_loads_and_checks(path: Path) -> None:
    config = load_config(path)
    check_run(config, num_processes=64 if path.stem == "moe_7b" else 1)
    assert config.dump_folder == f"./outputs/{path.stem}"
    assert "disable_cuda_graphs =" in path.read_text(), "a recipe says whether graphs are captured"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_built_model_has_the_counted_parameters(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = config.model_spec.model.build()
    parameters = dict(model.named_parameters())
    experts = sum(p.numel() for name, p in parameters.items() if "routed_experts" in name)
    total = sum(p.numel() for p in parameters.values())
    idle = experts * (config.model.num_experts - config.model.top_k) // config.model.num_experts
    assert parameter_counts(config.model) == (total, total - idle)


@pytest.mark.parametrize("name", PAPER_PARAMETERS)
def test_sizes_are_the_papers(name: str) -> None:
    total, active = parameter_counts(load_config(CONFIGS / f"{name}.toml").model)
    assert total == pytest.approx(PAPER_PARAMETERS[name], rel=0.08)
    assert active == pytest.approx(PAPER_ACTIVE_PARAMETERS[name], rel=0.08)


@pytest.mark.parametrize("name", PAPER_ROWS_PER_EXPERT)
def test_microbatch_gives_an_expert_the_papers_rows(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    model = config.model
    rows = microbatch_tokens(config) * model.top_k / model.num_experts
    assert rows == PAPER_ROWS_PER_EXPERT[name]
    assert rows / model.rounding_tile >= 2  # below that rounding costs quality (table 7)


@pytest.mark.parametrize("name", PAPER_PARAMETERS)
def test_router_is_swapped_by_one_key(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml", ["--model.router", "token_rounding"])
    experts = config.model_spec.model.layers[-1].moe.routed_experts
    assert (experts.router, experts.rounding, experts.rounding_tile) == (
        "token_rounding",
        "nearest",
        128,
    )


def test_shared_expert_variant_of_the_7b_has_6p9_billion_parameters() -> None:
    variant = ["--model.shared_expert_dim=1024", "--model.vocab_size=100352"]
    config = load_config(CONFIGS / "moe_7b.toml", [*variant, "--model.no-tie_embeddings"])
    assert parameter_counts(config.model)[0] == pytest.approx(6.9e9, rel=0.01)


def test_7b_runs_as_replicated_nodes_of_sharded_gpus() -> None:
    config = load_config(CONFIGS / "moe_7b.toml")
    parallelism = config.parallelism
    assert parallelism.data_parallel_replicate_degree == parallelism.data_parallel_shard_degree == 8
    assert config.training.seq_len == 4096 and config.training.local_batch_size == 6


def test_debug_configuration_is_small_but_whole() -> None:
    config = load_config(CONFIGS / "debug.toml")
    model = config.model
    assert model.num_layers >= 3 and model.num_experts >= 16 and model.aux_loss_coeff > 0
    assert model.router == "token_rounding" and config.validator.enable
    rows = microbatch_tokens(config) * model.top_k / model.num_experts
    assert rows / model.rounding_tile >= 2


def test_every_file_is_a_recipe() -> None:
    assert set(RECIPES) == {"base", *(path.stem for path in FILES)}


def _tiny_args(**options: object) -> ModelArgs:
    sizes = {"num_layers": 1, "dim": 64, "num_heads": 2, "expert_dim": 32, "num_experts": 8}
    return ModelArgs(**sizes, top_k=2, vocab_size=128, **options)  # pyrefly: ignore[bad-argument-type]


def test_the_stock_block_has_our_parameters():
    ours, stock = (
        decoder_config(_tiny_args(moe=block), seq_len=16) for block in ("sonic", "stock")
    )
    assert type(stock.layers[0].moe) is MoE.Config
    assert type(ours.layers[0].moe) is SonicMoE.Config
    names = [{n: p.shape for n, p in c.build().named_parameters()} for c in (ours, stock)]
    assert names[0] == names[1]


@pytest.mark.parametrize("option", [{"router": "token_rounding"}, {"z_loss_coeff": 1e-3}])
def test_the_stock_block_refuses_what_it_lacks(option):
    with pytest.raises(ValueError, match=rf"model\.{next(iter(option))} = .*model.moe = 'stock'"):
        _tiny_args(moe="stock", **option).validate()
