#!/usr/bin/env python3
"""Train on one GPU with our MoE block and with stock TorchTitan's; compare.

    python scripts/bench_train.py speed --plan                 rows by importance, with seconds
    python scripts/bench_train.py speed --deadline 480         as many as fit, added to the JSON
    python scripts/bench_train.py memory                       activation bytes beside the model's
    python scripts/bench_train.py losses
    python scripts/bench_train.py profile --models 7b_proxy --modes compiled+graphs --blocks sonic
    python scripts/bench_train.py report                       tables and figures again, no GPU

`speed` runs rows of a plan, the most wanted first: models (the 7B proxy is configs/moe_7b.toml with
8 layers; the 1.4B models are whole), blocks, eager and compiled, with and without CUDA graphs,
natural and forced-balanced routing; same data, loss, optimizer, metrics; no activation
checkpointing, no auxiliary losses (stock has none). Filters choose among them, and with --all among
what the plan leaves out too. A row measured again replaces the record of the same. `losses` trains
the backends hopper and torch from one seed, and torch again from weights that differ in their last
bits: what rounding alone does to a loss curve.
`profile` traces one step of each row and sums its GPU time by kind of kernel.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench import driver, facts, train_losses, train_report  # noqa: E402
from bench.train_memory import measured_bytes  # noqa: E402
from bench.train_plan import EVERYTHING, PLAN, Row, labels  # noqa: E402
from bench.train_profile import profile_table, read_trace  # noqa: E402
from bench.train_runs import (  # noqa: E402
    ACTIVE,
    BALANCES,
    BLOCKS,
    LOSS,
    MFU,
    MODELS,
    MODES,
    PREDICTED,
    RESERVED,
    SEQ_LEN,
    TOKENS_PER_S,
    Run,
    sizes,
    train,
)

ROUTERS = ("topk", "token_rounding")
CHOICES = (MODELS, BLOCKS, MODES, BALANCES)  # of the filters, in the order of a row
# Seconds of a row that no record tells about, for --plan and --deadline alone.
GUESSED_S = {"eager": 60, "compiled": 90}


def chosen(arguments: argparse.Namespace) -> list[Row]:
    """The plan's rows that pass the filters; with --all, what the plan lacks comes behind."""
    given = (arguments.models, arguments.blocks, arguments.modes, arguments.routing)
    accepted = [allowed or set(known) for allowed, known in zip(given, CHOICES, strict=True)]
    rows = tuple(dict.fromkeys(PLAN + EVERYTHING)) if arguments.all else PLAN
    passing = [row for row in rows if all(map(operator.contains, accepted, row))]
    if not passing:
        sys.exit("bench_train: no row of the plan passes these filters; --all knows every row")
    return passing


def run_of(row: Row, arguments: argparse.Namespace, extra: dict[str, object]) -> Run:
    """The run that measures a row."""
    own = sizes(
        row.model, steps=arguments.steps, layers=arguments.layers, sequences=arguments.sequences
    )
    options = own | BLOCKS[row.block] | MODES[row.mode] | BALANCES[row.balance] | extra
    return Run(row.model, {"block": row.block, "mode": row.mode, "routing": row.balance}, options)


def summary(row: Row, run: Run, records: list[dict]) -> dict:
    """Medians and quartiles over the windows after the warm-up."""
    windows = [record for record in records if TOKENS_PER_S in record]
    speeds = [record[TOKENS_PER_S] for record in windows]
    tokens = SEQ_LEN * int(run.options["training.global_batch_size"])
    steps_ms = [1e3 * tokens / speed for speed in speeds]
    first, middle, third = statistics.quantiles(steps_ms * 2, n=4)  # also of a single window
    predicted = {}
    if row.block != "stock" and PREDICTED in records[-1]:
        predicted = {"activations_predicted_gib": records[-1][PREDICTED]}
    return {
        **labels(row),
        "layers": run.options["model.num_layers"],
        "tokens_per_step": tokens,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_day": statistics.median(speeds) * train_report.SECONDS_A_DAY,
        "tokens_per_s_windows": speeds,
        "step_ms": {"q1": first, "median": middle, "q3": third},
        "mfu": statistics.median(record[MFU] for record in windows),
        "peak_gib": max(record[RESERVED] for record in records),
        "active_gib": max(record[ACTIVE] for record in records),
        **predicted,
        "last_loss": records[-1][LOSS],
        "wall_s": max(record.get("wall_s", 0.0) for record in records),
        "versions": facts.versions(),
        **facts.where_and_when(),
    }


def expected_s(row: Row, records: list[dict]) -> float:
    """Seconds of a row: of its own record, of the slowest in its mode, else a guess."""
    wanted = labels(row)
    timed = [r for r in records if "wall_s" in r]
    for names in (tuple(wanted), ("compile", "cuda_graphs")):
        found = [r["wall_s"] for r in timed if all(r[name] == wanted[name] for name in names)]
        if found:
            return max(found)
    return GUESSED_S["compiled" if wanted["compile"] else "eager"]


