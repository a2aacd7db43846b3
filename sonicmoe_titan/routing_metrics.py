"""From every layer's RouterStats to the metrics of a run.

Legend: L MoE layers of the whole model, E experts, V the values of `RouterStats.NAMES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sonicmoe_titan.stats import RouterStats, collect


@dataclass(frozen=True)
class Gathered:
    """Sums over all ranks since the last reading, on the host.

    Attributes:
        layer_ids: (L,) where in the model the layers are.
        values_LV: (L, V) float64.
        load_LE: (L, E) float64, rows per expert.
    """

    layer_ids: list[int]
    values_LV: Tensor
    load_LE: Tensor

    def column(self, name: str) -> Tensor:
        """(L,) the named value of every layer."""
        return self.values_LV[:, RouterStats.NAMES.index(name)]


@torch.no_grad()
def gather_stats(model_parts: Sequence[nn.Module], device: torch.device) -> Gathered | None:
    """Add up the statistics of all ranks and set them to zero; collective over all ranks.

    Ranks that hold the same layers twice (tensor parallelism) count twice, in every column alike:
    only ratios mean anything. Reads device tensors, so it waits for the device: call it at log
    steps, outside any captured graph.

    Returns:
        None if no layer of the model has statistics.
    """
    layers = collect(model_parts)
    num_values = len(RouterStats.NAMES)
    last_layer = max((layer for layer, _ in layers), default=-1)
    num_experts = max((stats.num_experts for _, stats in layers), default=0)
    extent = torch.tensor([last_layer + 1, num_experts], device=device)
    if dist.is_initialized():  # a pipeline stage knows its own layers only
        dist.all_reduce(extent, op=dist.ReduceOp.MAX)
    num_layers, num_experts = extent.tolist()
    if num_layers == 0:
        return None
    sums = torch.zeros(num_layers, num_values + num_experts, dtype=torch.float64, device=device)
    for layer, stats in layers:
        sums[layer, :num_values] = stats.values_V.double()
        sums[layer, num_values:] = stats.load_E.double()
        stats.reset()
    if dist.is_initialized():
        dist.all_reduce(sums)
    sums = sums.cpu()
    routed = sums[:, RouterStats.NAMES.index("microbatches")] > 0  # dense layers have no row
    layer_ids = routed.nonzero().flatten().tolist()
    return Gathered(layer_ids, sums[routed, :num_values], sums[routed, num_values:])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 0)


def layer_metrics(gathered: Gathered) -> dict[str, Tensor]:
    """Each metric as (L,), one number per MoE layer; fractions, not percent."""
    value = gathered.column
    rows, added, dropped = value("rows"), value("rows_added"), value("rows_dropped")
    chosen = rows - added + dropped
    load = gathered.load_LE
    return {
        "padding_waste": _ratio(value("rows_computed"), rows) - 1,
        "rows_added": _ratio(added, chosen),
        "rows_dropped": _ratio(dropped, chosen),
        "max_over_mean_load": _ratio(load.max(dim=1).values, load.mean(dim=1)),
        "router_entropy": _ratio(value("entropy"), value("tokens")),
        "aux_loss": _ratio(value("aux_loss"), value("microbatches")),
        "z_loss": _ratio(value("z_loss"), value("microbatches")),
    }


def routing_metrics(gathered: Gathered) -> dict[str, float]:
    """`moe/NAME`: the mean over layers (of the load: the worst layer); `moe_layer_NN/NAME`: each.

    padding_waste: rows computed over rows useful, less 1, with the kernels' M tile.
    rows_added, rows_dropped: by token rounding, over the rows of plain top-k.
    max_over_mean_load: rows of the busiest expert over the mean, of the window's sums.
    router_entropy: of a token's scores, in nats.
    aux_loss: load-balancing loss; z_loss: router z-loss; both before their coefficients.
    """
    per_layer = layer_metrics(gathered)
    metrics = {
        f"moe/{name}": float(value.max() if name == "max_over_mean_load" else value.mean())
        for name, value in per_layer.items()
    }
    for name, value in per_layer.items():
        for layer, number in zip(gathered.layer_ids, value.tolist(), strict=True):
            metrics[f"moe_layer_{layer:02d}/{name}"] = number
    return metrics
