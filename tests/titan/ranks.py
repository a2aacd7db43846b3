"""Runs a function on real processes that form a gloo process group, and small training runs in it.

A process costs more to start than the runs in it, so a scenario is a function that goes through
several runs and returns what the tests compare. The trainer is the real one; only its process group
outlives it, so that one process can train, resume and train again.
"""

import fcntl
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300


def run_on_ranks(scenario: Callable[[Path], Any], *, ranks: int, base: Path) -> list[Any]:
    """Return what `scenario(folder)` returns on every rank; runs once per `base`.

    Raises RuntimeError with the end of the first failed rank's log.
    """
    folder = base / f"{scenario.__module__.rsplit('.')[-1]}.{scenario.__name__}"
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result{rank}.pt" for rank in range(ranks)]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers share the result
        if not (folder / "done").exists():
            _spawn(scenario, ranks, folder)
            (folder / "done").touch()
    loaded = [torch.load(path, weights_only=False) for path in results]
    for rank, result in enumerate(loaded):
        if isinstance(result, _Failure):
            raise RuntimeError(f"rank {rank} of {ranks} failed:\n{result.text}")
    return loaded


@dataclass(frozen=True)
class _Failure:
    text: str


def start(scenario: Callable[[Path], Any], *, rank: int, ranks: int, folder: Path):
    """Start one rank of `scenario` and return its process; its log is folder/rank{rank}.log."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.titan.ranks", scenario.__module__, scenario.__name__],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "SCENARIO_FOLDER": str(folder),
        },
        stdout=open(folder / f"rank{rank}.log", "w"),
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parents[2],
    )


def _spawn(scenario: Callable[[Path], Any], ranks: int, folder: Path) -> None:
    (folder / "store").unlink(missing_ok=True)
    processes = [start(scenario, rank=r, ranks=ranks, folder=folder) for r in range(ranks)]
    try:
        for process in processes:
            process.wait(timeout=TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        result = folder / f"result{rank}.pt"
        if process.returncode and not result.exists():
            log = (folder / f"rank{rank}.log").read_text()[-6000:]
            torch.save(_Failure(log), result)


def main(module: str, name: str) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    folder = Path(os.environ["SCENARIO_FOLDER"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=90),
    )
    try:
        result = getattr(importlib.import_module(module), name)(folder)
    except Exception:
        result = _Failure(traceback.format_exc())
        print(result.text, flush=True)
    torch.save(result, folder / f"result{rank}.pt")
    sys.stdout.flush()
    os._exit(isinstance(result, _Failure))  # other ranks may be gone: no farewell


if __name__ == "__main__":
    from tests.titan import ranks  # under its importable name, for what it pickles

    ranks.main(*sys.argv[1:])
