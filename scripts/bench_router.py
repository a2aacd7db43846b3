#!/usr/bin/env python3
"""Time a whole MoE layer, router included: token choice beside token rounding, on one GPU.

    python scripts/bench_router.py --out docs/benchmarks
    python scripts/bench_router.py --shapes 7b --routers topk nearest

Measured is what the paper's figures leave out: gate, top-k, routing plan (with rounding), experts
and combination, forward and backward. Rounds alternate between the routers; the report counts
launches and says what share of the GPU time is not the experts' eight kernels. Padding waste is the
rows of whole 128-row tiles over the rows that belong to tokens.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from sonicmoe_kernels.moe import moe_experts  # noqa: E402
from sonicmoe_kernels.routing import (  # noqa: E402
    ROUNDINGS,
    RoutingPlan,
    route_topk,
    token_rounding_plan,
)
from torch import Tensor  # noqa: E402

NAME = "moe_router_h100"
TILE = 128
# The paper's shapes for token rounding (arXiv 2512.14080, Fig. 13), and its two model shapes.
SHAPES = {
    "7b": (24576, 1536, 256, 128, 8),
    "1.4b": (40960, 768, 256, 128, 8),
    **{f"d1536_n256_E{E}": (16384, 1536, 256, E, 8) for E in (64, 128, 256, 512)},
    **{f"d4096_n512_E{E}": (16384, 4096, 512, E, 8) for E in (64, 128, 256, 512)},
    **{f"d4096_n1024_E{E}": (16384, 4096, 1024, E, 4) for E in (32, 64, 128, 256)},
}
ROUTERS = ("topk", *ROUNDINGS)
EXPERT_KERNELS = r"GroupedGemmK|upUp|downDown|d_hiddenDHidden|d_inputDInput|aggregateAggregate"
PROFILED_STEPS = 5


class Layer:
    """Gate and experts of one layer in bf16; one call is a forward and a backward pass."""

    def __init__(self, T: int, D: int, F: int, E: int, K: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            return drawn.mul_(scale).requires_grad_()

        self.K = K
        self.x_TD = normal(T, D)
        self.gate_ED = normal(E, D, scale=D**-0.5)
        self.weights = (
            normal(E, F, D, scale=D**-0.5),
            normal(E, F, D, scale=D**-0.5),
            normal(E, D, F, scale=F**-0.5),
        )
        self.dout_TD = normal(T, D).detach()

    def plan(self, router: str) -> RoutingPlan:
        """The layer's routing; "topk" or a variant of token rounding."""
        logits_TE = torch.nn.functional.linear(self.x_TD, self.gate_ED).float()
        ids_TK, scores_TK, scores_TE = route_topk(
            logits_TE, top_k=self.K, renormalize=True, all_scores=router != "topk"
        )
        if router == "topk":
            return RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=len(self.gate_ED))
        return token_rounding_plan(ids_TK, scores_TK, scores_TE, rounding=router, tile=TILE)

    def step(self, router: str) -> None:
        out_TD = moe_experts(self.x_TD, *self.weights, self.plan(router))
        torch.autograd.grad(out_TD, [self.x_TD, self.gate_ED, *self.weights], self.dout_TD)