def speed(arguments: argparse.Namespace) -> None:
    """Rounds over the chosen rows; a record is replaced when its row ran."""
    path = facts.record_path(arguments.out, train_report.KIND)
    records = json.loads(path.read_text()) if path.exists() else []
    rows, began = chosen(arguments), time.monotonic()
    if arguments.plan:
        found = facts.recorded(arguments.out, train_report.KIND)
        timed = [record for file in found for record in json.loads(file.read_text())]
        for number, row in enumerate(rows, 1):
            print(f"{number:3d} {expected_s(row, timed):4.0f} s  {' / '.join(row)}")
        print(f"{sum(expected_s(row, timed) for row in rows):.0f} s in all")
        return
    seen: dict[Row, list[dict]] = {row: [] for row in rows}
    for row in rows * arguments.rounds:
        left = (arguments.deadline or float("inf")) - (time.monotonic() - began)
        if expected_s(row, records) > left:
            print(f"{' / '.join(row)}: left out, {left:.0f} s are left", flush=True)
            continue
        run = run_of(row, arguments, {"metrics.log_freq": arguments.log_freq})
        seen[row] += train(run, arguments.work, min(arguments.timeout, left))
        if any(TOKENS_PER_S in record for record in seen[row]):
            new = summary(row, run, seen[row])
            records = [r for r in records if train_report.key(r) != train_report.key(new)] + [new]
            path.write_text(json.dumps(records, indent=1) + "\n")
            print(json.dumps(new), flush=True)
    if not any(seen.values()):
        sys.exit("bench_train: no run ended well, see the logs")
    train_report.write(records, arguments.out)


def memory(arguments: argparse.Namespace) -> None:
    """`sonicmoe memory` for every model and router, at once; its measured rows as records."""
    own = {"layers": arguments.layers, "sequences": arguments.sequences}
    jobs = list(product(arguments.models or MODELS, ROUTERS))
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = pool.map(lambda job: measured_bytes(*job, folder=arguments.work, **own), jobs)
    records = [record for rows in found for record in rows]
    if not records:
        sys.exit("bench_train: nothing was measured, see the logs")
    path = facts.record_path(arguments.out, train_report.MEMORY_KIND)
    path.write_text(json.dumps(records, indent=1) + "\n")
    report(arguments)


def losses(arguments: argparse.Namespace) -> None:
    """Every router and mode with every backend, concurrently; writes curves and their distances.

    The file is whole after every run; a curve measured again replaces the earlier one.
    """
    shared = sizes("7b_proxy", steps=arguments.steps, layers=arguments.layers, sequences=1)
    shared |= {"metrics.log_freq": 1, "debug.seed": 1}
    wanted = product(arguments.routers or ROUTERS, arguments.modes or MODES, train_losses.RUNS)
    runs = [
        Run(
            "7b_proxy",
            dict(zip(train_losses.KEY, key, strict=True)),
            shared | {"model.router": key[0]} | MODES[key[1]] | train_losses.RUNS[key[2]],
        )
        for key in wanted
    ]
    path = facts.record_path(arguments.out, train_losses.KIND)
    rows = json.loads(path.read_text()) if path.exists() else []
    common, writing = {"versions": facts.versions(), **facts.where_and_when()}, threading.Lock()

    def measure(run: Run) -> None:
        records = train(run, arguments.work, arguments.timeout)
        if records:
            curve = [record[LOSS] for record in records]
            layers = run.options["model.num_layers"]
            new = {**run.labels, "losses": curve, "layers": layers, **common}
            with writing:
                rows[:] = train_losses.replaced(rows, new)
                path.write_text(json.dumps(rows, indent=1) + "\n")

    with ThreadPoolExecutor(arguments.concurrent) as pool:
        list(pool.map(measure, runs))
    if not rows:
        sys.exit("bench_train: no run ended well, see the logs")
    train_losses.write(rows, arguments.out)


def profile(arguments: argparse.Namespace) -> None:
    """Milliseconds of GPU time by kind and by kernel for one step of each chosen row."""
    traced = {"profiler.enable_profiling": True, "profiler.profile_freq": arguments.steps}
    for row in chosen(arguments):
        run = run_of(row, arguments, traced)
        train(run, arguments.work, arguments.timeout)
        traces = sorted((arguments.work / run.name).glob("profiling/traces/**/*.json*"))
        if traces:
            text = profile_table(read_trace(traces[-1])["traceEvents"])
            (arguments.out / f"profile_{run.name}.txt").write_text(text)
            print(f"== {run.name}\n{text}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    """Tables and figures of what the folder holds."""
    for kind in (train_report, train_losses):
        driver.report_all(kind, arguments.out)


ACTIONS = {
    "speed": speed,
    "memory": memory,
    "losses": losses,
    "profile": profile,
    "report": report,
}
STEPS = {"speed": 40, "losses": 200, "profile": 20}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=ACTIONS)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--routing", nargs="+", choices=BALANCES)
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, help="of losses")
    parser.add_argument("--all", action="store_true", help="rows beside the plan's too")
    parser.add_argument("--layers", type=int, help="the model's own otherwise")
    parser.add_argument("--sequences", type=int, help="a step; the model's own otherwise")
    parser.add_argument("--steps", type=int, help="default: 40 for speed, 200 for losses")
    parser.add_argument("--log-freq", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="print the rows of speed and stop")
    parser.add_argument("--deadline", type=float, help="start no row that would end later, seconds")
    parser.add_argument("--concurrent", type=int, default=2, help="runs of losses at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one run")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "bench_train")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or STEPS.get(arguments.what, 1)
    return arguments


def main() -> None:
    arguments = parse()
    for folder in (arguments.work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    ACTIONS[arguments.what](arguments)


if __name__ == "__main__":
    main()
