"""What a router did, added up on the device: one RouterStats per MoE layer.

Legend: E experts, V the values named in RouterStats.NAMES.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

KERNEL_TILE_ROWS = 128
"""Rows of the experts' GEMM tiles: every expert computes whole tiles."""


class RouterStats:
    """Running sums over the forward passes of one MoE layer since the last `reset`.

    Plain tensors, updated in place, made before the first forward pass: a captured CUDA graph keeps
    adding to them at every replay. They are no module buffers, so neither checkpoints nor sharding
    see them. Training only, and recomputation adds nothing. Sums over one process; consumers add
    over ranks and divide by "microbatches" or "tokens".

    Of the names: "rows_computed" counts whole GEMM tiles where the experts run; "rows_added" and
    "rows_dropped" are token rounding's; "entropy" is in nats, summed over tokens, estimated from a
    sample of them; "aux_loss" and "z_loss" come without their coefficients.

    Attributes:
        values_V: (V,) float32, in the order of NAMES.
        load_E: (E,) float32, rows per expert after routing and rounding, as this process sent them.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "microbatches",
        "tokens",
        "rows",
        "rows_computed",
        "rows_added",
        "rows_dropped",
        "entropy",
        "aux_loss",
        "z_loss",
    )

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.allocate(torch.device("cpu"))

    def allocate(self, device: torch.device) -> None:
        """Make the tensors on `device`, at zero; outside any graph capture."""
        self.values_V = torch.zeros(len(self.NAMES), dtype=torch.float32, device=device)
        self.load_E = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def add_rows(self, chosen_E: Tensor, expert_offsets: Tensor) -> None:
        """Count the routed rows.

        Args:
            chosen_E: (E,) rows per expert before rounding.
            expert_offsets: (E + 1,) where each expert's rows start after rounding.
        """
        rows_E = expert_offsets.diff().float()
        change_E = rows_E - chosen_E
        self.load_E.add_(rows_E)
        self.add(
            rows=rows_E.sum(),
            rows_added=change_E.clamp(min=0).sum(),
            rows_dropped=-change_E.clamp(max=0).sum(),
        )

    def add_tiles(self, expert_offsets: Tensor) -> None:
        """Count the rows of the whole tiles that the experts of a plan compute."""
        rows_e = expert_offsets.diff()
        tiles_e = torch.div(rows_e + KERNEL_TILE_ROWS - 1, KERNEL_TILE_ROWS, rounding_mode="floor")
        self.add(rows_computed=tiles_e.sum() * KERNEL_TILE_ROWS)

    def add(self, **values: Tensor | float) -> None:
        """Add to the named values; tensors are 0-d, on the device of `values_V`."""
        for name, value in values.items():
            self.values_V[self.NAMES.index(name)].add_(value)

    def reset(self) -> None:
        """Set every sum to zero, in place."""
        self.values_V.zero_()
        self.load_E.zero_()


def first_pass() -> bool:
    """Whether this forward pass is no recomputation by (eager) activation checkpointing."""
    if torch.compiler.is_compiling():
        return True  # TorchTitan has compiled recomputation skip side effects
    return torch._C._current_graph_task_id() == -1


def collect(model_parts: Sequence[nn.Module]) -> list[tuple[int, RouterStats]]:
    """(layer id, stats) of every MoE layer of this process's pipeline stages, in layer order."""
    found = [
        (int(layer_id), block.moe.stats)  # pyrefly: ignore[missing-attribute]
        for part in model_parts
        for layer_id, block in _blocks(part)
        if isinstance(getattr(getattr(block, "moe", None), "stats", None), RouterStats)
    ]
    return sorted(found, key=lambda item: item[0])


def _blocks(part: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    layers = getattr(part, "layers", None)
    return () if layers is None else layers.items()
