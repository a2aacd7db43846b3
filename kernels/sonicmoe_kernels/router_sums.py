"""Where a router's statistics are added up, and how much of them a forward pass adds.

Legend: E experts, P parts of a sum, an entry for each CTA that adds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["ENTROPY_SAMPLE", "Counting", "RouterSums"]

ENTROPY_SAMPLE = 1024
"""Tokens per forward pass, about, from which the entropy is estimated."""

Counting = Literal[0, 1, 2]
"""What a forward pass adds: nothing, its choices, or everything."""


class RouterSums(NamedTuple):
    """Where a forward pass adds its statistics, float32, in place.

    passes: at least 2, the number of passes and that of tokens. entropy_P: nats, summed over
    tokens. Of each expert: load_E rows, tiles_E whole GEMM tiles of them, added_E rows that token
    rounding added, change_E those less what it dropped, choices_E tokens before rounding.
    """

    passes: Tensor
    entropy_P: Tensor
    load_E: Tensor
    tiles_E: Tensor
    added_E: Tensor
    change_E: Tensor
    choices_E: Tensor
