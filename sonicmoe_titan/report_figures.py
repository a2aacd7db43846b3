"""The figures of a report: loss, throughput, padding waste, load per expert.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import TwoSlopeNorm

from sonicmoe_titan import plots
from sonicmoe_titan.runlog import TRAIN_LOSS, VALIDATION_LOSS, Run

WINDOW_RATE = "throughput/tokens_per_day"
AVERAGE_RATE = "throughput_average/tokens_per_day"


def describe_model(run: Run) -> str:
    """The model's size and router in a few words."""
    model = run.header.get("config", {}).get("model")
    if not model:
        return "unknown model"
    router = model["router"]
    if router == "token_rounding":
        router = f"token rounding ({model['rounding']}, tile {model['rounding_tile']})"
    return (
        f"{model['num_layers']} layers, D {model['dim']}, F {model['expert_dim']}, "
        f"E {model['num_experts']}, K {model['top_k']}, {router}"
    )


def describe_hardware(run: Run) -> str:
    return f"{run.header.get('num_devices', '?')} x {run.header.get('device', 'unknown device')}"


def _caption(runs: Sequence[Run]) -> str:
    lines = [
        f"{run.name}: {describe_model(run)}; {describe_hardware(run)}; {run.header.get('date', '')}"
        for run in runs
    ]
    return "\n".join(lines)


def draw(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write every figure that the runs have the numbers for; returns the files."""
    caption = _caption(runs)
    drawn = [
        _draw_loss(runs, out / "loss.png", caption),
        _draw_rate(runs, out / "tokens_per_day.png", caption),
        _draw_waste(runs, out / "padding_waste.png", caption),
    ]
    for run in runs:
        name = "expert_load.png" if len(runs) == 1 else f"expert_load_{_file_name(run)}.png"
        drawn.append(_draw_load(run, out / name))
    return [path for path in drawn if path is not None]


def _file_name(run: Run) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in run.name)


def _draw_loss(runs: Sequence[Run], path: Path, caption: str) -> Path:
    with plots.figure(path, caption=caption) as (_, axes):
        for index, run in enumerate(runs):
            colour, prefix = plots.colour(index), f"{run.name}: " if len(runs) > 1 else ""
            steps, losses = run.series(TRAIN_LOSS)
            label, reach = f"{prefix}training", len(losses) // 40
            if reach:
                axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=0.9)
                label = f"{label}, smoothed"
            axes.plot(steps, plots.smoothed(losses, reach), color=colour, label=label)
            steps, losses = run.series(VALIDATION_LOSS)
            if steps:
                axes.plot(
                    steps, losses, color=colour, marker="o", markersize=4, linestyle="--",
                    label=f"{prefix}validation (top-k routing)",
                )  # fmt: skip
        axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per token)")
        axes.legend()
    return path


def _draw_rate(runs: Sequence[Run], path: Path, caption: str) -> Path | None:
    if not any(run.series(WINDOW_RATE)[0] for run in runs):
        return None
    with plots.figure(path, caption=caption) as (_, axes):
        for index, run in enumerate(runs):
            steps, rates = run.series(WINDOW_RATE)
            average = run.last(AVERAGE_RATE)
            if not steps or average is None:
                continue
            colour = plots.colour(index)
            axes.plot(steps, rates, color=colour, alpha=0.5, linewidth=1.0)
            axes.axhline(
                average, color=colour, linestyle="--",
                label=f"{run.name}: {plots.count(average)} tokens/day on average",
            )  # fmt: skip
        axes.set(
            title="Training throughput, warm-up and validation left out",
            xlabel="step",
            ylabel="tokens/day",
        )
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        plots.format_axis(axes.yaxis, plots.count)
        axes.legend(loc="lower right")
    return path


def _draw_waste(runs: Sequence[Run], path: Path, caption: str) -> Path | None:
    if not any(run.series("moe/padding_waste")[0] for run in runs):
        return None
    with plots.figure(path, caption=caption) as (_, axes):
        for index, run in enumerate(runs):
            steps, waste = run.series("moe/padding_waste")
            label = f"{run.name}: padding waste" if len(runs) > 1 else "padding waste"
            axes.plot(steps, [100 * v for v in waste], color=plots.colour(index), label=label)
            if len(runs) == 1:
                for key, label in (
                    ("moe/rows_added", "rows added by rounding"),
                    ("moe/rows_dropped", "rows dropped by rounding"),
                ):
                    steps, values = run.series(key)
                    if any(values):
                        index += 1
                        axes.plot(
                            steps, [100 * v for v in values], color=plots.colour(index), label=label
                        )
        axes.set(
            title="Rows that the experts' tiles compute in vain",
            xlabel="step",
            ylabel="share of useful rows (%)",
        )
        axes.set_ylim(bottom=0)
        axes.legend()
    return path


def _draw_load(run: Run, path: Path) -> Path | None:
    if not run.load_LE:
        return None
    load_LE = torch.tensor(run.load_LE, dtype=torch.float64)
    load_LE = load_LE / load_LE.mean(dim=1, keepdim=True).clamp(min=1e-30)
    layers, experts = load_LE.shape
    height = min(9.0, max(3.0, 1.8 + 0.16 * layers))
    with plots.figure(path, caption=_caption([run]), height=height) as (drawn, axes):
        image = axes.imshow(
            load_LE.numpy(), aspect="auto", interpolation="nearest", cmap=plots.DIVERGING,
            norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(load_LE.max()))), origin="lower",
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set(
            title=f"Load per expert, last window (worst {float(load_LE.max()):.2f}x the mean)",
            xlabel=f"expert (of {experts})",
            ylabel=f"MoE layer (of {layers})",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)  # pyrefly: ignore[unexpected-keyword]
        drawn.colorbar(image, ax=axes, label="rows / mean of the layer")
    return path
