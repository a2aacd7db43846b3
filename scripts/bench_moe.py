#!/usr/bin/env python3
"""Measure the experts of one MoE layer: ours, the torch backend, the official package, Liger.

    python scripts/bench_moe.py --shapes 7b 1.4b --impls sonicmoe torch --out docs/benchmarks
    python scripts/bench_moe.py --impls sonicmoe official --pythonpath official=/opt/official/site

Every implementation runs in a process of its own (they need different CuTe DSL versions), rounds
alternate between them, and medians over the rounds are written as JSON, CSV, Markdown and figures.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import roofline  # noqa: E402

from tests.cases import BENCHMARK_CASES, Case  # noqa: E402

IMPLEMENTATIONS = ("sonicmoe", "torch", "official", "liger")
NAME = "moe_layer_h100"
STEP_FLOPS = 18  # times T K D F, forward and backward


class OurKernel(NamedTuple):
    """How the profiler names a kernel of ours, and the steps of roofline.py it serves."""

    symbol: str
    steps: tuple[str, ...]


# One symbol serves both weight gradients, and one both aggregations.
OUR_KERNELS = {
    "up": OurKernel("upUp_object", ("up",)),
    "down": OurKernel("downDown_object", ("down",)),
    "d_hidden": OurKernel("d_hiddenDHidden_object", ("d_hidden",)),
    "d_input": OurKernel("d_inputDInput_object", ("d_input",)),
    "d_weights": OurKernel("GroupedGemmK_object", ("d_weight2", "d_weight13")),
    "aggregate": OurKernel("Aggregate_object", ("aggregate_out", "aggregate_dx")),
}


class WorkerProcess:
    """One implementation in a process of its own; requests and answers are JSON lines."""

    def __init__(self, name: str, pythonpath: str | None, log: Path) -> None:
        paths = [str(ROOT), str(ROOT / "kernels"), pythonpath, os.environ.get("PYTHONPATH")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "bench_moe_worker.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def ask(self, case: Case, seconds: float) -> dict:
        """One round of `case`, or {"error": ...}."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"case": dataclasses.asdict(case), "seconds": seconds}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"process ended, see {self.log.name}"}


def per_kernel(kernels: dict[str, float], case: Case) -> dict[str, dict[str, float]]:
    """Measured and floor milliseconds by our kernel names; what matches none is 'other'."""
    floors = roofline.kernels(case.T, case.D, case.F, case.E, case.K)
    table = {
        name: {"ms": 0.0, "floor_ms": sum(floors[step].floor_ms for step in ours.steps)}
        for name, ours in OUR_KERNELS.items()
    }
    table["other"] = {"ms": 0.0, "floor_ms": 0.0}
    for kernel, ms in kernels.items():
        symbol = re.sub(r"\W", "", kernel)
        match = (name for name, ours in OUR_KERNELS.items() if ours.symbol in symbol)
        table[next(match, "other")]["ms"] += ms
    return table


def commit() -> str:
    """The checked-out commit, or 'unknown' outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or os.environ.get("SONICMOE_COMMIT", "unknown")


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Alternate rounds over implementations, shape by shape; one record each."""
    pythonpaths = dict(entry.split("=", 1) for entry in arguments.pythonpath)
    workers = {
        name: WorkerProcess(name, pythonpaths.get(name), folder / f"{NAME}_{name}.log")
        for name in arguments.impls
    }
    records = []
    for shape in arguments.shapes:
        case = BENCHMARK_CASES[shape]
        rounds: dict[str, list[dict]] = {name: [] for name in workers}
        for _ in range(arguments.rounds):
            for name, worker in workers.items():
                answer = worker.ask(case, arguments.seconds)
                if "error" in answer:
                    print(f"{shape} {name}: {answer['error']}", file=sys.stderr)
                else:
                    rounds[name].append(answer)
        records += [summarise(shape, name, answers) for name, answers in rounds.items() if answers]
        for record in records[-len(workers) :]:
            print(line(record), flush=True)
    return records


