"""One implementation of the experts, measured in a process of its own.

Started by bench_moe.py, which sends one JSON request a line and reads one JSON answer a line:
{"case": {"T": ..., "D": ..., "F": ..., "E": ..., "K": ...}, "seconds": 0.5, "details": true}.
Every request is one round of timings; `details` adds what one round can tell: the profiler's
kernels, memory, and probes of the results that every implementation must agree on.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cases import Case, Inputs, make_inputs, make_plan
from tests.saved_bytes import saved_bytes

WARM_STEPS = 3  # of a round, before it is timed
PROFILED_STEPS = 5
HOST_ROUNDS, HOST_STEPS = 10, 8  # steps in a row, so few that the launch queue never fills
STEPS_AHEAD = 16  # that the host may be ahead of the GPU in a timed loop
TUNING_MS = {"warmup": 5, "rep": 25}  # of one candidate of a Triton autotuner, as quack's own has
PACKAGES = ("nvidia-cutlass-dsl", "triton", "sonic-moe", "quack-kernels", "liger-kernel")


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


def _ours(case: Case, inputs: Inputs, backend: str) -> Run:
    from sonicmoe_kernels.moe import moe_experts

    x, w1, w3, w2 = _leaves(*inputs[:4])
    routed = make_plan(case, inputs.pairs, device="cuda")
    (score,) = _leaves(routed.score_R)  # a leaf: the plan's own graph lives for one backward only
    plan = dataclasses.replace(routed, score_R=score)

    def forward() -> Tensor:
        return moe_experts(x, w1, w3, w2, plan, backend=backend)

    return Run(forward, [w1, w3, w2], [x, score], inputs.dout_TD)


def _tune_briefly() -> None:
    """Let Triton's autotuners try all their candidates, each for 30 ms instead of 125."""
    import triton

    benchmark = functools.partial(triton.testing.do_bench, **TUNING_MS)
    triton.runtime.driver.active.get_benchmarker = lambda: benchmark


def _official(case: Case, inputs: Inputs) -> Run:
    """What its `moe_TC_softmax_topk_layer` runs once the routing's metadata is there."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import (
        TC_topk_router_metadata_triton,
        _DownProjection,
        _UpProjection,
    )

    _tune_briefly()
    interleaved = torch.stack((inputs.w1_EFD, inputs.w3_EFD), dim=2).flatten(1, 2)
    score_TK = inputs.pairs.score_P.cuda().view(case.T, case.K)
    x, w13, w2, score = _leaves(inputs.x_TD, interleaved, inputs.w2_EDF, score_TK)
    rows = case.T * case.K
    count, offsets, token, scatter, reverse = (
        torch.empty(length, dtype=torch.int32, device="cuda")
        for length in (case.E, case.E + 1, rows, rows, rows)
    )
    ids_TK = inputs.pairs.expert_P.int().cuda().view(case.T, case.K)
    TC_topk_router_metadata_triton(ids_TK, case.E, count, offsets, token, scatter, reverse)
    metadata = (token, scatter, reverse, None, False)
    swiglu = ActivationType.SWIGLU

    def forward() -> Tensor:
        up, down = w13.permute(1, 2, 0), w2.permute(1, 2, 0)
        a, h = _UpProjection.apply(
            x, up, None, offsets, rows, case.K, *metadata, swiglu, False, False
        )
        return _DownProjection.apply(
            a, h, down, None, score, offsets, case.T, case.K, *metadata, swiglu
        )

    return Run(forward, [w13, w2], [x, score], inputs.dout_TD)


def _liger(case: Case, inputs: Inputs) -> Run:
    """Its forward sorts the routing itself (and waits for the host), every time."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    _tune_briefly()
    gate_up = torch.cat((inputs.w1_EFD, inputs.w3_EFD), dim=1)
    score_TK = inputs.pairs.score_P.cuda().view(case.T, case.K)
    x, w13, w2, score = _leaves(inputs.x_TD, gate_up, inputs.w2_EDF, score_TK)
    ids = inputs.pairs.expert_P.view(case.T, case.K).int().cuda()

    def forward() -> Tensor:
        return LigerFusedMoEFunction.apply(x, w13, w2, ids, score)

    return Run(forward, [w13, w2], [x, score], inputs.dout_TD)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def build(name: str, case: Case, inputs: Inputs) -> Run:
    """Implementation `name` ("sonicmoe", "torch", "official", "liger") on the case's tensors."""
    if name in ("sonicmoe", "torch"):
        return _ours(case, inputs, "hopper" if name == "sonicmoe" else "torch")
    return {"official": _official, "liger": _liger}[name](case, inputs)


