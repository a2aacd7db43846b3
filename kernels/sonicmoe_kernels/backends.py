"""Which implementation serves which device: "hopper" (our CuTe DSL kernels) or "torch"."""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch

__all__ = ["BACKENDS", "Backend", "resolve_backend"]

Backend = Literal["auto", "hopper", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)

HOPPER_CAPABILITY = (9, 0)
HOPPER_MULTIPLE = 64  # one k-tile of the GEMMs; local D and F
GROUPED_MM_MULTIPLE = 8  # 16 bytes of a half-precision row, which grouped_mm's TMA loads need
HOPPER_DTYPES = (torch.bfloat16, torch.float16)
HOPPER_IMPLEMENTED = True  # all eight kernels ran right on an H100

logger = logging.getLogger(__name__)


def _hopper_obstacle(device: torch.device, dtype: torch.dtype, dim: int, expert_dim: int) -> str:
    """Why the hopper backend cannot serve this, or an empty string."""
    if not HOPPER_IMPLEMENTED:
        return "this version has no Hopper kernels"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, not 9.0"
    if dtype not in HOPPER_DTYPES:
        return f"dtype is {dtype}, not bfloat16 or float16"
    if dim % HOPPER_MULTIPLE or expert_dim % HOPPER_MULTIPLE:
        return f"D={dim} and F={expert_dim} are not both multiples of {HOPPER_MULTIPLE}"
    return ""


@functools.cache
def resolve_backend(
    requested: str, device: torch.device, dtype: torch.dtype, dim: int, expert_dim: int
) -> str:
    """The backend that runs ("hopper" or "torch"); `auto` picks and says once why.

    Args:
        requested: one of `BACKENDS`.
        device, dtype: of the activations and weights.
        dim, expert_dim: local D and F.

    Raises:
        ValueError: unknown name, or a backend that cannot serve this device, dtype or shape.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend {requested!r} is unknown; accepted: {', '.join(BACKENDS)}")
    obstacle = _hopper_obstacle(device, dtype, dim, expert_dim)
    if requested == "hopper" and obstacle:
        raise ValueError(
            f"backend 'hopper' cannot run here: {obstacle}. Use backend 'torch', or 'auto' to let "
            "the device decide."
        )
    chosen = "hopper" if requested != "torch" and not obstacle else "torch"
    if chosen == "torch" and device.type == "cuda":
        if dim % GROUPED_MM_MULTIPLE or expert_dim % GROUPED_MM_MULTIPLE:
            raise ValueError(
                f"D={dim} and F={expert_dim} must be multiples of {GROUPED_MM_MULTIPLE} on a GPU "
                "(grouped_mm loads 16-byte pieces); pad the model's widths"
            )
        if dtype != torch.bfloat16:
            raise ValueError(
                f"backend 'torch' on a GPU needs bfloat16, got {dtype} (grouped_mm computes "
                "nothing else without waiting for the host); cast x and the weights"
            )
    if requested == "auto":
        why = f" ({obstacle})" if obstacle else ""
        logger.info("experts on %s run on the %s backend%s", device, chosen, why)
    return chosen
