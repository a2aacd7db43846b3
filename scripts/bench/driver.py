"""What the drivers of several implementations share: processes, deadline, records and report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from bench import facts
from bench.process import WorkerProcess


@contextmanager
def workers(
    module: str, arguments: argparse.Namespace, *, logs: Path, prefix: str
) -> Iterator[dict[str, WorkerProcess]]:
    """A process for each of --impls, with its --pythonpath; killed at the end.

    One in the middle of a round would disturb whoever measures next.
    """
    pythonpaths = dict(entry.split("=", 1) for entry in arguments.pythonpath)
    started = {
        impl: WorkerProcess(
            module, impl, log=logs / f"{prefix}_{impl}.log", pythonpath=pythonpaths.get(impl)
        )
        for impl in arguments.impls
    }
    try:
        yield started
    finally:
        for worker in started.values():
            worker.kill()


def in_time(shapes: Iterable[str], *, began: float, deadline_s: float | None) -> Iterator[str]:
    """The shapes that may start: none once `deadline_s` after `began` (monotonic) are over."""
    for shape in shapes:
        seconds = time.monotonic() - began
        if deadline_s and seconds > deadline_s:
            print(f"{shape}: left out, {seconds:.0f} s are over", flush=True)
        else:
            yield shape


def run(
    name: str,
    report: ModuleType,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, list[dict], Path], None],
) -> None:
    """Measure unless --report, to the records of --out if --append; then write the report."""
    if arguments.report:
        if not report_all(report, arguments.out):
            sys.exit(f"{name}: no records {report.KIND}_*.json in {arguments.out}")
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"{name}: needs an NVIDIA GPU")
    path = facts.record_path(arguments.out, report.KIND)
    records = json.loads(path.read_text()) if arguments.append and path.exists() else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"{name}: stopped"))
    measure(arguments, records, path)
    if not records:
        sys.exit(f"{name}: no records in {path}; see the logs beside it")
    report.write(records, arguments.out)


def report_all(report: ModuleType, folder: Path) -> list[Path]:
    """Write the report of every GPU whose records `folder` holds; their JSON files."""
    found = facts.recorded(folder, report.KIND)
    for path in found:
        report.write(json.loads(path.read_text()), folder)
    return found
