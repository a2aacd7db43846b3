"""One implementation of the experts, measured in a process of its own.

Started by bench_moe.py, which sends one JSON request a line and reads one JSON answer a line:
{"case": {"T": ..., "D": ..., "F": ..., "E": ..., "K": ...}, "seconds": 0.5}.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cases import Case, Inputs, make_inputs, make_plan
from tests.saved_bytes import saved_bytes

PROFILED_STEPS = 5
HOST_STEPS = 20


class Run(NamedTuple):
    """An implementation ready to run: its forward and what it differentiates by."""

    forward: Callable[[], Tensor]
    weights: list[Tensor]
    others: list[Tensor]
    dout_TD: Tensor

    def step(self) -> None:
        """Forward and backward; gradients are returned by autograd and dropped."""
        self.backward(self.forward())

    def backward(self, out_TD: Tensor) -> None:
        torch.autograd.grad(out_TD, [*self.weights, *self.others], self.dout_TD)


def _ours(case: Case, inputs: Inputs, backend: str) -> Run:
    from sonicmoe_kernels.moe import moe_experts

    x, w1, w3, w2 = _leaves(*inputs[:4])
    routed = make_plan(case, inputs.pairs, device="cuda")
    (score,) = _leaves(routed.score_R)  # a leaf: the plan's own graph lives for one backward only
    plan = dataclasses.replace(routed, score_R=score)

    def forward() -> Tensor:
        return moe_experts(x, w1, w3, w2, plan, backend=backend)

    return Run(forward, [w1, w3, w2], [x, score], inputs.dout_TD)


def _official(case: Case, inputs: Inputs) -> Run:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    interleaved = torch.stack((inputs.w1_EFD, inputs.w3_EFD), dim=2).flatten(1, 2)
    score_P = inputs.pairs.score_P.cuda()
    x, w13, w2, score = _leaves(inputs.x_TD, interleaved, inputs.w2_EDF, score_P)
    token, expert = inputs.pairs.token_P.int().cuda(), inputs.pairs.expert_P.int().cuda()
    stream = torch.cuda.current_stream().cuda_stream

    def forward() -> Tensor:
        up, down = w13.permute(1, 2, 0), w2.permute(1, 2, 0)
        swiglu = ActivationType.SWIGLU
        return moe_general_routing_inputs(
            x, score, token, expert, up, None, down, None, case.E, stream, swiglu
        )[0]

    return Run(forward, [w13, w2], [x, score], inputs.dout_TD)


def _liger(case: Case, inputs: Inputs) -> Run:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

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
        if len(events) % 16 == 0:
            events[-8][2].synchronize()  # at most 16 steps ahead
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
    """Median host time that one step takes to enqueue, the GPU being idle."""
    spans = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run.step()
        spans.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(spans)


class Worker:
    """Holds the last case, so that later rounds of it build nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.case: Case | None = None
        self.run: Run | None = None

    def prepare(self, case: Case) -> Run:
        """Draw inputs and run a few steps (compiles or tunes what needs it)."""
        if case == self.case and self.run is not None:
            return self.run
        self.case, self.run = case, None
        torch.cuda.empty_cache()
        inputs = make_inputs(case, device="cuda", dtype=torch.bfloat16)
        self.run = build(self.name, case, inputs)
        for _ in range(3):
            self.run.step()
        torch.cuda.synchronize()
        return self.run

    def measure(self, case: Case, seconds: float) -> dict[str, object]:
        """One round."""
        run = self.prepare(case)
        timings = _timed_loop(run, seconds)
        kernels = _kernel_times(run)
        return {
            **timings,
            "kernels": kernels,
            "kernel_ms": sum(kernels.values()),
            "host_us": _host_us(run),
            "saved_bytes": saved_bytes(run.forward, run.weights),
            "peak_bytes": _peak_bytes(run),
        }


def main() -> None:
    worker = Worker(sys.argv[1])
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not reach the protocol
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = worker.measure(Case(**request["case"]), request["seconds"])
        except Exception as error:  # the driver reports it and goes on with the others
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
