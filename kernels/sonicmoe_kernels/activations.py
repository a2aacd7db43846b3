"""Expert activations in plain PyTorch: forward and backward, elementwise, in the dtype given.

Legend: H pre-activation (gate and up, or up alone), A activation, dA and dH their gradients.
A gated activation is A = act(gate) * up; an ungated one is A = act(up) and has no gate weight (w3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]


class ActValue(NamedTuple):
    """Value and derivative of a scalar function, elementwise."""

    value: Tensor
    derivative: Tensor


def _silu(z: Tensor) -> ActValue:
    sigmoid = torch.sigmoid(z)
    value = z * sigmoid
    return ActValue(value, sigmoid + value * (1 - sigmoid))


def _gelu(z: Tensor) -> ActValue:
    # Exact (erf) GELU: Phi(z) + z * phi(z) is its derivative.
    cdf = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
    pdf = torch.exp(-0.5 * z * z) * 0.3989422804014327
    return ActValue(z * cdf, cdf + z * pdf)


def _relu(z: Tensor) -> ActValue:
    return ActValue(F.relu(z), (z > 0).to(z.dtype))


def _relu2(z: Tensor) -> ActValue:
    positive = F.relu(z)
    return ActValue(positive * positive, 2 * positive)


@dataclass(frozen=True)
class Activation:
    """One expert activation; a gated one takes two halves: gate (from w1) and up (from w3)."""

    name: str
    gated: bool
    scalar: Callable[[Tensor], ActValue]

    @property
    def halves(self) -> int:
        """Number of F-wide halves in H: 2 when gated, else 1."""
        return 2 if self.gated else 1

    def forward(self, h_RHF: Tensor) -> Tensor:
        """A (R, F) from H (R, halves, F)."""
        value = self.scalar(h_RHF[:, 0]).value
        return value * h_RHF[:, 1] if self.gated else value

    def backward(self, da_RF: Tensor, h_RHF: Tensor) -> Tensor:
        """dH (R, halves, F) from dA (R, F) and H (R, halves, F)."""
        value, derivative = self.scalar(h_RHF[:, 0])
        if not self.gated:
            return (da_RF * derivative).unsqueeze(1)
        return torch.stack((da_RF * h_RHF[:, 1] * derivative, da_RF * value), dim=1)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("swiglu", True, _silu),
        Activation("geglu", True, _gelu),
        Activation("reglu", True, _relu),
        Activation("silu", False, _silu),
        Activation("relu2", False, _relu2),
    )
}


def get_activation(name: str) -> Activation:
    """Look an activation up by name; ValueError names the accepted ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; accepted: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
