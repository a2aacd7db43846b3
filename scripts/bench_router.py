#!/usr/bin/env python3
"""Time a whole MoE layer, router included: token choice beside token rounding, on one GPU.

    python scripts/bench_router.py --shapes sparsest --routers topk nearest balance --append
    python scripts/bench_router.py --impls sonicmoe official --pythonpath official=/opt/official
    python scripts/bench_router.py --build             our kernels for it, no GPU
    python scripts/bench_router.py --report            table and figure again, no GPU

Measured is what the paper's figures leave out: gate, top-k, routing plan (with rounding), experts
and combination, forward and backward. Every implementation runs in a process of its own; rounds
alternate between implementations and routers. The report counts launches and says what share of
the GPU time is not the experts' eight kernels. Padding waste is the rows of whole 128-row tiles
over the rows that belong to tokens. --append, --deadline, --limit and what packages keep on disk:
see bench_moe.py.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench import driver, facts, router_report  # noqa: E402
from bench.process import Turn, WorkerProcess, alternate  # noqa: E402
from sonicmoe_kernels import kernel_lists  # noqa: E402
from sonicmoe_kernels.rounding import ROUNDINGS  # noqa: E402
from sonicmoe_kernels.tiles import TopKOptions  # noqa: E402
from sonicmoe_kernels.warmup import warm_up  # noqa: E402

# The paper's shapes for token rounding (arXiv 2512.14080, Fig. 13), and its two model shapes.
SHAPES = {
    "7b": (24576, 1536, 256, 128, 8),
    "1.4b": (40960, 768, 256, 128, 8),
    **{f"d1536_n256_E{E}": (16384, 1536, 256, E, 8) for E in (64, 128, 256, 512)},
    **{f"d4096_n512_E{E}": (16384, 4096, 512, E, 8) for E in (64, 128, 256, 512)},
    **{f"d4096_n1024_E{E}": (16384, 4096, 1024, E, 4) for E in (32, 64, 128, 256)},
}
# Most wanted first: the sparsest row of each of the paper's three families.
GROUPS = {"sparsest": ("d1536_n256_E512", "d4096_n1024_E256", "d4096_n512_E512")}
GROUPS["all"] = tuple(dict.fromkeys((*GROUPS["sparsest"], *SHAPES)))
ROUTERS = ("topk", *ROUNDINGS)
OFFICIAL_ROUTERS = ("topk", "nearest", "up", "down")  # what its benchmark can do


def shapes_named(names: list[str]) -> list[str]:
    """Names of shapes from names of shapes and groups, each once."""
    return list(dict.fromkeys(shape for name in names for shape in GROUPS.get(name, (name,))))


def specs_of(shape: str, routers: Sequence[str]) -> list:
    """Every kernel of ours that a shape's layer launches; its logits are bf16."""
    _, D, F, E, K = SHAPES[shape]
    options = TopKOptions(E, K, "bfloat16", "softmax", "before", renormalize=True, has_bias=False)
    plans = [None if router == "topk" else router for router in routers]
    return [
        *kernel_lists.specs(d=D, f=F, num_experts=E, top_k=K),
        *kernel_lists.topk_kernels(options),
        *(s for r in plans for s in kernel_lists.plan_specs(num_experts=E, top_k=K, rounding=r)),
    ]


def turns(shape: str, workers: dict[str, WorkerProcess], arguments: argparse.Namespace) -> list:
    """One round of a shape: every router of every implementation."""
    return [
        Turn(
            f"{shape} {impl} {router}",
            worker,
            {"sizes": SHAPES[shape], "router": router, "seconds": arguments.seconds},
        )
        for router in arguments.routers
        for impl, worker in workers.items()
        if impl != "official" or router in OFFICIAL_ROUTERS
    ]


def summarise(label: str, answers: list[dict]) -> dict:
    """One record: medians over the rounds, and the last round's details."""
    shape, impl, router = label.split()
    sizes, details = SHAPES[shape], answers[-1]
    kernels = details["kernels"]
    total = sum(ms for _, ms in kernels.values())
    launches = round(sum(count for count, _ in kernels.values()))
    timings = {"fwd_ms": "fwd_ms", "bwd_ms": "bwd_ms", "step_ms": "fwd_bwd_ms"}
    timings |= {"step_q1_ms": "fwd_bwd_q1_ms", "step_q3_ms": "fwd_bwd_q3_ms", "host_us": "host_us"}
    return {
        "shape": shape,
        **dict(zip("TDFEK", sizes, strict=True)),
        "impl": impl,
        "router": router,
        "rows_per_expert": sizes[0] * sizes[4] // sizes[3],
        **{key: statistics.median(a[name] for a in answers) for key, name in timings.items()},
        "kernels_ms": total,
        "experts_ms": details["experts_ms"],
        "router_ms": total - details["experts_ms"],
        "launches": launches,
        "forward_launches": details["forward_launches"],
        "rows": details["rows"],
        "padding_waste": details["padding_waste"],
        "per_kernel": {
            name: {"launches": count, "ms": ms} for name, (count, ms) in kernels.items()
        },
        "versions": details["versions"],
        "wall_s": sum(answer["wall_s"] for answer in answers),
    }


def measure(arguments: argparse.Namespace, records: list[dict], path: Path) -> None:
    """Shape by shape; `path` is rewritten after each."""
    began, common = time.monotonic(), facts.where_and_when()
    module, prefix, shapes = "bench.router_worker", "bench_router", shapes_named(arguments.shapes)
    with driver.workers(module, arguments, logs=path.parent, prefix=prefix) as workers:
        for shape in driver.in_time(shapes, began=began, deadline_s=arguments.deadline):
            asked = turns(shape, workers, arguments)
            rounds = alternate(asked, rounds=arguments.rounds, limit_s=arguments.limit)
            new = [summarise(label, answers) | common for label, answers in rounds.items()]
            replaced = {router_report.key(record) for record in new}
            records[:] = [r for r in records if router_report.key(r) not in replaced] + new
            path.write_text(json.dumps(records, indent=1) + "\n")
            for r in new:
                print(
                    f"{shape} {r['impl']} {r['router']}: {r['step_ms']:.3f} ms, router "
                    f"{r['router_ms']:.3f}, {r['launches']} launches, {r['wall_s']:.0f} s",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=[*GROUPS, *SHAPES], default=["all"])
    parser.add_argument(
        "--impls", nargs="+", choices=("sonicmoe", "official"), default=["sonicmoe"]
    )
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=["topk", "nearest"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one round's loop")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one answer")
    parser.add_argument("--deadline", type=float, help="start no shape after so many seconds")
    parser.add_argument("--pythonpath", nargs="*", default=[], metavar="IMPL=PATHS")
    parser.add_argument("--append", action="store_true", help="to the records that --out holds")
    parser.add_argument("--report", action="store_true", help="of the records, measuring nothing")
    parser.add_argument("--build", action="store_true", help="compile our kernels and stop")
    parser.add_argument("--jobs", type=int, help="of --build; one per core otherwise")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    if arguments.build:
        shapes = shapes_named(arguments.shapes)
        wanted = [spec for shape in shapes for spec in specs_of(shape, arguments.routers)]
        warm_up(wanted, jobs=arguments.jobs)
        return
    driver.run("bench_router", router_report, arguments, measure)


if __name__ == "__main__":
    main()
