#!/usr/bin/env python3
"""Host time of one forward and backward of `moe_experts`, launches left out, without a GPU.

    python scripts/host_cost.py              microseconds of forward and of backward
    python scripts/host_cost.py --profile    where Python spends them

The hopper backend's own host code runs on small CPU tensors; every kernel is a function that does
nothing. What it leaves out, per launch on a GPU: 2 to 3 us to hand the tensors over and 3 to 5 us
of the driver. The whole cost on a GPU is `host_us` of bench_moe.py.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from sonicmoe_kernels import backends, hopper, moe, ops  # noqa: E402

from tests.cases import Case, make_inputs, make_plan  # noqa: E402

CASE = Case(16, 64, 64, E=8, K=2)
REPEATS = 2000


def pretend_hopper() -> None:
    """Send CPU tensors down the hopper path, with kernels that do nothing."""

    def load(spec: object) -> Callable[..., None]:
        return lambda *arguments: None

    backends._hopper_obstacle = lambda *facts: ""
    hopper.kernel_cache.load = load
    hopper.make_ready = lambda specs: None  # nothing to compile
    hopper._num_ctas = lambda device_index: 132
    torch.cuda.device = lambda device: contextlib.nullcontext()
    assert ops._resolve("hopper", torch.empty(1, 64), torch.empty(1, 64, 64)) == "hopper"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print Python's hottest functions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretend_hopper()
    inputs = make_inputs(CASE, dtype=torch.bfloat16)
    routed = make_plan(CASE, inputs.pairs)
    leaves = [t.requires_grad_() for t in inputs[:4]]
    plan = dataclasses.replace(routed, score_R=routed.score_R.requires_grad_())
    wanted = [*leaves, plan.score_R]

    def forward() -> torch.Tensor:
        return moe.moe_experts(*leaves, plan, backend="hopper")

    spans: list[tuple[float, float]] = []
    profiler = cProfile.Profile()
    for step in range(REPEATS):
        if arguments.profile and step == REPEATS // 2:
            profiler.enable()
        begin = time.perf_counter()
        out_TD = forward()
        middle = time.perf_counter()
        torch.autograd.grad(out_TD, wanted, inputs.dout_TD)
        spans.append((middle - begin, time.perf_counter() - middle))
    profiler.disable()
    forward_us, backward_us = (1e6 * statistics.median(part) for part in zip(*spans, strict=True))
    if arguments.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    else:
        total = forward_us + backward_us
        print(f"forward {forward_us:.1f} us, backward {backward_us:.1f} us, both {total:.1f} us")


if __name__ == "__main__":
    main()
