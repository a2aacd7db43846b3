"""Compiles a kernel once, keeps the object on disk, and loads it without the compiler.

A kernel is named by a frozen dataclass (its spec) that holds everything static about it and says
in `builder` which function compiles it. Its object lies in the cache directory (`store.py`) as

    dsl<version>-<machine>/<kernel>-<hash of spec, arch and kernel sources>.so

beside libcute_dsl_runtime.so, which it needs. All ranks and nodes may share the directory: one lock
per object, written under another name and renamed when whole. Neither a GPU nor a driver is needed
to build; neither the compiler nor a linker to load.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sonicmoe_kernels import store
from sonicmoe_kernels.block_stages import BlockStage
from sonicmoe_kernels.store import CACHE_VARIABLE, cache_dir
from sonicmoe_kernels.tiles import (
    Aggregation,
    RoutingKernel,
    RowGemm,
    TopKBackward,
    TopKForward,
    WeightGemm,
)

__all__ = [
    "Built",
    "KernelSpec",
    "build",
    "build_once",
    "cache_dir",
    "check_tools",
    "load",
    "object_path",
    "prepare_dsl",
]

ARCH = "sm_90a"
ARCH_VARIABLE = "CUTE_DSL_ARCH"  # read by cutlass once, when it is imported
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
DSL_PACKAGE = "nvidia-cutlass-dsl"
DSL_FOLDER = "nvidia_cutlass_dsl"  # where that package is installed
ENTRY = "kernel"  # name of the function in every object
PACKAGE = "sonicmoe_kernels"
SCHEMA = 2  # raise it when objects of old are called differently

logger = logging.getLogger(__name__)

_compiler = threading.Lock()  # MLIR is not thread-safe


# Frozen dataclasses of plain values; each names its `kernel` and the `builder` that compiles it.
KernelSpec = (
    RowGemm | WeightGemm | Aggregation | TopKForward | TopKBackward | RoutingKernel | BlockStage
)


class Built(NamedTuple):
    """An object in the cache; seconds is what compiling took, 0 when it was there."""

    path: Path
    seconds: float


def _compiles_here(arch: str) -> bool:
    """Whether this process may still name the target: others import cutlass too (inductor does)."""
    return "cutlass" not in sys.modules or os.environ.get(ARCH_VARIABLE) == arch


def prepare_dsl(arch: str = ARCH) -> None:
    """Names the target to the compiler; call it before anything imports cutlass.

    Raises:
        RuntimeError: cutlass was imported for another target.
    """
    if not _compiles_here(arch):
        raise RuntimeError(
            f"cutlass was imported with {ARCH_VARIABLE}={os.environ.get(ARCH_VARIABLE)}, but "
            f"kernels are compiled for {arch}: set {ARCH_VARIABLE}={arch} before the first import "
            "of cutlass"
        )
    os.environ[ARCH_VARIABLE] = arch


def _imports(source: str) -> set[str]:
    """Modules of this package that a module imports, as paths below it without suffix."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and module.startswith(PACKAGE):
            below = module.removeprefix(PACKAGE).removeprefix(".")
            found |= {below, *(f"{below}.{alias.name}".strip(".") for alias in node.names)}
    return {name.replace(".", "/") for name in found}


@functools.cache
def _sources_hash(builder: str) -> str:
    """Hash of the builder's module and of every module of this package that it imports, nested."""
    root = Path(__file__).parent
    todo = [builder.split(":")[0].removeprefix(f"{PACKAGE}.").replace(".", "/")]
    sources: dict[str, bytes] = {}
    while todo:
        name = todo.pop()
        path = root / f"{name}.py"
        if name not in sources and path.is_file():
            sources[name] = path.read_bytes()
            todo += _imports(sources[name].decode())
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name])
    return digest.hexdigest()


def _stem(spec: KernelSpec, arch: str) -> str:
    code = _sources_hash(spec.builder)
    values = dataclasses.asdict(spec)
    facts = [SCHEMA, arch, type(spec).__name__, values, code]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{spec.kernel}-{digest[:24]}"


