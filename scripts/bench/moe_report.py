"""Tables of bench_moe.py's records; figures are in moe_figures.py, goals in moe_goals.py.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import csv
from pathlib import Path

from bench.facts import record_name
from bench.figures import can_draw
from tests.cases import BENCHMARK_CASES

KIND = "moe_layer"
# Name of the record, label, colour (Okabe and Ito's palette, told apart by the colour-blind).
IMPLEMENTATIONS = {
    "sonicmoe": ("SonicMoE (ours)", "#0072B2"),
    "torch": ("torch backend (grouped_mm)", "#999999"),
    "official": ("official sonic-moe", "#E69F00"),
    "liger": ("Liger", "#009E73"),
}
PASS_FLOPS = 6  # times T K D F: three GEMMs forward, and twice that backward
MIB = 2.0**20
SIZES = ("T", "D", "F", "E", "K")
Shapes = dict[str, dict[str, dict]]
"""shape -> implementation -> record, in the records' order."""


def tflops(sizes: dict, ms: float, *, passes: int) -> float:
    """TFLOP/s of 1 (forward), 2 (backward) or 3 (both) passes of a layer in `ms`."""
    flops = PASS_FLOPS * passes * sizes["T"] * sizes["K"] * sizes["D"] * sizes["F"]
    return flops / ms * 1e-9


def merge(records: list[dict], new: list[dict]) -> None:
    """Put `new` in the place of what `records` holds of the same shapes and implementations.

    Shapes stand in the order of the cases, whenever they were measured.
    """
    measured = {(r["shape"], r["impl"]) for r in new}
    records[:] = [r for r in records if (r["shape"], r["impl"]) not in measured] + new
    shapes, impls = list(BENCHMARK_CASES), list(IMPLEMENTATIONS)
    records.sort(key=lambda r: (shapes.index(r["shape"]), impls.index(r["impl"])))


def line(record: dict) -> str:
    """One record as a line of the console's table."""
    return (
        f"{record['shape']:10s} {record['impl']:9s} fwd {record['fwd_ms']:7.3f} "
        f"bwd {record['bwd_ms']:7.3f} both {record['fwd_bwd_ms']:7.3f} ms, kernels "
        f"{record['kernel_ms']:7.3f} ({record['kernel_ms'] / record['floor_ms']:.2f}x floor), "
        f"{record['tflops']:.0f} TFLOP/s, host {record['host_us']:.0f} us, "
        f"{record.get('wall_s', 0):.0f} s"
    )


def write(records: list[dict], folder: Path) -> None:
    """CSV, Markdown and figures beside the JSON."""
    from bench import moe_cited, moe_figures, moe_goals

    name = record_name(KIND, records[0]["device"])
    _write_csv(records, folder / f"{name}.csv")
    lines = _markdown(records)
    if name == record_name(KIND, "H100"):  # what others were measured on, and goals are set for
        lines += moe_goals.sections(records) + moe_cited.sections(records)
    lines += _versions(records)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    if can_draw():
        moe_figures.write(records, folder / name)