def _z_score(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Inner product of two sets of tensors over what independent normal numbers would give."""
    dot, square_a, square_b, count = 0.0, 0.0, 0.0, 0
    for a, b in pairs:
        dot += (a * b).sum(dtype=torch.float32).item()
        square_a += torch.linalg.vector_norm(a, dtype=torch.float32).item() ** 2
        square_b += torch.linalg.vector_norm(b, dtype=torch.float32).item() ** 2
        count += a.numel()
    return dot / math.sqrt(square_a * square_b / count)


def _probes(run: Run) -> dict[str, float]:
    """Results as few numbers that do not depend on the layout of weights and rows.

    Right results differ by about 0.01 between implementations, wrong ones by about 1.
    """
    out_TD = run.forward()
    *weights, dx_TD, dscore = run.backward(out_TD)
    with torch.no_grad():
        return {
            "out": _z_score([(out_TD, run.dout_TD)]),
            "weights": _z_score(zip(weights, run.weights, strict=True)),
            "dx": _z_score([(dx_TD, run.others[0])]),
            "dscore": _z_score([(dscore, run.others[1])]),
        }


def _peak_bytes(run: Run) -> int:
    """Bytes allocated at the worst moment of one step, beyond inputs and weights."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _timed_loop(run: Run, seconds: float) -> dict[str, float]:
    """Medians over a sustained loop; the queue is kept full, events are read after it."""
    events = []
    begin = time.monotonic()
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
    }


def _kernel_times(run: Run) -> dict[str, float]:
    """Milliseconds per step of every GPU kernel, by kernel name."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            run.step()
        torch.cuda.synchronize()
    totals = {e.key: e.self_device_time_total for e in profile.key_averages()}
    return {name: us / 1e3 / PROFILED_STEPS for name, us in totals.items() if us > 0}


def _host_us(run: Run) -> float:
    """Host time to enqueue one of several steps in a row, the GPU being idle at first; a median.

    In a row, as a training loop does: a single step after a wait of some milliseconds for the
    GPU costs two to three times as much, for its code has left the caches meanwhile and autograd's
    thread has fallen asleep.
    """
    spans = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_STEPS):
            run.step()
        spans.append((time.perf_counter() - begin) * 1e6 / HOST_STEPS)
    torch.cuda.synchronize()
    return statistics.median(spans)


class Worker:
    """Holds the last case, so that later rounds of it build nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.case: Case | None = None
        self.run: Run | None = None

    def prepare(self, case: Case) -> Run:
        """Draw the inputs, unless the last round already did."""
        if case == self.case and self.run is not None:
            return self.run
        self.case, self.run = case, None
        torch.cuda.empty_cache()
        inputs = make_inputs(case, device="cuda", dtype=torch.bfloat16)
        self.run = build(self.name, case, inputs)
        return self.run

    def measure(self, case: Case, seconds: float, *, details: bool) -> dict[str, object]:
        """One round; memory that only steps need is free again when it returns."""
        run = self.prepare(case)
        for _ in range(WARM_STEPS):  # the first one compiles or tunes what needs it
            run.step()
        answer: dict[str, object] = {**_timed_loop(run, seconds), "host_us": _host_us(run)}
        if details:
            kernels = _kernel_times(run)
            answer |= {
                "kernels": kernels,
                "kernel_ms": sum(kernels.values()),
                "saved_bytes": saved_bytes(run.forward, run.weights),
                "peak_bytes": _peak_bytes(run),
                "probes": _probes(run),
                "versions": _versions(),
            }
        torch.cuda.empty_cache()
        return answer


def _versions() -> dict[str, str]:
    """Of torch, CUDA and the packages an implementation is made of, as far as installed here."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    worker = Worker(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the protocol
    for line in sys.stdin:
        request = json.loads(line)
        try:
            case = Case(**request["case"])
            answer = worker.measure(case, request["seconds"], details=request["details"])
        except Exception as error:  # the driver reports it and goes on with the others
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
