"""Tables and figures of bench_moe.py's records.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import csv
from pathlib import Path

NAME = "moe_layer_h100"
# Name of the record, label, colour (Okabe and Ito's palette, told apart by the colour-blind).
IMPLEMENTATIONS = {
    "sonicmoe": ("SonicMoE (ours)", "#0072B2"),
    "torch": ("torch backend (grouped_mm)", "#999999"),
    "official": ("official sonic-moe", "#E69F00"),
    "liger": ("Liger", "#009E73"),
}
STEP_FLOPS = 18  # times T K D F, forward and backward
SHAPES_PER_ROW = 6  # of a figure
MIB = 2.0**20
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over a ceiling's dashes
SIZES = ("T", "D", "F", "E", "K")


def line(record: dict) -> str:
    """One record as a line of the console's table."""
    return (
        f"{record['shape']:10s} {record['impl']:9s} fwd {record['fwd_ms']:7.3f} "
        f"bwd {record['bwd_ms']:7.3f} both {record['fwd_bwd_ms']:7.3f} ms, kernels "
        f"{record['kernel_ms']:7.3f} ({record['kernel_ms'] / record['floor_ms']:.2f}x floor), "
        f"{record['tflops']:.0f} TFLOP/s, host {record['host_us']:.0f} us"
    )


def write(records: list[dict], folder: Path) -> None:
    """CSV, Markdown and figures beside the JSON."""
    _write_csv(records, folder / f"{NAME}.csv")
    (folder / f"{NAME}.md").write_text("\n".join(_markdown(records)) + "\n")
    _write_figure(records, folder / f"{NAME}_tflops.png", "tflops")
    _write_figure(records, folder / f"{NAME}_memory.png", "memory")


