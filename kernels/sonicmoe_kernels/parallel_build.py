"""Builds many kernels at once, in processes of their own (the compiler is not thread-safe).

A worker is `python -m sonicmoe_kernels.parallel_build`: it reads a kernel per line and answers each
with a line. It is started anew and not forked or spawned by multiprocessing, so it neither inherits
CUDA nor runs the user's script again, and the compiler never enters the training process. A worker
whose parent is gone reads the end of its input and stops.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import store
from sonicmoe_kernels.compile import ARCH, Built, KernelSpec

__all__ = ["build_all", "cores", "make_ready"]

STOP_S = 10.0  # a worker that is told to end in the middle of a kernel gets this long
ERROR_LINES = 15  # of a worker that died

logger = logging.getLogger(__name__)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def make_ready(specs: Iterable[KernelSpec]) -> None:
    """Builds what the cache lacks of `specs`, with every core; returns when all of it is there.

    Of the processes that come with the same wish (ranks, nodes) one builds and the others wait.
    Where the cache cannot be written, each builds into a folder of its own.

    Raises:
        RuntimeError: a kernel cannot be built.
        ValueError: a configuration is illegal, or the cache is not to be trusted.
    """
    wanted = list(dict.fromkeys(specs))
    if any(kernel_cache.object_path(spec) is None for spec in wanted):
        store.with_fallback(lambda root: _build_missing(wanted, root))


def _build_missing(wanted: list[KernelSpec], root: Path) -> None:
    kernel_cache.check_tools()
    with store.locked(store.open_folder(root) / "layer"):
        missing = [spec for spec in wanted if kernel_cache.object_path(spec) is None]
        if not missing:
            return
        is_shared = root != store.private_dir()
        ranks = 1 if is_shared else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        jobs = min(len(missing), max(1, cores() // ranks))
        logger.info("compiling %d kernels in %d processes", len(missing), jobs)
        started = time.perf_counter()
        built = list(build_all(missing, jobs=jobs, root=root))
        new, seconds = sum(b.seconds > 0 for b in built), time.perf_counter() - started
        logger.info("compiled %d kernels in %.1f s into %s", new, seconds, root)


def build_all(
    specs: Iterable[KernelSpec], *, jobs: int, arch: str = ARCH, root: Path | None = None
) -> Iterator[Built]:
    """Builds `specs` in up to `jobs` processes; yields each one as it is there.

    Raises:
        OSError: `root` (the cache directory if None) cannot be written.
        RuntimeError: a kernel cannot be built.
        ValueError: a configuration is illegal, or the cache is not to be trusted.
    """
    waiting = list(dict.fromkeys(specs))[::-1]
    root = root or kernel_cache.cache_dir()
    workers = [_Worker(arch) for _ in range(min(jobs, len(waiting)))]
    try:
        for worker in workers:
            worker.take(waiting.pop(), root)
        busy = {worker.answers.fileno(): worker for worker in workers}
        while busy:
            ready, _, _ = select.select(list(busy), [], [])
            for descriptor in ready:
                worker = busy[descriptor]
                yield worker.result()
                if waiting:
                    worker.take(waiting.pop(), root)
                else:
                    del busy[descriptor]
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.close()


class _Worker:
    """A process that builds one kernel at a time."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # shown only when the process dies
        environment = {
            **os.environ,
            kernel_cache.ARCH_VARIABLE: arch,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sonicmoe_kernels.parallel_build"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's, which ends its workers
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders: IO[bytes] = self.process.stdin
        self.answers: IO[bytes] = self.process.stdout
        self.spec: KernelSpec | None = None

    def take(self, spec: KernelSpec, root: Path) -> None:
        """Begins with a kernel."""
        self.spec = spec
        order = base64.b64encode(pickle.dumps((spec, self.arch, root)))
        with suppress(BrokenPipeError):  # it is dead, which `result` reports
            self.orders.write(order + b"\n")
            self.orders.flush()

    def result(self) -> Built:
        """What came of the kernel; waits for it."""
        line = self.answers.readline()
        if not line:
            self.errors.seek(0)
            said = b"\n".join(self.errors.read().splitlines()[-ERROR_LINES:]).decode(
                errors="replace"
            )
            raise RuntimeError(
                f"the process that compiled {self.spec} ended with {self.process.wait()} (-9: "
                f"killed, often for memory; then take fewer jobs). It said: {said or 'nothing'}"
            )
        answer = json.loads(line)
        if "path" in answer:
            return Built(Path(answer["path"]), answer["seconds"])
        if "errno" in answer:
            raise OSError(answer["errno"], answer["message"], answer["file"])
        raise {"ValueError": ValueError}.get(answer["error"], RuntimeError)(answer["message"])

    def close(self) -> None:
        """Waits for the process, which has been told to end."""
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for file in (self.answers, self.errors):
            file.close()
        with suppress(BrokenPipeError):
            self.orders.close()


def _answer(spec: KernelSpec, arch: str, root: Path) -> dict[str, object]:
    try:
        built = kernel_cache.build_once(spec, arch=arch, root=root)
    except OSError as error:
        return {
            "errno": error.errno,
            "message": error.strerror or str(error),
            "file": str(error.filename or root),
        }
    except Exception as error:
        name = type(error).__name__
        message = (
            str(error) if isinstance(error, (RuntimeError, ValueError)) else f"{name}: {error}"
        )
        return {"error": name, "message": message}
    return {"path": str(built.path), "seconds": built.seconds}


def main() -> None:
    """Works off standard input until its end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are cleaned up
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the compiler prints is no answer
        for line in sys.stdin.buffer:
            answer = _answer(*pickle.loads(base64.b64decode(line)))
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
