"""Checks and times the kernels one by one on a GPU, every risky step in a process of its own.

    python scripts/gpu_check.py build  [--cases small,7b,...]   compile what the others need (no GPU)
    python scripts/gpu_check.py check  [--cases ...]            against fp32 references
    python scripts/gpu_check.py time   [--cases 7b,...]         medians and floors, in rounds

Legend: T tokens, D model width, F expert width, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from tests.cases import ACTIVATION_CASES, BENCHMARK_CASES, SMALL_CASES, Case  # noqa: E402

TIMEOUT_S = 60
TENSOR_FLOPS, MEMORY_BYTES = 660e12, 3.0e12  # sustained on an H100: what floors are computed from
KERNELS = ("up", "down", "d_hidden", "d_input")
EXTRA_CASES = (
    Case(3000, 192, 192, 5, 2, "zipf"),
    Case(2000, 768, 256, 24, 3, "tile_edges"),
    Case(700, 128, 320, 40, 4, "zipf"),
)


def cases_named(names: str) -> list[tuple[str, Case]]:
    """(group, case) of a comma-separated list: small, activations, extra, or benchmark names."""
    groups = {"small": SMALL_CASES, "activations": ACTIVATION_CASES, "extra": EXTRA_CASES}
    chosen = []
    for name in names.split(","):
        cases = groups.get(name) or (BENCHMARK_CASES[name],)
        chosen += [(name, case) for case in cases]
    return chosen


def specs_of(case: Case, dtype: str) -> list:
    from sonicmoe_kernels.tiles import pick_rows

    facts = {"d": case.D, "f": case.F, "num_experts": case.E}
    return [
        pick_rows(kernel, **facts, dtype=dtype, activation=case.activation) for kernel in KERNELS
    ]


def build(spec: object) -> str:
    from sonicmoe_kernels import compile as kernel_cache

    started = time.perf_counter()
    path = kernel_cache.build(spec)
    return f"{path.name} {time.perf_counter() - started:.1f} s"


def run_build(arguments: argparse.Namespace) -> int:
    """Compiles the chosen cases' kernels in two processes."""
    import multiprocessing

    specs = {
        spec: None
        for _, case in cases_named(arguments.cases)
        for spec in specs_of(case, arguments.dtype)
    }
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for line in pool.imap_unordered(build, list(specs)):
            print(line, flush=True)
    return 0


def run_one(arguments: argparse.Namespace) -> int:
    """One kernel on one case, in this process."""
    from tests.gpu.row_kernels import CHECKS, make_problem

    torch.backends.cuda.matmul.allow_tf32 = False
    case = Case(**eval(arguments.case))
    problem = make_problem(case, getattr(torch, arguments.dtype))
    for kernel in arguments.kernels.split(","):
        CHECKS[kernel](problem)
        print(f"ok {kernel}", flush=True)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Every chosen case in a subprocess; a hang or a crash costs its case only."""
    failed = 0
    for group, case in cases_named(arguments.cases):
        command = [sys.executable, __file__, "one", "--case", repr(dataclasses.asdict(case))]
        command += ["--dtype", arguments.dtype, "--kernels", arguments.kernels]
        started = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            passed, output = done.returncode == 0, done.stdout + done.stderr
        except subprocess.TimeoutExpired as expired:
            passed = False
            output = (expired.stdout or b"").decode() + "TIMEOUT"
        seconds = time.perf_counter() - started
        print(f"{'pass' if passed else 'FAIL'} {group} {case.name} {seconds:.1f} s", flush=True)
        if not passed:
            failed += 1
            print("    " + "\n    ".join(output.strip().splitlines()[-6:]), flush=True)
    print(f"{failed} cases failed", flush=True)
    return int(failed > 0)


def floor_ms(kernel: str, case: Case) -> float:
    """Least time: useful FLOPs at 660 TFLOP/s or every tensor once at 3.0 TB/s."""
    rows, unit = case.T * case.K, case.T * case.K * case.D * case.F * 2
    x, y, a, weight = case.T * case.D, rows * case.D, rows * case.F, case.E * case.D * case.F
    flops = {"up": 2, "down": 1, "d_hidden": 1, "d_input": 2}[kernel] * unit
    elements = {
        "up": x + 2 * weight + 3 * a,
        "down": a + weight + y,
        "d_hidden": x + weight + 5 * a,
        "d_input": 2 * a + 2 * weight + y,
    }[kernel]
    return max(flops / TENSOR_FLOPS, 2 * elements / MEMORY_BYTES) * 1e3


def run_time(arguments: argparse.Namespace) -> int:
    """Medians of CUDA-event timings, kernels interleaved over rounds."""
    from tests.gpu.row_kernels import launchers, make_problem

    for name, case in cases_named(arguments.cases):
        problem = make_problem(case, getattr(torch, arguments.dtype))
        calls = launchers(problem)
        rounds: dict[str, list[float]] = {kernel: [] for kernel in calls}
        for _ in range(arguments.rounds):
            for kernel, call in calls.items():
                rounds[kernel].append(median_ms(call, arguments.repeats))
        for kernel, times in rounds.items():
            floor = floor_ms(kernel, case)
            shown = " ".join(f"{ms:.3f}" for ms in times)
            print(f"{name:10s} {kernel:9s} {shown} ms, floor {floor:.3f}, "
                  f"{floor / min(times):.0%} at best", flush=True)  # fmt: skip
        del problem, calls
        torch.cuda.empty_cache()
    return 0


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
    parser.add_argument("action", choices=("build", "check", "time", "one"))
    parser.add_argument("--cases", default="small,extra,activations")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    actions = {"build": run_build, "check": run_check, "time": run_time, "one": run_one}
    return actions[arguments.action](arguments)


if __name__ == "__main__":
    sys.exit(main())
