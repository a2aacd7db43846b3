"""Sections of the layer's report that answer a question: margins, losses, rates, skew, few tokens.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import statistics

from bench.moe_report import (
    IMPLEMENTATIONS,
    Shapes,
    by_shape,
    footnote,
    mark,
    table,
)

LARGEST_LOSSES = 12
FEW_ROWS = 512  # per expert: where partial tiles and weights cost most
SKEWED = {"zipf": "Zipf 1.2", "dirichlet": "Dirichlet(2)"}
FEW_TOKENS = 4096


def sections(records: list[dict]) -> list[str]:
    """Lines of Markdown; a section without records is left out."""
    shapes = by_shape(records)
    ours = [r for r in records if r["impl"] == "sonicmoe"]
    return [
        *margins(shapes),
        *losses(ours),
        *rates(ours),
        *skew(shapes),
        *few_tokens(records),
    ]


def section(title: str, text: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """A heading, what the table shows, the table; nothing without rows."""
    return ["", f"## {title}", "", text, "", *table(header, rows)] if rows else []


def margins(shapes: Shapes) -> list[str]:
    """Mean advantage over each peer, over all shapes and over those with few rows per expert."""
    rows = []
    for peer in (p for p in IMPLEMENTATIONS if p != "sonicmoe"):
        pairs = [
            (of[peer], of["sonicmoe"]) for of in shapes.values() if {peer, "sonicmoe"} <= {*of}
        ]
        few = [(p, o) for p, o in pairs if o["T"] * o["K"] <= FEW_ROWS * o["E"]]
        for label, chosen in (("all", pairs), (f"at most {FEW_ROWS}", few)):
            if chosen:
                apart = " *" if any(mark(*pair) for pair in chosen) else ""
                cells = [IMPLEMENTATIONS[peer][0], label, str(len(chosen)) + apart]
                for key in ("fwd_bwd_ms", "kernel_ms"):
                    gains = [theirs[key] / ours[key] - 1 for theirs, ours in chosen]
                    cells.append(f"{statistics.mean(gains):+.1%} ({min(gains):+.1%})")
                rows.append(cells)
    text = "How much longer the peer takes: mean over the shapes that both were measured on, least."
    header = ["peer", "rows per expert", "shapes", "loop: mean (least)", "kernels: mean (least)"]
    return section("Ahead by", text, header, rows) + footnote(rows)


def losses(ours: list[dict]) -> list[str]:
    """Where the most time over the floor goes, kernel by kernel."""
    found = [
        (k["ms"] - k["floor_ms"], r["shape"], name, k)
        for r in ours
        for name, k in r["per_kernel"].items()
    ]
    found.sort(key=lambda item: -item[0])
    rows = [
        [shape, name, f"{k['ms']:.3f}", f"{k['floor_ms']:.3f}", f"{lost:.3f}"]
        for lost, shape, name, k in found[:LARGEST_LOSSES]
        if lost > 0
    ]
    text = "Milliseconds over the floor, largest first."
    return section("Losses", text, ["shape", "kernel", "ms", "floor ms", "over ms"], rows)


def rates(ours: list[dict]) -> list[str]:
    """The floors at the run's own rates beside the fixed ones, with clock and power of the loop."""
    rows = []
    for r in ours:
        if "rates" not in r:
            continue
        rows.append(
            [
                r["shape"],
                f"{r['kernel_ms']:.3f}",
                f"{r['floor_ms']:.3f} ({r['kernel_ms'] / r['floor_ms']:.2f})",
                f"{r['rates']['matmul_tflops']:.0f}, {r['rates']['copy_tb_s']:.2f}",
                f"{r['own_floor_ms']:.3f} ({r['kernel_ms'] / r['own_floor_ms']:.2f})",
                f"{r['sm_mhz']:.0f}" if "sm_mhz" in r else "",
                f"{r['power_w']:.0f}" if "power_w" in r else "",
            ]
        )
    text = (
        "The run's own rates: an 8192^3 bf16 product and a copy of 2 GiB, measured before the "
        "shapes. Clock and power: medians over the sustained loops (power is the driver's average "
        "over about a second)."
    )
    header = ["shape", "kernels ms", "floor at 660, 3.0 (kernels over it)"]
    header += ["own TFLOP/s, TB/s", "floor at own rates (kernels over it)", "SM MHz", "W"]
    return section("Floors at the run's own rates", text, header, rows)


def skew(shapes: Shapes) -> list[str]:
    """Skewed loads against balanced ones at equal rows."""
    rows = []
    for shape, by_impl in shapes.items():
        for impl, r in by_impl.items():
            balanced = shapes.get(shape.removesuffix(f"_{r['routing']}"), {}).get(impl)
            if r["routing"] in SKEWED and balanced is not None:
                cells = [balanced["shape"], SKEWED[r["routing"]], IMPLEMENTATIONS[impl][0]]
                for key in ("fwd_bwd_ms", "kernel_ms"):
                    cells.append(f"{balanced[key]:.3f} to {r[key]:.3f}")
                    cells.append(f"{r[key] / balanced[key] - 1:+.1%}")
                rows.append(cells)
    text = "The same sizes and rows, balanced to skewed; the goal is at most 10% more time."
    header = ["shape", "load", "implementation", "loop ms", "change", "kernels ms", "change"]
    return section("Skewed loads", text, header, rows)


def few_tokens(records: list[dict]) -> list[str]:
    """Where the host shows: enqueueing a step, and the same step in a CUDA graph."""
    rows = []
    for r in records:
        if r["T"] > FEW_TOKENS:
            continue
        graph = ["", ""]
        if "graph_ms" in r:
            graph = [f"{r['graph_ms']:.3f}", f"{r['graph_host_us']:.0f}"]
        elif "graph_error" in r:
            graph = [r["graph_error"], ""]
        cells = [r["shape"], IMPLEMENTATIONS[r["impl"]][0], f"{r['host_us']:.0f}"]
        cells += [f"{r['fwd_bwd_ms']:.3f}", f"{r['kernel_ms']:.3f}", *graph]
        rows.append(cells)
    text = (
        "Host: time to enqueue forward and backward, eight steps in a row. Replay: the same step "
        "captured in a CUDA graph."
    )
    header = ["shape", "implementation", "host us", "loop ms", "kernels ms", "replay ms"]
    header += ["host us of a replay"]
    return section("Few tokens", text, header, rows)
