"""Runs as users start them: in processes of their own, from the scripts and entry points."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sonicmoe_titan import cli
from sonicmoe_titan.config_registry import CONFIGS

REPOSITORY = Path(__file__).parents[2]
DEBUG = str(CONFIGS / "debug.toml")
TINY = [
    "--model.num_layers=2",
    "--model.dim=32",
    "--model.expert_dim=16",
    "--model.num_experts=8",
    "--model.vocab_size=512",
    "--model.rounding_tile=8",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--tokenizer.vocab_size=512",
    "--tokenizer.train_bytes=200000",
    "--dataloader.max_bytes=400000",
    "--validator.no-enable",
    "--metrics.log_freq=1",
    "--metrics.no-report",
]


def start(
    folder: Path, command: list[str], *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    environment |= {"SONICMOE_PYTHON": sys.executable, "NPROC": "1", **variables}
    return subprocess.Popen(
        [*command, *arguments, "--dump_folder", str(folder)],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


def losses(output: str) -> dict[int, str]:
    found = re.findall(r"[^e] step: *(\d+) +loss: +(\S+)", output)
    return {int(step): loss for step, loss in found}


def is_saving(checkpoints: Path) -> bool:
    """Whether a checkpoint after the first one is being written at this moment."""
    saves = [path for path in checkpoints.glob("step-*") if path.name != "step-2"]
    return any(not (path / ".metadata").exists() for path in saves)


@pytest.mark.parametrize("moment", ["after a save", "in a save"])
def test_ctrl_c_ends_in_one_line_and_the_next_run_resumes(moment: str, tmp_path: Path) -> None:
    train_sh = [str(REPOSITORY / "scripts" / "train.sh"), DEBUG]
    saving = ["--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.keep_latest_k=0"]
    process = start(tmp_path, train_sh, *TINY, *saving, "--training.steps=100000")
    deadline = time.monotonic() + 200
    checkpoints = tmp_path / "checkpoint"
    while not (
        is_saving(checkpoints)
        if moment == "in a save"
        else (checkpoints / "step-2" / ".metadata").exists()
    ):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.002)
    time.sleep(0.02)  # past a save's first file operations
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output and "death signal" not in output
    (line,) = re.findall(
        r"stopped by Ctrl-C at step (\d+); resumes from the last checkpoint", output
    )

    saved = sorted(checkpoints.glob("step-*/.metadata"))
    last = max(int(path.parent.name.removeprefix("step-")) for path in saved)
    assert last <= int(line)
    resumed = start(tmp_path, train_sh, *TINY, *saving, f"--training.steps={last + 2}")
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert sorted(losses(output)) == [last + 1, last + 2]
    trained = (tmp_path / "config.toml").read_text()
    assert trained.startswith("hf_assets_path")

    other = start(tmp_path, train_sh, *TINY, *saving, "--training.steps=9", "--model.dim=64")
    output = finish(other)
    assert other.returncode == 2 and "error: " in output
    assert (tmp_path / "config.toml").read_text() == trained


FAILS_IN_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import torch
    def fail(*_args, **_options):
        raise RuntimeError("only rank 1 knows why")
    torch.optim.AdamW.step = fail
"""


def test_what_another_rank_raised_is_said(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS_IN_RANK_1)
    train = [sys.executable, "-m", "sonicmoe_titan.cli", "train", DEBUG, "--nproc", "2"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start(tmp_path, train, *TINY, "--training.steps=2", PYTHONPATH=path)
    output = finish(process)
    assert process.returncode == 1
    assert "in fail\n" in output and "RuntimeError: only rank 1 knows why\n" in output
    assert output.endswith("error: process 1 ended with 1\n")


def test_stock_command_line_trains_the_same_model(tmp_path: Path) -> None:
    run = ["--training.steps=2", "--debug.seed=1", "--model.router=topk", *TINY]
    stock = ["torchtitan.train", "--module", "sonicmoe_titan", "--config=debug"]
    ours = ["sonicmoe_titan.train", "--job.config_file", DEBUG]
    outputs = []
    for module in (stock, ours):
        # one process needs no launcher; port 0 lets the system choose
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        alone |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        process = start(tmp_path, [sys.executable, "-m"], *module, *run, **alone)
        outputs.append(finish(process))
        assert process.returncode == 0, outputs[-1]
    by_stock, by_ours = map(losses, outputs)
    assert by_stock == by_ours
    assert sorted(by_ours) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([DEBUG, "--training.stepz", "4"], "did you mean training.steps?"),
        (["configs/debugg.toml"], "configs/debugg.toml: no such file"),
        ([DEBUG, "--model.router", "roundabout"], "expected one of topk, token_rounding"),
        (
            [DEBUG, "--nproc", "3", "--parallelism.expert_parallel_degree", "3"],
            "does not divide model.num_experts = 16",
        ),
        ([DEBUG, "--model.rounding_tile", "0"], "expected a number above 0"),
        (["misspelt.toml"], "training.stepps = 4: unknown key; did you mean training.steps?"),
    ],
)
def test_mistake_is_one_line_before_anything_starts(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("misspelt.toml").write_text('[job]\nrecipe = "debug"\n[training]\nstepps = 4\n')
    assert cli.run(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: .*\n", captured.err) and says in captured.err
    assert not (tmp_path / "outputs").exists()


def test_script_passes_the_error_on(tmp_path: Path) -> None:
    process = start(tmp_path, [str(REPOSITORY / "scripts" / "train.sh")], "--training.stepz", "4")
    output = finish(process)
    assert process.returncode == 2
    assert re.fullmatch(r"error: .*did you mean training\.steps\?\n", output)


def test_print_config_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", DEBUG, "--print-config", "--dump_folder", str(tmp_path / "x")]) == 0
    assert 'recipe = "base"' in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
