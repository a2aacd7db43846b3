#!/usr/bin/env python3
"""Everything that must run on an H100, in parts that fail and time out on their own.

    python scripts/gpu_suite.py --list
    python scripts/gpu_suite.py --parts warmup --jobs 16        needs no GPU
    python scripts/gpu_suite.py --parts tests sanitizer --log outputs/suite --deadline 560
    python scripts/gpu_suite.py --parts moe-official --pythonpath official=/opt/official/site
    python scripts/gpu_suite.py --gpus 0,1,2,3             four parts at a time, each on a GPU

GPUs may be had for minutes at a time: a part is what fits ten of them, with a time limit, in
process groups of its own, with a log file; a failing part stops nobody; the summary (also
summary.json beside the logs) says what passed, failed, timed out or was left out for --deadline,
and the exit code is 1 unless every part passed. A name before a dash stands for all its parts:
`tests`, `sanitizer`, `moe`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench.process import python_environment  # noqa: E402
from bench.suite_parts import Part, parts  # noqa: E402

GRACE_S = 5  # for a part that is out of time to end by itself
TAIL_LINES = 15  # of the log of a part that failed

started: set[int] = set()  # process groups of commands that run
stopping = threading.Event()  # Ctrl-C came: what starts now ends at once


class Outcome(NamedTuple):
    """How a part ended: "passed (proof)", "failed (why)", "timed out" or "left out (why)"."""

    part: str
    outcome: str
    seconds: float


def run_part(
    name: str, part: Part, folder: Path, *, limit_s: float, gpus: Sequence[str] = ()
) -> Outcome:
    """The part's commands, in a process group each, their output in `folder`/name.log."""
    began = time.monotonic()
    environment = python_environment() | dict(part.environment)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    outcome = "passed"
    with (folder / f"{name}.log").open("w") as log:
        for command in part.commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            left = limit_s - (time.monotonic() - began)
            code = _run(command, log, environment, limit_s=left)
            if code != 0:
                outcome = "timed out" if code is None else f"failed ({code})"
                break
    if outcome == "passed" and part.proof:
        found = re.findall(part.proof, (folder / f"{name}.log").read_text(errors="replace"))
        outcome = f"passed ({found[-1]})" if found else f"failed (no {part.proof!r} in its log)"
    return Outcome(name, outcome, time.monotonic() - began)


def _run(
    command: list[str], log, environment: dict[str, str], *, limit_s: float
) -> int | str | None:
    """Exit code, what kept it from starting, or None if it was stopped with all it had started."""
    try:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return f"{command[0]}: {error.strerror}"
    started.add(process.pid)
    if stopping.is_set():
        _kill(process.pid)
    try:
        return process.wait(timeout=max(limit_s, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a benchmark ends its own workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        return None
    finally:
        _kill(process.pid)
        process.wait()
        started.discard(process.pid)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run_all(
    chosen: dict[str, Part],
    folder: Path,
    *,
    deadline_s: float | None = None,
    packages: Sequence[str] = (),
    gpus: Sequence[str] = (),
) -> list[Outcome]:
    """Part after part; with `gpus`, as many at once as these allow, each on its own.

    A part waits for as many GPUs as it needs, and for parts that write the same records. Left out:
    what is not expected to end before the deadline, or needs other than `packages`.
    """
    began, outcomes, changed = time.monotonic(), {}, threading.Condition()
    free, running, waiting = list(gpus), set[str](), dict(chosen)

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.part] = outcome
        print(f"{outcome.part}: {outcome.outcome} after {outcome.seconds:.0f} s", flush=True)
        if outcome.outcome.startswith(("failed", "timed out")):
            print(_tail(folder / f"{outcome.part}.log"), flush=True)
        summary = [outcomes[name]._asdict() for name in chosen if name in outcomes]
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def occupied(part: Part) -> int:
        return len(gpus) if part.alone else min(part.gpus, len(gpus))

    def can_start(name: str) -> bool:
        rivals = {other for other in running if _write_the_same(name, other)}
        enough = len(free) >= occupied(chosen[name])
        return enough and not rivals and (bool(gpus) or not running)

    def run(name: str, taken: list[str], limit_s: float) -> None:
        visible = taken[: chosen[name].gpus]
        outcome = run_part(name, chosen[name], folder, limit_s=limit_s, gpus=visible)
        with changed:
            finish(outcome)
            running.remove(name)
            free.extend(taken)
            changed.notify()

    def start_all(pool: ThreadPoolExecutor) -> list[Future[None]]:
        futures = []
        with changed:
            while waiting:
                name = next(filter(can_start, waiting), None)
                if name is None:
                    changed.wait()
                    continue
                part = waiting.pop(name)
                spent_s = time.monotonic() - began
                left = float("inf") if deadline_s is None else deadline_s - spent_s
                if part.needs and part.needs not in packages:
                    finish(Outcome(name, f"left out (no --pythonpath {part.needs}=...)", 0.0))
                elif part.expected_s > left:
                    finish(Outcome(name, f"left out ({left:.0f} s left)", 0.0))
                else:
                    taken = [free.pop(0) for _ in range(occupied(part))]
                    where = f" on GPU {', '.join(taken)}" if taken else ""
                    print(f"{name}: {part.about}{where}", flush=True)
                    running.add(name)
                    futures.append(pool.submit(run, name, taken, min(part.limit_s, left)))
        return futures

    with ThreadPoolExecutor(max(1, len(gpus))) as pool:
        try:
            for future in wait_for(start_all(pool)).done:
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for group in list(started):
                _kill(group)
            raise
    return [outcomes[name] for name in chosen]


def _write_the_same(name: str, other: str) -> bool:
    """Whether two parts rewrite the same files of records: those of one family, but of tests."""
    family = name.partition("-")[0]
    return family == other.partition("-")[0] and family not in ("tests", "sanitizer")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(
        f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:]
    )


def named(words: Sequence[str], known: dict[str, Part]) -> dict[str, Part]:
    """The parts of names and of what stands before a name's dash.

    Raises:
        ValueError: a word that names no part.
    """
    chosen = {}
    for word in words:
        found = {n: part for n, part in known.items() if word in (n, n.partition("-")[0])}
        if not found:
            raise ValueError(f"--parts {word}: expected some of {', '.join(known)}")
        chosen |= found
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="default: every part")
    parser.add_argument("--log", type=Path, default=ROOT / "outputs" / "gpu_suite")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the compiler")
    parser.add_argument("--deadline", type=float, help="seconds after which no part may end")
    parser.add_argument("--gpus", default="", help="0,1,...: parts run side by side on these")
    parser.add_argument("--pythonpath", nargs="*", default=[], metavar="IMPL=PATHS",
                        help="where official and liger are installed")  # fmt: skip
    given = parser.parse_args(argv)
    known = parts(jobs=given.jobs, out=given.out.absolute(), pythonpath=given.pythonpath)
    try:
        chosen = known if given.parts is None else named(given.parts, known)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for name, part in chosen.items():
            print(f"{name:20s} {part.expected_s:4d} s, at most {part.limit_s:4d}  {part.about}")
        return 0
    given.log.mkdir(parents=True, exist_ok=True)
    packages = [entry.partition("=")[0] for entry in given.pythonpath]
    limits = {"deadline_s": given.deadline, "packages": packages}
    outcomes = run_all(chosen, given.log, **limits, gpus=[g for g in given.gpus.split(",") if g])
    print("\n".join(f"{o.part:20s} {o.seconds:6.0f} s  {o.outcome}" for o in outcomes))
    return 0 if all(o.outcome.startswith("passed") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
