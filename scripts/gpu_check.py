"""Checks and times the kernels one by one on a GPU, every risky step in a process of its own.

    python scripts/gpu_check.py build    [--cases small,7b,...]  compile what the others need
    python scripts/gpu_check.py check    [--cases ...]           against fp32 references
    python scripts/gpu_check.py time     [--cases 7b,...]        medians and floors, in rounds
    python scripts/gpu_check.py variants [--cases 7b,...]        configurations side by side
    python scripts/gpu_check.py overlap  [--cases 7b,...]        dX's aggregation beside dW1 and dW3

Cases: names or groups of tests/cases.py's benchmarks, small, activations, extra. Only `build` needs
no GPU.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import roofline  # noqa: E402
import torch  # noqa: E402
from sonicmoe_kernels import kernel_lists, warmup  # noqa: E402
from sonicmoe_kernels.activations import get_activation  # noqa: E402
from sonicmoe_kernels.rounding import ROUNDINGS  # noqa: E402
from sonicmoe_kernels.tiles import (  # noqa: E402
    PINGPONG,
    ROW_TILES,
    TURNED,
    UP_TURNED,
    WIDE,
    RowGemm,
    RowTile,
    TopKOptions,
    WeightGemm,
    WeightTile,
    pick_weights,
    why_illegal,
    why_illegal_weights,
)

from tests.cases import (  # noqa: E402
    ACTIVATION_CASES,
    BENCHMARK_CASES,
    BENCHMARK_GROUPS,
    DRAWN_CASE,
    ODD_CASES,
    SMALL_CASES,
    Case,
)

TIMEOUT_S = 60
CONCURRENT = 5  # subprocesses on one GPU
SPARED = (0, 4, 8, 12, 20)  # multiprocessors that dW1 and dW3 leave to the aggregation
KERNELS = ("up", "down", "d_hidden", "d_input", "d_weight2", "d_weight13")
EXTRA_CASES = (
    Case(3000, 192, 192, 5, 2, "zipf"),
    Case(2000, 768, 256, 24, 3, "tile_edges"),
    Case(700, 128, 320, 40, 4, "zipf"),
    DRAWN_CASE,
    *ODD_CASES,
)

WEIGHT_TILES = (
    WeightTile(256, 4, 2),
    WeightTile(256, 4, 1),
    WeightTile(192, 4, 2),
    WeightTile(256, 4, 2, short_end=True),
)
DRAWN = dataclasses.replace(PINGPONG, dynamic=True)
VARIANTS = {
    "up": (
        RowTile(256, 4),
        RowTile(256, 4, dynamic=True),
        dataclasses.replace(UP_TURNED, dynamic=False),
        UP_TURNED,
        dataclasses.replace(UP_TURNED, row_group=16),
    ),
    "down": (
        PINGPONG,
        DRAWN,
        TURNED,
        dataclasses.replace(TURNED, row_group=16),
        RowTile(192, 5, "pingpong", epi_n=64),
        WIDE,
    ),
    "d_hidden": (
        RowTile(256, 3, load_sets=2),
        RowTile(256, 3, "relayed", load_sets=4),
    ),
    "d_input": (
        PINGPONG,
        DRAWN,
        WIDE,
        dataclasses.replace(WIDE, dynamic=True),
        TURNED,
        dataclasses.replace(TURNED, dynamic=True),
        dataclasses.replace(TURNED, dynamic=True, row_group=16),
        RowTile(128, 6, "pingpong", epi_n=64, epi_sets=2),
    ),
    "d_weight2": WEIGHT_TILES,
    "d_weight13": WEIGHT_TILES,
}


def weight_tiles() -> list[tuple[str, WeightTile]]:
    """(kernel, tile) of every challenger of the weight gradients' picks at wide layers."""
    return [(kernel, tile) for kernel in ("d_weight2", "d_weight13") for tile in WEIGHT_TILES]


def row_tiles() -> list[tuple[str, RowTile]]:
    """(kernel, tile) of every ragged-M tile of the table, and of its challengers."""
    found = [
        (kernel, tile)
        for tiles_of in (ROW_TILES, VARIANTS)
        for kernel, tiles in tiles_of.items()
        for tile in tiles
        if isinstance(tile, RowTile)
    ]
    return list(dict.fromkeys(found))


def cases_named(names: str) -> list[tuple[str, Case]]:
    """(group, case) of a comma-separated list: small, activations, extra, or benchmark names."""
    groups = {"small": SMALL_CASES, "activations": ACTIVATION_CASES, "extra": EXTRA_CASES}
    chosen = []
    for name in names.split(","):
        cases = groups.get(name) or [
            BENCHMARK_CASES[shape] for shape in BENCHMARK_GROUPS.get(name, (name,))
        ]
        chosen += [(name, case) for case in cases]
    return chosen


