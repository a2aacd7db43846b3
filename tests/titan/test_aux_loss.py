"""Injected auxiliary losses equal explicit ones and weigh the same in every layout."""

import pytest
import torch

from sonicmoe_titan.aux_loss import attach_loss, load_balancing_loss, z_loss
from tests.titan.block_runs import results, succeeded


@pytest.fixture(scope="module")
def one(shared_folder):
    return results(1, shared_folder)


@pytest.fixture(scope="module")
def two(shared_folder):
    return results(2, shared_folder)


@pytest.fixture(scope="module")
def four(shared_folder):
    return results(4, shared_folder)


def test_injection_is_exact_on_two_ranks_with_gradient_accumulation(two):
    for seen in two["injected_equals_explicit"]:
        assert succeeded(seen)["deviation"] < 1e-14
        assert seen["gradient"] > 0.1


def test_balanced_router_has_load_balancing_loss_one():
    probability_TE = torch.full((8, 4), 0.25)
    loss = load_balancing_loss(probability_TE, torch.full((4,), 4), top_k=2)
    assert loss.item() == pytest.approx(1.0)


def test_collapsed_router_has_load_balancing_loss_of_experts_over_k():
    probability_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(8, 4)
    loss = load_balancing_loss(probability_TE, torch.tensor([8, 8, 0, 0]), top_k=2)
    assert loss.item() == pytest.approx(4 / 2)


def test_z_loss_is_the_mean_square_of_the_log_partition_function():
    logits_TE = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = (torch.tensor(2.0).log() ** 2 + (1 + torch.tensor(2.0).log()) ** 2) / 2
    assert z_loss(logits_TE).item() == pytest.approx(expected.item())


def test_scale_is_read_during_backward_and_the_anchor_is_unchanged():
    anchor = torch.ones(3, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    scale = torch.zeros(())
    out = attach_loss(anchor, weight * 5, scale)
    scale_of_the_replay = 0.25
    with torch.no_grad():
        scale.data.fill_(scale_of_the_replay)  # as a captured graph sees it: no version counter
    out.sum().backward()
    assert torch.equal(anchor.grad, torch.ones(3))
    assert weight.grad.item() == pytest.approx(scale_of_the_replay * 5)


@pytest.mark.parametrize(
    "name",
    ["fsdp, aux", "fsdp, aux, partial_dtensor", "ep, aux", "tp, aux", "tp, aux, partial_dtensor"],
)
def test_two_processes_train_as_one_with_auxiliary_losses(one, two, name):
    (reference,) = one["aux"]
    assert succeeded(two[name][0]).losses == pytest.approx(succeeded(reference).losses, rel=1e-5)


def test_tensor_and_expert_parallel_train_as_one_process_with_auxiliary_losses(one, four):
    (reference,) = one["aux"]
    assert succeeded(four["tp + ep, aux"][0]).losses == pytest.approx(
        succeeded(reference).losses, rel=1e-5
    )


def test_pipeline_microbatches_weigh_what_accumulated_ones_weigh(one, two):
    (reference,) = one["aux, accumulated"]
    assert succeeded(two["pp, aux"][0]).losses == pytest.approx(
        succeeded(reference).losses, rel=1e-5
    )


def test_recomputation_injects_once(one):
    (plain,), (full,) = one["aux"], one["aux, full"]
    assert succeeded(full).losses == pytest.approx(succeeded(plain).losses, rel=1e-6)


def test_auxiliary_losses_change_training(one):
    (with_losses,), (without,) = one["aux"], one["plain"]
    assert succeeded(with_losses).losses[0] == pytest.approx(succeeded(without).losses[0])
    assert with_losses.losses[2] != pytest.approx(without.losses[2], rel=1e-4)
