"""Table and figure of bench_granularity.py's records, like Figure 1 of SonicMoE (2512.14080).

Legend: T tokens, D model width, F expert width, E experts, K experts per token, G = D / F.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.facts import record_name
from bench.figures import bare, can_draw, figure
from bench.moe_report import table, where

KIND = "granularity"
GIB = 2.0**30
# Name of the record, label, colour.
IMPLEMENTATIONS = {
    "sonicmoe": ("SonicMoE (ours), random routing", "#0072B2"),
    "sonicmoe_equal": ("SonicMoE (ours), equal rows", "#56B4E9"),
    "bound": ("bound: cuBLAS BMM + activation + BMM + aggregation", "#000000"),
}
PAPER_SHARE = 0.88  # of the bound, on average (section 1 and Figure 1)
PEER_COLORS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999999", "#000000")


def write(records: list[dict], folder: Path) -> None:
    """Markdown and figure beside the JSON."""
    name = record_name(KIND, records[0]["device"])
    (folder / f"{name}.md").write_text("\n".join(markdown(records)) + "\n")
    if can_draw():
        write_figure(records, folder / f"{name}.png")


def by_experts(records: list[dict]) -> dict[int, dict[str, dict]]:
    """E -> implementation -> record, coarse experts first."""
    rows: dict[int, dict[str, dict]] = {}
    for record in sorted(records, key=lambda r: r["E"]):
        rows.setdefault(record["E"], {})[record["impl"]] = record
    return rows


def shares(records: list[dict], impl: str) -> list[float]:
    """Of the bound's rate, one for every granularity that both were measured at."""
    rows = by_experts(records).values()
    return [
        of[impl]["fwd_tflops"] / of["bound"]["fwd_tflops"]
        for of in rows
        if {impl, "bound"} <= {*of}
    ]


def markdown(records: list[dict]) -> list[str]:
    """Rates against the bound, then resident bytes against the formula."""
    first, torch = records[0], " and ".join(sorted({r["versions"]["torch"] for r in records}))
    lines = [
        "# Granularity at constant FLOPs: rate and memory",
        "",
        f"{where(records)}, torch {torch}; `python scripts/bench_granularity.py`. T {first['T']}, "
        f"D {first['D']}, K F = {first['K'] * first['F']}, K / E constant; bf16, SwiGLU, forward "
        "with everything that the backward needs stored, router excluded. The bound multiplies "
        "already gathered rows, equally many for every expert: `torch.bmm` (cuBLAS), the compiled "
        "activation, `torch.bmm`, and our aggregation kernel. Rounds alternate in one process; "
        "medians of sustained loops. TFLOP/s count 6 T K D F.",
        "",
    ]
    rows = []
    for E, of in by_experts(records).items():
        bound = of.get("bound")
        for impl, r in of.items():
            share = f"{r['fwd_tflops'] / bound['fwd_tflops']:.1%}" if bound else ""
            low, high = min(r["fwd_ms_rounds"]), max(r["fwd_ms_rounds"])
            rows.append(
                [
                    f"{r['K']} / {E}",
                    f"{r['F']}",
                    f"{r['D'] / r['F']:g}",
                    IMPLEMENTATIONS[impl][0],
                    f"{r['fwd_ms']:.3f} ({low:.3f} to {high:.3f})",
                    f"{r['fwd_tflops']:.0f}",
                    share,
                ]
            )
    header = ["K / E", "F", "G", "implementation", "forward ms (rounds)", "TFLOP/s", "of the bound"]
    lines += table(header, rows)
    lines += ["", f"Mean share of the bound (the paper's: {PAPER_SHARE:.0%}):"]
    for impl in ("sonicmoe", "sonicmoe_equal"):
        found = shares(records, impl)
        if found:
            lines.append(f"- {IMPLEMENTATIONS[impl][0]}: {statistics.mean(found):.1%}")
    pieces = [r for r in records if "pieces" in r]
    if pieces:
        names = list(pieces[0]["pieces"])
        lines += ["", "## The bound's parts, ms", ""]
        cells = [
            [f"{r['K']} / {r['E']}", *(f"{r['pieces'][name]:.3f}" for name in names)]
            for r in pieces
        ]
        lines += table(["K / E", *names], cells)
    return lines + _memory(records)


