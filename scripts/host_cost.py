#!/usr/bin/env python3
"""Host time of forward and backward of the MoE block at 1024 tokens, without a GPU.

    python scripts/host_cost.py                    microseconds and launches
    python scripts/host_cost.py --profile topk     where Python spends them
    python scripts/host_cost.py --launches topk    every kernel of one forward and backward
    python scripts/host_cost.py --counts           what a loaded machine cannot blur, as JSON
    python scripts/host_cost.py --kernels          with our kernels' own host code; compiles them
    python scripts/host_cost.py --gpu              on the GPU of this machine, driver included
    python scripts/host_cost.py --gpu --chain 16   every block of a chain, beside the GPU's time

Torch's whole CUDA path runs (tests/dry_gpu.py), on a device that executes nothing. What that leaves
out: the driver, 2 to 3 us a launch on an H100's host, and without --kernels 1 to 2 us a launch to
hand over the tensors. "experts" is `moe_experts` with a given plan; "topk" and "nearest" are the
block as the trainer runs it, token choice and token rounding, statistics included. "each of 8" is
what one more block costs in a chain: a lone backward pays for the autograd engine as well.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import itertools
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from sonicmoe_kernels import block, hopper, hopper_routing, routing_ops  # noqa: E402
from sonicmoe_kernels import compile as kernel_cache  # noqa: E402
from sonicmoe_kernels.block_stages import BlockStage  # noqa: E402

from tests import dry_gpu, host_block  # noqa: E402

SUBJECTS = ("experts", "topk", "nearest")
WARM_STEPS, STEPS, ROUNDS = 20, 100, 5
CHAIN = 8
QUEUED_BLOCKS = 32  # of 16 launches each: the driver's queue holds more


# Without a GPU to wait for, CPU time of all threads: others may use the machine meanwhile.
clock = time.process_time


ours: list[str] = []  # kernels of ours that were launched and left out


def leave_out_kernels() -> None:
    """Make every kernel of ours a function that notes its launch."""

    def load(spec: kernel_cache.KernelSpec) -> Callable[..., None]:
        kernels = spec.launches if isinstance(spec, BlockStage) else (spec.kernel,)
        return lambda *arguments: ours.extend(kernels)

    kernel_cache.load = load
    for module in (block, hopper, hopper_routing, routing_ops):
        module.make_ready = lambda specs: None  # nothing to compile


def build(subject: str, count: int = 1) -> host_block.Subject:
    if subject == "experts":
        return host_block.HostExperts(count=count)
    return host_block.HostBlocks(subject, count=count)


def step(subject: host_block.Subject) -> tuple[float, float]:
    """Seconds of the host in forward and in backward."""
    begin = clock()
    out = subject.forward()
    middle = clock()
    subject.backward(out)
    return middle - begin, clock() - middle


def warm_up(subject: host_block.Subject) -> None:
    gc.collect()
    gc.disable()  # as TorchTitan does, which collects between steps
    for _ in range(WARM_STEPS):
        step(subject)


def fastest_median_us(subject: host_block.Subject, count: int = 1) -> tuple[float, float]:
    """Microseconds of forward and of backward: medians of each round, those of the best round.

    count: blocks of the subject. A GPU that is slower than the host is waited for in between.
    """
    warm_up(subject)
    rounds = []
    for _ in range(ROUNDS):
        spans = []
        for number in range(STEPS):
            if number % (QUEUED_BLOCKS // count) == 0:
                torch.cuda.synchronize()
            spans.append(step(subject))
        rounds.append([1e6 * statistics.median(part) for part in zip(*spans, strict=True)])
    forward, backward = min(rounds, key=sum)
    return forward, backward


def report() -> None:
    print("us                 forward  backward     both   each of 8   launches")
    for name in SUBJECTS:
        one, chain = build(name), build(name, CHAIN)
        forward, backward = fastest_median_us(one)
        each = (sum(fastest_median_us(chain, CHAIN)) - forward - backward) / (CHAIN - 1)
        launches = "" if not dry_gpu.active() else str(len(launched(one)))
        print(
            f"{name:17} {forward:9.1f} {backward:9.1f} {forward + backward:8.1f} {each:11.1f}"
            f"   {launches:>8}"
        )


def chain_report(count: int) -> None:
    """How the host's time spreads over a chain of blocks that begins on an idle device.

    If the host waited for the GPU somewhere, a step would take it the GPU's time and less of its
    own (cpu).
    """
    print("us of the host: forward of each block; backward, all, cpu, of each; GPU's of each")
    for name in ("topk", "nearest"):
        chain = build(name, count)
        assert isinstance(chain, host_block.HostBlocks)
        warm_up(chain)
        spans_us = [chain_spans_us(chain) for _ in range(STEPS // 2)]
        *forward, backward, cpu = map(statistics.median, zip(*spans_us, strict=True))
        parts = {"backward": backward, "all": sum(forward) + backward, "cpu": cpu}
        parts["GPU"] = device_us(chain)
        each = ", ".join(f"{part} {value / count:.0f}" for part, value in parts.items())
        print(f"{name}: {' '.join(f'{value:.0f}' for value in forward)}; {each}")


def chain_spans_us(chain: host_block.HostBlocks) -> list[float]:
    """Of one step from an idle device: each block's forward, the backward pass, and CPU time."""
    torch.cuda.synchronize()
    began_cpu, times = time.process_time(), [time.perf_counter()]
    out_BLD = chain.x_BLD
    for moe in chain.blocks:
        out_BLD = moe(out_BLD)
        times.append(time.perf_counter())
    chain.backward(out_BLD)
    times.append(time.perf_counter())
    spans = [end - begin for begin, end in itertools.pairwise(times)]
    return [1e6 * seconds for seconds in (*spans, time.process_time() - began_cpu)]