def specs_of(case: Case, dtype: str) -> list:
    """Every kernel that a layer of the case's sizes launches, its router's too."""
    experts = {"num_experts": case.E, "top_k": case.K}
    routing = TopKOptions(case.E, case.K)
    return [
        *kernel_lists.specs(d=case.D, f=case.F, **experts, dtype=dtype, activation=case.activation),
        *kernel_lists.topk_specs(routing),
        *kernel_lists.plan_specs(**experts),
    ]


def run_build(arguments: argparse.Namespace) -> int:
    """Compiles the chosen cases' kernels."""
    chosen = [case for _, case in cases_named(arguments.cases)]
    specs = [spec for case in chosen for spec in specs_of(case, arguments.dtype)]
    for rounding in ROUNDINGS:  # of launch_layers.py
        case = SMALL_CASES[0]
        specs += kernel_lists.plan_specs(num_experts=case.E, top_k=case.K, rounding=rounding)
    if arguments.variants:
        specs += [gemm for case in chosen for _, gemm in variants_of(case, arguments.dtype)]
    warmup.warm_up(specs, jobs=arguments.jobs)
    return 0


def run_one(arguments: argparse.Namespace) -> int:
    """The chosen kernels on one case, in this process."""
    from tests.gpu.row_kernels import CHECKS, forced_tile, make_problem

    torch.backends.cuda.matmul.allow_tf32 = False
    problem = make_problem(
        Case(**ast.literal_eval(arguments.case)), getattr(torch, arguments.dtype)
    )
    kernels = arguments.kernels.split(",")
    with contextlib.ExitStack() as stack:
        if arguments.tile:
            fields = ast.literal_eval(arguments.tile)
            tile = RowTile(**fields) if "schedule" in fields else WeightTile(**fields)
            stack.enter_context(forced_tile(kernels[0], tile))
        for kernel in kernels:
            CHECKS[kernel](problem)
            print(f"ok {kernel}", flush=True)
    return 0


class Step(NamedTuple):
    """One subprocess: which kernels on which case, with which tile if not the table's."""

    label: str
    case: Case
    kernels: str
    tile: RowTile | WeightTile | None = None


def run_step(step: Step, dtype: str) -> bool:
    """Runs `step` in a process of its own: a hang or a crash costs this step only."""
    command = [sys.executable, __file__, "one", "--case", repr(dataclasses.asdict(step.case))]
    command += ["--dtype", dtype, "--kernels", step.kernels]
    if step.tile:
        command += ["--tile", repr(dataclasses.asdict(step.tile))]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        passed, output = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        passed, output = False, (expired.stdout or b"").decode() + "TIMEOUT"
    lines = [f"{'pass' if passed else 'FAIL'} {step.label} {step.case.name} {step.kernels}"]
    lines[0] += f" {step.tile or ''} {time.perf_counter() - started:.1f} s"
    if not passed:
        lines += [f"    {line}" for line in output.strip().splitlines()[-8:]]
    print("\n".join(lines), flush=True)
    return passed


def run_steps(steps: list[Step], dtype: str) -> list[bool]:
    """Runs the steps, a few at a time; which of them passed."""
    with ThreadPoolExecutor(CONCURRENT) as pool:
        passed = list(pool.map(lambda step: run_step(step, dtype), steps))
    print(f"{passed.count(False)} of {len(passed)} failed", flush=True)
    return passed


def run_check(arguments: argparse.Namespace) -> int:
    """Every chosen case against the fp32 reference."""
    steps = [Step(group, case, arguments.kernels) for group, case in cases_named(arguments.cases)]
    return int(not all(run_steps(steps, arguments.dtype)))


def variants_of(case: Case, dtype: str) -> list[tuple[str, RowGemm | WeightGemm]]:
    """Every configuration worth comparing on a case, by kernel."""
    facts = (case.D, case.F, case.E, dtype, case.activation)
    halves = get_activation(case.activation).halves
    legal = []
    for kernel in KERNELS:
        for tile in VARIANTS[kernel]:
            if isinstance(tile, RowTile):
                gemm = RowGemm(kernel, *facts, tile)
                reason = why_illegal(gemm)
            else:
                columns = 1 if kernel == "d_weight2" else halves
                picked = pick_weights(kernel, d=case.D, f=case.F, halves=columns, dtype=dtype)
                gemm = dataclasses.replace(picked, tile=tile)
                reason = why_illegal_weights(gemm)
            if reason is None:
                legal.append((kernel, gemm))
    return legal


