"""Figures of bench_moe.py's records: rate and memory by shape and implementation.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from pathlib import Path

from bench.figures import bare, figure, legend_above
from bench.moe_report import IMPLEMENTATIONS, MIB, by_shape, tflops, where

SHAPES_PER_ROW = 6  # of a figure
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over a ceiling's dashes


def write(records: list[dict], stem: Path) -> None:
    """`stem`_tflops.png and `stem`_memory.png."""
    for panel in ("tflops", "memory"):
        _write_figure(records, stem.with_name(f"{stem.name}_{panel}.png"), panel)


def _write_figure(records: list[dict], path: Path, panel: str) -> None:
    """Bars per shape and implementation; for memory, hatched up to the peak of a step."""
    table = by_shape(records)
    shapes = list(table)
    impls = [name for name in IMPLEMENTATIONS if any(name in of for of in table.values())]
    chunks = [shapes[i : i + SHAPES_PER_ROW] for i in range(0, len(shapes), SHAPES_PER_ROW)]
    size = (10, 0.9 + 2.9 * len(chunks))
    with figure(path, rows=len(chunks), size=size, caption=where(records)) as (drawn, grid):
        for axes, chunk in zip(grid[:, 0], chunks, strict=True):
            _draw_row(axes, [table[shape] for shape in chunk], impls, panel)
            axes.set_xticks(range(len(chunk)), [_tick(shape, table[shape]) for shape in chunk])
            axes.set_xlim(-0.6, SHAPES_PER_ROW - 0.4 if len(chunks) > 1 else len(chunk) - 0.4)
        legend_above(drawn, grid[0, 0], columns=3)


def _tick(shape: str, by_impl: dict[str, dict]) -> str:
    r = next(iter(by_impl.values()))
    return f"{shape}\nT{r['T']} D{r['D']}\nF{r['F']} E{r['E']} K{r['K']}"


def _draw_row(axes, rows: list[dict[str, dict]], impls: list[str], panel: str) -> None:
    width = 0.82 / len(impls)
    for i, name in enumerate(impls):
        label, color = IMPLEMENTATIONS[name]
        points = [(x, of[name]) for x, of in enumerate(rows) if name in of]
        at = [x + (i - (len(impls) - 1) / 2) * width for x, _ in points]
        axes.bar([0], [0], width, label=label, color=color)  # the legend's, also without a record
        found = [r for _, r in points]
        if panel == "tflops":
            bars = axes.bar(at, [r["tflops"] for r in found], width, color=color)
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2, bbox=LABEL_BOX)
        else:
            peak = [r["peak_bytes"] / MIB / 1024 for r in found]
            kept = [r["saved_bytes"] / MIB / 1024 for r in found]
            bars = axes.bar(at, peak, width, color=color, alpha=0.35)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
            axes.bar(at, kept, width, color=color)
    if panel == "tflops":
        ceilings = [_ceiling(next(iter(of.values()))) for of in rows]
        axes.hlines(
            ceilings,
            [x - 0.46 for x in range(len(rows))],
            [x + 0.46 for x in range(len(rows))],
            color="black",
            linewidth=1.2,
            linestyles="dashed",
            label="ceiling: 660 TFLOP/s, 3.0 TB/s",
        )
        axes.set_ylabel("TFLOP/s\nforward + backward")
    else:
        axes.set_ylabel("GiB: kept for backward\n(pale, with number: peak)")
    axes.margins(y=0.14)
    axes.tick_params(axis="x", labelsize=8, length=0)
    bare(axes)


def _ceiling(record: dict) -> float:
    """TFLOP/s of a step that takes the sum of its kernels' floors."""
    return tflops(record, record["floor_ms"], passes=3)
