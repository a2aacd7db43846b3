#!/usr/bin/env python3
"""Rate and memory against granularity, like Figure 1 of SonicMoE (arXiv 2512.14080), on one GPU.

    python scripts/bench_granularity.py --out docs/benchmarks
    python scripts/bench_granularity.py --report       table and figure again, no GPU

30B shapes with the same FLOPs, K / E = 2/32, 4/64, 8/128 and 16/256: the forward of our experts
beside a bound that no fused kernel needs to respect, "cuBLAS BMM + activation + BMM + aggregation"
over rows that are gathered already, equally many for every expert; and what a layer holds after its
forward beside the memory model's prediction. The router is in neither.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, C rows per expert.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench import driver, facts, granularity_report  # noqa: E402
from bench.moe_report import tflops  # noqa: E402

from tests.cases import BENCHMARK_CASES, Case  # noqa: E402

SHAPES = ("30b_n2048", "30b_n1024", "30b_n512", "30b_n256")
WARM_CALLS = 3
CALLS_AHEAD = 16  # that the host may be ahead of the GPU in a timed loop


def predicted_bytes(case: Case) -> tuple[int, dict[str, int]]:
    """What a layer holds after its forward, by the memory model: ours, and peers by name.

    Beside what is kept for the backward: the output and the three weights.
    """
    from sonicmoe_titan.memory_model import LayerShape
    from sonicmoe_titan.memory_peers import peers
    from sonicmoe_titan.model_args import ModelArgs

    args = ModelArgs(
        num_layers=1,
        dim=case.D,
        num_heads=case.D // 128,
        expert_dim=case.F,
        num_experts=case.E,
        top_k=case.K,
        vocab_size=128,
    )
    shape = LayerShape(args=args, num_tokens=case.T)
    output_and_weights = 2 * case.T * case.D + 6 * case.E * case.D * case.F
    ours, *others = peers(shape)
    return ours.bytes + output_and_weights, {
        peer.name: peer.bytes + output_and_weights for peer in others
    }


def equal_pairs(case: Case):
    """(ids, scores), (T, K) each: every expert gets T K / E rows, its tokens at random places."""
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    ids_TK = torch.arange(case.T * case.K).view(case.T, case.K) % case.E
    ids_TK = torch.randperm(case.E, generator=generator)[ids_TK]
    ids_TK = ids_TK[torch.randperm(case.T, generator=generator)]
    scores_TK = torch.rand((case.T, case.K), generator=generator) + 0.2
    return ids_TK, scores_TK / case.K**0.5


class Layer:
    """The forwards of one shape, and what ours leaves allocated."""

    def __init__(self, case: Case) -> None:
        import torch
        from sonicmoe_kernels.moe import moe_experts
        from sonicmoe_kernels.routing import RoutingPlan

        from tests.cases import make_pairs, make_plan

        self.case = case
        torch.cuda.empty_cache()
        ids_TK, scores_TK = (t.cuda() for t in equal_pairs(case))
        pairs = make_pairs(case)
        plan = make_plan(case, pairs, device="cuda")
        equal = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=case.E)
        generator = torch.Generator("cuda").manual_seed(case.seed + 1)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            bf16 = {"device": "cuda", "dtype": torch.bfloat16}
            drawn = torch.randn(shape, generator=generator, **bf16)
            return drawn.mul_(scale).requires_grad_()

        before = torch.cuda.memory_allocated() - sum(_plan_bytes(plan))
        D, F, E = case.D, case.F, case.E
        x_TD = normal(case.T, D, scale=1.0)
        w1, w3 = (normal(E, F, D, scale=D**-0.5) for _ in range(2))
        w2 = normal(E, D, F, scale=F**-0.5)

        def ours(plan: RoutingPlan) -> Callable[[], torch.Tensor]:
            return lambda: moe_experts(x_TD, w1, w3, w2, plan, backend="hopper")

        warm = ours(plan)()
        del warm
        out_TD = ours(plan)()
        self.resident_bytes = torch.cuda.memory_allocated() - before
        del out_TD
        self.bound = Bound(case, equal, x_TD.detach(), w1.detach(), w3.detach(), w2.detach())
        self.forwards = {
            "sonicmoe": ours(plan),
            "sonicmoe_equal": ours(equal),
            "bound": self.bound.forward,
        }
        self._check(ours(equal)())

    def _check(self, ours_TD) -> None:
        """The bound and ours compute the same on the equal routing."""
        self.bound.forward()
        error = (self.bound.out_TD - ours_TD).float().norm() / ours_TD.float().norm()
        if not error < 0.02:  # bf16 rounds each of them by about 0.004
            raise RuntimeError(f"the bound is off by {error:.3f} of the output's norm")


def _plan_bytes(plan) -> list[int]:
    """Allocated by the plan's tensors, in the allocator's blocks of 512 bytes."""
    values = [getattr(plan, field.name) for field in dataclasses.fields(plan)]
    storages = [v.untyped_storage() for v in values if hasattr(v, "untyped_storage")]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return [-(-size // 512) * 512 for size in sizes.values()]


class Bound:
    """cuBLAS BMM + activation + BMM + aggregation over gathered rows, C = T K / E for each expert.

    Activation: silu(gate) * up compiled by inductor. Aggregation: our own kernel 3. Every tensor is
    allocated once, before.
    """

    def __init__(self, case: Case, plan, x_TD, w1_EFD, w3_EFD, w2_EDF) -> None:
        import torch
        from sonicmoe_kernels import hopper

        E, C, F = case.E, case.T * case.K // case.E, case.F
        self.x_ECD = x_TD[plan.token_idx_R.long()].view(E, C, case.D)
        self.w13_EDG = torch.cat((w1_EFD, w3_EFD), dim=1).transpose(1, 2)  # G = 2 F columns
        self.w2_EFD = w2_EDF.transpose(1, 2)
        self.h_ECG, self.a_ECF = x_TD.new_empty(E, C, 2 * F), x_TD.new_empty(E, C, F)
        self.y_ECD, self.out_TD = torch.empty_like(self.x_ECD), torch.empty_like(x_TD)

        @torch.compile(dynamic=False)
        def activate(h_ECG: torch.Tensor, a_ECF: torch.Tensor) -> None:
            gate, up = h_ECG.chunk(2, dim=-1)
            a_ECF.copy_(torch.nn.functional.silu(gate) * up)

        def aggregate() -> None:
            hopper.aggregate(
                self.y_ECD.view(E * C, case.D),
                plan.token_rows_R,
                plan.token_offsets,
                self.out_TD,
                rows_per_token=case.K,
                score_R=plan.score_R.detach(),
            )

        self.pieces = {
            "BMM up": lambda: torch.bmm(self.x_ECD, self.w13_EDG, out=self.h_ECG),
            "activation": lambda: activate(self.h_ECG, self.a_ECF),
            "BMM down": lambda: torch.bmm(self.a_ECF, self.w2_EFD, out=self.y_ECD),
            "aggregation": aggregate,
        }

    def forward(self) -> None:
        for piece in self.pieces.values():
            piece()


def loop_ms(call: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of a call in a sustained loop."""
    import torch

    for _ in range(WARM_CALLS):
        call()
    events, begin = [], time.monotonic()
    while time.monotonic() - begin < seconds or len(events) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
        if len(events) > CALLS_AHEAD:
            events[-CALLS_AHEAD][1].synchronize()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure(shape: str, *, rounds: int, seconds: float) -> list[dict]:
    """One record per implementation, from alternating rounds."""
    case = BENCHMARK_CASES[shape]
    layer = Layer(case)
    times: dict[str, list[float]] = {name: [] for name in layer.forwards}
    for _ in range(rounds):
        for name, forward in layer.forwards.items():
            times[name].append(loop_ms(forward, seconds))
    pieces = {name: loop_ms(call, seconds / 4) for name, call in layer.bound.pieces.items()}
    predicted, peers = predicted_bytes(case)
    records = []
    for name, rounds_ms in times.items():
        fwd_ms = statistics.median(rounds_ms)
        record = {
            "shape": shape,
            **{key: getattr(case, key) for key in "TDFEK"},
            "impl": name,
            "fwd_ms": fwd_ms,
            "fwd_ms_rounds": rounds_ms,
            "fwd_tflops": tflops(dataclasses.asdict(case), fwd_ms, passes=1),
            "versions": facts.versions(),
        }
        if name == "sonicmoe":
            record |= {"resident_bytes": layer.resident_bytes, "predicted_bytes": predicted}
            record["peers_bytes"] = peers
        if name == "bound":
            record["pieces"] = pieces
        records.append(record | facts.where_and_when())
    return records


def measure_shapes(arguments: argparse.Namespace, records: list[dict], path: Path) -> None:
    """Shape by shape; `path` is rewritten after each."""
    for shape in arguments.shapes:
        new = measure(shape, rounds=arguments.rounds, seconds=arguments.seconds)
        records[:] = [r for r in records if r["shape"] != shape] + new
        path.write_text(json.dumps(records, indent=1) + "\n")
        for r in new:
            print(f"{shape} {r['impl']}: {r['fwd_ms']:.3f} ms, {r['fwd_tflops']:.0f} TFLOP/s",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one round's loop")
    parser.add_argument("--report", action="store_true", help="of the records, measuring nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.set_defaults(append=True)  # a shape that is measured again replaces its records
    driver.run("bench_granularity", granularity_report, parser.parse_args(), measure_shapes)


if __name__ == "__main__":
    main()
