"""Tables and figure of bench_train.py's records: speed, and activation memory.

Legend: T tokens of one step.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.facts import record_name
from bench.figures import bare, can_draw, figure, legend_above
from bench.moe_report import table, where

KIND = "train"
MEMORY_KIND = "train_memory"
SECONDS_A_DAY = 86400
GIB = 2.0**30
# Panels of the figure: title, factor, format.
QUANTITIES = {
    "tokens_per_s": ("thousand tokens/s", 1e-3, "%.0f"),
    "peak_gib": ("GiB reserved", 1.0, "%.1f"),
}
# Of a block by a word of its label, the first that fits, in the order of the bars.
COLORS = {
    "stock": "#999999",
    "torch backend": "#E69F00",
    "top-k": "#0072B2",
    "rounding": "#56B4E9",
}


def key(record: dict) -> tuple[object, ...]:
    """What a later run of the same replaces."""
    names = ("model", "impl", "backend", "router", "balance", "compile", "cuda_graphs")
    return tuple(record[name] for name in names)


def mode(record: dict) -> str:
    """eager or compiled, with CUDA graphs or without."""
    return ("compiled" if record["compile"] else "eager") + (
        "+graphs" if record["cuda_graphs"] else ""
    )


def label(record: dict) -> str:
    """What the tables call the record's block."""
    if record["impl"] == "stock":
        return "stock TorchTitan"
    router = "token rounding" if record["router"] == "token_rounding" else "top-k"
    suffix = ", torch backend" if record["backend"] == "torch" else ""
    return f"SonicMoE, {router}{suffix}"


def write(records: list[dict], folder: Path) -> None:
    """Markdown and figure beside the JSON, with the memory records that the folder holds."""
    device = records[0]["device"]
    name, path = record_name(KIND, device), folder / f"{record_name(MEMORY_KIND, device)}.json"
    memory = json.loads(path.read_text()) if path.exists() else []
    (folder / f"{name}.md").write_text("\n".join(markdown(records, memory)) + "\n")
    if can_draw():
        write_figure(records, folder / f"{name}.png")


def markdown(records: list[dict], memory: list[dict]) -> list[str]:
    """One line a run; each block's best beside stock's best; activation bytes."""
    versions = sorted({tuple(r["versions"].items()) for r in records})
    shown = "; ".join(", ".join(f"{k} {v}" for k, v in found) for found in versions)
    lines = [
        "# Training on one GPU beside stock TorchTitan",
        "",
        f"{where(records)}, {shown}; `python scripts/bench_train.py speed`. The same data, loss, "
        "optimizer and metrics for both: bf16 over fp32 master weights, AdamW, no activation "
        "checkpointing, no auxiliary losses (stock has none), stock's load balancing. Medians "
        "over the logged windows after the warm-up; runs of the blocks alternate. The 7B proxy is "
        "configs/moe_7b.toml with fewer layers.",
        "",
    ]
    rows = []
    for r in sorted(records, key=lambda r: (groups(records).index(_group(r)), mode(r), label(r))):
        step = r["step_ms"]
        rows.append(
            [
                f"{r['model']} ({r['layers']} layers)",
                r["balance"],
                label(r),
                mode(r),
                f"{r['tokens_per_s']:,.0f}",
                f"{r['tokens_per_day'] / 1e9:.2f}",
                f"{r['mfu']:.1f}%",
                f"{step['median']:.1f} ({step['q1']:.1f} to {step['q3']:.1f})",
                f"{r['peak_gib']:.1f}",
                f"{r['active_gib']:.1f}",
                r["date"],
            ]
        )
    header = ["model", "routing", "block", "mode", "tokens/s", "billion tokens/day", "MFU"]
    header += ["step ms (quartiles)", "reserved GiB", "active GiB", "date"]
    lines += table(header, rows) + _against_stock(records)
    notes = dict.fromkeys(r["note"] for r in records if "note" in r)
    return lines + [line for note in notes for line in ("", note)] + _memory(records, memory)


def best_of(records: list[dict], model: str, balance: str) -> dict[str, dict]:
    """The fastest record of every block for a model and routing.

    Beside compiled blocks one that was measured eager alone is left out: that is not its best.
    """
    rows = [r for r in records if _group(r) == (model, balance)]
    compiled = {label(r) for r in rows if r["compile"]}
    best: dict[str, dict] = {}
    for r in rows:
        if not compiled or label(r) in compiled:
            rival = best.setdefault(label(r), r)
            best[label(r)] = max(rival, r, key=lambda row: row["tokens_per_s"])
    return best


