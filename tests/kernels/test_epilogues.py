"""The kernels' activation arithmetic in fp64, with torch in place of the GPU's functions."""

import os
from types import SimpleNamespace

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import pytest
import torch
from sonicmoe_kernels.activations import ACTIVATIONS

pytest.importorskip("cutlass")
from sonicmoe_kernels.cute import epilogues

POINTS = torch.linspace(-12, 12, 481, dtype=torch.float64)  # holds 0, where ReLU bends


@pytest.fixture(autouse=True)
def torch_for_the_device(monkeypatch):
    arch = SimpleNamespace(exp2=torch.exp2, rcp_approx=torch.reciprocal, fmax=torch.maximum)
    monkeypatch.setattr(
        epilogues, "cute", SimpleNamespace(arch=arch, math=SimpleNamespace(erf=torch.erf))
    )
    monkeypatch.setattr(epilogues, "cutlass", SimpleNamespace(select_=torch.where))
    monkeypatch.setattr(
        epilogues, "Float32", lambda value: torch.tensor(value, dtype=torch.float64)
    )


def random_halves(halves):
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(POINTS.shape, generator=generator, dtype=torch.float64)
    return (POINTS, up)[:halves]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_the_reference(name):
    activation = ACTIVATIONS[name]
    halves = random_halves(activation.halves)
    expected = activation.forward(torch.stack(halves, dim=1))
    torch.testing.assert_close(epilogues.activate(name, halves), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_equal_the_reference(name):
    activation = ACTIVATIONS[name]
    halves = random_halves(activation.halves)
    da = torch.cos(POINTS)
    hidden = torch.stack(halves, dim=1)
    got = epilogues.differentiate(name, halves, da)
    torch.testing.assert_close(got.a, activation.forward(hidden), rtol=1e-12, atol=1e-13)
    expected = activation.backward(da, hidden).unbind(1)
    assert len(got.dh) == len(expected)
    for mine, theirs in zip(got.dh, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_silu_of_very_negative_and_very_positive_numbers_is_finite():
    extreme = torch.tensor([-3e38, -1e4, 1e4], dtype=torch.float32)
    value, slope = epilogues.silu(extreme.double())
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert value[0] == 0 and slope[2] == 1