def summarise(shape: str, name: str, answers: list[dict]) -> dict:
    """Medians over the rounds of one implementation."""
    case = BENCHMARK_CASES[shape]
    numbers = [key for key, value in answers[0].items() if isinstance(value, int | float)]
    record = {key: statistics.median(a[key] for a in answers) for key in numbers}
    kernels = {
        key: statistics.median(a["kernels"].get(key, 0.0) for a in answers)
        for key in answers[0]["kernels"]
    }
    spread = [a["fwd_bwd_ms"] for a in answers]
    return {
        "shape": shape,
        **{key: getattr(case, key) for key in ("T", "D", "F", "E", "K")},
        "impl": name,
        **record,
        "fwd_bwd_ms_rounds": spread,
        "tflops": STEP_FLOPS * case.T * case.K * case.D * case.F / record["fwd_bwd_ms"] * 1e-9,
        "floor_ms": sum(
            work.floor_ms
            for work in roofline.kernels(case.T, case.D, case.F, case.E, case.K).values()
        ),
        "per_kernel": per_kernel(kernels, case) if name == "sonicmoe" else kernels,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def line(record: dict) -> str:
    """One record as a line of the console's table."""
    return (
        f"{record['shape']:10s} {record['impl']:9s} fwd {record['fwd_ms']:7.3f} "
        f"bwd {record['bwd_ms']:7.3f} both {record['fwd_bwd_ms']:7.3f} ms, kernels "
        f"{record['kernel_ms']:7.3f} ({record['kernel_ms'] / record['floor_ms']:.2f}x floor), "
        f"{record['tflops']:.0f} TFLOP/s, host {record['host_us']:.0f} us"
    )


def write_tables(records: list[dict], folder: Path) -> None:
    """JSON (everything), CSV (scalars) and Markdown (what a reader compares)."""
    (folder / f"{NAME}.json").write_text(json.dumps(records, indent=1) + "\n")
    scalars = [k for k, v in records[0].items() if isinstance(v, int | float | str)]
    with (folder / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    first = records[0]
    lines = [
        "# The experts of one MoE layer on an H100",
        "",
        f"{first['device']}, torch {first['versions']['torch']}, commit {first['commit']}, "
        f"{first['date']}; `python scripts/bench_moe.py`. bf16, routing given, balanced. Medians "
        "over alternating rounds of a sustained loop; kernel time is the profiler's sum. Floors: "
        f"{roofline.TFLOPS:.0f} TFLOP/s and {roofline.TERABYTES_PER_S} TB/s.",
        "",
        "| shape | T, D, F, E, K | implementation | forward ms | backward ms | both ms "
        "| kernels ms | kernels / floor | TFLOP/s | host us | saved MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        sizes = ", ".join(str(r[key]) for key in ("T", "D", "F", "E", "K"))
        lines.append(
            f"| {r['shape']} | {sizes} | {r['impl']} | {r['fwd_ms']:.3f} | {r['bwd_ms']:.3f} | "
            f"{r['fwd_bwd_ms']:.3f} | {r['kernel_ms']:.3f} | "
            f"{r['kernel_ms'] / r['floor_ms']:.2f} | {r['tflops']:.0f} | {r['host_us']:.0f} | "
            f"{r['saved_bytes'] / 2**20:.0f} | {r['peak_bytes'] / 2**20:.0f} |"
        )
    ours = [r for r in records if r["impl"] == "sonicmoe"]
    if ours:
        names = list(ours[0]["per_kernel"])
        lines += ["", "## Ours, kernel by kernel: ms (times its floor)", ""]
        lines += ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for r in ours:
            cells = [
                f"{k['ms']:.3f} ({k['ms'] / k['floor_ms']:.2f})"
                if k["floor_ms"]
                else f"{k['ms']:.3f}"
                for k in r["per_kernel"].values()
            ]
            lines.append(f"| {r['shape']} | " + " | ".join(cells) + " |")
    (folder / f"{NAME}.md").write_text("\n".join(lines) + "\n")


def write_figures(records: list[dict], folder: Path) -> None:
    """Throughput and saved memory by shape, one bar per implementation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(IMPLEMENTATIONS, ("#0072B2", "#999999", "#E69F00", "#009E73"), strict=True))
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    impls = [name for name in IMPLEMENTATIONS if any(r["impl"] == name for r in records)]
    panels = {
        "tflops": ("forward + backward, TFLOP/s", 1.0),
        "memory": ("kept for backward, MiB", 2.0**20),
    }
    for panel, (label, unit) in panels.items():
        key = "tflops" if panel == "tflops" else "saved_bytes"
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        width = 0.8 / len(impls)
        for i, name in enumerate(impls):
            values = {r["shape"]: r[key] / unit for r in records if r["impl"] == name}
            at = [x + (i - (len(impls) - 1) / 2) * width for x in range(len(shapes))]
            bars = axes.bar(
                at, [values.get(s, 0) for s in shapes], width, label=name, color=colors[name]
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        if panel == "tflops":
            for x, shape in enumerate(shapes):
                r = next(r for r in records if r["shape"] == shape)
                flops = STEP_FLOPS * r["T"] * r["K"] * r["D"] * r["F"]
                ceiling = flops / r["floor_ms"] * 1e-9
                axes.hlines(ceiling, x - 0.45, x + 0.45, color="black", linestyle="dashed")
            axes.plot([], [], color="black", linestyle="dashed", label="sum of floors")
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_ylabel(label)
        axes.legend(fontsize=8, ncols=len(impls) + 1, loc="upper left")
        axes.margins(y=0.2)
        first = records[0]
        axes.set_title(f"{first['device']}, {first['date']}, {first['commit']}", fontsize=9)
        figure.savefig(folder / f"{NAME}_{panel}.png", dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=BENCHMARK_CASES, default=["7b", "1.4b"])
    default = ["sonicmoe", "torch"]
    parser.add_argument("--impls", nargs="+", choices=IMPLEMENTATIONS, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one round's loop")
    parser.add_argument("--pythonpath", nargs="*", default=[], metavar="IMPL=PATHS")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_moe: needs an NVIDIA GPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = measure(arguments, arguments.out)
    if not records:
        sys.exit("bench_moe: nothing could be measured, see the logs")
    write_tables(records, arguments.out)
    write_figures(records, arguments.out)


if __name__ == "__main__":
    main()