def groups(records: list[dict]) -> list[tuple[str, str]]:
    """(model, routing), in the order measured."""
    return list(dict.fromkeys(map(_group, records)))


def _group(record: dict) -> tuple[str, str]:
    return record["model"], record["balance"]


def _against_stock(records: list[dict]) -> list[str]:
    rows = []
    for model, balance in groups(records):
        best = best_of(records, model, balance)
        stock = best.pop("stock TorchTitan", None)
        if stock is None:
            continue
        for name, r in best.items():
            rows.append(
                [
                    model,
                    balance,
                    f"{name} ({mode(r)})",
                    f"{mode(stock)}, of {_modes(records, model, balance)}",
                    f"{r['tokens_per_s'] / stock['tokens_per_s']:.2f}x",
                    f"{stock['peak_gib'] - r['peak_gib']:.1f}",
                ]
            )
    if not rows:
        return []
    header = ["model", "routing", "block at its best", "stock at its best"]
    header += ["tokens/s over stock's", "GiB less reserved"]
    return ["", "## Each at its best mode", "", *table(header, rows)]


def _modes(records: list[dict], model: str, balance: str) -> str:
    found = [
        mode(r)
        for r in records
        if (r["model"], r["balance"], r["impl"]) == (model, balance, "stock")
    ]
    return f"{len(found)} measured"


def _memory(records: list[dict], memory: list[dict]) -> list[str]:
    """Activation bytes of a layer, predicted and measured, and of the whole model, predicted."""
    rows = [
        [
            r["model"],
            "token rounding" if r["router"] == "token_rounding" else "top-k",
            r["what"],
            f"{r['tokens']:,}",
            f"{r['predicted_bytes']:,}",
            f"{r['measured_bytes']:,}",
            f"{r['measured_bytes'] / r['predicted_bytes'] - 1:+.3%}",
            f"{r['layers'] * r['predicted_bytes'] / GIB:.2f}",
            f"{r['layers'] * r['measured_bytes'] / GIB:.2f}",
        ]
        for r in memory
    ]
    if not rows:
        return []
    text = (
        f"{where(memory)}; `python scripts/bench_train.py memory`: what autograd keeps of one "
        "layer (eager, no activation checkpointing), and as many GiB for all layers of the model."
    )
    header = ["model", "router", "of a layer", "tokens", "predicted bytes", "measured bytes"]
    header += ["difference", "all layers, predicted GiB", "all layers, measured GiB"]
    return ["", "## Activations kept for the backward", "", text, "", *table(header, rows)]


def _color(name: str) -> str:
    return next(color for word, color in COLORS.items() if word in name)


def write_figure(records: list[dict], path: Path) -> None:
    """Tokens/s (left) and reserved memory (right) of every block at its best mode."""
    every = [(group, best_of(records, *group)) for group in groups(records)]
    rows = [row for row in every if len(row[1]) > 1] or every
    found = {name: _color(name) for _, best in rows for name in best}
    names = sorted(found, key=lambda name: [*COLORS.values()].index(found[name]))
    with figure(path, columns=2, size=(10, 4), caption=where(records)) as (drawn, (panels,)):
        for axes, (quantity, (title, scale, text)) in zip(panels, QUANTITIES.items(), strict=True):
            width = 0.8 / len(names)
            for i, name in enumerate(names):
                points = [(x, best[name]) for x, (_, best) in enumerate(rows) if name in best]
                at = [x + (i - (len(names) - 1) / 2) * width for x, _ in points]
                values = [scale * r[quantity] for _, r in points]
                bars = axes.bar(at, values, width, label=name, color=found[name])
                axes.bar_label(bars, fmt=text, fontsize=8)
            ticks = [f"{model}\n{balance} routing" for (model, balance), _ in rows]
            axes.set_xticks(range(len(rows)), ticks, fontsize=8)
            axes.set_xlim(-0.6, max(len(rows), 2) - 0.4)
            axes.set_ylabel(title)
            bare(axes)
        legend_above(drawn, panels[0], columns=3)
