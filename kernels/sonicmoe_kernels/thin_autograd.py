"""Operators with a gradient at little host cost.

`torch.library.register_autograd` adds 30 us to every call, `torch.autograd.Function` under the
dispatcher's Autograd key a few. A pass through the dispatcher with a dozen arguments costs 10 us
more: where nobody would see it (no mode, no tracing, no subclass, no function transform) the
function that runs on plain tensors is called at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["ThinOp"]


class ThinOp:
    """An operator of a library; calls take all its arguments, by position.

    Args:
        library: defines it and stays alive as long as it is called.
        name: with the namespace, "sonicmoe::experts".
        eager: runs it on plain tensors.
        fake: the same for shapes alone.
        function: called with (keys, *inputs) where an input needs a gradient; its forward calls
            `below_autograd`. Without one, no gradient passes.
        refusal: instead of a function, what a RuntimeError says to who asks for a gradient.
    """

    def __init__(
        self,
        library: torch.library.Library,
        name: str,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        function: type[torch.autograd.Function] | None = None,
        *,
        refusal: str | None = None,
    ) -> None:
        if refusal is not None:
            function = _refusing(self, refusal)
        namespace, short = name.split("::")
        self.op = getattr(getattr(torch.ops, namespace), short).default
        self.eager = eager
        self.function = function
        library.impl(name, eager, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        if function is not None:
            library.impl(name, self._with_gradient, "Autograd", with_keyset=True)

    def __call__(self, *inputs: Any) -> Any:
        """The operator, with its gradient."""
        if somebody_watches():
            return self.op(*inputs)
        for value in inputs:
            kind = type(value)
            if kind is not Tensor and kind is not Parameter and isinstance(value, Tensor):
                return self.op(*inputs)
        return self._with_gradient(None, *inputs)

    def below_autograd(self, keys: Any, *inputs: Any) -> Any:
        """The operator without its gradient; what the Function's forward calls."""
        if keys is None:
            return self.eager(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def _with_gradient(self, keys: Any, *inputs: Any) -> Any:
        """The operator above all backends; `keys` are None past the dispatcher."""
        if self.function is not None and torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return self.function.apply(keys, *inputs)
        return self.below_autograd(keys, *inputs)


def somebody_watches() -> bool:
    """Whether a tracer, a mode or a function transform wants to see the operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._are_functorch_transforms_active()


def _refusing(op: ThinOp, refusal: str) -> type[torch.autograd.Function]:
    """The gradient of an operator that has none."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *inputs: Any) -> Any:
            return op.below_autograd(keys, *inputs)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(refusal)

    return Refusing