def loop_ms(layer: Layer, router: str, seconds: float) -> list[float]:
    """Milliseconds of each step of a sustained loop."""
    events, begin = [], time.monotonic()
    while time.monotonic() - begin < seconds or len(events) < 5:
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        layer.step(router)
        pair[1].record()
        events.append(pair)
        if len(events) % 16 == 0:
            events[-8][1].synchronize()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def kernel_times(layer: Layer, router: str) -> dict[str, tuple[float, float]]:
    """(launches, milliseconds) per step of every GPU kernel, copy and fill."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            layer.step(router)
        torch.cuda.synchronize()
    return {
        event.key: (
            event.count / PROFILED_STEPS,
            event.self_device_time_total / 1e3 / PROFILED_STEPS,
        )
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def padding_waste(plan: RoutingPlan) -> float:
    """Rows of whole tiles over the rows of tokens, less 1."""
    rows_E = plan.expert_offsets.diff()
    tiles_E = torch.div(rows_E + TILE - 1, TILE, rounding_mode="floor")
    return (tiles_E.sum() * TILE / rows_E.sum()).item() - 1


def measure(shape: str, routers: list[str], rounds: int, seconds: float) -> list[dict]:
    """One record per router, from alternating rounds."""
    T, D, F, E, K = SHAPES[shape]
    layer = Layer(T, D, F, E, K)
    for router in routers:
        for _ in range(2):
            layer.step(router)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {router: [] for router in routers}
    for _ in range(rounds):
        for router in routers:
            times[router] += loop_ms(layer, router, seconds)
    records = []
    for router in routers:
        kernels = kernel_times(layer, router)
        experts = sum(
            ms for name, (_, ms) in kernels.items() if re.search(EXPERT_KERNELS, _plain(name))
        )
        total = sum(ms for _, ms in kernels.values())
        plan = layer.plan(router)
        first, _, third = statistics.quantiles(times[router], n=4)
        records.append(
            {
                "shape": shape,
                **dict(zip("TDFEK", SHAPES[shape], strict=True)),
                "router": router,
                "rows_per_expert": T * K // E,
                "step_ms": statistics.median(times[router]),
                "step_q1_ms": first,
                "step_q3_ms": third,
                "kernels_ms": total,
                "experts_ms": experts,
                "router_ms": total - experts,
                "launches": round(sum(count for count, _ in kernels.values())),
                "rows": int(plan.expert_offsets[-1]),
                "padding_waste": padding_waste(plan),
                "per_kernel": {
                    name: {"launches": count, "ms": ms} for name, (count, ms) in kernels.items()
                },
                "device": torch.cuda.get_device_name(),
                "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
                "commit": commit(),
                "date": datetime.date.today().isoformat(),
            }
        )
    return records


def _plain(name: str) -> str:
    return re.sub(r"\W", "", name)


def commit() -> str:
    """The checked-out commit, or $SONICMOE_COMMIT outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or os.environ.get("SONICMOE_COMMIT", "unknown")


def report(records: list[dict]) -> str:
    """Markdown: one line a shape and router."""
    first = records[0]
    lines = [
        "# A whole MoE layer with its router on an H100",
        "",
        f"{first['device']}, torch {first['versions']['torch']}, commit {first['commit']}, "
        f"{first['date']}; `python scripts/bench_router.py`. bf16, gate + top-k + plan (+ rounding "
        "to 128 rows) + experts, forward and backward. Step: median of a sustained loop, rounds "
        "alternating. Kernels, router share and launches: the profiler's, per step; the router is "
        "everything but the experts' eight kernels, the gate's own GEMMs included.",
        "",
        "| shape | T, D, F, E, K | rows per expert | router | step ms | against top-k "
        "| kernels ms | router ms (share) | launches | padding waste |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        base = next(
            (b for b in records if b["shape"] == r["shape"] and b["router"] == "topk"), None
        )
        ratio = f"{r['step_ms'] / base['step_ms'] - 1:+.1%}" if base else ""
        sizes = ", ".join(str(r[key]) for key in "TDFEK")
        lines.append(
            f"| {r['shape']} | {sizes} | {r['rows_per_expert']} | {r['router']} | "
            f"{r['step_ms']:.3f} | {ratio} | {r['kernels_ms']:.3f} | {r['router_ms']:.3f} "
            f"({r['router_ms'] / r['kernels_ms']:.1%}) | {r['launches']} | "
            f"{r['padding_waste']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=["topk", "nearest"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one round's loop")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_router: needs an NVIDIA GPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for shape in arguments.shapes:
        records += measure(shape, arguments.routers, arguments.rounds, arguments.seconds)
        torch.cuda.empty_cache()
        (arguments.out / f"{NAME}.json").write_text(json.dumps(records, indent=1) + "\n")
        (arguments.out / f"{NAME}.md").write_text(report(records))
        print(report(records).splitlines()[-len(arguments.routers) :], flush=True)


if __name__ == "__main__":
    main()