def _write_csv(records: list[dict], path: Path) -> None:
    scalars = [k for k, v in records[0].items() if isinstance(v, int | float | str)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def _shapes(records: list[dict]) -> dict[str, dict[str, dict]]:
    """shape -> implementation -> record, in the order measured."""
    table: dict[str, dict[str, dict]] = {}
    for record in records:
        table.setdefault(record["shape"], {})[record["impl"]] = record
    return table


def _where(records: list[dict]) -> str:
    """Device, driver, commits and dates of all records, in a line."""
    facts = {key: sorted({str(r[key]) for r in records}) for key in ("device", "driver")}
    facts |= {key: sorted({str(r[key]) for r in records}) for key in ("commit", "date")}
    device, driver, commit, date = (" and ".join(values) for values in facts.values())
    return f"{device}, driver {driver}, commit {commit}, {date}"


def _markdown(records: list[dict]) -> list[str]:
    lines = [
        "# The experts of one MoE layer on an H100",
        "",
        f"{_where(records)}. bf16, SwiGLU, routing given (its metadata is built before the loop; "
        "Liger builds it in every forward). Every implementation in a process of its own, rounds "
        "alternating between them, inputs drawn alike; medians. Forward, backward and both are of "
        "a sustained loop; kernels is the profiler's sum over one step; host is the time to "
        "enqueue one of eight steps in a row (see docs/host_cost.md). Floor: the larger of FLOPs "
        "at 660 TFLOP/s and every tensor once at 3.0 TB/s, summed over the eight kernels "
        "(`scripts/roofline.py`). TFLOP/s count 18 T K D F. Saved: what autograd keeps beside "
        "weights. Peak: the worst moment of a step beyond inputs and weights. The peers' own "
        "autotuners chose among all their candidates.",
        "",
        "| shape | T, D, F, E, K | implementation | forward ms | backward ms | both ms (rounds) "
        "| kernels ms | kernels / floor | TFLOP/s | host us | saved MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, by_impl in _shapes(records).items():
        for r in by_impl.values():
            sizes = ", ".join(str(r[key]) for key in SIZES)
            low, high = min(r["fwd_bwd_ms_rounds"]), max(r["fwd_bwd_ms_rounds"])
            note = "" if r["agrees"] else " (results differ)"
            lines.append(
                f"| {shape} | {sizes} | {IMPLEMENTATIONS[r['impl']][0]}{note} "
                f"| {r['fwd_ms']:.3f} | {r['bwd_ms']:.3f} "
                f"| {r['fwd_bwd_ms']:.3f} ({low:.3f} to {high:.3f}) | {r['kernel_ms']:.3f} "
                f"| {r['kernel_ms'] / r['floor_ms']:.2f} | {r['tflops']:.0f} | {r['host_us']:.0f} "
                f"| {r['saved_bytes'] / MIB:.0f} | {r['peak_bytes'] / MIB:.0f} |"
            )
    lines += _against_peers(records) + _kernel_table(records) + _versions(records)
    return lines


def _against_peers(records: list[dict]) -> list[str]:
    """How many times faster ours is, by the loop's forward and backward and by the kernels."""
    lines = ["", "## Time of a peer over ours: loop (kernels)", ""]
    peers = [p for p in IMPLEMENTATIONS if p != "sonicmoe" and any(r["impl"] == p for r in records)]
    lines += ["| shape | " + " | ".join(IMPLEMENTATIONS[p][0] for p in peers) + " |"]
    lines += ["|---" * (len(peers) + 1) + "|"]
    for shape, by_impl in _shapes(records).items():
        if "sonicmoe" not in by_impl:
            continue
        ours, cells = by_impl["sonicmoe"], []
        for peer in peers:
            if peer in by_impl:
                loop, kernels = (
                    by_impl[peer][key] / ours[key] for key in ("fwd_bwd_ms", "kernel_ms")
                )
                cells.append(f"{loop:.2f} ({kernels:.2f})")
            else:
                cells.append("")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return lines


def _kernel_table(records: list[dict]) -> list[str]:
    ours = [r for r in records if r["impl"] == "sonicmoe"]
    if not ours:
        return []
    names = list(ours[0]["per_kernel"])
    lines = ["", "## Ours, kernel by kernel: ms (times its floor)", ""]
    lines += ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for r in ours:
        cells = [
            f"{k['ms']:.3f} ({k['ms'] / k['floor_ms']:.2f})" if k["floor_ms"] else f"{k['ms']:.3f}"
            for k in r["per_kernel"].values()
        ]
        lines.append(f"| {r['shape']} | " + " | ".join(cells) + " |")
    return lines


def _versions(records: list[dict]) -> list[str]:
    lines = ["", "## Versions", ""]
    for impl, (label, _) in IMPLEMENTATIONS.items():
        found = {tuple(r["versions"].items()) for r in records if r["impl"] == impl}
        for versions in sorted(found):
            lines.append(f"- {label}: " + ", ".join(f"{k} {v}" for k, v in versions))
    return lines


def _write_figure(records: list[dict], path: Path, panel: str) -> None:
    """Bars per shape and implementation; for memory, hatched up to the peak of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = _shapes(records)
    shapes = list(table)
    impls = [name for name in IMPLEMENTATIONS if any(name in of for of in table.values())]
    chunks = [shapes[i : i + SHAPES_PER_ROW] for i in range(0, len(shapes), SHAPES_PER_ROW)]
    figure, grid = plt.subplots(
        len(chunks), 1, figsize=(10, 0.9 + 2.9 * len(chunks)), squeeze=False, layout="constrained"
    )
    for axes, chunk in zip(grid[:, 0], chunks, strict=True):
        _draw_row(axes, [table[shape] for shape in chunk], impls, panel)
        axes.set_xticks(range(len(chunk)), [_tick(shape, table[shape]) for shape in chunk])
        axes.set_xlim(-0.6, SHAPES_PER_ROW - 0.4 if len(chunks) > 1 else len(chunk) - 0.4)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.supxlabel(_where(records), fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _tick(shape: str, by_impl: dict[str, dict]) -> str:
    r = next(iter(by_impl.values()))
    return f"{shape}\nT{r['T']} D{r['D']}\nF{r['F']} E{r['E']} K{r['K']}"


def _draw_row(axes, rows: list[dict[str, dict]], impls: list[str], panel: str) -> None:
    width = 0.82 / len(impls)
    for i, name in enumerate(impls):
        label, color = IMPLEMENTATIONS[name]
        points = [(x, of[name]) for x, of in enumerate(rows) if name in of]
        at = [x + (i - (len(impls) - 1) / 2) * width for x, _ in points]
        found = [r for _, r in points]
        if panel == "tflops":
            bars = axes.bar(at, [r["tflops"] for r in found], width, label=label, color=color)
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2, bbox=LABEL_BOX)
        else:
            peak = [r["peak_bytes"] / MIB / 1024 for r in found]
            kept = [r["saved_bytes"] / MIB / 1024 for r in found]
            bars = axes.bar(at, peak, width, color=color, alpha=0.35)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
            axes.bar(at, kept, width, label=label, color=color)
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.grid(axis="y", linewidth=0.4, color="#cccccc")
    axes.set_axisbelow(True)


def _ceiling(record: dict) -> float:
    """TFLOP/s of a step that takes the sum of its kernels' floors."""
    flops = STEP_FLOPS * record["T"] * record["K"] * record["D"] * record["F"]
    return flops / record["floor_ms"] * 1e-9
