"""What every test shares: quiet processes, no network, and only what this machine can run."""

import importlib.util
import os

# read when torch and the libraries below it are imported, also by the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

HAS_TORCHTITAN = importlib.util.find_spec("torchtitan") is not None
collect_ignore = [] if HAS_TORCHTITAN else ["titan"]


def pytest_report_header() -> str:
    """Say what is left out."""
    if HAS_TORCHTITAN:
        return ""
    return "tests/titan is left out: torchtitan is not installed (the train extra brings it)"
