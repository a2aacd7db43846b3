"""The block trains as TorchTitan's own does, in every layout and with everything that wraps it.

Every run sees the same four sequences a step and starts from the same weights, so that the losses
of all layouts can be held against stock on one process.
"""

import pytest

from tests.titan.block_runs import results, succeeded

FLOAT32 = 1e-5
"""Relative; both sides compute in float32 and differ in the order of sums."""
BFLOAT16 = 1e-3
"""Relative; on a CPU stock has no float32 autocast and its gate multiplies in bf16."""


@pytest.fixture(scope="module")
def one(shared_folder):
    return results(1, shared_folder)


@pytest.fixture(scope="module")
def two(shared_folder):
    return results(2, shared_folder)


@pytest.fixture(scope="module")
def four(shared_folder):
    return results(4, shared_folder)


def assert_same_losses(actual, expected, *, relative):
    """Compare the losses that every rank saw with those of a one-process run."""
    (reference,) = expected
    for rank, result in enumerate(actual):
        assert succeeded(result).losses == pytest.approx(
            succeeded(reference).losses, rel=relative
        ), f"rank {rank}"


@pytest.mark.parametrize(
    "name", ["plain", "accumulated", "compiled", "selective", "full", "overridden"]
)
def test_one_process_loses_what_stock_loses(one, name):
    assert_same_losses(one[name], one["stock"], relative=FLOAT32)


def test_one_process_in_bfloat16_loses_what_stock_loses(one):
    assert_same_losses(one["plain, bf16"], one["stock, bf16"], relative=BFLOAT16)


@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        "ep",
        "ep, partial_dtensor",
        "ep, full_dtensor",
        "ep, compiled",
        "ep, selective",
        "ep, full",
        "ep, redispatch_x",
        "tp",
        "tp, full_dtensor",
    ],
)
def test_two_processes_lose_what_stock_loses(one, two, name):
    assert_same_losses(two[name], one["stock"], relative=FLOAT32)


@pytest.mark.parametrize("name", ["fsdp, bf16", "ep, bf16", "tp, bf16"])
def test_two_processes_in_bfloat16_lose_what_stock_loses(one, two, name):
    assert_same_losses(two[name], one["stock, bf16"], relative=BFLOAT16)


def test_pipeline_loses_what_stock_loses(one, two):
    assert_same_losses(two["pp"], one["stock, untied"], relative=FLOAT32)


def test_tensor_and_expert_parallel_lose_what_stock_loses(one, four):
    assert_same_losses(four["tp + ep"], one["stock"], relative=FLOAT32)
    assert_same_losses(four["tp + ep, bf16"], one["stock, bf16"], relative=BFLOAT16)


def test_aux_free_bias_moves_as_stock_s_does(one, two):
    (stock,), (ours,) = one["stock, bias"], one["bias"]
    assert succeeded(ours).losses == pytest.approx(succeeded(stock).losses, rel=FLOAT32)
    assert ours.inspected == stock.inspected
    assert any(any(layer) for layer in stock.inspected)
    for result in two["ep, bias"]:
        assert succeeded(result).losses == pytest.approx(stock.losses, rel=FLOAT32)
        assert result.inspected == stock.inspected


def test_aux_free_bias_counts_choices_before_rounding(one):
    """One step on the same weights: rounding changes the rows, not what the router preferred."""
    (rounding,), (plain,) = one["bias, rounding"], one["bias, one step"]
    assert succeeded(rounding).inspected[0] == succeeded(plain).inspected[0]


@pytest.mark.parametrize("name", ["rounding, compiled, selective", "rounding, full"])
def test_token_rounding_survives_recomputation_and_compilation(one, name):
    assert_same_losses(one[name], one["rounding"], relative=FLOAT32)


@pytest.mark.parametrize("name", ["drawing, selective", "drawing, full"])
def test_recomputation_draws_the_numbers_of_the_forward_pass(one, name):
    assert_same_losses(one[name], one["drawing"], relative=FLOAT32)
    (drawing,), (nearest,) = one["drawing"], one["rounding"]
    assert succeeded(drawing).losses != pytest.approx(succeeded(nearest).losses, rel=FLOAT32)


def test_token_rounding_is_the_same_on_all_tensor_parallel_ranks(one, two):
    assert_same_losses(two["tp, rounding"], one["rounding"], relative=FLOAT32)


def test_token_rounding_under_expert_parallelism_survives_recomputation(two):
    plain, again = two["ep, rounding"][0], two["ep, rounding, full"][0]
    assert succeeded(again).losses == pytest.approx(succeeded(plain).losses, rel=FLOAT32)


def test_token_rounding_changes_training_and_not_evaluation(one):
    (plain,), (rounding,) = one["plain, evaluated"], one["rounding, evaluated"]
    assert succeeded(plain).losses != pytest.approx(succeeded(rounding).losses, rel=FLOAT32)
    assert plain.inspected["same weights"] == rounding.inspected["same weights"]
