"""Whole runs of configs/debug.toml on one GPU: every way to train gives the same losses.

The runs are processes of their own, all started at once: most of their time is start-up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sonicmoe_kernels.backends import HOPPER_CAPABILITY

ROOT = Path(__file__).parents[2]
LOSS, GRAD_NORM = "loss_metrics/global_avg_loss", "grad_norm"
STEPS = 12
# bf16 rounds 1 in 256 and the paths of two runs part slowly: first steps agree closely.
FIRST_STEP, LAST_STEP = 2e-3, 3e-2
BASE = {
    "model.backend": "torch",
    "training.steps": STEPS,
    "metrics.log_freq": 1,
    "metrics.enable_wandb": False,
    "metrics.report": False,
    "validator.enable": False,
    "debug.seed": 1,
    "optimizer.lr": 1e-3,  # at the file's own rate the runs of two backends part within ten steps
    "compile.enable": False,
}
HOPPER = {"model.backend": "hopper"}
GRAPHS = {"training.disable_cuda_graphs": False}
COMPILED = {"compile.enable": True}
RUNS = {
    "torch": {},
    "hopper": HOPPER,
    "hopper, CUDA graphs": HOPPER | GRAPHS,
    "hopper, compiled": HOPPER | COMPILED,
    "hopper, compiled, CUDA graphs": HOPPER | COMPILED | GRAPHS,
    "hopper, selective checkpointing": HOPPER | {"activation_checkpoint.kind": "selective"},
    "hopper, full checkpointing": HOPPER | {"activation_checkpoint.kind": "full"},
    "hopper, compiled, selective checkpointing": HOPPER
    | COMPILED
    | {"activation_checkpoint.kind": "selective"},
    "hopper, no CUDA memory cache": HOPPER,  # every buffer is new, none holds an old value
}
TOPK_RUNS = {f"top-k {name}": RUNS[name] for name in ("torch", "hopper")}
ACCUMULATED = {"training.global_batch_size": 64, "training.local_batch_size": 16}
ACCUMULATED_RUNS = {
    f"4 microbatches, {name}": RUNS[name] | ACCUMULATED for name in ("torch", "hopper")
}
# What the fused operator serves: no auxiliary losses, experts a multiple of 64.
FUSIBLE = {"model.num_experts": 64, "model.aux_loss_coeff": 0, "model.z_loss_coeff": 0}
FUSED = HOPPER | FUSIBLE | {"model.fused_block": "always"}
FUSED_RUNS = {
    "64 experts, torch": FUSIBLE,
    "64 experts, fused": FUSED,
    "64 experts, fused, CUDA graphs": FUSED | GRAPHS,
    "64 experts, fused, full checkpointing": FUSED | {"activation_checkpoint.kind": "full"},
    "64 experts, fused, no CUDA memory cache": FUSED,
    "64 experts, top-k torch": FUSIBLE | {"model.router": "topk"},
    "64 experts, top-k fused": FUSED | {"model.router": "topk"},
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def option_words(options: dict[str, object]) -> list[str]:
    """Keys and values as words of a command line."""
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
    ]


def read_steps(dump: Path) -> list[dict]:
    """The records of a run, step by step."""
    lines = map(json.loads, (dump / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line]


def _start(name: str, options: dict[str, object], folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "sonicmoe_titan.train", "--job.config_file"]
    words.append(str(ROOT / "configs" / "debug.toml"))
    words += option_words(BASE | options | {"dump_folder": folder / name})
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = os.environ | ranks | {"MASTER_PORT": str(_free_port())}
    if "no CUDA memory cache" in name:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The records of every run by step."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("needs torchtitan (extra: train)")
    if torch.cuda.get_device_capability() != HOPPER_CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    folder = tmp_path_factory.mktemp("runs")
    options = RUNS | {name: o | {"model.router": "topk"} for name, o in TOPK_RUNS.items()}
    options |= ACCUMULATED_RUNS | FUSED_RUNS
    processes = {name: _start(name, run, folder) for name, run in options.items()}
    records = {}
    for name, process in processes.items():
        code = process.wait(timeout=400)
        assert code == 0, f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}"
        records[name] = read_steps(folder / name)
    return records


PAIRS = (
    *((name, "torch") for name in RUNS if name != "torch"),
    ("top-k hopper", "top-k torch"),
    ("4 microbatches, hopper", "4 microbatches, torch"),
    *((name, "64 experts, torch") for name in FUSED_RUNS if ", fused" in name),
    ("64 experts, top-k fused", "64 experts, top-k torch"),
)


@pytest.mark.parametrize(("name", "reference"), PAIRS)
def test_losses_agree_with_the_torch_backend(
    name: str, reference: str, runs: dict[str, list[dict]]
) -> None:
    mine, theirs = ([record[LOSS] for record in runs[n]] for n in (name, reference))
    assert len(mine) == len(theirs) == STEPS
    assert mine[0] == pytest.approx(theirs[0], abs=FIRST_STEP)
    assert mine[-1] == pytest.approx(theirs[-1], abs=LAST_STEP)
    assert mine[-1] < mine[0] - 0.5  # it learns


@pytest.mark.parametrize("name", [name for name in RUNS if name != "torch"])
def test_statistics_are_those_of_the_eager_run(name: str, runs: dict[str, list[dict]]) -> None:
    for record, reference in zip(runs[name], runs["hopper"], strict=True):
        assert record["moe/padding_waste"] == 0
        assert record["moe/max_over_mean_load"] == pytest.approx(
            reference["moe/max_over_mean_load"], abs=0.3
        )
        assert record["moe/router_entropy"] == pytest.approx(
            reference["moe/router_entropy"], abs=0.05
        )
