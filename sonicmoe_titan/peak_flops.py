"""The peak that a model FLOPs utilisation refers to, where there is one."""

import functools
import math

from torchtitan.tools import utils

A100_PEAK_FLOPS = 312e12  # dense bf16; what TorchTitan takes for every GPU that it does not know

_stock_peak_flops = utils.get_peak_flops


def use_our_peak_flops() -> None:
    """Have TorchTitan ask `peak_flops`."""
    utils.get_peak_flops = peak_flops


def peak_flops(device_name: str) -> float:
    """As TorchTitan's, which takes an A100's for a CPU too; against infinity its MFU is 0."""
    return math.inf if device_name == "cpu" else _stock_peak_flops(device_name)


@functools.cache
def known_peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device; None for a CPU or a GPU that TorchTitan does not know.

    TorchTitan takes an A100's peak for those: a number that looks like an MFU and is none.
    """
    peak = peak_flops(device_name)
    assumed = peak == A100_PEAK_FLOPS and "A100" not in device_name
    return None if assumed or math.isinf(peak) else peak