def _memory(records: list[dict]) -> list[str]:
    ours = [of["sonicmoe"] for of in by_experts(records).values() if "sonicmoe" in of]
    if not ours:
        return []
    lines = [
        "",
        "## Bytes resident per layer",
        "",
        "What the layer holds after its forward: x, H, the plan, the output and the weights "
        "(4TD + 4TKF + 6EDF bytes and the plan). Predicted by the memory model "
        "(`sonicmoe_titan.memory_model`), measured by torch's allocator. Peers: the same with what "
        "they keep, from `sonicmoe_titan.memory_peers`, not measured here.",
        "",
    ]
    rows = []
    for r in ours:
        off = r["resident_bytes"] / r["predicted_bytes"] - 1
        rows.append(
            [
                f"{r['K']} / {r['E']}",
                f"{r['D'] / r['F']:g}",
                f"{r['predicted_bytes'] / GIB:.3f}",
                f"{r['resident_bytes'] / GIB:.3f}",
                f"{off:+.3%}",
                *(f"{size / GIB:.2f}" for size in r["peers_bytes"].values()),
            ]
        )
    header = ["K / E", "G", "predicted GiB", "measured GiB", "difference", *ours[0]["peers_bytes"]]
    return lines + table(header, rows)


def write_figure(records: list[dict], path: Path) -> None:
    """Left: resident GiB over granularity. Right: forward rate beside the bound."""
    rows = by_experts(records)
    size = (10.5, 4.4)
    with figure(path, columns=2, size=size, caption=where(records)) as (_, ((left, right),)):
        _draw_memory(left, [of["sonicmoe"] for of in rows.values() if "sonicmoe" in of])
        _draw_rates(right, list(rows.values()))
        bare(left)
        bare(right)


def _draw_memory(axes, ours: list[dict]) -> None:
    if not ours:
        return
    at = range(len(ours))
    for color, peer in zip(PEER_COLORS, ours[0]["peers_bytes"], strict=False):
        gib = [r["peers_bytes"][peer] / GIB for r in ours]
        axes.plot(at, gib, ":", marker=".", color=color, label=f"{peer}, by formula")
    blue = IMPLEMENTATIONS["sonicmoe"][1]
    axes.plot(at, [r["predicted_bytes"] / GIB for r in ours], color=blue, label="ours, predicted")
    measured = [r["resident_bytes"] / GIB for r in ours]
    axes.plot(at, measured, "o", color=blue, markersize=8, fillstyle="none", label="ours, measured")
    for x, gib in zip(at, measured, strict=True):
        axes.annotate(f"{gib:.2f}", (x, gib), (0, -14), textcoords="offset points",
                      ha="center", fontsize=8, color=blue)  # fmt: skip
    axes.set_xticks(at, [_tick(r) for r in ours])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GiB resident after the forward, one layer")
    axes.set_xlabel("K / E and granularity G = D / F")
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _draw_rates(axes, rows: list[dict[str, dict]]) -> None:
    impls = [name for name in IMPLEMENTATIONS if any(name in of for of in rows)]
    width = 0.82 / len(impls)
    for i, name in enumerate(impls):
        label, color = IMPLEMENTATIONS[name]
        points = [(x, of) for x, of in enumerate(rows) if name in of]
        at = [x + (i - (len(impls) - 1) / 2) * width for x, _ in points]
        rates = [of[name]["fwd_tflops"] for _, of in points]
        hollow = name == "bound"
        bars = axes.bar(at, rates, width, label=label, edgecolor=color, linewidth=1,
                        color="none" if hollow else color)  # fmt: skip
        texts = [
            f"{rate:.0f}"
            if hollow or "bound" not in of
            else f"{rate:.0f}\n{rate / of['bound']['fwd_tflops']:.0%}"
            for rate, (_, of) in zip(rates, points, strict=True)
        ]
        axes.bar_label(bars, texts, fontsize=7.5, padding=2)
    axes.set_xticks(range(len(rows)), [_tick(next(iter(of.values()))) for of in rows])
    axes.margins(y=0.3)
    axes.set_ylabel("forward TFLOP/s (and share of the bound)")
    axes.set_xlabel("K / E and granularity G = D / F")
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _tick(record: dict) -> str:
    return f"{record['K']} / {record['E']}\nG {record['D'] / record['F']:g}"
