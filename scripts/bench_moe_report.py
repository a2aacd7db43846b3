"""Tables and figures of bench_moe.py's records.

Legend: T tokens, D model width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import csv
from pathlib import Path

IMPLEMENTATIONS = ("sonicmoe", "torch", "official", "liger")
NAME = "moe_layer_h100"


def line(record: dict) -> str:
    """One record as a line of the console's table."""
    return (
        f"{record['shape']:10s} {record['impl']:9s} fwd {record['fwd_ms']:7.3f} "
        f"bwd {record['bwd_ms']:7.3f} both {record['fwd_bwd_ms']:7.3f} ms, kernels "
        f"{record['kernel_ms']:7.3f} ({record['kernel_ms'] / record['floor_ms']:.2f}x floor), "
        f"{record['tflops']:.0f} TFLOP/s, host {record['host_us']:.0f} us"
    )


def write(records: list[dict], folder: Path) -> None:
    """CSV of the scalars for now."""
    scalars = [k for k, v in records[0].items() if isinstance(v, int | float | str)]
    with (folder / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
