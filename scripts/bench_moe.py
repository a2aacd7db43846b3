#!/usr/bin/env python3
"""Measure the experts of one MoE layer: ours, the torch backend, the official package, Liger.

    python scripts/bench_moe.py --shapes paper models --impls sonicmoe torch --append
    python scripts/bench_moe.py --impls sonicmoe official --pythonpath official=/opt/official/site
    python scripts/bench_moe.py --report            tables and figures again, no GPU

A shape is a name of tests/cases.py's BENCHMARK_CASES or one of its groups: paper, models, skewed,
small, fine, all. Every implementation runs in a process of its own (they need different CuTe DSL
versions), rounds alternate between them, and medians over the rounds are written as JSON after
every shape. One that hangs for --limit seconds or dies is started again for the next shape. With
--append shapes and implementations that the JSON holds already stay unless measured again, so a
command can be cut into calls; --deadline starts no shape after so many seconds. CSV, Markdown and
figures are made of the JSON at the end.

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
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import roofline  # noqa: E402
from bench import driver, facts, moe_report  # noqa: E402
from bench.kernels import EXPERTS, expert_kernel  # noqa: E402
from bench.process import Turn, WorkerProcess, alternate  # noqa: E402

from tests.cases import BENCHMARK_CASES, BENCHMARK_GROUPS, Case  # noqa: E402

PROBE_TOLERANCE = 0.1  # right results differ by about 0.01, wrong ones by about 1
IMPLEMENTATIONS = tuple(moe_report.IMPLEMENTATIONS)
# Of the last round's answer, where there.
DETAILS = ("kernel_ms", "saved_bytes", "peak_bytes", "probes", "versions")
GRAPH_DETAILS = ("graph_ms", "graph_host_us", "graph_error")


def floors_ms(case: Case, rates: dict[str, float] | None = None) -> dict[str, float]:
    """Least milliseconds of every step of roofline.py, at its rates or a run's own."""
    work = roofline.kernels(case.T, case.D, case.F, case.E, case.K)
    if rates is None:
        return {step: w.floor_ms for step, w in work.items()}
    return {step: w.at(rates["matmul_tflops"], rates["copy_tb_s"]) for step, w in work.items()}


def per_kernel(kernels: dict[str, float], case: Case) -> dict[str, dict[str, float]]:
    """Measured and floor milliseconds by our kernel names; what matches none is 'other'."""
    floors = floors_ms(case)
    table = {
        key: {"ms": 0.0, "floor_ms": sum(floors[step] for step in kernel.steps)}
        for key, kernel in EXPERTS.items()
    }
    table["other"] = {"ms": 0.0, "floor_ms": 0.0}
    for kernel, ms in kernels.items():
        table[expert_kernel(kernel) or "other"]["ms"] += ms
    return table


def measure(arguments: argparse.Namespace, records: list[dict], path: Path) -> None:
    """Alternate rounds over implementations, shape by shape; `path` is rewritten after each."""
    began = time.monotonic()
    with driver.workers("bench.moe_worker", arguments, logs=path.parent, prefix="bench") as workers:
        common = facts.where_and_when() | {"rates": facts.measured_rates()}
        print(json.dumps(common), flush=True)
        shapes = shapes_named(arguments.shapes)
        with facts.sampled_clocks() as clocks:
            for shape in driver.in_time(shapes, began=began, deadline_s=arguments.deadline):
                new = _measure_shape(shape, workers, arguments, clocks)
                for record in new:
                    record |= common
                    record["own_floor_ms"] = sum(
                        floors_ms(BENCHMARK_CASES[shape], common["rates"]).values()
                    )
                moe_report.merge(records, new)
                path.write_text(json.dumps(records, indent=1) + "\n")
                for record in new:
                    print(moe_report.line(record), flush=True)


def shapes_named(names: Iterable[str]) -> list[str]:
    """Names of cases from names of cases and groups, each once."""
    found = [shape for name in names for shape in BENCHMARK_GROUPS.get(name, (name,))]
    return list(dict.fromkeys(found))


def _measure_shape(
    shape: str,
    workers: dict[str, WorkerProcess],
    arguments: argparse.Namespace,
    clocks: facts.ClockSampler,
) -> list[dict]:
    began = time.monotonic()
    request = {"case": dataclasses.asdict(BENCHMARK_CASES[shape]), "seconds": arguments.seconds}
    turns = [Turn(name, worker, request) for name, worker in workers.items()]
    rounds = alternate(turns, rounds=arguments.rounds, limit_s=arguments.limit)
    new = []
    for name, answers in rounds.items():
        seen = [clocks.between(a["began"], a["ended"]) for a in answers]
        new.append(summarise(shape, name, answers) | medians(filter(None, seen)))
    _compare_probes(new)
    print(f"{shape}: {time.monotonic() - began:.0f} s", flush=True)
    return new


def medians(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of every key of dictionaries that have the same keys."""
    found = list(rows)
    return {key: statistics.median(row[key] for row in found) for key in (found or [{}])[0]}


def summarise(shape: str, name: str, answers: list[dict]) -> dict:
    """Medians over the rounds of one implementation, and the last round's details."""
    case, details = BENCHMARK_CASES[shape], answers[-1]
    timings = ("fwd_ms", "bwd_ms", "fwd_bwd_ms", "host_us")
    record = medians({key: answer[key] for key in timings} for answer in answers)
    kernels = details["kernels"]
    return {
        "shape": shape,
        **{key: getattr(case, key) for key in ("T", "D", "F", "E", "K", "routing")},
        "impl": name,
        **record,
        "fwd_bwd_ms_rounds": [a["fwd_bwd_ms"] for a in answers],
        "tflops": moe_report.tflops(dataclasses.asdict(case), record["fwd_bwd_ms"], passes=3),
        "floor_ms": sum(floors_ms(case).values()),
        **{key: details[key] for key in DETAILS},
        **{key: details[key] for key in GRAPH_DETAILS if key in details},
        "per_kernel": per_kernel(kernels, case)
        if name == "sonicmoe"
        else {kernel: {"ms": ms, "floor_ms": 0.0} for kernel, ms in kernels.items()},
        "wall_s": sum(answer["wall_s"] for answer in answers),
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*BENCHMARK_GROUPS, *BENCHMARK_CASES]
    parser.add_argument("--shapes", nargs="+", choices=known, default=["7b", "1.4b"])
    default = ["sonicmoe", "torch"]
    parser.add_argument("--impls", nargs="+", choices=IMPLEMENTATIONS, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one round's loop")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one answer; tuning"
                        " the official package takes up to 400 a shape")  # fmt: skip
    parser.add_argument("--deadline", type=float, help="start no shape after so many seconds")
    parser.add_argument("--pythonpath", nargs="*", default=[], metavar="IMPL=PATHS")
    parser.add_argument("--append", action="store_true", help="to the records that --out holds")
    parser.add_argument("--report", action="store_true", help="of the records, measuring nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args(argv)


def main() -> None:
    driver.run("bench_moe", moe_report, parse(), measure)


if __name__ == "__main__":
    main()
