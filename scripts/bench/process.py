"""Implementations in processes of their own: requests and answers are JSON lines.

They need different CuTe DSL versions, may hang, and may die; none of it may cost the others'
measurements.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0  # to import torch and a package, beyond the limit of the first answer


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def python_environment(pythonpath: str | None = None) -> dict[str, str]:
    """This process's environment, with the repository's packages first on PYTHONPATH.

    A `pythonpath` replaces the inherited one.
    """
    inherited = os.environ.get("PYTHONPATH") if pythonpath is None else pythonpath
    paths = [str(ROOT / "scripts"), str(ROOT), str(ROOT / "kernels"), inherited]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


class WorkerProcess:
    """One implementation; started at once, and again at the next request after it died.

    With its own `pythonpath` it sees no package of another implementation.
    """

    def __init__(self, module: str, name: str, *, log: Path, pythonpath: str | None = None) -> None:
        self.environment = python_environment(pythonpath)
        self.command = [sys.executable, "-m", module, name]
        self.log = log
        log.write_text("")
        self._start()

    def _start(self) -> None:
        self.fresh = True
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                text=True,
                start_new_session=True,  # with the compilers that its package starts
            )
        assert self.process.stdout is not None
        reader = threading.Thread(
            target=_read, args=(self.process.stdout, self.answers), daemon=True
        )
        reader.start()

    def ask(self, request: dict, *, limit_s: float) -> dict:
        """The answer, or {"error": ...} after a failure, a death or `limit_s`."""
        if self.process.poll() is not None:
            self._start()
        limit_s += START_S if self.fresh else 0.0
        self.fresh = False
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=limit_s)
        except BrokenPipeError:
            answer = ""
        except queue.Empty:
            self.kill()
            return {"error": f"no answer in {limit_s:.0f} s, stopped; see {self.log}"}
        if not answer:
            self.kill()  # its children may outlive it
            return {"error": f"the process ended; see {self.log}"}
        return json.loads(answer)

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _read(lines: IO[str], answers: queue.SimpleQueue[str]) -> None:
    for line in lines:
        answers.put(line)
    answers.put("")


class Turn(NamedTuple):
    """What one round of a comparison asks of one worker."""

    label: str
    worker: WorkerProcess
    request: dict


def alternate(turns: Sequence[Turn], *, rounds: int, limit_s: float) -> dict[str, list[dict]]:
    """Answers by label, a round of all before the next; who fails gets no further round.

    Requests say in which round details are wanted: in the last. Every answer gets the seconds it
    took as `wall_s`.
    """
    answers: dict[str, list[dict]] = {turn.label: [] for turn in turns}
    for number in range(rounds):
        for label, worker, request in turns:
            if label not in answers:
                continue
            began = time.monotonic()
            details = number == rounds - 1
            answer = worker.ask(request | {"details": details}, limit_s=limit_s)
            answer["wall_s"] = time.monotonic() - began
            if "error" in answer:
                print(f"{label}: {answer['error']}", file=sys.stderr, flush=True)
                del answers[label]
            else:
                answers[label].append(answer)
    return answers


def serve(measure: Callable[[dict], dict]) -> None:
    """A worker's main loop: answers what stdin asks, an exception as {"error": ...}."""
    if sys.platform == "linux":  # a driver that is killed takes its workers along
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the protocol
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line))
        except Exception as error:  # the driver reports it and goes on with the others
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
