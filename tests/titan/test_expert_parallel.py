"""Expert parallelism: right for every routing, each token sent once, no collective repeated."""

import pytest
import torch
import torch.distributed as dist
from sonicmoe_kernels.routing import RoutingPlan

from sonicmoe_titan.expert_parallel import expert_parallel
from tests.titan.block_runs import failed, results, succeeded
from tests.titan.expert_parallel_ranks import TILE

A_LAYER = 8
"""All-to-alls of one layer and step: counts, x, pairs, scores, y; dy, dx, dscores."""


@pytest.fixture(scope="module")
def two(shared_folder):
    return results(2, shared_folder)


@pytest.mark.parametrize(
    "case",
    [
        "uneven",
        "all_to_one_rank",
        "one_local_expert",
        "one_expert_per_rank_in_use",
        "sent_again_in_backward",
        "a_rank_without_tokens_of_its_own",
    ],
)
def test_output_and_gradients_equal_all_experts_on_one_rank(two, case):
    for rank, deviations in enumerate(two[case]):
        for name, deviation in succeeded(deviations).items():
            assert deviation < 1e-12, f"rank {rank}, {name}"


def test_a_token_travels_once_to_each_rank_that_serves_it(two):
    for seen in two["rows_travel_once"]:
        assert succeeded(seen)["received"] == seen["expected"]


def test_rounded_tiles_are_whole_at_the_receiver(two):
    for rows_e in two["whole_tiles_at_the_receiver"]:
        assert any(succeeded(rows_e))
        assert all(rows % TILE == 0 for rows in rows_e), rows_e


def test_redispatch_keeps_no_received_token(two):
    for kept in two["saved_bytes"]:
        assert succeeded(kept)["once"] > 0
        assert kept["again"] == 0


@pytest.mark.parametrize("name", ["redispatch_x, selective", "redispatch_x, compiled"])
def test_redispatch_with_another_way_to_save_memory_is_refused(two, name):
    for result in two[name]:
        assert "ValueError: model.redispatch_x = true with" in failed(result)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ep", A_LAYER),
        ("ep, partial_dtensor", A_LAYER),
        ("ep, selective", A_LAYER),
        ("ep, redispatch_x", A_LAYER + 1),
        ("ep, full", 2 * A_LAYER - 3),
    ],
)
def test_number_of_all_to_alls(two, name, expected):
    """Selective checkpointing repeats none; full checkpointing all five of the forward pass."""
    for result in two[name]:
        layers, steps = 2, len(succeeded(result).losses)
        assert result.collectives["all_to_all_single"] == layers * steps * expected


def test_selective_checkpointing_repeats_no_collective_at_all(two):
    plain, selective = two["ep"][0], two["ep, selective"][0]
    assert succeeded(selective).collectives == succeeded(plain).collectives


def test_experts_that_do_not_divide_among_the_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    plan = RoutingPlan.from_topk(torch.tensor([[0, 1]]), torch.ones(1, 2), num_experts=4)
    with pytest.raises(ValueError, match="expert_parallel_degree that divides"):
        expert_parallel(torch.ones(1, 8), plan, lambda x, plan: x, group=None)
