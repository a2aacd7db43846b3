#!/usr/bin/env python3
"""Measure the experts of one MoE layer: ours, the torch backend, the official package, Liger.

    python scripts/bench_moe.py --shapes 7b 1.4b --impls sonicmoe torch --out docs/benchmarks
    python scripts/bench_moe.py --impls sonicmoe official --pythonpath official=/opt/official/site
    python scripts/bench_moe.py --report --out docs/benchmarks      tables and figures again, no GPU

Every implementation runs in a process of its own (they need different CuTe DSL versions), rounds
alternate between them, and medians over the rounds are written as JSON after every shape. With
--append shapes and implementations that the JSON holds already stay unless measured again. CSV,
Markdown and figures are made of the JSON at the end.

The first round of a shape compiles and tunes. What a package keeps on disk it finds again:
    sonicmoe  SONICMOE_CACHE_DIR, filled by python -m sonicmoe_kernels.warmup
    official  QUACK_CACHE_DIR with QUACK_CACHE_AUTOTUNING=1; with QUACK_COMPILE_WORKERS=1 it starts
              no compilers when the objects are there
    official, liger    TRITON_CACHE_DIR with TRITON_CACHE_AUTOTUNING=1

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import bench_moe_report as report  # noqa: E402
import roofline  # noqa: E402

from tests.cases import BENCHMARK_CASES, Case  # noqa: E402

PROBE_TOLERANCE = 0.1  # right results differ by about 0.01, wrong ones by about 1


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
    """One implementation in a process of its own; requests and answers are JSON lines.

    A `pythonpath` replaces the inherited one, so that no package of another implementation is seen.
    """

    def __init__(self, name: str, pythonpath: str | None, log: Path) -> None:
        inherited = os.environ.get("PYTHONPATH") if pythonpath is None else pythonpath
        paths = [str(ROOT), str(ROOT / "kernels"), inherited]
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

    def ask(self, case: Case, seconds: float, *, details: bool) -> dict:
        """One round of `case`, or {"error": ...}."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"case": dataclasses.asdict(case), "seconds": seconds, "details": details}
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


def _first_line(command: list[str]) -> str:
    """What a command prints first, or an empty string when it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip().partition("\n")[0]


def environment() -> dict[str, object]:
    """Where and when: what every record of this run has in common."""
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _first_line(query) or "unknown",
        "commit": os.environ.get("SONICMOE_COMMIT") or _first_line(head) or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def measure(arguments: argparse.Namespace, records: list[dict], path: Path) -> None:
    """Alternate rounds over implementations, shape by shape; `path` is rewritten after each."""
    pythonpaths = dict(entry.split("=", 1) for entry in arguments.pythonpath)
    workers = {
        name: WorkerProcess(name, pythonpaths.get(name), path.with_name(f"bench_{name}.log"))
        for name in arguments.impls
    }
    try:
        _measure_shapes(arguments, workers, records, path)
    finally:  # a worker in the middle of a round would disturb whoever measures next
        for worker in workers.values():
            worker.process.kill()


def _measure_shapes(
    arguments: argparse.Namespace,
    workers: dict[str, WorkerProcess],
    records: list[dict],
    path: Path,
) -> None:
    common = environment()
    for shape in arguments.shapes:
        began = time.monotonic()
        rounds = _rounds(shape, workers, arguments)
        new = [summarise(shape, name, answers) | common for name, answers in rounds.items()]
        _compare_probes(new)
        measured = {(r["shape"], r["impl"]) for r in new}
        records[:] = [r for r in records if (r["shape"], r["impl"]) not in measured] + new
        path.write_text(json.dumps(records, indent=1) + "\n")
        for record in new:
            print(report.line(record))
        print(f"{shape}: {time.monotonic() - began:.0f} s", flush=True)


def _rounds(
    shape: str, workers: dict[str, WorkerProcess], arguments: argparse.Namespace
) -> dict[str, list[dict]]:
    """Answers of every implementation; one that fails gets no further round of this shape."""
    rounds: dict[str, list[dict]] = {name: [] for name in workers}
    for number in range(arguments.rounds):
        for name in list(rounds):
            began = time.monotonic()
            details = number == arguments.rounds - 1
            case = BENCHMARK_CASES[shape]
            answer = workers[name].ask(case, arguments.seconds, details=details)
            if "error" in answer:
                print(f"{shape} {name}: {answer['error']}", file=sys.stderr)
                del rounds[name]
                continue
            rounds[name].append(answer)
            if number == 0:
                print(f"{shape} {name}: first round {time.monotonic() - began:.1f} s", flush=True)
    return rounds


def summarise(shape: str, name: str, answers: list[dict]) -> dict:
    """Medians over the rounds of one implementation, and the last round's details."""
    case, details = BENCHMARK_CASES[shape], answers[-1]
    timings = ("fwd_ms", "bwd_ms", "fwd_bwd_ms", "host_us")
    record = {key: statistics.median(a[key] for a in answers) for key in timings}
    floors = roofline.kernels(case.T, case.D, case.F, case.E, case.K).values()
    kernels = details["kernels"]
    return {
        "shape": shape,
        **{key: getattr(case, key) for key in ("T", "D", "F", "E", "K", "routing")},
        "impl": name,
        **record,
        "fwd_bwd_ms_rounds": [a["fwd_bwd_ms"] for a in answers],
        "tflops": report.STEP_FLOPS
        * case.T
        * case.K
        * case.D
        * case.F
        / record["fwd_bwd_ms"]
        * 1e-9,
        "floor_ms": sum(work.floor_ms for work in floors),
        **{key: details[key] for key in ("kernel_ms", "saved_bytes", "peak_bytes", "probes")},
        "per_kernel": per_kernel(kernels, case)
        if name == "sonicmoe"
        else {kernel: {"ms": ms, "floor_ms": 0.0} for kernel, ms in kernels.items()},
        "versions": details["versions"],
    }


def _compare_probes(records: list[dict]) -> None:
    """Say which implementations disagree with the first one about a result."""
    for record in records:
        off = {
            name: abs(value - records[0]["probes"][name])
            for name, value in record["probes"].items()
        }
        record["agrees"] = max(off.values()) < PROBE_TOLERANCE
        if not record["agrees"]:
            names = f"{record['shape']}: {record['impl']} and {records[0]['impl']}"
            print(f"{names} compute different results: {off}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=BENCHMARK_CASES, default=["7b", "1.4b"])
    default = ["sonicmoe", "torch"]
    parser.add_argument("--impls", nargs="+", choices=report.IMPLEMENTATIONS, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one round's loop")
    parser.add_argument("--pythonpath", nargs="*", default=[], metavar="IMPL=PATHS")
    parser.add_argument("--append", action="store_true", help="to the records that --out holds")
    parser.add_argument("--report", action="store_true", help="of the records, measuring nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    path = arguments.out / f"{report.NAME}.json"
    keep = (arguments.append or arguments.report) and path.exists()
    records = json.loads(path.read_text()) if keep else []
    if not arguments.report:
        if not torch.cuda.is_available():
            sys.exit("bench_moe: needs an NVIDIA GPU")
        arguments.out.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_moe: stopped"))
        measure(arguments, records, path)
    if not records:
        sys.exit(f"bench_moe: no records in {path}; see the logs beside it")
    report.write(records, arguments.out)


if __name__ == "__main__":
    main()
