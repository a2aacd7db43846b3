"""Fills the kernel cache before a job starts: python -m sonicmoe_kernels.warmup --shape D,F,E,K
...

Needs no GPU. Run it where the compiler is installed, and point SONICMOE_CACHE_DIR of the job at
the same directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterable
from typing import Literal

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.activations import ACTIVATIONS, get_activation
from sonicmoe_kernels.rounding import ROUNDINGS
from sonicmoe_kernels.tiles import (
    ROW_TILES,
    Aggregation,
    ScoreFunction,
    SoftmaxOrder,
    TopKBackward,
    TopKForward,
    TopKOptions,
    pick_rows,
    pick_weights,
    routing_kernels,
    why_illegal_routing,
    why_illegal_topk,
)

__all__ = ["main", "plan_specs", "specs", "topk_specs", "warm_up"]

SIZES = ("D", "F", "E", "K")
Dtype = Literal["bfloat16", "float16"]


def specs(
    *,
    d: int,
    f: int,
    num_experts: int,
    top_k: int,
    dtype: Dtype = "bfloat16",
    activation: str = "swiglu",
) -> list[kernel_cache.KernelSpec]:
    """Every kernel that `moe_experts` launches for these sizes, with K rows a token or ragged."""
    halves = get_activation(activation).halves
    rows = [
        pick_rows(kernel, d=d, f=f, num_experts=num_experts, dtype=dtype, activation=activation)
        for kernel in ROW_TILES
    ]
    weights = [
        pick_weights("d_weight2", d=d, f=f, dtype=dtype),
        pick_weights("d_weight13", d=d, f=f, halves=halves, dtype=dtype),
    ]
    sums = [
        Aggregation(d, dtype, rows_per_token, weighted)
        for rows_per_token in (top_k, None)
        for weighted in (True, False)
    ]
    return [*rows, *weights, *sums]


def topk_specs(
    *,
    num_experts: int,
    top_k: int,
    score_func: ScoreFunction = "softmax",
    softmax_order: SoftmaxOrder = "before",
    renormalize: bool = True,
    has_bias: bool = False,
) -> list[kernel_cache.KernelSpec]:
    """Every kernel that `route_topk` launches for these options and fp32 logits.

    With all scores and without; the backward with their gradient and without. None where E or K
    is too large for the kernels.
    """
    options = TopKOptions(
        num_experts, top_k, "float32", score_func, softmax_order, renormalize, has_bias
    )
    if why_illegal_topk(options) is not None:
        return []
    static = dataclasses.asdict(options)
    return [
        *(TopKForward(**static, all_scores=all_scores) for all_scores in (False, True)),
        *(TopKBackward(**static, d_weights=True, d_all=d_all) for d_all in (False, True)),
    ]


def plan_specs(
    *, num_experts: int, top_k: int, rounding: str | None = None
) -> list[kernel_cache.KernelSpec]:
    """Every kernel that builds plans for these sizes: of top-k and, if given, of one rounding.

    num_experts counts the experts of all ranks. None where E or K is too large for the kernels.
    """
    if why_illegal_routing(num_experts, top_k) is not None:
        return []
    wanted = dict.fromkeys((None, rounding))
    return [spec for r in wanted for spec in routing_kernels(num_experts, top_k, rounding=r)]


def _build(spec: kernel_cache.KernelSpec) -> str:
    started = time.perf_counter()
    path = kernel_cache.build(spec)
    return f"{path.name} {time.perf_counter() - started:.1f} s"


def warm_up(wanted: Iterable[kernel_cache.KernelSpec], *, jobs: int) -> None:
    """Builds what the cache lacks, in `jobs` processes (the compiler is not thread-safe)."""
    unique = list(dict.fromkeys(wanted))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for line in pool.imap_unordered(_build, unique):
            print(line, flush=True)


def _shape(text: str) -> dict[str, int]:
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != len(SIZES):
        wanted = ",".join(SIZES)
        raise argparse.ArgumentTypeError(f"{text!r}: give {wanted}, such as 1536,256,128,8")
    return dict(zip(SIZES, numbers, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status is 0 when every object is there."""
    parser = argparse.ArgumentParser(prog="python -m sonicmoe_kernels.warmup", description=__doc__)
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        required=True,
        metavar=",".join(SIZES),
        help="model width, expert width, local experts, experts per token; repeat it",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="swiglu")
    parser.add_argument("--rounding", choices=ROUNDINGS, help="token rounding; without it, top-k")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args(argv)
    get_activation(arguments.activation)
    wanted = [
        spec
        for shape in arguments.shape
        for spec in specs(
            d=shape["D"],
            f=shape["F"],
            num_experts=shape["E"],
            top_k=shape["K"],
            dtype=arguments.dtype,
            activation=arguments.activation,
        )
    ]
    for shape in arguments.shape:
        wanted += topk_specs(num_experts=shape["E"], top_k=shape["K"])
        wanted += plan_specs(num_experts=shape["E"], top_k=shape["K"], rounding=arguments.rounding)
    warm_up(wanted, jobs=arguments.jobs)
    print(f"{len(wanted)} kernels in {kernel_cache.cache_dir()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
