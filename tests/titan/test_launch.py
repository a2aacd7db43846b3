"""Many nodes on one host: torchrun agents, and the SLURM script against stub srun and scontrol."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = REPOSITORY / "scripts/multinode_torchrun.sh"
SLURM = REPOSITORY / "scripts/multinode_slurm.sh"
TINY_HSDP = (
    *("--model.num_layers=2", "--model.vocab_size=512", "--tokenizer.vocab_size=512"),
    *("--tokenizer.train_bytes=200000", "--dataloader.max_bytes=1000000"),
    *("--dataloader.validation_fraction=0.1", "--validator.enable=false", "--metrics.log_freq=1"),
    "--metrics.report=false",
    *("--lr_scheduler.warmup_steps=1", "--lr_scheduler.total_steps=10", "--checkpoint.enable"),
    *("--training.local_batch_size=2", "--training.seq_len=64", "--model.rounding_tile=16"),
    "--parallelism.data_parallel_replicate_degree=2",
    "--parallelism.data_parallel_shard_degree=1",
)

# One agent per node, as srun starts them; every word of the call and the environment is noted.
SRUN_STUB = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$STUBS/srun.arguments"
env >"$STUBS/srun.environment"
eval "${SRUN_DOES:-}"
while [ "$1" != bash ]; do shift; done
for _ in $(seq "$NNODES"); do "$@" & done
code=0
for _ in $(seq "$NNODES"); do wait -n || code=$?; done
exit $code
"""
SCONTROL_STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUBS/scontrol.calls"
case "$1 $2" in
  "show hostnames") printf 'localhost\\nother\\n' ;;
  "show job") printf 'JobId=%s\\n   JobState=%s Reason=None\\n' "$3" "${JOB_STATE:-RUNNING}" ;;
esac
"""


def free_port() -> int:
    """A free port of the range that the SLURM script takes its ports from."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as candidate:
            if candidate.connect_ex(("localhost", port)):
                return port
    raise RuntimeError("no free port")


@contextmanager
def started(*command: object, **environment: object) -> Iterator[subprocess.Popen[str]]:
    """A process with the launchers' environment, ended with all its children."""
    drop = ("SLURM_", "TORCHELASTIC_", "SONICMOE_PYTHON")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    process = subprocess.Popen(
        [str(word) for word in command],
        env={
            **clean,
            "SONICMOE_PYTHON": sys.executable,
            "NPROC": "1",
            **{key: str(value) for key, value in environment.items()},
        },
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # children may outlive the process
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with srun, scontrol and a python that approves of every configuration."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in {
        "srun": SRUN_STUB,
        "scontrol": SCONTROL_STUB,
        "approving_python": '#!/bin/sh\necho checked "$@"\n',
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def slurm_environment(stubs: Path, *, job: int = 7) -> dict[str, object]:
    return {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUBS": stubs,
        "SLURM_SUBMIT_DIR": REPOSITORY,
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "sonicmoe",
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def calls(stubs: Path) -> str:
    return (stubs / "scontrol.calls").read_text()


def test_two_agents_train_hsdp_and_a_slurm_job_resumes_their_run(
    tmp_path: Path, stubs: Path
) -> None:
    run = ("configs/debug.toml", f"--dump_folder={tmp_path / 'run'}", *TINY_HSDP)
    node = {
        "NNODES": 2,
        "HEAD": f"localhost:{free_port()}",
        "RUN_ID": "test",
        "LOG_DIR": tmp_path / "logs",
        "CHECKED": 1,
    }
    command = (TORCHRUN, *run, "--training.steps=2")
    with started(*command, **node) as first, started(*command, **node) as second:
        logs = [output_of(first), output_of(second)]
    assert (first.returncode, second.returncode) == (0, 0), "\n".join(logs)
    for log in logs:
        assert "Applied HSDP to the model" in log
        assert re.search(r"step:  2  loss:", log)
    # with one shard each, both replicas must have seen the same mean loss over all data
    losses = [re.findall(r"step: +\d+ +loss: +([\d.]+)", log) for log in logs]
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "logs").glob("test_*/attempt_0/0/stderr.log"))) == 2

    port = free_port()
    job = {**slurm_environment(stubs, job=port - 20000), "LOG_DIR": tmp_path / "slurm_logs"}
    with started("bash", SLURM, *run, "--training.steps=3", **job) as third:
        log = output_of(third)
    assert third.returncode == 0, log
    assert "Training starts at step 3" in log
    assert re.search(r"step:  3  loss:", log)
    assert "requeue" not in calls(stubs)


