"""A GPU whose kernels do not run: torch's whole CUDA path, and its host cost, without a GPU.

`dry_gpu.c` stands in for the CUDA runtime and cuBLAS. Preloaded, it lets torch find an H100 whose
memory is the host's: dispatcher, autograd, caching allocator and the host code of our kernels are
the real ones; a launch is counted and forgotten, so results are garbage. What it leaves out is the
driver's own work, 2 to 3 us a launch on an H100's host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

SOURCE = Path(__file__).with_suffix(".c")
ACTIVE = "SONICMOE_DRY_GPU"  # set in a process that runs on the dry GPU
PREFIX = "sonicmoe-dry-gpu-"


class Counts(NamedTuple):
    """What the host asked of the GPU since the process started."""

    launches: int
    waits: int  # for the device
    copies: int
    allocations: int  # that the caching allocator passed on

    def since(self, earlier: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))


def why_not() -> str:
    """Why there can be no dry GPU here, or an empty string."""
    import torch

    if not str(torch.version.cuda).startswith("13."):
        return f"torch is built for CUDA {torch.version.cuda}, the stand-in is written for CUDA 13"
    if _headers() is None:
        return "no package here has CUDA's header driver_types.h"
    return "" if shutil.which("gcc") else "gcc is missing"


def _headers() -> Path | None:
    """CUDA's headers as triton, which torch needs, brings them along."""
    package = importlib.util.find_spec("triton")
    for folder in (package.submodule_search_locations or ()) if package else ():
        include = Path(folder) / "backends" / "nvidia" / "include"
        if (include / "driver_types.h").is_file():
            return include
    return None


def environment(folder: Path) -> dict[str, str]:
    """Builds the stand-in in `folder`; the environment of a process that shall run on it."""
    library = folder / "libdry_gpu.so"
    # The name of the driver's library, so that whoever loads that one finds this one loaded.
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    command += ["-o", str(library), str(SOURCE), f"-I{_headers()}"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library), ACTIVE: "1"}


def run_again_on_it() -> NoReturn:
    """Replaces this process by itself on the dry GPU; then `remove_library`."""
    if obstacle := why_not():
        sys.exit(f"no GPU can be played here: {obstacle}")
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    os.execve(sys.executable, [sys.executable, *sys.argv], environment(folder))


def remove_library() -> None:
    """Deletes what `run_again_on_it` built: this process has loaded it, its children need none."""
    folder = Path(os.environ["LD_PRELOAD"]).parent
    if folder.name.startswith(PREFIX):
        del os.environ["LD_PRELOAD"]
        shutil.rmtree(folder)


def active() -> bool:
    """Whether this process runs on it."""
    return ACTIVE in os.environ


def counts() -> Counts:
    library = ctypes.CDLL(None)
    return Counts(*(ctypes.c_long.in_dll(library, f"dry_{name}").value for name in Counts._fields))


def launch_names(begin: int, end: int) -> list[str]:
    """Kernels launched from number `begin` up to `end`, of the last few thousand."""
    name = ctypes.CDLL(None).dry_launch_name
    name.restype = ctypes.c_char_p
    return [name(ctypes.c_long(number)).decode() for number in range(begin, end)]
