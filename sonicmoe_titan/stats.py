"""What a router did, added up on the device: one RouterStats per MoE layer.

Legend: E experts, V the values named in RouterStats.NAMES.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from sonicmoe_kernels.router_sums import RouterSums
from sonicmoe_kernels.tiles import STATISTICS_CTAS
from torch import Tensor, nn

KERNEL_TILE_ROWS = 128
"""Rows of the experts' GEMM tiles: every expert computes whole tiles."""


class RouterStats:
    """Running sums over the forward passes of one MoE layer since the last `reset`.

    Plain tensors, updated in place, made before the first forward pass: a captured CUDA graph keeps
    adding to them at every replay. They are no module buffers, so neither checkpoints nor sharding
    see them. Training only, and recomputation adds nothing. Sums over one process; consumers add
    over ranks and divide by "microbatches" or "tokens". A forward pass launches as little as it
    can: sums over experts, and over the parts of the entropy, wait until somebody reads `values_V`.

    Of the names: "rows_computed" counts whole GEMM tiles where the experts run; "rows_added" and
    "rows_dropped" are token rounding's; "entropy" is in nats, summed over tokens, estimated from a
    sample of them; "aux_loss" and "z_loss" come without their coefficients.

    Attributes:
        load_E: (E,) float32, rows per expert after routing and rounding, as this process sent them.
        zero, one: float32 constants on the device, 0-d.
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

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.zero, self.one = zeros(), zeros() + 1
        self._values_V, self._entropy_P = zeros(len(self.NAMES)), zeros(STATISTICS_CTAS)
        self.load_E, self._tiles_E, self._added_E, self._change_E = (
            zeros(self.num_experts) for _ in range(4)
        )
        self._sums: RouterSums | None = None

    def sums(self, choices_E: Tensor) -> RouterSums:
        """What the fused block adds to by itself; `choices_E` counts tokens before rounding."""
        if self._sums is None or self._sums.choices_E is not choices_E:
            self._sums = RouterSums(
                self._values_V,
                self._entropy_P,
                self.load_E,
                self._tiles_E,
                self._added_E,
                self._change_E,
                choices_E,
            )
        return self._sums

    @property
    def values_V(self) -> Tensor:
        """(V,) float32, in the order of NAMES: always the same tensor, up to date as it is read."""
        sums = {
            "rows": self.load_E,
            "rows_computed": self._tiles_E * KERNEL_TILE_ROWS,
            "rows_added": self._added_E,
            "rows_dropped": self._added_E - self._change_E,
            "entropy": self._entropy_P,
        }
        for name, sum_E in sums.items():
            self._values_V[self.NAMES.index(name)] = sum_E.sum()
        return self._values_V

    def add_rows(self, rows_E: Tensor, chosen_E: Tensor | None = None) -> None:
        """Count the routed rows.

        Args:
            rows_E: (E,) rows per expert.
            chosen_E: (E,) rows per expert before rounding; None where nothing rounds.
        """
        self.load_E.add_(rows_E)
        if chosen_E is not None:
            change_E = rows_E - chosen_E
            self._change_E.add_(change_E)
            self._added_E.add_(change_E.clamp(min=0))

    def add_tiles(self, rows_e: Tensor) -> None:
        """Count the rows of the whole tiles of experts with (e,) rows, all of them or a share."""
        minus_tiles_e = torch.div(rows_e, -KERNEL_TILE_ROWS, rounding_mode="floor")
        self._tiles_E[: rows_e.shape[0]].sub_(minus_tiles_e)

    def count_choices(self, ids_P: Tensor, *, into_E: Tensor | None = None) -> Tensor:
        """(E,) float32, how often each expert was chosen; `bincount` would wait for the device.

        Args:
            ids_P: (P,) int64 experts.
            into_E: what to add to, in place; zeros if None.
        """
        if into_E is not None and into_E.dtype != self.one.dtype:
            return into_E.add_(self.count_choices(ids_P))  # one by one, bf16 stops at 256
        count_E = torch.zeros_like(self.load_E) if into_E is None else into_E
        return count_E.scatter_add_(0, ids_P, self.one.expand_as(ids_P))

    def add(self, **values: Tensor | float) -> None:
        """Add to named values other than sums; tensors are 0-d, on the device of `load_E`."""
        for name, value in values.items():
            self._values_V[self.NAMES.index(name)].add_(value)

    def add_entropy(self, value: Tensor, factor: float) -> None:
        """Add `factor` times a 0-d tensor, in one launch."""
        self._entropy_P[0].add_(value, alpha=factor)

    def reset(self) -> None:
        """Set every sum to zero, in place."""
        each = (self._values_V, self._entropy_P, self.load_E)
        for sums in (*each, self._tiles_E, self._added_E, self._change_E):
            sums.zero_()


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
    return layers.items() if isinstance(layers, nn.ModuleDict) else ()
