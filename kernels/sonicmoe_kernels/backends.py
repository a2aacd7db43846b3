"""Which implementation serves which device: "hopper" (our CuTe DSL kernels) or "torch"."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from sonicmoe_kernels.tiles import (
    MAX_PAIRS,
    MAX_ROUTED_TOKENS,
    TOPK_MAX_CHOSEN,
    TOPK_MAX_EXPERTS,
    why_illegal_routing,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "resolve_backend",
    "resolve_plan_backend",
    "resolve_topk_backend",
]

Backend = Literal["auto", "hopper", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)

HOPPER_CAPABILITY = (9, 0)
HOPPER_MULTIPLE = 64  # one k-tile of the GEMMs; local D and F
GROUPED_MM_MULTIPLE = 8  # 16 bytes of a half-precision row, which grouped_mm's TMA loads need
HOPPER_DTYPES = (torch.bfloat16, torch.float16)
TOPK_DTYPES = (torch.float32, torch.bfloat16)
HOPPER_IMPLEMENTED = True  # all eight kernels ran right on an H100

logger = logging.getLogger(__name__)


def _constant_when_traced(function: Callable[..., str]) -> Callable[..., str]:
    """What `torch.compiler.assume_constant_result` does, without importing dynamo for it."""
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function


def _device_obstacle(device: torch.device) -> str:
    """Why our kernels cannot run on this device, or an empty string."""
    if not HOPPER_IMPLEMENTED:
        return "this version has no Hopper kernels"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, not 9.0"
    return ""


def _hopper_obstacle(device: torch.device, dtype: torch.dtype, dim: int, expert_dim: int) -> str:
    """Why the hopper backend cannot compute the experts, or an empty string."""
    if obstacle := _device_obstacle(device):
        return obstacle
    if dtype not in HOPPER_DTYPES:
        return f"dtype is {dtype}, not bfloat16 or float16"
    if dim % HOPPER_MULTIPLE or expert_dim % HOPPER_MULTIPLE:
        return f"D={dim} and F={expert_dim} are not both multiples of {HOPPER_MULTIPLE}"
    return ""


def _topk_obstacle(device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int) -> str:
    """Why the hopper backend cannot choose experts, or an empty string."""
    if obstacle := _device_obstacle(device):
        return obstacle
    if dtype not in TOPK_DTYPES:
        return f"the logits are {dtype}, not float32 or bfloat16"
    if num_experts > TOPK_MAX_EXPERTS or top_k > TOPK_MAX_CHOSEN:
        return f"E={num_experts}, K={top_k} exceed {TOPK_MAX_EXPERTS} and {TOPK_MAX_CHOSEN}"
    return ""


@functools.cache
def _resolve_topk_backend(
    requested: str, device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int
) -> str:
    if requested not in BACKENDS:
        raise ValueError(f"backend {requested!r} is unknown; accepted: {', '.join(BACKENDS)}")
    obstacle = _topk_obstacle(device, dtype, num_experts, top_k)
    if requested == "hopper" and obstacle:
        raise ValueError(
            f"backend 'hopper' cannot route here: {obstacle}. Use backend 'torch', or 'auto' to "
            "let the device decide."
        )
    chosen = "hopper" if requested != "torch" and not obstacle else "torch"
    if requested == "auto":
        why = f" ({obstacle})" if obstacle else ""
        logger.info("routing on %s runs on the %s backend%s", device, chosen, why)
    return chosen


@_constant_when_traced
def resolve_topk_backend(
    requested: str, device: torch.device, dtype: torch.dtype, num_experts: int, top_k: int
) -> str:
    """The backend that routes ("hopper" or "torch"); `auto` picks and says once why.

    Args:
        requested: one of `BACKENDS`.
        device, dtype: of the logits.
        num_experts, top_k: E and K.

    Raises:
        ValueError: unknown name, or hopper where it cannot serve this device, dtype or size.
    """
    return _resolve_topk_backend(requested, device, dtype, num_experts, top_k)


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
    _check_name(requested)
    obstacle = _hopper_obstacle(device, dtype, dim, expert_dim)
    if requested == "hopper" and obstacle:
        raise ValueError(_cannot_run(obstacle))
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


def resolve_plan_backend(
    requested: str,
    ids_TK: Tensor,
    num_experts: int,
    *floats: Tensor,
) -> str:
    """The backend that builds a plan ("hopper" or "torch"); works while torch.compile traces.

    Args:
        requested: one of `BACKENDS`.
        ids_TK: (T, K) the chosen experts.
        num_experts: E.
        floats: scores and draws; the kernels compute in float32.

    Raises:
        ValueError: unknown name, or "hopper" where it cannot serve these tensors.
    """
    _check_name(requested)
    if requested == "torch" or (requested == "auto" and ids_TK.device.type != "cuda"):
        return "torch"
    T, K = ids_TK.shape
    obstacle = _device_obstacle_once(ids_TK.device)
    obstacle = obstacle or why_illegal_routing(num_experts, K) or ""
    if not obstacle and torch.float64 in [tensor.dtype for tensor in floats]:
        obstacle = "scores or draws are float64"
    if not obstacle and T > MAX_ROUTED_TOKENS:
        obstacle = f"T={T} tokens are more than {MAX_ROUTED_TOKENS}"
    if not obstacle and T * num_experts >= MAX_PAIRS:
        obstacle = f"T * E = {T} * {num_experts} pairs do not fit in int32"
    if obstacle and requested == "hopper":
        raise ValueError(_cannot_run(obstacle))
    return "torch" if obstacle else "hopper"


@_constant_when_traced
def _device_obstacle_once(device: torch.device) -> str:
    """`_device_obstacle`, asked once per device; a constant to torch.compile."""
    return _cached_device_obstacle(device)


_cached_device_obstacle = functools.cache(_device_obstacle)


def _check_name(requested: str) -> None:
    if requested not in BACKENDS:
        raise ValueError(f"backend {requested!r} is unknown; accepted: {', '.join(BACKENDS)}")


def _cannot_run(obstacle: str) -> str:
    return (
        f"backend 'hopper' cannot run here: {obstacle}. Use backend 'torch', or 'auto' to let the "
        "device decide."
    )