def test_slurm_starts_one_agent_per_node_after_checking_the_run(stubs: Path) -> None:
    environment = {
        **slurm_environment(stubs, job=123456),
        "SONICMOE_PYTHON": stubs / "approving_python",
        "SLURM_RESTART_COUNT": 2,
        "NPROC": 8,
        "SRUN_ARGS": "--container-image=image --mpi=none",
        "SRUN_DOES": "exit 0",
    }
    with started("bash", SLURM, "configs/moe_7b.toml", "--training.steps=9", **environment) as job:
        log = output_of(job)
    assert job.returncode == 0, log
    overrides = ["--dump_folder", "outputs/sonicmoe-123456", "--training.steps=9"]
    check = " ".join(["check configs/moe_7b.toml --nproc 16", *overrides])
    assert log.startswith(f"checked -m sonicmoe_titan.cli {check}")
    arguments = (stubs / "srun.arguments").read_text().split()
    assert arguments[arguments.index("bash") :] == [
        *("bash", "scripts/multinode_torchrun.sh", "configs/moe_7b.toml"),
        *overrides,
    ]
    assert {"--ntasks-per-node=1", "--container-image=image", "--mpi=none"} <= set(arguments)
    passed_on = set((stubs / "srun.environment").read_text().splitlines())
    assert {"NNODES=2", "NPROC=8", "HEAD=localhost:23456", "RUN_ID=123456-2"} <= passed_on


@pytest.mark.parametrize(
    ("srun_does", "state", "crash_is_young_s", "comes_back"),
    [
        ("exit 1", "RUNNING", 0, True),
        ("exit 1", "RUNNING", 600, False),  # it failed at its start: an error of the run
        ("exit 143", "CANCELLED", 0, False),  # scancel
        ("exit 0", "RUNNING", 0, False),
    ],
)
def test_slurm_queues_a_crashed_job_again(
    stubs: Path, srun_does: str, state: str, crash_is_young_s: int, comes_back: bool
) -> None:
    environment = {
        **slurm_environment(stubs),
        "SONICMOE_PYTHON": stubs / "approving_python",
        "SRUN_DOES": srun_does,
        "JOB_STATE": state,
        "REQUEUE_AFTER_S": crash_is_young_s,
    }
    with started("bash", SLURM, "configs/debug.toml", **environment) as job:
        log = output_of(job)
    assert job.returncode == int(srun_does.split()[1]), log
    assert ("requeue 7" in calls(stubs)) == comes_back, log


def test_slurm_ends_the_step_and_queues_the_job_again_before_the_time_limit(stubs: Path) -> None:
    environment = {
        **slurm_environment(stubs),
        "SONICMOE_PYTHON": stubs / "approving_python",
        "SRUN_DOES": "trap 'exit 143' TERM; touch $STUBS/up; sleep 60 & wait",
    }
    with started("bash", SLURM, "configs/debug.toml", **environment) as job:
        deadline = time.monotonic() + 60
        while not (stubs / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=30) == 143
    assert "requeue 7" in calls(stubs)


def test_slurm_stops_at_a_wrong_configuration_with_one_line(stubs: Path) -> None:
    environment = slurm_environment(stubs)
    wrong = ("configs/debug.toml", "--model.router=roundabout")
    with started("bash", SLURM, *wrong, **environment) as job:
        log = output_of(job)
    assert job.returncode == 2, log
    assert "roundabout" in log and "Traceback" not in log
    assert not (stubs / "srun.arguments").exists()


@pytest.mark.parametrize("missing", ["NNODES", "HEAD", "RUN_ID"])
def test_torchrun_script_names_the_variable_that_is_missing(missing: str) -> None:
    node = {"NNODES": 1, "HEAD": "localhost", "RUN_ID": "test", missing: ""}
    with started(TORCHRUN, "configs/debug.toml", **node) as process:
        log = output_of(process)
    assert process.returncode == 2
    assert log.startswith(f"error: {missing} is not set")


def test_settings_of_the_site_win_over_ours() -> None:
    script = f". {REPOSITORY}/scripts/cluster_env.sh; echo $PYTORCH_ALLOC_CONF $NCCL_DEBUG"
    with started("bash", "-c", script, NCCL_DEBUG="INFO") as process:
        assert output_of(process) == "expandable_segments:True INFO\n"
