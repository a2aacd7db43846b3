"""What every test shares: quiet processes, no network, and only what this machine can run."""

import importlib.util
import os
from pathlib import Path

import pytest

# read when torch and the libraries below it are imported, also by the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

HAS_TORCHTITAN = importlib.util.find_spec("torchtitan") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The kernels' tests run where torchtitan is not installed."""
    titan = Path(__file__).parent / "titan"
    return True if titan in collection_path.parents and not HAS_TORCHTITAN else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if not HAS_TORCHTITAN:
        terminalreporter.write_line("tests/titan left out: torchtitan (extra: train) is missing")