def _dsl_version() -> str | None:
    try:
        return importlib.metadata.version(DSL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder_name(version: str) -> str:
    """Objects of one compiler and one kind of CPU (their host side is machine code)."""
    return f"dsl{version}-{platform.machine()}"


def object_path(spec: KernelSpec, *, arch: str = ARCH) -> Path | None:
    """The object of `spec` in the cache, or None when nobody has built it or it is damaged.

    Where the compiler is installed its version must match; where it is not, the newest object
    counts.

    Raises:
        ValueError: the cache or the object is not to be trusted.
    """
    name = f"{_stem(spec, arch)}.so"
    pattern = f"{_folder_name(_dsl_version() or '*')}/{name}"
    for root in (cache_dir(), store.private_dir()):
        if root is None or not os.access(root, os.R_OK | os.X_OK) or not root.is_dir():
            continue
        store.check_trust(root, root.stat())
        found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found:
            store.check_trust(path.parent, path.parent.stat())
            if store.is_whole(path) and _has_runtime(path.parent):
                return path
    return None


def _runtime_library() -> Path:
    """libcute_dsl_runtime.so of the installed compiler (the newest CUDA it was built for)."""
    package = importlib.util.find_spec(DSL_FOLDER)
    folders = list(package.submodule_search_locations or ()) if package else []
    libraries = sorted(
        path for folder in folders for path in Path(folder).glob(f"cu*/lib/{RUNTIME_LIBRARY}")
    )
    if not libraries:
        raise RuntimeError(
            f"{RUNTIME_LIBRARY} is not in the {DSL_PACKAGE} installation: reinstall "
            f"'{DSL_PACKAGE}[cu13]'"
        )
    return libraries[-1]


def _linker() -> str:
    linker = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if linker is None:
        raise RuntimeError(
            "building a kernel needs a linker: install gcc, set CC, or point "
            f"{CACHE_VARIABLE} at a directory filled by `python -m sonicmoe_kernels.warmup`"
        )
    return linker


def check_tools() -> None:
    """Raises RuntimeError, which says what to install, where nothing can be built."""
    if _dsl_version() is None:
        raise RuntimeError(
            f"building a kernel needs {DSL_PACKAGE}, which is not installed: install "
            f"'{DSL_PACKAGE}[cu13]', or fill {cache_dir()} with `python -m "
            "sonicmoe_kernels.warmup` on a machine that has it"
        )
    _linker()
    _runtime_library()


def _link(object_file: Path, library: Path) -> None:
    """Links an object against the runtime library that will lie beside it."""
    command = [*shlex.split(_linker()), "-shared", "-fPIC", "-o", str(library), str(object_file)]
    command += [f"-L{_runtime_library().parent}", "-lcute_dsl_runtime", "-Wl,-rpath,$ORIGIN"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"the linker {command[0]} does not start: {error.strerror}") from None
    if done.returncode:
        raise RuntimeError(f"linking {library.name} failed: {done.stderr.strip()}")


def _has_runtime(folder: Path) -> bool:
    """Whether the runtime library of `folder` is whole; hashed once (44 MB, 30 ms)."""
    library = folder / RUNTIME_LIBRARY
    try:
        status = library.stat()
    except OSError:
        return False
    # The private folder has a link to the installed library, which is trusted as Python itself is.
    return library.is_symlink() or _is_whole(library, status.st_size, status.st_mtime_ns)


@functools.cache
def _is_whole(path: Path, size: int, mtime_ns: int) -> bool:
    del size, mtime_ns  # of the file that was looked at: another one is looked at again
    return store.is_whole(path)


def _install_runtime(folder: Path) -> None:
    library = folder / RUNTIME_LIBRARY
    with store.locked(library):
        if _has_runtime(folder):
            return
        if folder.parent == store.private_dir():
            library.symlink_to(_runtime_library())
        else:
            store.write_whole(library, _runtime_library().read_bytes())


def compile_kernel(spec: KernelSpec, *, arch: str = ARCH) -> Any:
    """Compiles `spec` in this process, without the cache; what `export_to_c` can be called on."""
    prepare_dsl(arch)
    module, function = spec.builder.split(":")
    with _compiler:
        return getattr(importlib.import_module(module), function)(spec)


def _linked_object(spec: KernelSpec, arch: str) -> bytes:
    """The shared object of `spec`, made in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="sonicmoe-build-") as scratch:
        object_file, library = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        compiled = compile_kernel(spec, arch=arch)
        compiled.export_to_c(object_file_path=str(object_file), function_name=ENTRY)
        _link(object_file, library)
        return library.read_bytes()


def build_once(spec: KernelSpec, *, arch: str = ARCH, root: Path | None = None) -> Built:
    """The object of `spec`, compiled here and linked into `root` unless it is there already.

    Args:
        spec: what to compile.
        arch: for which GPU.
        root: the cache directory if None.

    Raises:
        OSError: `root` cannot be written.
        RuntimeError: the compiler or a linker is missing, or failed.
        ValueError: the configuration is illegal, or the cache is not to be trusted.
    """
    found = object_path(spec, arch=arch)
    if found is not None:
        return Built(found, 0.0)
    check_tools()
    root = store.open_folder(root or cache_dir())
    mode = root.stat().st_mode & store.READABLE
    folder = store.open_folder(root / _folder_name(str(_dsl_version())), mode=mode)
    target = folder / f"{_stem(spec, arch)}.so"
    with store.locked(target):
        started = time.perf_counter()
        _install_runtime(folder)
        if store.is_whole(target):
            return Built(target, 0.0)
        if target.exists():
            logger.warning("%s is damaged or of another build: building it again", target)
        store.write_whole(target, _linked_object(spec, arch))
        seconds = time.perf_counter() - started
    logger.info("compiled %s in %.1f s", target.stem, seconds)
    return Built(target, seconds)


def build(spec: KernelSpec, *, arch: str = ARCH) -> Path:
    """As `build_once`, the path alone."""
    return build_once(spec, arch=arch).path


@functools.cache
def load(spec: KernelSpec) -> Callable[..., None]:
    """The kernel as a function of tensors and numbers, on the current CUDA stream.

    Built on the first call in a process if the cache has no object of it (2-5 s).

    Raises:
        RuntimeError: it cannot be built, or the system refuses to load it.
    """
    import tvm_ffi

    if not _compiles_here(ARCH):
        from sonicmoe_kernels.parallel_build import make_ready

        make_ready([spec])  # in a process of its own
    path = store.with_fallback(lambda root: build_once(spec, root=root)).path
    try:
        return tvm_ffi.load_module(str(path))[ENTRY]
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"{path} cannot be loaded ({error}): where its file system is mounted noexec, set "
            f"{CACHE_VARIABLE} to another; where it was built on a newer Linux, delete it"
        ) from error
