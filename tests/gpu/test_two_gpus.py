"""Runs of configs/debug.toml on two GPUs over NCCL, in every layout."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan")

from tests.gpu.test_training import (
    BASE,
    FIRST_STEP,
    LAST_STEP,
    LOSS,
    ROOT,
    STEPS,
    option_words,
    read_steps,
)

EXPERT_PARALLEL = {"parallelism.expert_parallel_degree": 2}
LAYOUTS = {  # all of two ranks, which read the same text
    "sharded": {},
    "replicated": {
        "parallelism.data_parallel_replicate_degree": 2,
        "parallelism.data_parallel_shard_degree": 1,
    },
    "expert parallel": EXPERT_PARALLEL,
    "expert parallel, torch backend": EXPERT_PARALLEL | {"model.backend": "torch"},
    "expert parallel, compiled": EXPERT_PARALLEL | {"compile.enable": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float] | str]:
    """The losses of every layout, step by step, or what a run that failed said."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("two_gpus")
    with ThreadPoolExecutor(len(LAYOUTS)) as pool:  # most of their time is start-up
        return dict(zip(LAYOUTS, pool.map(partial(train, folder=folder), LAYOUTS), strict=True))


def train(name: str, *, folder: Path) -> list[float] | str:
    """A layout's losses, or the end of what it said when it failed."""
    dump = folder / name.replace(", ", "_").replace(" ", "_")
    values = BASE | {"model.backend": "auto", "training.local_batch_size": 16} | LAYOUTS[name]
    words = [sys.executable, "-m", "sonicmoe_titan.cli", "train"]
    words += [str(ROOT / "configs" / "debug.toml"), "--nproc", "2"]
    words += option_words(values | {"dump_folder": dump})
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=400)
    if done.returncode != 0:
        return (done.stdout + done.stderr)[-3000:]
    return [record[LOSS] for record in read_steps(dump)]


def losses(runs: dict[str, list[float] | str], name: str) -> list[float]:
    found = runs[name]
    assert isinstance(found, list), f"{name}: {found}"
    return found


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("expert")])
def test_layouts_agree(name: str, runs: dict[str, list[float] | str]) -> None:
    mine, reference = losses(runs, name), losses(runs, "sharded")
    assert mine[0] == pytest.approx(reference[0], abs=FIRST_STEP)
    assert mine[-1] == pytest.approx(reference[-1], abs=LAST_STEP)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns(name: str, runs: dict[str, list[float] | str]) -> None:
    """Replicated weights, too, which are drawn otherwise than shards of them."""
    mine = losses(runs, name)
    assert len(mine) == STEPS
    assert mine[-1] < mine[0] - 0.5
