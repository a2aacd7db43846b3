#!/usr/bin/env python3
"""Floors of the eight kernels: the larger of FLOPs over the matrix rate and bytes over bandwidth.

    python scripts/roofline.py T D F E K [T D F E K ...]

Every tensor is counted as moved once (gathered rows of x and dO are found in L2, weights are read
once). The rates are what an H100 sustains, not its datasheet: 660 TFLOP/s bf16, 3.0 TB/s.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

TFLOPS = 660.0
TERABYTES_PER_S = 3.0
HALF_BYTES = 2
INDEX_BYTES = 4


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one kernel."""

    flops: float
    bytes: float

    def at(self, tflops: float, terabytes_per_s: float) -> float:
        """The least time either rate allows, in milliseconds."""
        return max(self.flops / tflops, self.bytes / terabytes_per_s) * 1e-9

    @property
    def floor_ms(self) -> float:
        """The least time at the rates that an H100 sustains."""
        return self.at(TFLOPS, TERABYTES_PER_S)


def kernels(T: int, D: int, F: int, E: int, K: int) -> dict[str, Work]:
    """Work of each kernel of a gated expert layer in 16-bit elements, by its name."""
    rows = T * K
    product = 2.0 * rows * D * F  # one GEMM between D and F
    token, row_d, row_f = T * D * HALF_BYTES, rows * D * HALF_BYTES, rows * F * HALF_BYTES
    w13, w2 = 2 * E * D * F * HALF_BYTES, E * D * F * HALF_BYTES
    index = rows * INDEX_BYTES
    return {
        "up": Work(2 * product, token + w13 + 3 * row_f + index),
        "down": Work(product, row_f + w2 + row_d),
        "aggregate_out": Work(0, row_d + token + 2 * index),
        "d_hidden": Work(product, token + w2 + 5 * row_f + 3 * index),
        "d_weight2": Work(product, token + row_f + w2 + index),
        "d_input": Work(2 * product, 2 * row_f + w13 + row_d),
        "d_weight13": Work(2 * product, token + 2 * row_f + w13 + index),
        "aggregate_dx": Work(0, row_d + token + index),
    }


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:]]
    if not numbers or len(numbers) % 5:
        sys.exit("usage: roofline.py T D F E K [T D F E K ...]")
    for start in range(0, len(numbers), 5):
        T, D, F, E, K = numbers[start : start + 5]
        print(f"T={T} D={D} F={F} E={E} K={K}, {T * K / E:.0f} rows per expert")
        total = 0.0
        for name, work in kernels(T, D, F, E, K).items():
            total += work.floor_ms
            limit = "matrix" if work.flops / TFLOPS > work.bytes / TERABYTES_PER_S else "memory"
            print(f"  {name:14s} {work.floor_ms:7.3f} ms  {limit}")
        print(f"  {'sum':14s} {total:7.3f} ms  ({18e-9 * T * K * D * F / total:.0f} TFLOP/s)")


if __name__ == "__main__":
    main()