def _write_csv(records: list[dict], path: Path) -> None:
    scalars = [k for k in dict.fromkeys(k for r in records for k in r) if _is_scalar(records, k)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def _is_scalar(records: list[dict], key: str) -> bool:
    return all(isinstance(r[key], int | float | str) for r in records if key in r)


def by_shape(records: list[dict]) -> Shapes:
    """The records as a table."""
    table: Shapes = {}
    for record in records:
        table.setdefault(record["shape"], {})[record["impl"]] = record
    return table


def where(records: list[dict]) -> str:
    """Device, driver, commits and dates of all records, in a line."""
    words = []
    for key, name in (("device", ""), ("driver", "driver "), ("commit", "commit "), ("date", "")):
        found = sorted({str(r[key]) for r in records if key in r})
        words += [name + " and ".join(found)] if found else []
    return ", ".join(words)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def mark(theirs: dict, ours: dict) -> str:
    """A star where two records are of different runs, whose machines and clocks may differ."""
    same = all(theirs.get(key) == ours.get(key) for key in ("started", "commit", "date"))
    return "" if same else " *"


def footnote(rows: list[list[str]]) -> list[str]:
    """What the stars of a table mean, if it has any."""
    starred = any(cell.endswith("*") for row in rows for cell in row)
    return ["", "\\* measured in another run than ours."] if starred else []


def _markdown(records: list[dict]) -> list[str]:
    lines = [
        "# The experts of one MoE layer",
        "",
        f"{where(records)}. bf16, SwiGLU, routing given (its metadata is built before the loop; "
        "Liger builds it in every forward). Every implementation in a process of its own, rounds "
        "alternating between them, inputs drawn alike; medians. Forward, backward and both are of "
        "a sustained loop; kernels is the profiler's sum over one step; host is the time to "
        "enqueue one of eight steps in a row (in records before 2026-11-26 a single step after a "
        "wait: see docs/host_cost.md). Floor: the larger of FLOPs at 660 TFLOP/s and every tensor "
        "once at 3.0 TB/s, summed over the eight kernels (`scripts/roofline.py`). TFLOP/s count 18 "
        "T K D F. Saved: what autograd keeps beside weights. Peak: the worst moment of a step "
        "beyond inputs and weights. The peers' own autotuners chose among all their candidates.",
        "",
    ]
    rows = []
    for shape, by_impl in by_shape(records).items():
        for r in by_impl.values():
            low, high = min(r["fwd_bwd_ms_rounds"]), max(r["fwd_bwd_ms_rounds"])
            note = "" if r["agrees"] else " (results differ)"
            rows.append(
                [
                    shape,
                    ", ".join(str(r[key]) for key in SIZES),
                    IMPLEMENTATIONS[r["impl"]][0] + note,
                    f"{r['fwd_ms']:.3f}",
                    f"{r['bwd_ms']:.3f}",
                    f"{r['fwd_bwd_ms']:.3f} ({low:.3f} to {high:.3f})",
                    f"{r['kernel_ms']:.3f}",
                    f"{r['kernel_ms'] / r['floor_ms']:.2f}",
                    f"{r['tflops']:.0f}",
                    f"{r['host_us']:.0f}",
                    f"{r['saved_bytes'] / MIB:.0f}",
                    f"{r['peak_bytes'] / MIB:.0f}",
                ]
            )
    header = ["shape", "T, D, F, E, K", "implementation", "forward ms", "backward ms"]
    header += ["both ms (rounds)", "kernels ms", "kernels / floor", "TFLOP/s", "host us"]
    header += ["saved MiB", "peak MiB"]
    return lines + table(header, rows) + _against_peers(records) + _kernels(records)


def _against_peers(records: list[dict]) -> list[str]:
    """How many times faster ours is, by the loop's forward and backward and by the kernels."""
    peers = [p for p in IMPLEMENTATIONS if p != "sonicmoe" and any(r["impl"] == p for r in records)]
    rows = []
    for shape, by_impl in by_shape(records).items():
        ours = by_impl.get("sonicmoe")
        if ours and len(by_impl) > 1:
            cells = [shape, f"{ours['T'] * ours['K'] // ours['E']}"]
            for peer in peers:
                theirs = by_impl.get(peer)
                cells.append(_ratios(theirs, ours) + mark(theirs, ours) if theirs else "")
            rows.append(cells)
    header = ["shape", "rows per expert", *(IMPLEMENTATIONS[p][0] for p in peers)]
    title = "## Time of a peer over ours: loop (kernels)"
    return ["", title, "", *table(header, rows), *footnote(rows)]


def _ratios(theirs: dict, ours: dict) -> str:
    loop, kernels = (theirs[key] / ours[key] for key in ("fwd_bwd_ms", "kernel_ms"))
    return f"{loop:.2f} ({kernels:.2f})"


def _kernels(records: list[dict]) -> list[str]:
    """Every kernel of ours against its floor."""
    ours = [r for r in records if r["impl"] == "sonicmoe"]
    if not ours:
        return []
    rows = []
    for r in ours:
        cells = [
            f"{k['ms']:.3f} ({k['ms'] / k['floor_ms']:.2f})" if k["floor_ms"] else f"{k['ms']:.3f}"
            for k in r["per_kernel"].values()
        ]
        rows.append([r["shape"], *cells])
    title = ["", "## Ours, kernel by kernel: ms (times its floor)", ""]
    return title + table(["shape", *ours[0]["per_kernel"]], rows)


def _versions(records: list[dict]) -> list[str]:
    lines = ["", "## Versions", ""]
    for impl, (label, _) in IMPLEMENTATIONS.items():
        found = {tuple(r["versions"].items()) for r in records if r["impl"] == impl}
        for versions in sorted(found):
            lines.append(f"- {label}: " + ", ".join(f"{k} {v}" for k, v in versions))
    return lines
