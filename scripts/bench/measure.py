"""One round of measurements of one implementation on this GPU.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.facts import short_name

WARM_STEPS = 3  # of a round, before it is timed
PROFILED_STEPS = 5
HOST_STEPS = 8  # in a row, so few that the launch queue never fills
HOST_ROUNDS, HOST_S = 10, 0.4  # whichever comes first
REPLAYS = 50
STEPS_AHEAD = 16  # that the host may be ahead of the GPU in a timed loop
OFFICIAL_AUTOTUNE = Path(__file__).with_name("official_autotune")
TUNING_MS = {"warmup": 5, "rep": 25}  # of one candidate of a Triton autotuner, as quack's own has


class Run(NamedTuple):
    """An implementation ready to run: its forward and what it differentiates by."""

    forward: Callable[[], Tensor]
    weights: list[Tensor]
    others: list[Tensor]
    dout_TD: Tensor

    def step(self) -> None:
        """Forward and backward; gradients are returned by autograd and dropped."""
        self.backward(self.forward())

    def backward(self, out_TD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_TD, [*self.weights, *self.others], self.dout_TD)


def tune_briefly() -> None:
    """Let Triton's autotuners try all their candidates, each for 30 ms instead of 125."""
    import functools

    import triton

    benchmark = functools.partial(triton.testing.do_bench, **TUNING_MS)
    triton.runtime.driver.active.get_benchmarker = lambda: benchmark


def use_earlier_choices() -> None:
    """Put what the official package's autotuner chose on a GPU of this kind into its cache."""
    known = OFFICIAL_AUTOTUNE / short_name(torch.cuda.get_device_name())
    if (cache := os.environ.get("QUACK_CACHE_DIR")) and known.is_dir():
        shutil.copytree(known, cache, dirs_exist_ok=True)


def warm_up(run: Run) -> None:
    """A round's first steps; the very first compiles or tunes what needs it."""
    for _ in range(WARM_STEPS):
        run.step()


def timed_loop(run: Run, seconds: float) -> dict[str, float]:
    """Medians over a sustained loop; the queue is kept full, events are read after it.

    `began` and `ended` are `time.time()`, for whoever samples clocks meanwhile.
    """
    events: list[tuple[torch.cuda.Event, ...]] = []
    began, begin = time.time(), time.monotonic()
    while time.monotonic() - begin < seconds or len(events) < 5:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        out = run.forward()
        middle.record()
        run.backward(out)
        end.record()
        events.append((start, middle, end))
        if len(events) > STEPS_AHEAD:
            events[-STEPS_AHEAD][2].synchronize()
    torch.cuda.synchronize()
    both_ms = [start.elapsed_time(end) for start, _, end in events]
    first, _, third = statistics.quantiles(both_ms, n=4)
    return {
        "fwd_ms": statistics.median(start.elapsed_time(middle) for start, middle, _ in events),
        "bwd_ms": statistics.median(middle.elapsed_time(end) for _, middle, end in events),
        "fwd_bwd_ms": statistics.median(both_ms),
        "fwd_bwd_q1_ms": first,
        "fwd_bwd_q3_ms": third,
        "began": began,
        "ended": time.time(),
    }


def kernel_times(call: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """(launches, milliseconds) per call of every GPU kernel, copy and fill, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            call()
        torch.cuda.synchronize()
    return {
        event.key: (
            event.count / PROFILED_STEPS,
            event.self_device_time_total / 1e3 / PROFILED_STEPS,
        )
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def host_us(call: Callable[[], object]) -> float:
    """Median host time to enqueue one of several calls in a row, the GPU being idle at first.

    In a row, as a training loop does: after a wait of some milliseconds for the GPU the code has
    left the caches and autograd's thread has fallen asleep (docs/host_cost.md).
    """
    spans: list[float] = []
    began = time.monotonic()
    while len(spans) < 3 or (len(spans) < HOST_ROUNDS and time.monotonic() - began < HOST_S):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_STEPS):
            call()
        spans.append((time.perf_counter() - begin) * 1e6 / HOST_STEPS)
    torch.cuda.synchronize()
    return statistics.median(spans)


def in_a_graph(run: Run) -> dict[str, float | str]:
    """A step captured in a CUDA graph: time of a replay and the host's part of it.

    {"graph_ms", "graph_host_us"}, or {"graph_error"} where a step cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up(run)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            run.step()
    except RuntimeError as error:
        return {"graph_error": str(error).partition("\n")[0]}
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return {
        "graph_ms": statistics.median(start.elapsed_time(end) for start, end in events),
        "graph_host_us": host_us(graph.replay),
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes allocated at the worst moment of one call, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
