"""Fills the kernel cache before a job starts: python -m sonicmoe_kernels.warmup --shape D,F,E,K
...

Needs no GPU. Run it where the compiler is installed, and point SONICMOE_CACHE_DIR of the job at
the same directory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import get_args

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.activations import ACTIVATIONS
from sonicmoe_kernels.compile import ARCH, Built
from sonicmoe_kernels.kernel_lists import Dtype, plan_specs, specs, topk_specs
from sonicmoe_kernels.parallel_build import build_all, cores
from sonicmoe_kernels.rounding import ROUNDINGS
from sonicmoe_kernels.tiles import TopKOptions

__all__ = ["check_arch", "main", "warm_up"]

SIZES = ("D", "F", "E", "K")
USERS_MISTAKE, FAILED = 2, 1  # exit codes


def check_arch(arch: str) -> None:
    """Raises ValueError for GPUs that have no kernels here."""
    if arch != ARCH:
        raise ValueError(
            f"arch {arch!r}: the kernels are Hopper's, accepted: {ARCH}. On other GPUs backend "
            "'torch' computes the experts and their routing; it compiles nothing beforehand"
        )


def warm_up(
    wanted: Iterable[kernel_cache.KernelSpec], *, jobs: int | None = None, arch: str = ARCH
) -> None:
    """Builds what the cache lacks, in `jobs` processes (one per core if None), and shows progress.

    Raises:
        RuntimeError: a kernel cannot be built or kept; the message says what is missing.
        ValueError: an arch or sizes without kernels, or a cache that is not to be trusted.
    """
    check_arch(arch)
    unique = list(dict.fromkeys(wanted))
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}: expected a number above 0")
    missing = [spec for spec in unique if kernel_cache.object_path(spec, arch=arch) is None]
    started, compiled = time.perf_counter(), 0
    if missing:
        kernel_cache.check_tools()
        try:
            with _progress(len(missing)) as show:
                for built in build_all(missing, jobs=jobs, arch=arch):
                    show(built)
                    compiled += built.seconds > 0
        except OSError as error:
            raise RuntimeError(
                f"the kernel cache {kernel_cache.cache_dir()} cannot be written "
                f"({error.strerror or error}): free space there, or set "
                f"{kernel_cache.CACHE_VARIABLE} to a folder that can be written"
            ) from None
    seconds = time.perf_counter() - started
    print(
        f"{len(unique)} kernels in {kernel_cache.cache_dir()}: {compiled} compiled in "
        f"{seconds:.1f} s, {len(unique) - compiled} were there"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Built], None]]:
    """A bar on a terminal that has `rich`; else a line per kernel."""
    done = 0

    def line(built: Built) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {built.path.stem} {built.seconds:.1f} s", flush=True)

    try:
        from rich.progress import Progress, TimeElapsedColumn
    except ImportError:
        yield line
        return
    if not sys.stdout.isatty():
        yield line
        return
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("compiling kernels", total=total)

        def advance(built: Built) -> None:
            bar.update(task, advance=1, description=built.path.stem.split("-")[0])

        yield advance


def _shape(text: str) -> dict[str, int]:
    try:
        shape = dict(zip(SIZES, (int(part) for part in text.split(",")), strict=True))
    except ValueError:
        shape = {}
    if not shape or min(shape.values()) < 1 or shape["K"] > shape["E"]:
        wanted = ",".join(SIZES)
        raise argparse.ArgumentTypeError(
            f"{text!r}: give {wanted} above 0 with K at most E, such as 1536,256,128,8"
        )
    return shape


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 when every kernel is there, 1 when one could not be built, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m sonicmoe_kernels.warmup",
        description="Compiles the kernels of a layer into the cache ($SONICMOE_CACHE_DIR, else "
        "~/.cache/sonicmoe/kernels). Needs no GPU.",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        required=True,
        metavar=",".join(SIZES),
        help="model width, expert width, local experts, experts per token; repeat it",
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="swiglu")
    parser.add_argument("--rounding", choices=ROUNDINGS, help="token rounding; without it, top-k")
    parser.add_argument("--arch", default=ARCH, help=f"GPU to compile for ({ARCH})")
    parser.add_argument("--jobs", type=int, help="processes; one per core otherwise")
    arguments = parser.parse_args(argv)
    try:
        wanted = []
        for shape in arguments.shape:
            experts, top_k = shape["E"], shape["K"]
            wanted += specs(
                d=shape["D"],
                f=shape["F"],
                num_experts=experts,
                top_k=top_k,
                dtype=arguments.dtype,
                activation=arguments.activation,
            )
            wanted += topk_specs(TopKOptions(experts, top_k))
            wanted += plan_specs(num_experts=experts, top_k=top_k, rounding=arguments.rounding)
        warm_up(wanted, jobs=arguments.jobs, arch=arguments.arch)
    except ValueError as error:
        return _failed(error, USERS_MISTAKE)
    except RuntimeError as error:
        return _failed(error, FAILED)
    return 0


def _failed(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
