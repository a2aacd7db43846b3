"""One implementation of the experts, measured in a process of its own.

Started by bench_moe.py, which sends one JSON request a line and reads one JSON answer a line:
{"case": {"T": ..., "D": ..., "F": ..., "E": ..., "K": ...}, "seconds": 0.5, "details": true}.
Every request is one round of timings; `details` adds what one round can tell: the profiler's
kernels, memory, a CUDA graph of few tokens, and probes of the results that every implementation
must agree on.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.facts import versions
from bench.measure import (
    Run,
    host_us,
    in_a_graph,
    kernel_times,
    peak_bytes,
    timed_loop,
    tune_briefly,
    use_earlier_choices,
    warm_up,
)
from bench.process import serve
from tests.cases import Case, Inputs, make_inputs, make_plan
from tests.saved_bytes import saved_bytes

GRAPH_TOKENS = 4096  # up to so many a step is short enough for its launches to show


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
    """What its `moe_TC_softmax_topk_layer` runs once the routing's metadata is there."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import (
        TC_topk_router_metadata_triton,
        _DownProjection,
        _UpProjection,
    )

    tune_briefly()
    use_earlier_choices()
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

    tune_briefly()
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

    def measure(self, request: dict) -> dict[str, object]:
        """One round; memory that only steps need is free again when it returns."""
        case = Case(**request["case"])
        run = self.prepare(case)
        warm_up(run)
        answer: dict[str, object] = timed_loop(run, request["seconds"])
        answer["host_us"] = host_us(run.step)
        if request["details"]:
            kernels = {name: ms for name, (_, ms) in kernel_times(run.step).items()}
            answer |= {
                "kernels": kernels,
                "kernel_ms": sum(kernels.values()),
                "saved_bytes": saved_bytes(run.forward, run.weights),
                "peak_bytes": peak_bytes(run.step),
                "probes": _probes(run),
                "versions": versions(),
            }
            if self.name == "sonicmoe" and case.T <= GRAPH_TOKENS:
                answer |= in_a_graph(run)
        torch.cuda.empty_cache()
        return answer


if __name__ == "__main__":
    serve(Worker(sys.argv[1]).measure)
