"""Operators with a gradient at little host cost.

`torch.library.register_autograd` adds 30 us to every call, `torch.autograd.Function` under the
dispatcher's Autograd key a few.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["below_autograd", "register"]


def below_autograd(op: Any, keys: Any, *inputs: Any) -> Any:
    """`op` as it is without gradients; what a Function's forward calls."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def register(
    library: torch.library.Library, op: Any, function: type[torch.autograd.Function]
) -> None:
    """Make `function`, called with (keys, *inputs), the gradient of `op`."""
    name = op.name().removesuffix(".default")
    with_gradient = functools.partial(_with_gradient, op, function)
    library.impl(name, with_gradient, "Autograd", with_keyset=True)


def _with_gradient(
    op: Any, function: type[torch.autograd.Function], keys: Any, *inputs: Any
) -> Any:
    """`op` as the dispatcher calls it above all backends."""
    tensors = (t for t in inputs if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return function.apply(keys, *inputs)
    return below_autograd(op, keys, *inputs)
