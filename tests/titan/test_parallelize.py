"""The weights that several processes draw together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.titan.ranks import run_on_ranks
from tests.titan.tiny import config

LAYOUTS = {
    "fsdp2": {},
    "ep2": {"expert_parallel_degree": 2},
    "ep2, partial_dtensor": {"expert_parallel_degree": 2, "spmd_backend": "partial_dtensor"},
    "hsdp 2x1": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
}


def initial_weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every parameter before the first step, as this rank sees it when it is gathered."""
    weights = {}
    for layout, parallelism in LAYOUTS.items():
        trainer = config(folder, parallelism=parallelism).build()
        weights[layout] = {
            name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
            for name, value in trainer.model_parts[0].named_parameters()
        }
    return weights


@pytest.fixture(scope="module")
def weights(shared_folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks(initial_weights, ranks=2, base=shared_folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_two_experts_and_no_two_tokens_start_equal(weights: list, layout: str) -> None:
    for name, value in weights[0][layout].items():
        if "norm" not in name:
            rows = value.flatten(1)
            assert len(rows.unique(dim=0)) == len(rows), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_start_from_the_same_model(weights: list, layout: str) -> None:
    for name, value in weights[0][layout].items():
        assert torch.equal(weights[1][layout][name], value), name


def divide_factors(folder: Path) -> set[float | None]:
    """What FSDP divides gradients by."""
    model = config(folder).build().model_parts[0]
    return {
        group.gradient_divide_factor
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    }


@pytest.mark.parametrize(("ranks", "factor"), [(1, None), (2, 1.0)])
def test_one_rank_alone_does_not_divide_its_gradients_by_one(
    shared_folder: Path, ranks: int, factor: float | None
) -> None:
    base = shared_folder / f"{ranks} ranks"
    for found in run_on_ranks(divide_factors, ranks=ranks, base=base):
        assert found == {factor}
