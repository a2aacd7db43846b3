"""Loss curves of the backends, and how far they are from each other."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.facts import record_name
from bench.figures import can_draw, figure
from bench.moe_report import where

KIND = "losses_7b_proxy"
# Two initialisations that differ by less than bfloat16 resolves: every rounding falls anew.
RUNS = {
    "hopper": {"model.backend": "hopper"},
    "torch": {"model.backend": "torch"},
    "torch, other rounding": {"model.backend": "torch", "model.init_std": 0.0200001},
}


KEY = ("router", "mode", "run")


def replaced(rows: list[dict], new: dict) -> list[dict]:
    """The curves with `new` in the place of the same, in an order that no schedule decides."""

    def key(row: dict) -> tuple[str, ...]:
        return tuple(row[name] for name in KEY)

    return sorted([row for row in rows if key(row) != key(new)] + [new], key=key, reverse=True)


def write(rows: list[dict], folder: Path) -> None:
    """Markdown and figure beside the JSON."""
    name = record_name(KIND, rows[0]["device"])
    (folder / f"{name}.md").write_text(loss_table(rows))
    if can_draw():
        draw_losses(rows, folder / f"{name}.png")


def distances(rows: list[dict], router: str, mode: str) -> dict[str, list[float]]:
    """Absolute difference of the loss to the torch backend's, step by step, for each other run.

    Nothing where the torch backend's run failed.
    """
    curves = {r["run"]: r["losses"] for r in rows if (r["router"], r["mode"]) == (router, mode)}
    base = curves.pop("torch", None)
    if base is None:
        return {}
    return {
        name: [abs(a - b) for a, b in zip(curve, base, strict=False)]
        for name, curve in curves.items()
    }


def loss_table(rows: list[dict]) -> str:
    """Markdown: how far each run is from the torch backend's."""
    first = rows[0]
    lines = [
        "# Losses of the Hopper backend beside the torch backend's",
        "",
        f"{where(rows)}, torch {first['versions']['torch']}; "
        f"`python scripts/bench_train.py losses`. {first['layers']} layers of configs/moe_7b.toml, "
        "4096 tokens a step, real text, one seed. Distance of the loss (nats) to the torch "
        'backend\'s at the same step; "other rounding" is the torch backend from weights that '
        "differ in their last bits.",
        "",
        "| router | mode | run | first step | mean, steps 2-50 | mean, last 50 | last losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for router, mode in dict.fromkeys((r["router"], r["mode"]) for r in rows):
        for name, apart in distances(rows, router, mode).items():
            ends = [
                statistics.mean(r["losses"][-20:])
                for r in rows
                if (r["router"], r["mode"]) == (router, mode) and r["run"] in (name, "torch")
            ]
            lines.append(
                f"| {router} | {mode} | {name} | {apart[0]:.5f} | "
                f"{statistics.mean(apart[1:50]):.5f} | {statistics.mean(apart[-50:]):.5f} | "
                + " / ".join(f"{end:.4f}" for end in ends)
                + " |"
            )
    return "\n".join(lines) + "\n"


def draw_losses(rows: list[dict], path: Path) -> None:
    """Loss curves above, distances to the torch backend below; one column a router and mode."""
    found = dict.fromkeys((r["router"], r["mode"]) for r in rows)
    panels = [panel for panel in found if distances(rows, *panel)]
    if not panels:
        return
    colors = dict(zip(RUNS, ("#0072B2", "#333333", "#E69F00"), strict=True))
    size = (4 * len(panels), 6)
    with figure(path, rows=2, columns=len(panels), size=size, caption=where(rows)) as (_, axes):
        for (router, mode), (above, below) in zip(panels, axes.T, strict=True):
            for r in rows:
                if (r["router"], r["mode"]) == (router, mode):
                    above.plot(r["losses"], label=r["run"], color=colors[r["run"]], linewidth=1)
            for name, apart in distances(rows, router, mode).items():
                below.semilogy(apart, label=name, color=colors[name], linewidth=0.8)
            above.set_title(f"{router}, {mode}", fontsize=10)
            below.set_xlabel("step")
            below.legend(fontsize=8)
            above.legend(fontsize=8)
        axes[0][0].set_ylabel("loss, nats")
        axes[1][0].set_ylabel("distance to torch, nats")