def device_us(chain: host_block.HostBlocks) -> float:
    """The device's time of a step that a CUDA graph replays."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(chain)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step(chain)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)


def launched(subject: host_block.Subject) -> list[str]:
    """Names of the kernels of one step, those left out last."""
    warm_up(subject)
    before = dry_gpu.counts().launches
    ours.clear()
    step(subject)
    return dry_gpu.launch_names(before, dry_gpu.counts().launches) + ours


def counted(subject: host_block.Subject) -> dict[str, int]:
    """What one step asks of the device and how often it calls Python functions and built-ins."""
    warm_up(subject)
    calls, watching = 0, True

    def watch(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += watching and event in ("call", "c_call")

    before = dry_gpu.counts()
    ours.clear()
    sys.setprofile(watch)
    out = subject.forward()
    sys.setprofile(None)  # until the block's backward: what starts a pass is no block's
    out.register_hook(lambda gradient: sys.setprofile(watch))
    subject.backward(out)
    watching = False
    asked = dry_gpu.counts().since(before)
    return {**asked._asdict(), "launches": asked.launches + len(ours), "calls": calls}


def profile(subject: host_block.Subject) -> None:
    """Python's own view."""
    warm_up(subject)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS):
        step(subject)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=SUBJECTS, help="print Python's hottest functions")
    parser.add_argument("--launches", choices=SUBJECTS, help="print the kernels of one step")
    parser.add_argument("--counts", action="store_true", help="print what one step asks for")
    parser.add_argument("--kernels", action="store_true", help="load our kernels' host code")
    parser.add_argument("--gpu", action="store_true", help="use the GPU of this machine")
    parser.add_argument("--chain", type=int, help="with --gpu: blocks of a chain, one by one")
    arguments = parser.parse_args()
    if arguments.chain and not arguments.gpu:
        parser.error("--chain needs --gpu: there is nothing to compare the host with otherwise")
    if not arguments.gpu:
        if not dry_gpu.active():
            dry_gpu.run_again_on_it()
        dry_gpu.remove_library()
    torch.set_num_threads(1)
    if arguments.gpu:
        global clock
        clock = time.perf_counter
    if not arguments.kernels and not arguments.gpu:
        leave_out_kernels()
    if arguments.chain:
        chain_report(arguments.chain)
    elif arguments.profile:
        profile(build(arguments.profile))
    elif arguments.launches:
        print("\n".join(launched(build(arguments.launches))))
    elif arguments.counts:
        print(json.dumps({name: counted(build(name)) for name in SUBJECTS}))
    else:
        report()


if __name__ == "__main__":
    main()
