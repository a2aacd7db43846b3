"""`sonicmoe warmup` and `sonicmoe bench` on the sizes of a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sonicmoe_titan import bench, cli, run_kernels
from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.run_kernels import local_sizes
from sonicmoe_titan.toml_config import load_config

DEBUG = str(CONFIGS / "debug.toml")


def test_sizes_are_what_parallelism_leaves_to_a_rank() -> None:
    def sizes(*overrides: str) -> tuple[int, int]:
        return local_sizes(load_config(DEBUG, overrides))

    tp, ep = "--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=4"
    assert sizes() == (64, 16)
    assert sizes(tp) == (32, 16)
    assert sizes(ep) == sizes(tp, ep) == (64, 4)


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the warm-up is asked for, which is not built here."""
    specs: list[Any] = []

    def record(asked: Sequence[Any], *, jobs: int | None = None, arch: str = "") -> None:
        specs.extend(asked)

    monkeypatch.setattr("sonicmoe_titan.warmup.warm_up", record)
    monkeypatch.setattr("sonicmoe_titan.run_kernels.make_ready", record)
    return specs


def test_warmup_and_a_rank_build_every_kernel_of_the_run(
    wanted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(CONFIGS / "moe_7b.toml")
    assert cli.run(["warmup", config, "--jobs", "2", "--model.router", "token_rounding"]) == 0
    kernels = {spec.kernel for spec in wanted}
    assert kernels >= {"up", "down", "d_hidden", "d_input", "d_weight2", "d_weight13", "aggregate"}
    assert kernels >= {"topk", "topk_backward", "token_rounding", "plan_rows"}
    before, wanted[:] = list(wanted), []
    run = load_config(config, ["--model.router", "token_rounding"])
    run_kernels.prepare_run(run)
    assert wanted == []  # no GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(run_kernels, "resolve_backend", lambda *facts: "hopper")
    run_kernels.prepare_run(run)
    assert wanted == before


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ((), False),
        (("--training.seq_len=1024",), True),
        (("--training.seq_len=1024", "--model.fused_block=never"), False),
        (("--training.seq_len=1024", "--compile.enable"), False),
        (("--model.fused_block=always",), True),
    ],
)
def test_blocks_of_few_tokens_have_their_operator_ready(
    overrides: tuple[str, ...], fused: bool
) -> None:
    plain = ("--training.local_batch_size=2", "--compile.no-enable", "--model.aux_loss_coeff=0")
    plain += ("--model.z_loss_coeff=0",)
    run = load_config(str(CONFIGS / "moe_7b.toml"), [*plain, *overrides])
    stages = {spec.kernel for spec in run_kernels.run_specs(run)}
    assert ("block_forward" in stages) == fused


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("--model.backend=torch",), 'model.backend = "torch"'),
        (("--parallelism.tensor_parallel_degree=2",), "F = 32 of a rank"),
    ],
)
def test_warmup_says_when_a_run_needs_none(
    overrides: tuple[str, ...],
    reason: str,
    wanted: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["warmup", DEBUG, *overrides]) == 0
    assert wanted == []
    output = capsys.readouterr().out
    assert output.startswith("nothing to compile: ") and reason in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arch", "sm_100a"), "accepted: sm_90a"),
        (("--jobs", "many"), "--jobs = 'many': expected a number above 0"),
        (("--model.backend=hopper", "--model.dim=72"), "D=72"),
    ],
)
def test_a_mistake_in_a_warmup_is_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["warmup", DEBUG, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_bench_times_the_experts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SECONDS_PER_ROUND", 0.0)
    assert cli.run(["bench", DEBUG, "--model.dim=32", "--training.local_batch_size=1"]) == 0
    shape, result = capsys.readouterr().out.splitlines()
    assert shape.startswith("T 128  D 32  F 64  E 16  K 4")
    assert result.startswith("torch") and "forward+backward" in result


@pytest.mark.parametrize("module", ["sonicmoe_titan.cli", "sonicmoe_titan.train"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(module: str, tmp_path: Path) -> None:
    """A stand-in for torch presses Ctrl-C while it is imported."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}{os.pathsep}{os.getcwd()}"
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_program_that_imports_us_keeps_its_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import signal, sonicmoe_titan\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}{os.pathsep}{os.getcwd()}"
    subprocess.run(
        [sys.executable, "-m", "theirs"],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_in_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "main", interrupted)
    monkeypatch.setattr(sys, "argv", ["sonicmoe", "bench"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
