"""Table and figure of bench_router.py's records.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

from pathlib import Path

from bench.facts import record_name
from bench.figures import bare, can_draw, figure, legend_above
from bench.moe_report import IMPLEMENTATIONS, SIZES, footnote, mark, table, where

KIND = "moe_router"
TOPK = "topk"
LINES = {TOPK: "-", "nearest": "--"}


def key(record: dict) -> tuple[str, str, str]:
    """What a later run of the same replaces."""
    return record["shape"], record["impl"], record["router"]


def write(records: list[dict], folder: Path) -> None:
    """Markdown and, where a shape has several routers, a figure beside the JSON."""
    name = record_name(KIND, records[0]["device"])
    (folder / f"{name}.md").write_text("\n".join(markdown(records)) + "\n")
    if can_draw():
        write_figure(records, folder / f"{name}.png")


def markdown(records: list[dict]) -> list[str]:
    """One line a shape, implementation and router, then the rounding's gains."""
    torch = " and ".join(sorted({r["versions"]["torch"] for r in records}))
    lines = [
        "# A whole MoE layer with its router",
        "",
        f"{where(records)}, torch {torch}; `python scripts/bench_router.py`. bf16, gate + top-k + "
        "plan (+ rounding to 128 rows) + experts, forward and backward. Every implementation in a "
        "process of its own, the gate in bf16; loops are sustained, rounds alternate; medians. "
        "Kernels, router share and launches: the profiler's, per step; the router is everything "
        "but the experts' eight kernels, the gate's own GEMMs included. Padding waste: rows of "
        "whole 128-row tiles over the tokens' rows, less 1. The official package has no router for "
        "token rounding; there it is the paper's Algorithm 4 in torch operations, as its own "
        "benchmark computes it.",
        "",
    ]
    rows = []
    for r in records:
        base = _find(records, r["shape"], r["impl"], TOPK)
        launches = str(r["launches"])
        if "forward_launches" in r:
            launches += f" ({r['forward_launches']})"
        rows.append(
            [
                r["shape"],
                ", ".join(str(r[size]) for size in SIZES),
                str(r["rows_per_expert"]),
                IMPLEMENTATIONS[r["impl"]][0],
                r["router"],
                f"{r['fwd_ms']:.3f}, {r['bwd_ms']:.3f}" if "fwd_ms" in r else "",
                f"{r['step_ms']:.3f}",
                f"{r['step_ms'] / base['step_ms'] - 1:+.1%}" if base else "",
                f"{r['kernels_ms']:.3f}",
                f"{r['router_ms']:.3f} ({r['router_ms'] / r['kernels_ms']:.1%})",
                launches,
                f"{r['padding_waste']:.1%}",
            ]
        )
    header = ["shape", "T, D, F, E, K", "rows per expert", "implementation", "router"]
    header += ["forward, backward ms", "step ms", "against its top-k", "kernels ms"]
    header += ["router ms (share)", "launches (forward)", "padding waste"]
    return lines + table(header, rows) + _gains(records)


def _find(records: list[dict], shape: str, impl: str, router: str) -> dict | None:
    wanted = (shape, impl, router)
    return next((r for r in records if key(r) == wanted), None)


def _gains(records: list[dict]) -> list[str]:
    """Ours, rounded or not, against the official package's token choice and our own."""
    rows = []
    for r in records:
        official = _find(records, r["shape"], "official", TOPK)
        if r["impl"] != "sonicmoe" or official is None:
            continue
        cells = [r["shape"], str(r["rows_per_expert"]), r["router"]]
        gain = f"{official['step_ms'] / r['step_ms'] - 1:+.1%}"
        rows.append([*cells, gain + mark(official, r)])
    if not rows:
        return []
    header = ["shape", "rows per expert", "our router", "official top-k takes longer by"]
    title = "## Against the official package's token choice"
    return ["", title, "", *table(header, rows), *footnote(rows)]


def write_figure(records: list[dict], path: Path) -> None:
    """Steps per shape: every router of every implementation, sparser shapes to the right."""
    families: dict[str, list[str]] = {}
    for shape in dict.fromkeys(r["shape"] for r in records):
        family, _, experts = shape.rpartition("_E")
        if experts.isdigit():
            families.setdefault(family, []).append(shape)
    if not families:
        return
    size = (1 + 3.6 * len(families), 3.8)
    with figure(path, columns=len(families), size=size, caption=where(records)) as (drawn, grid):
        for axes, shapes in zip(grid[0], families.values(), strict=True):
            _draw(axes, records, shapes)
        grid[0][0].set_ylabel("forward + backward, ms\nrouter included")
        legend_above(drawn, grid[0][0], columns=2)


def _draw(axes, records: list[dict], shapes: list[str]) -> None:
    for impl, router in dict.fromkeys((r["impl"], r["router"]) for r in records):
        found = [r for r in records if r["shape"] in shapes and key(r)[1:] == (impl, router)]
        if not found:
            continue
        found.sort(key=lambda r: r["E"])
        name, color = IMPLEMENTATIONS[impl]
        x, y = [r["E"] for r in found], [r["step_ms"] for r in found]
        style = LINES.get(router, ":")
        axes.plot(x, y, style, marker="o", color=color, label=f"{name}, {router}")
    first = next(r for r in records if r["shape"] == shapes[0])
    axes.set_title(f"D {first['D']}, F {first['F']}, K {first['K']}, T {first['T']}", size=9)
    axes.set_xscale("log", base=2)
    experts = sorted(int(shape.rpartition("_E")[2]) for shape in shapes)
    axes.set_xticks(experts, [str(E) for E in experts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_xlabel("experts E")
    bare(axes)
