"""Sections of the layer's report with numbers that others state or that were measured elsewhere.

None of them is interleaved with ours: cards, clocks and methods differ, and each says how.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.moe_goals import section
from bench.moe_report import Shapes, by_shape, tflops


def sections(records: list[dict]) -> list[str]:
    """Lines of Markdown; a section without records is left out."""
    shapes = by_shape(records)
    return [*official_elsewhere(shapes), *paper_speedups(shapes), *liger_claim(shapes)]


class Measured(NamedTuple):
    """Milliseconds of the official package: passes alone, both as waited for, kernel sum."""

    fwd: float
    bwd: float
    both: float
    kernels: float


# sonic-moe 0.1.2.post1, CuTe DSL 4.4.2, quack 0.4.1, torch 2.11.0+cu130, two H100 80GB HBM3, driver
# 580, 2026-11-22; single runs. 7b is of another card than the rest.
OFFICIAL = {
    "7b": Measured(1.150, 2.099, 3.979, 3.11),
    "1.4b": Measured(1.045, 2.328, 2.931, 2.805),
    "30b_n1024": Measured(5.762, 10.826, 18.243, 17.55),
    "sparse": Measured(7.048, 12.878, 22.25, 23.03),
}


def official_elsewhere(shapes: Shapes) -> list[str]:
    """The official package's numbers on the shapes where it was measured alone."""
    rows = []
    for shape, theirs in OFFICIAL.items():
        ours = shapes.get(shape, {}).get("sonicmoe")
        if ours is not None:
            rows.append(
                [
                    shape,
                    f"{theirs.both:.3f}",
                    f"{theirs.both / ours['fwd_bwd_ms'] - 1:+.1%}",
                    f"{theirs.kernels:.3f}",
                    f"{theirs.kernels / ours['kernel_ms'] - 1:+.1%}",
                    f"{theirs.fwd:.3f}, {theirs.bwd:.3f}",
                ]
            )
    text = (
        "sonic-moe 0.1.2.post1 alone on H100 80GB HBM3 cards of 2026-11-22 (driver 580, torch "
        "2.11.0+cu130, CuTe DSL 4.4.2, quack 0.4.1; single runs), beside ours above: not the same "
        "run, so differences of a few percent mean nothing. Its loop at 7b looked bound by the "
        "host of that machine."
    )
    header = ["shape", "loop ms", "longer than ours", "kernels ms", "longer than ours"]
    header += ["forward, backward alone ms"]
    return section("The official package, measured elsewhere", text, header, rows)


class LigerClaim(NamedTuple):
    """A rate that Liger's developers state for one H100 (their pull request 1294)."""

    what: str
    key: str  # of a record's milliseconds
    passes: int
    tflops: float


LIGER_SHAPE = "qwen3_30b"
LIGER_CLAIMS = (
    LigerClaim("forward", "fwd_ms", 1, 501),
    LigerClaim("forward + backward", "fwd_bwd_ms", 3, 413),
)


def liger_claim(shapes: Shapes) -> list[str]:
    """What Liger states for its Triton kernels on Qwen3-30B's sizes, beside ours."""
    ours = shapes.get(LIGER_SHAPE, {}).get("sonicmoe")
    if ours is None:
        return []
    rows = []
    for claim in LIGER_CLAIMS:
        rate = tflops(ours, ours[claim.key], passes=claim.passes)
        cells = [
            claim.what,
            f"{rate:.0f}",
            f"{claim.tflops:.0f}",
            f"{rate / claim.tflops - 1:+.1%}",
        ]
        rows.append(cells)
    text = f"TFLOP/s on {LIGER_SHAPE}; Liger's as stated in its pull request 1294, on an H100."
    return section("Liger's stated rates", text, ["pass", "ours", "Liger", "ours ahead"], rows)


class Claim(NamedTuple):
    """A speedup that the paper states for its 7B shape, and what we know of the peer's time.

    peer_ms: measured by us, None where only the paper's figure gives a rate (peer_tflops).
    """

    what: str
    passes: int  # 1 forward, 2 backward
    paper: str
    peer_ms: float | None
    peer_tflops: float


# arXiv 2512.14080 v2, section 6; rates: Figure 14 of v1, read off its bars, +-3 TFLOP/s. The peers'
# milliseconds: one H100 80GB HBM3, driver 580, torch 2.11.0+cu130, 2026-11-22, median of Triton's
# do_bench, single runs; ScatterMoE's backward is the difference of both and forward.
CLAIMS = (
    Claim("forward, DeepGEMM", 1, "+43%", None, 259),
    Claim("backward, ScatterMoE", 2, "+83%", 4.959, 212),
    Claim("backward, MoMoE", 2, "+115%", 4.943, 184),
    Claim("forward, ScatterMoE", 1, "", 2.742, 206),
    Claim("forward, MoMoE", 1, "", 1.808, 193),
)
PAPER_SHAPE = "7b"


def paper_speedups(shapes: Shapes) -> list[str]:
    """The paper's 7B speedups beside ours."""
    ours = shapes.get(PAPER_SHAPE, {}).get("sonicmoe")
    if ours is None:
        return []
    rows = []
    for claim in CLAIMS:
        ms = ours["fwd_ms"] if claim.passes == 1 else ours["bwd_ms"]
        rate = tflops(ours, ms, passes=claim.passes)
        measured = "not measured" if claim.peer_ms is None else f"{claim.peer_ms:.3f} ms"
        gain = "" if claim.peer_ms is None else f"{claim.peer_ms / ms - 1:+.0%}"
        cells = [claim.what, claim.paper, f"{ms:.3f} ms, {rate:.0f} TFLOP/s", measured, gain]
        rows.append([*cells, f"{claim.peer_tflops:.0f}", f"{rate / claim.peer_tflops - 1:+.0%}"])
    text = (
        "Ours is of the sustained loop above. The peers' times are of another H100 80GB HBM3 "
        "(driver 580, torch 2.11.0+cu130, 2026-11-22: medians of Triton's do_bench, single runs, "
        "experts with the routing given; ScatterMoE's backward is forward and backward less "
        "forward). DeepGEMM with its gather and activation was not measured there: the paper's "
        "figure alone gives its rate, read off the bars to about 3 TFLOP/s, on the paper's H100."
    )
    header = ["pass and peer", "paper", "ours", "peer, measured elsewhere", "ours ahead"]
    header += ["peer TFLOP/s in the paper's figure", "ours ahead of that"]
    return section("The paper's 7B speedups", text, header, rows)
