"""What the router's statistics count."""

import pytest
import torch

from sonicmoe_titan.stats import KERNEL_TILE_ROWS, RouterStats
from tests.titan.block_runs import results, succeeded
from tests.titan.distributed import ARGS


@pytest.fixture(scope="module")
def one(shared_folder):
    return results(1, shared_folder)


@pytest.fixture(scope="module")
def two(shared_folder):
    return results(2, shared_folder)


def layers_of(result):
    return succeeded(result).inspected


def test_rows_and_tiles_are_counted_per_expert():
    stats = RouterStats(3)
    rows_E = torch.tensor([130, 0, 1], dtype=torch.int32)
    stats.add_rows(rows_E, torch.tensor([128.0, 1.0, 1.0]))
    stats.add_tiles(rows_E)
    seen = dict(zip(stats.NAMES, stats.values_V.tolist(), strict=True))
    assert stats.load_E.tolist() == [130, 0, 1]
    assert (seen["rows"], seen["rows_added"], seen["rows_dropped"]) == (131, 2, 1)
    assert seen["rows_computed"] == 3 * KERNEL_TILE_ROWS


def test_tensors_stay_where_they_are_while_sums_grow_and_reset():
    stats = RouterStats(2)
    values, load = stats.values_V, stats.load_E
    stats.add(tokens=3, aux_loss=torch.tensor(1.5))
    stats.add_entropy(torch.tensor(2.0), 3)
    stats.add_rows(torch.tensor([1, 1]))
    assert values[stats.NAMES.index("aux_loss")] == 1.5 and load.sum() == 2
    assert stats.values_V[stats.NAMES.index("entropy")] == 6
    stats.reset()
    assert stats.values_V is values and stats.load_E is load
    assert stats.values_V.sum() == 0 and load.sum() == 0


def test_layers_are_collected_in_order_with_all_tokens(one):
    layers = layers_of(one["plain"][0])
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer in layers:
        steps, tokens_a_step, top_k = 3, 4 * 64, 2
        assert layer["microbatches"] == steps
        assert layer["tokens"] == steps * tokens_a_step
        assert layer["rows"] == sum(layer["load"]) == steps * tokens_a_step * top_k
        assert layer["load"] == layer["chosen"]
        assert layer["rows_added"] == layer["rows_dropped"] == 0
        assert 0 < layer["entropy"] / layer["tokens"] <= torch.tensor(8.0).log().item()


@pytest.mark.parametrize("name", ["selective", "full"])
def test_recomputation_counts_nothing(one, name):
    for plain, again in zip(layers_of(one["plain"][0]), layers_of(one[name][0]), strict=True):
        assert {k: v for k, v in again.items() if k != "chosen"} == {
            k: v for k, v in plain.items() if k != "chosen"
        }


def test_rounding_shows_in_load_and_leaves_the_preferences(one):
    for layer in layers_of(one["rounding"][0]):
        assert all(rows % ARGS.rounding_tile == 0 for rows in layer["load"])
        assert sum(layer["chosen"]) == 3 * 4 * 64 * 2
        change = sum(layer["load"]) - sum(layer["chosen"])
        assert change == layer["rows_added"] - layer["rows_dropped"]
        assert layer["rows_added"] > 0


def test_senders_count_rows_and_receivers_tiles(two):
    ranks = [layers_of(result) for result in two["ep, rounding"]]
    for layer in range(2):
        computed = sum(rank[layer]["rows_computed"] for rank in ranks)
        rows = sum(rank[layer]["rows"] for rank in ranks)
        assert computed >= rows
        assert computed % KERNEL_TILE_ROWS == 0


def test_losses_are_counted_without_their_coefficients(one):
    for layer in layers_of(one["aux"][0]):
        assert 1 <= layer["aux_loss"] / layer["microbatches"] < 2
        assert layer["z_loss"] / layer["microbatches"] > torch.tensor(8.0).log().item() ** 2 - 0.5
