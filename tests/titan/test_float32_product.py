"""The gate's gradient as two bf16 numbers: written in place or left to a compiler, alike."""

import pytest
import torch

from sonicmoe_titan import float32_product


@pytest.fixture(params=["in place", "for a compiler"])
def way(request, monkeypatch):
    monkeypatch.setattr(float32_product, "_may_use_out", lambda: request.param == "in place")


def test_two_halves_carry_sixteen_bits(way):
    dlogits_TE = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * 1e-3
    high_TE, low_TE = float32_product._halves(dlogits_TE).split(12, dim=1)
    assert torch.equal(high_TE, dlogits_TE.bfloat16())
    torch.testing.assert_close(high_TE.float() + low_TE.float(), dlogits_TE, rtol=2**-16, atol=0)


def test_a_sum_is_rounded_once(way):
    a, b = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.empty(12, 32, dtype=torch.bfloat16)
    got = float32_product._rounded_sum(a, b, like=weight)
    assert got.dtype == torch.bfloat16 and torch.equal(got, (a + b).bfloat16())


def test_nothing_is_written_in_place_under_autograd():
    assert not float32_product._may_use_out()
    with torch.no_grad():
        assert float32_product._may_use_out()
