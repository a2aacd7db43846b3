"""Bytes that autograd really keeps, and that really are allocated, while a function runs."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

KINETO_QUIET = "6"  # the profiler's library reports its own start and end to stderr below this


@dataclass(frozen=True)
class SavedTensor:
    """A storage that the graph keeps alive; `bytes` are the storage's, whatever part is viewed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class _Kept:
    """What the graph holds instead of the tensor: it dies with the node that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # detached: an output saved by its own node would keep itself alive for ever
        self.tensor = tensor.detach()


class SavedTensors:
    """Context: watches what autograd saves of the operations inside, each storage once.

    Storages of `excluded` (parameters and buffers) do not count; they live anyway. What is saved
    and let go before `read` does not count either. Inside activation checkpointing the wrapper's
    own hooks hide everything: use `allocated_bytes` there.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage_key(tensor) for tensor in excluded}
        self._kept: list[weakref.ref[_Kept]] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.append(weakref.ref(kept))
        return kept

    def read(self) -> list[SavedTensor]:
        """What the graph keeps at this moment, in the order in which it was saved."""
        seen = set(self._excluded)
        saved = []
        for reference in self._kept:
            kept = reference()
            if kept is None or (key := _storage_key(kept.tensor)) in seen:
                continue
            seen.add(key)
            local = _local(kept.tensor)
            size = local.untyped_storage().nbytes()
            saved.append(SavedTensor(tuple(local.shape), local.dtype, size))
        return saved

    def bytes(self) -> int:
        """Their sum."""
        return sum(saved.bytes for saved in self.read())


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _storage_key(tensor: Tensor) -> int:
    return _local(tensor).untyped_storage().data_ptr()


def on_first_forward(module: nn.Module, tell: Callable[[int], None]) -> None:
    """Call `tell` with the bytes that the module's first forward pass in training keeps.

    The hooks remove themselves, so that no later pass and no captured CUDA graph meets them. Not
    for modules that are compiled or checkpointed.
    """
    watching: list[SavedTensors] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled() and not watching:
            # read here: FSDP has put the gathered parameters in place by now
            watching.append(SavedTensors([*module.parameters(), *module.buffers()]))
            watching[0].__enter__()

    def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if watching:
            watching[0].__exit__(None, None, None)
            for handle in handles:
                handle.remove()
            tell(watching[0].bytes())

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


@dataclass(frozen=True)
class Allocated:
    """Bytes allocated by a call: still live at its end, and at the worst moment within it."""

    live: int
    peak: int


def allocated_bytes(call: Callable[[], Any], *, device: torch.device) -> tuple[Any, Allocated]:
    """Run `call` and follow the allocator; the result must be kept for `live` to count it.

    On CUDA the caching allocator is asked (it rounds every tensor up to 512 bytes), on a CPU the
    profiler records each allocation. Garbage from before must not be freed in between.
    """
    gc.collect()
    gc.disable()
    try:
        return _allocated_by(call, device)
    finally:
        gc.enable()


def _allocated_by(call: Callable[[], Any], device: torch.device) -> tuple[Any, Allocated]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        return result, Allocated(live, torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", KINETO_QUIET)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()  # pyrefly: ignore [missing-attribute]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return result, Allocated(live, peak)
