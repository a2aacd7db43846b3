"""Compiles a kernel once, keeps the object on disk, and loads it without the compiler.

A kernel is named by a frozen dataclass (its spec) that holds everything static about it and says
in `builder` which function compiles it. Its object lies in the cache directory as

    <kernel>-<hash of spec, arch and kernel sources>-dsl<version>.so

beside libcute_dsl_runtime.so, which it needs. All ranks and nodes may share the directory: one
lock per object, written under another name and renamed when whole. Neither a GPU nor a driver is
needed to build; neither the compiler nor a linker to load.
"""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sonicmoe_kernels.tiles import (
    Aggregation,
    RoutingKernel,
    RowGemm,
    TopKBackward,
    TopKForward,
    WeightGemm,
)

__all__ = ["KernelSpec", "build", "cache_dir", "load", "object_path", "prepare_dsl"]

ARCH = "sm_90a"
ARCH_VARIABLE = "CUTE_DSL_ARCH"  # read by cutlass once, when it is imported
CACHE_VARIABLE = "SONICMOE_CACHE_DIR"
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
DSL_PACKAGE = "nvidia-cutlass-dsl"
ENTRY = "kernel"  # name of the function in every object
PACKAGE = "sonicmoe_kernels"
SCHEMA = 1  # raise it when objects of old are called differently

_compiler = threading.Lock()  # MLIR is not thread-safe


# Frozen dataclasses of plain values; each names its `kernel` and the `builder` that compiles it.
KernelSpec = RowGemm | WeightGemm | Aggregation | TopKForward | TopKBackward | RoutingKernel


def cache_dir() -> Path:
    """Where objects are kept: $SONICMOE_CACHE_DIR, else ~/.cache/sonicmoe/kernels."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sonicmoe" / "kernels")


def prepare_dsl(arch: str = ARCH) -> None:
    """Names the target to the compiler; call it before anything imports cutlass.

    Raises:
        RuntimeError: cutlass was imported for another target.
    """
    current = os.environ.get(ARCH_VARIABLE)
    if "cutlass" in sys.modules and current != arch:
        raise RuntimeError(
            f"cutlass was imported with {ARCH_VARIABLE}={current}, but kernels are compiled for "
            f"{arch}: set {ARCH_VARIABLE}={arch} before the first import of cutlass"
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


def object_path(spec: KernelSpec, *, arch: str = ARCH) -> Path | None:
    """The object of `spec` in the cache directory, or None when nobody has built it.

    Where the compiler is installed its version must match; where it is not, the newest object
    counts.
    """
    version = _dsl_version()
    found = cache_dir().glob(f"{_stem(spec, arch)}-dsl{version or '*'}.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _runtime_library() -> Path:
    """libcute_dsl_runtime.so of the installed compiler (the newest CUDA it was built for)."""
    prepare_dsl(os.environ.get(ARCH_VARIABLE, ARCH))
    import cutlass

    libraries = sorted(Path(cutlass.__file__).parents[2].glob(f"cu*/lib/{RUNTIME_LIBRARY}"))
    if not libraries:
        raise RuntimeError(
            f"{RUNTIME_LIBRARY} is not in the {DSL_PACKAGE} installation: reinstall "
            f"'{DSL_PACKAGE}[cu13]'"
        )
    return libraries[-1]


def _link(object_file: Path, library: Path) -> None:
    """Links an object against the runtime library beside it."""
    linker = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if linker is None:
        raise RuntimeError(
            "building a kernel needs a linker: install gcc, set CC, or point "
            f"{CACHE_VARIABLE} at a directory filled by `python -m sonicmoe_kernels.warmup`"
        )
    command = [linker, "-shared", "-fPIC", "-o", str(library), str(object_file)]
    command += [f"-L{object_file.parent}", "-lcute_dsl_runtime", "-Wl,-rpath,$ORIGIN"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"linking {library.name} failed: {done.stderr.strip()}")


def _install_runtime(directory: Path) -> None:
    target = directory / RUNTIME_LIBRARY
    if not target.exists():
        partial = directory / f"{RUNTIME_LIBRARY}.{os.getpid()}"
        shutil.copy(_runtime_library(), partial)
        os.replace(partial, target)


def compile_kernel(spec: KernelSpec, *, arch: str = ARCH) -> Any:
    """Compiles `spec` in this process, without the cache; what `export_to_c` can be called on."""
    prepare_dsl(arch)
    module, function = spec.builder.split(":")
    with _compiler:
        return getattr(importlib.import_module(module), function)(spec)


def build(spec: KernelSpec, *, arch: str = ARCH) -> Path:
    """The object of `spec`, compiled and linked unless it is there already.

    Raises:
        RuntimeError: the compiler or a linker is missing, or failed.
    """
    found = object_path(spec, arch=arch)
    if found is not None:
        return found
    version = _dsl_version()
    if version is None:
        raise RuntimeError(
            f"no object of kernel {spec.kernel} in {cache_dir()} and {DSL_PACKAGE} is not "
            "installed: install it, or fill the cache with `python -m sonicmoe_kernels.warmup` "
            "on a machine that has it"
        )
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    stem = _stem(spec, arch)
    target = directory / f"{stem}-dsl{version}.so"
    with _locked(directory / f"{stem}.lock"):
        if target.exists():
            return target
        _install_runtime(directory)
        partial = directory / f"{stem}.{os.getpid()}"
        object_file, library = partial.with_suffix(".o"), partial.with_suffix(".partial")
        try:
            compiled = compile_kernel(spec, arch=arch)
            compiled.export_to_c(object_file_path=str(object_file), function_name=ENTRY)
            _link(object_file, library)
            os.replace(library, target)
        finally:
            object_file.unlink(missing_ok=True)
            library.unlink(missing_ok=True)
    return target


@functools.cache
def load(spec: KernelSpec) -> Callable[..., None]:
    """The kernel as a function of tensors and numbers, on the current CUDA stream.

    Built on the first call in a process if the cache has no object of it (2-5 s).
    """
    import tvm_ffi

    return tvm_ffi.load_module(str(build(spec)))[ENTRY]
