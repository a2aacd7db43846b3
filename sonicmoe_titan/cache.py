"""A folder that many processes may want at once and exactly one builds."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root() -> Path:
    """Return the cache folder: $SONICMOE_CACHE, or ~/.cache/sonicmoe_titan."""
    given = os.environ.get("SONICMOE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "sonicmoe_titan"


def build_once(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the finished folder `kind/key` of the cache; `build(folder)` fills it if it is absent.

    Every process of a job may call this at the same moment: one holds the file lock and builds, the
    others wait for it. The folder appears by one rename, so a process that is killed while it
    builds leaves nothing that another could take for a result. Where a shared file system ignores
    locks, two nodes may build the same content; the second one's copy is dropped.

    Raises ValueError when the cache folder cannot be written.
    """
    folder = cache_root() / kind / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"cannot write the cache folder {folder.parent} ({error.strerror}): "
            "set SONICMOE_CACHE to a folder that can be written"
        ) from error
    try:
        if not folder.is_dir():
            _build_and_rename(folder, build)
    finally:
        lock.release()
    return folder


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        build(partial)
        partial.chmod(0o755)  # mkdtemp gives 0700, and a shared cache has other readers
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another node was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
