"""What the tests of the training side share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test session share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder: Path) -> Path:
    """A cache of this session's own: the user's is neither read nor written."""
    os.environ["SONICMOE_CACHE"] = str(shared_folder / "cache")
    return shared_folder / "cache"
