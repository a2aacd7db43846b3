"""Operators with a gradient at little host cost.

`torch.library.register_autograd` adds 30 us to every call, `torch.autograd.Function` under the
dispatcher's Autograd key a few. A pass through the dispatcher with a dozen arguments costs 10 us
more: where nothing lies between autograd and the kernels (no mode, no tracing, no subclass) the
function that runs on plain tensors is called at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

__all__ = ["ThinOp", "register"]

_PLAIN_BACKENDS = (DispatchKey.CUDA, DispatchKey.CPU)


class ThinOp:
    """An operator and the function that runs it on plain tensors; calls take all its arguments."""

    def __init__(self, op: Any, eager: Callable[..., Any]) -> None:
        self.op = op
        self.eager = eager

    def below_autograd(self, keys: Any, *inputs: Any) -> Any:
        """The operator without gradients; what a Function's forward calls."""
        with torch._C._AutoDispatchBelowAutograd():
            below = keys & torch._C._after_ADInplaceOrView_keyset
            if below.highestPriorityTypeId() in _PLAIN_BACKENDS:
                return self.eager(*inputs)
            return self.op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def in_backward(self, *inputs: Any) -> Any:
        """The operator as a Function's backward calls it."""
        first = next(value for value in inputs if value is not None)
        plain = type(first) is Tensor and not torch._C._len_torch_dispatch_stack()
        if plain and not torch.is_grad_enabled():
            return self.eager(*inputs)
        return self.op(*inputs)


def register(
    library: torch.library.Library,
    thin: ThinOp,
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> None:
    """Implement an operator that `library` defines: on tensors, on fakes, and its gradient.

    `function` is called with (keys, *inputs) where an input needs a gradient.
    """
    name = thin.op.name().removesuffix(".default")
    library.impl(name, thin.eager, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    with_gradient = functools.partial(_with_gradient, thin, function)
    library.impl(name, with_gradient, "Autograd", with_keyset=True)


def _with_gradient(
    thin: ThinOp, function: type[torch.autograd.Function], keys: Any, *inputs: Any
) -> Any:
    """The operator as the dispatcher calls it above all backends."""
    if torch.is_grad_enabled():
        for value in inputs:
            if isinstance(value, Tensor) and value.requires_grad:
                return function.apply(keys, *inputs)
    return thin.below_autograd(keys, *inputs)
