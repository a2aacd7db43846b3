"""An operator called past the dispatcher: who sees it, and that results and gradients are alike."""

from __future__ import annotations

import pytest
import torch
from sonicmoe_kernels.thin_autograd import ThinOp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_library = torch.library.Library("sonicmoe_test", "DEF")
_library.define("tripled(Tensor x, float factor) -> Tensor")


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, x, factor):
        ctx.factor = factor
        return tripled.below_autograd(keys, x, factor)

    @staticmethod
    def backward(ctx, dout):
        return None, 3 * ctx.factor * dout, None


tripled = ThinOp(
    _library,
    "sonicmoe_test::tripled",
    lambda x, factor: x.detach() * 3 * factor,
    lambda x, factor: torch.empty_like(x),
    _Tripled,
)


class Seen(TorchDispatchMode):
    """Notes every operator that the dispatcher hands down."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A subclass that a kernel must not meet unasked."""

    calls: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, values: Tensor) -> Named:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.name())
        return torch.ones(2)


def differentiate(call) -> tuple[Tensor, Tensor]:
    x = torch.arange(4.0, requires_grad=True)
    out = call(x, 2.0)
    return out, *torch.autograd.grad(out.sum(), x)


def test_results_and_gradients_are_the_operators() -> None:
    got, want = differentiate(tripled), differentiate(tripled.op)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not tripled(torch.ones(2), 2.0).requires_grad
    with torch.no_grad():
        assert not tripled(torch.ones(2, requires_grad=True), 2.0).requires_grad


def test_a_mode_sees_the_operator() -> None:
    with Seen() as seen:
        differentiate(tripled)
    assert "sonicmoe_test::tripled" in seen.names


def test_a_subclass_reaches_the_dispatcher() -> None:
    tripled(Named(torch.ones(2)), 2.0)
    assert "sonicmoe_test::tripled" in Named.calls


def test_a_fake_tensor_outside_its_mode_gets_a_fake_result() -> None:
    with FakeTensorMode() as mode:
        x = torch.empty(4)
    assert tripled(x, 2.0).fake_mode is mode


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_traces_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, factor: tripled(x, factor), fullgraph=True, backend=backend)
    got, want = differentiate(compiled), differentiate(tripled.op)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