def run_variants(arguments: argparse.Namespace) -> int:
    """Checks every variant on a small T, then times those that passed, in rounds."""
    from tests.gpu.row_kernels import forced_tile, launchers, make_problem

    for name, case in cases_named(arguments.cases):
        variants = variants_of(case, arguments.dtype)
        if not arguments.skip_check:
            small = dataclasses.replace(case, T=min(case.T, 2048))
            steps = [Step(name, small, kernel, gemm.tile) for kernel, gemm in variants]
            passed = run_steps(steps, arguments.dtype)
            variants = list(itertools.compress(variants, passed))
        problem = make_problem(case, getattr(torch, arguments.dtype))
        calls = {}
        for kernel, gemm in variants:
            with forced_tile(kernel, gemm.tile):
                calls[kernel, gemm.tile] = launchers(problem)[kernel].call
        times: dict = {key: [] for key in calls}
        for _ in range(arguments.rounds):
            for (kernel, tile), call in calls.items():
                with forced_tile(kernel, tile):
                    times[kernel, tile].append(median_ms(call, arguments.repeats))
        for (kernel, tile), measured in times.items():
            shown = " ".join(f"{ms:.3f}" for ms in measured)
            floor = roofline.kernels(case.T, case.D, case.F, case.E, case.K)[kernel].floor_ms
            print(f"{name} {kernel} {shown} (floor {floor:.3f}) {tile}", flush=True)
        del problem, calls
        torch.cuda.empty_cache()
    return 0


def run_time(arguments: argparse.Namespace) -> int:
    """Medians of CUDA-event timings, kernels interleaved over rounds."""
    from tests.gpu.row_kernels import launchers, make_problem

    for name, case in cases_named(arguments.cases):
        problem = make_problem(case, getattr(torch, arguments.dtype))
        calls = {name: launch.call for name, launch in launchers(problem).items()}
        for kernel, times in timed_rounds(calls, arguments).items():
            floor = roofline.kernels(case.T, case.D, case.F, case.E, case.K)[kernel].floor_ms
            shown = " ".join(f"{ms:.3f}" for ms in times)
            print(f"{name:10s} {kernel:9s} {shown} ms, floor {floor:.3f}, "
                  f"{floor / min(times):.0%} at best", flush=True)  # fmt: skip
        del problem, calls
        torch.cuda.empty_cache()
    return 0


def run_overlap(arguments: argparse.Namespace) -> int:
    """The backward pass with its aggregation in turn, and beside dW1 and dW3, in rounds."""
    from sonicmoe_kernels import hopper

    from tests.cases import make_plan
    from tests.gpu.row_kernels import launchers, make_problem

    side = torch.cuda.Stream()
    for name, case in cases_named(arguments.cases):
        problem = make_problem(case, getattr(torch, arguments.dtype))
        plan = make_plan(case, problem.inputs.pairs, device="cuda")
        calls = {kernel: launch.call for kernel, launch in launchers(problem).items()}
        aggregate = functools.partial(
            hopper.aggregate,
            torch.zeros((problem.r_max, case.D), dtype=problem.inputs.x_TD.dtype, device="cuda"),
            plan.token_rows_R,
            plan.token_offsets,
            torch.empty_like(problem.inputs.x_TD),
            rows_per_token=plan.rows_per_token,
        )
        passes = {n: functools.partial(backward, calls, aggregate, n, side) for n in SPARED}
        for spared, times in timed_rounds(passes, arguments).items():
            shown = " ".join(f"{ms:.3f}" for ms in times)
            print(f"{name} backward {shown} ms, {spared} multiprocessors spared", flush=True)
        del problem, plan, calls, aggregate, passes
        torch.cuda.empty_cache()
    return 0


def backward(calls: dict, aggregate, spared: int, side: torch.cuda.Stream) -> None:
    """A layer's backward pass. With some multiprocessors spared, dW1 and dW3 run on the others,
    and dX's aggregation meanwhile on the stream `side`.
    """
    from sonicmoe_kernels import hopper

    for kernel in ("d_hidden", "d_weight2", "d_input"):
        calls[kernel]()
    if not spared:
        aggregate()
        calls["d_weight13"]()
        return
    stream = torch.cuda.current_stream()
    side.wait_stream(stream)
    ctas = hopper.num_ctas(torch.cuda.current_device()) - spared
    with mock.patch.object(hopper, "num_ctas", lambda _: ctas):
        calls["d_weight13"]()  # first: what comes later gets what it leaves
    with torch.cuda.stream(side):
        aggregate()
    stream.wait_stream(side)


def timed_rounds(calls: dict, arguments: argparse.Namespace) -> dict:
    """Milliseconds of every call, a median a round, in turn."""
    rounds: dict = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            rounds[name].append(median_ms(call, arguments.repeats))
    return rounds


def median_ms(call, repeats: int) -> float:
    """Median time of one call, each between its own pair of events."""
    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("build", "check", "time", "variants", "overlap", "one"))
    parser.add_argument("--cases", default="small,extra,activations")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--variants", action="store_true", help="build: also what is compared")
    parser.add_argument("--skip-check", action="store_true", help="variants: time only")
    parser.add_argument("--tile", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    actions = {"build": run_build, "check": run_check, "time": run_time, "one": run_one}
    actions |= {"variants": run_variants, "overlap": run_overlap}
    return actions[arguments.action](arguments)


if __name__ == "__main__":
    sys.exit(main())
