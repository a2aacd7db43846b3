"""The GPU suite's runner: parts that fail, hang or do not fit cost the others nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_suite
import pytest
from bench.suite_parts import Part, parts

ROOT = Path(__file__).resolve().parents[2]


def _python(source: str, **options) -> Part:
    given = {"expected_s": 1, "limit_s": 20} | options
    return Part("a test", ([sys.executable, "-c", source],), **given)


def _every(tmp_path: Path) -> dict[str, Part]:
    return parts(jobs=2, out=tmp_path)


def test_a_failing_part_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {
        "bad": _python("print('what went wrong'); raise SystemExit(3)"),
        "absent": Part("no such program", (["/no/such/tool"],), 1, 5),
        "good": _python("print('fine')"),
    }
    outcomes = gpu_suite.run_all(chosen, tmp_path)
    found = {o.part: o.outcome for o in outcomes}
    assert found["bad"] == "failed (3)"
    assert "/no/such/tool" in found["absent"]
    assert found["good"] == "passed"
    assert "what went wrong" in capsys.readouterr().out
    assert "fine" in (tmp_path / "good.log").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["part"] for row in summary] == list(chosen)


def test_a_hanging_part_is_ended_at_its_limit(tmp_path: Path) -> None:
    hanging = _python("import time; time.sleep(60)", limit_s=1)
    began = time.monotonic()
    (outcome,) = gpu_suite.run_all({"hanging": hanging}, tmp_path)
    assert outcome.outcome == "timed out"
    assert time.monotonic() - began < 20


def test_a_part_out_of_time_may_end_its_own_processes_first(tmp_path: Path) -> None:
    source = f"""
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path({str(tmp_path / "ended")!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""
    (outcome,) = gpu_suite.run_all({"polite": _python(source, limit_s=2)}, tmp_path)
    assert outcome.outcome == "timed out"
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("waiting", ["", '"next": part'], ids=["the last part", "more to come"])
def test_ctrl_c_ends_what_runs(tmp_path: Path, waiting: str) -> None:
    source = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    # The tests may run in a shell's background, where SIGINT is ignored, by their children too.
    program = f"""
import signal, sys; sys.path[:0] = [{str(ROOT / "scripts")!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)
import gpu_suite
from bench.suite_parts import Part
part = Part("long", ([sys.executable, "-c", {source!r}],), 1, 60)
gpu_suite.run_all({{"long": part, {waiting}}}, gpu_suite.Path({str(tmp_path)!r}))
"""
    runner = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert runner.poll() is None and time.monotonic() - began < 30
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_later_commands_of_a_part_do_not_run_after_a_failure(tmp_path: Path) -> None:
    fail, write = "raise SystemExit(1)", f"open({str(tmp_path / 'ran')!r}, 'w')"
    part = Part("two", tuple([sys.executable, "-c", code] for code in (fail, write)), 1, 20)
    gpu_suite.run_all({"two": part}, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_or_lacks_a_package_is_left_out(tmp_path: Path) -> None:
    chosen = {
        "long": _python("1", expected_s=100),
        "peer": _python("1", needs="official"),
        "short": _python("1"),
    }
    outcomes = gpu_suite.run_all(chosen, tmp_path, deadline_s=50)
    assert [o.outcome.partition(" (")[0] for o in outcomes] == ["left out", "left out", "passed"]
    (with_package,) = gpu_suite.run_all({"peer": chosen["peer"]}, tmp_path, packages=["official"])
    assert with_package.outcome == "passed"


def test_a_part_that_proves_nothing_fails(tmp_path: Path) -> None:
    proof = r"\d+ passed.*"
    chosen = {
        "skipped": _python("print('3 skipped in 1 s')", proof=proof),
        "ran": _python("print('2 passed, 1 skipped in 1 s')", proof=proof),
    }
    skipped, ran = gpu_suite.run_all(chosen, tmp_path)
    assert skipped.outcome.startswith("failed")
    assert ran.outcome == "passed (2 passed, 1 skipped in 1 s)"


def test_parts_run_side_by_side_on_their_own_gpus(tmp_path: Path) -> None:
    source = """
import os, pathlib, sys, time
mine = pathlib.Path(sys.argv[1])
(mine / os.environ["CUDA_VISIBLE_DEVICES"].replace(",", "+")).touch()
began = time.monotonic()
while len(list(mine.iterdir())) < 2 and time.monotonic() - began < 15:
    time.sleep(0.01)
sys.exit(len(list(mine.iterdir())) < 2)
"""
    folder = tmp_path / "seen"
    folder.mkdir()
    command = [sys.executable, "-c", source, str(folder)]
    part = Part("waits for the other", (command,), 1, 20)
    chosen = {"tests-one": part, "tests-other": part}
    outcomes = gpu_suite.run_all(chosen, tmp_path, gpus=["3", "5"])
    assert [o.outcome for o in outcomes] == ["passed", "passed"]
    assert {path.name for path in folder.iterdir()} == {"3", "5"}


def test_parts_of_the_same_records_and_parts_alone_wait_for_the_others(tmp_path: Path) -> None:
    source = """
import os, pathlib, sys, time
mine = pathlib.Path(sys.argv[1])
name = mine / str(os.getpid())
name.touch()
time.sleep(0.3)
alone = list(mine.iterdir()) == [name]
name.unlink()
sys.exit(not alone)
"""
    folder = tmp_path / "running"
    folder.mkdir()
    part = Part("must be the only one", ([sys.executable, "-c", source, str(folder)],), 1, 20)
    for chosen in (
        {"moe-one": part, "moe-other": part},
        {"tests-two": part._replace(gpus=2), "tests-more": part._replace(gpus=2)},
        {"tests-host": part._replace(alone=True), "tests-rows": part},
    ):
        outcomes = gpu_suite.run_all(chosen, tmp_path, gpus=["0", "1"])
        assert [o.outcome for o in outcomes] == ["passed", "passed"], list(chosen)


def test_a_parts_environment_reaches_its_commands(tmp_path: Path) -> None:
    part = _python("import os; print(os.environ['COLOUR'])", environment=(("COLOUR", "blue"),))
    gpu_suite.run_all({"part": part}, tmp_path)
    assert "blue" in (tmp_path / "part.log").read_text()


def test_a_name_before_a_dash_stands_for_all_its_parts(tmp_path: Path) -> None:
    known = _every(tmp_path)
    assert set(gpu_suite.named(["sanitizer"], known)) == {
        "sanitizer-memcheck",
        "sanitizer-synccheck",
    }
    assert set(gpu_suite.named(["warmup", "tests-rows"], known)) == {"warmup", "tests-rows"}
    with pytest.raises(ValueError, match="expected some of warmup"):
        gpu_suite.named(["test"], known)


def test_list_says_what_each_part_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(parts(jobs=1, out=ROOT))
    assert all(" s, at most " in line for line in lines)


def test_every_gpu_test_file_is_in_a_part(tmp_path: Path) -> None:
    known = _every(tmp_path)
    words = {w for name, part in known.items() if name.startswith("tests-") for c in part.commands
             for w in c}  # fmt: skip
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files <= words


@pytest.mark.parametrize("name", parts(jobs=1, out=ROOT))
def test_every_part_names_programs_and_files_that_exist(name: str, tmp_path: Path) -> None:
    part = _every(tmp_path)[name]
    assert part.expected_s <= part.limit_s
    for command in part.commands:
        for word in command:
            if word.endswith((".py", ".toml")):
                assert (ROOT / word).exists(), word  # an absolute one stays itself
