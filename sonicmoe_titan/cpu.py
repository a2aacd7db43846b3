"""What TorchTitan needs to run on a machine without an accelerator.

TorchTitan 0.3 freezes its device type when `torchtitan.tools.utils` is imported, takes "cuda" when
it finds nothing, and asks `torch.cpu` for functions that only `torch.cuda` has. With an accelerator
in the machine nothing here is touched.
"""

import os
import resource
import sys
import warnings
from types import SimpleNamespace

import torch

_prepared = False


def prepare_cpu() -> None:
    """Make TorchTitan train on the CPU if the machine has no accelerator; idempotent.

    Works before TorchTitan is imported and after (the stock entry point imports it first).
    """
    global _prepared
    if _prepared or torch._utils._get_available_device_type() is not None:
        return
    _prepared = True
    torch._utils._get_available_device_type = lambda: "cpu"
    # barrier(device_ids=[current_device()]) wants an index; torch.cpu answers with "cpu"
    torch.cpu.current_device = lambda: 0  # pyrefly: ignore [bad-assignment]
    for function in (
        get_device_name,
        get_device_properties,
        memory_stats,
        reset_peak_memory_stats,
        empty_cache,
    ):
        if not hasattr(torch.cpu, function.__name__):
            setattr(torch.cpu, function.__name__, function)
    _correct_imported_modules()
    # FSDP on gloo says so at every start; `parallelize_decoder` draws each shard by itself
    warnings.filterwarnings("ignore", r"DTensor (random operators|manual_seed\(\)) may not have")


def get_device_name(device: object = None) -> str:
    """The name TorchTitan prints for the device."""
    return "cpu"


def get_device_properties(device: object = None) -> SimpleNamespace:
    """`total_memory` in bytes, and `name`, as `torch.cuda.get_device_properties` has them."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(name="cpu", total_memory=pages * page_bytes)


def memory_stats(device: object = None) -> dict[str, int]:
    """The peak resident set of this process, in bytes, under the allocator's two key names."""
    kib = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


def reset_peak_memory_stats(device: object = None) -> None:
    """The peak of a process cannot be reset."""


def empty_cache() -> None:
    """There is no caching allocator."""


def _correct_imported_modules() -> None:
    """Correct the device that TorchTitan's modules froze if they were imported before us."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan.") and getattr(module, "device_type", None) == "cuda":
            module.device_type = "cpu"  # pyrefly: ignore [missing-attribute]
            if hasattr(module, "device_module"):
                module.device_module = torch.cpu  # pyrefly: ignore [missing-attribute]
            if hasattr(module, "_get_available_device_type"):
                # pyrefly: ignore [missing-attribute]
                module._get_available_device_type = torch._utils._get_available_device_type
