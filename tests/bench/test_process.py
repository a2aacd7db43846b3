"""Workers of the benchmarks: one that dies, hangs or fails costs nobody else a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench.process import Turn, WorkerProcess, alternate, python_environment

SOURCE = """
import os, subprocess, sys, time
from bench.process import serve

def measure(request):
    print("noise of a library")
    match request["do"]:
        case "raise":
            raise KeyError("no such kernel")
        case "die":
            os._exit(3)
        case "hang":
            child = subprocess.Popen(["sleep", "60"])
            open(request["pid_file"], "w").write(str(child.pid))
            time.sleep(60)
    return {"name": sys.argv[1], "pid": os.getpid(), "details": request.get("details")}

serve(measure)
"""
Start = Callable[[str], WorkerProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("bench.process.START_S", 30.0)
    (tmp_path / "toy_worker.py").write_text(SOURCE)
    workers: list[WorkerProcess] = []

    def started(name: str) -> WorkerProcess:
        log = tmp_path / f"{name}.log"
        workers.append(WorkerProcess("toy_worker", name, log=log, pythonpath=str(tmp_path)))
        return workers[-1]

    yield started
    for worker in workers:
        worker.kill()


def test_an_exception_is_an_answer_and_the_process_goes_on(start: Start) -> None:
    worker = start("a")
    first = worker.ask({"do": "work"}, limit_s=10)
    failed = worker.ask({"do": "raise"}, limit_s=10)
    again = worker.ask({"do": "work"}, limit_s=10)
    assert failed == {"error": "KeyError: 'no such kernel'"}
    assert (first["name"], again["pid"]) == ("a", first["pid"])


def test_a_process_that_died_is_started_again(start: Start) -> None:
    worker = start("a")
    first = worker.ask({"do": "work"}, limit_s=10)
    assert "the process ended" in worker.ask({"do": "die"}, limit_s=10)["error"]
    again = worker.ask({"do": "work"}, limit_s=10)
    assert again["pid"] != first["pid"]


def test_a_process_that_hangs_is_ended_with_what_it_started(start: Start, tmp_path: Path) -> None:
    worker, pid_file = start("a"), tmp_path / "pid"
    worker.ask({"do": "work"}, limit_s=10)
    answer = worker.ask({"do": "hang", "pid_file": str(pid_file)}, limit_s=2)
    assert "no answer in 2 s" in answer["error"]
    assert _ends(int(pid_file.read_text()))
    assert worker.ask({"do": "work"}, limit_s=10)["name"] == "a"


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_worker_dies_with_its_driver(start: Start, tmp_path: Path) -> None:
    start("a")  # writes the worker's source
    source = """
import os, sys
from pathlib import Path
from bench.process import WorkerProcess
worker = WorkerProcess("toy_worker", "b", log=Path("b.log"), pythonpath=".")
worker.ask({"do": "work"}, limit_s=10)
print(worker.process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env=python_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert _ends(int(done.stdout))


def test_rounds_alternate_and_a_failing_one_gets_no_further_round(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = start("good"), start("bad")
    turns = [Turn("good", good, {"do": "work"}), Turn("bad", bad, {"do": "die"})]
    answers = alternate(turns, rounds=3, limit_s=10)
    assert [a["details"] for a in answers["good"]] == [False, False, True]
    assert all(a["wall_s"] >= 0 for a in answers["good"])
    assert "bad" not in answers
    assert capsys.readouterr().err.count("bad:") == 1


def test_a_worker_sees_its_own_packages_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/another/implementation")
    paths = start("a").environment["PYTHONPATH"].split(os.pathsep)
    assert "/of/another/implementation" not in paths
