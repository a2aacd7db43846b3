"""Validation: what it logs, in every layout, and that training does not notice it."""

import math
from pathlib import Path
from typing import Any

import pytest

from sonicmoe_titan.validate import SonicValidator
from tests.titan import validate_scenarios as scenarios
from tests.titan.ranks import run_on_ranks

LOSS = "validation_metrics/loss"
PERPLEXITY = "validation_metrics/perplexity"
BITS_PER_BYTE = "validation_metrics/bits_per_byte"


@pytest.fixture(scope="module")
def one_rank(shared_folder: Path) -> dict[str, Any]:
    return run_on_ranks(scenarios.one_rank, ranks=1, base=shared_folder)[0]


@pytest.fixture(scope="module")
def two_ranks(shared_folder: Path, one_rank: dict[str, Any]) -> list[dict[str, Any]]:
    return run_on_ranks(scenarios.two_ranks, ranks=2, base=shared_folder)


def test_training_does_not_notice_a_validation(one_rank: dict) -> None:
    plain, validated = one_rank["stochastic"], one_rank["stochastic, validated"]
    assert validated.losses == plain.losses
    assert validated.digest == plain.digest
    assert all(LOSS in metrics for metrics in validated.logged.values())
    assert not any(LOSS in metrics for metrics in plain.logged.values())


def test_loss_is_that_of_plain_top_k_on_the_held_out_text(one_rank: dict) -> None:
    by_hand = one_rank["by hand"]
    assert by_hand["logged"][0][LOSS] == pytest.approx(by_hand["loss"], rel=1e-6)
    assert by_hand["loss with rounding"] != pytest.approx(by_hand["loss"], rel=1e-4)


def test_perplexity_and_bits_per_byte_follow_from_the_loss(one_rank: dict) -> None:
    by_hand = one_rank["by hand"]
    logged = by_hand["logged"][0]
    assert logged[PERPLEXITY] == pytest.approx(math.exp(logged[LOSS]), rel=1e-12)
    assert logged[BITS_PER_BYTE] == pytest.approx(by_hand["bits per byte"], rel=1e-6)


def test_every_validation_reads_the_same_batches(one_rank: dict) -> None:
    first, second = one_rank["by hand"]["logged"]
    assert first[LOSS] == second[LOSS]


def test_statistics_counters_and_mode_are_left_alone(one_rank: dict) -> None:
    by_hand = one_rank["by hand"]
    assert by_hand["statistics kept"]
    assert by_hand["counter kept"]
    assert by_hand["train mode"]


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2, chunked loss", "ep2", "tp2", "pp2"])
def test_layouts_agree(layout: str, one_rank: dict, two_ranks: list) -> None:
    alone = one_rank["alone"].logged
    # Only the last pipeline stage knows the loss.
    logged = two_ranks[1 if layout == "pp2" else 0][layout].logged
    assert list(logged) == [2, 3]
    for step in logged:
        for key in (LOSS, PERPLEXITY, BITS_PER_BYTE):
            assert logged[step][key] == pytest.approx(alone[step][key], rel=2e-5), (step, key)


def test_illegal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"validator\.steps must be at least 1, got -1"):
        SonicValidator.Config(steps=-1)
    with pytest.raises(ValueError, match=r"validator\.freq must be at least 1, got 0"):
        SonicValidator.Config(freq=0)
