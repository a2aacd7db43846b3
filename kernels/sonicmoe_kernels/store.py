"""The folder of compiled kernels: whom it trusts, what a whole entry is, one builder at a time.

An entry is a file with a seal at its end, a hash of its bytes and its name, and appears by one
rename. A file that was cut off, altered, or built as another entry has no valid seal and counts as
absent.

Entries are code that this process runs. So the folder is made for its owner alone, and a folder or
entry that somebody else (root apart) owns or that others can write is refused.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import logging
import os
import pwd
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

__all__ = [
    "cache_dir",
    "check_trust",
    "is_whole",
    "locked",
    "open_folder",
    "private_dir",
    "with_fallback",
    "write_whole",
]

CACHE_VARIABLE = "SONICMOE_CACHE_DIR"
OWNER_ONLY = 0o700
READABLE = 0o755  # what an owner who shares a folder may add to OWNER_ONLY
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SEAL = b"sonicmoe-sealed\0"  # before the hash
SEAL_BYTES = len(SEAL) + hashlib.sha256().digest_size
PARTIAL = ".partial"
STALE_S = 3600.0  # a partial file this old belongs to a builder that was killed
LOCK_TIMEOUT_S = 600.0  # a lock only spares work, so waiting for it has an end
LOCK_POLL_S = 0.05
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system

T = TypeVar("T")

logger = logging.getLogger(__name__)

_private: Path | None = None  # this process's own folder, once the cache could not be written


def cache_dir() -> Path:
    """Where objects are kept: $SONICMOE_CACHE_DIR, else ~/.cache/sonicmoe/kernels."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sonicmoe" / "kernels")


def private_dir() -> Path | None:
    """The folder that this process fell back to, or None."""
    return _private


def check_trust(path: Path, status: os.stat_result) -> None:
    """Refuses a folder or file whose content somebody else could have chosen.

    Raises:
        ValueError: neither this user nor root owns it, or group or others can write it.
    """
    instead = f"or set {CACHE_VARIABLE} to a folder of your own"
    if status.st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"{path} belongs to {_user(status.st_uid)}, and what is in a kernel cache runs as you: "
            f"take a copy that you own (cp -r --no-preserve=ownership), {instead}"
        )
    if status.st_mode & OTHERS_WRITE:
        raise ValueError(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o}), and "
            f"what is in a kernel cache runs as you: if nobody has, chmod -R go-w {path}; "
            f"else delete it, {instead}"
        )


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def open_folder(path: Path, *, mode: int = OWNER_ONLY) -> Path:
    """`path`, made with `mode` unless it is there.

    Raises:
        OSError: it cannot be made.
        ValueError: it is not to be trusted.
    """
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=OWNER_ONLY)
            if mode != OWNER_ONLY:
                path.chmod(mode)  # mkdir's mode is cut by the umask
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(path)) from None
    check_trust(path, path.stat())
    return path


def _seal(name: str, body: bytes) -> bytes:
    return SEAL + hashlib.sha256(name.encode() + b"\0" + body).digest()


def is_whole(path: Path) -> bool:
    """Whether `path` is there, readable, and exactly what was written under this name.

    Raises:
        ValueError: it is not to be trusted.
    """
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        check_trust(path, os.fstat(file.fileno()))
        content = file.read()
    return content[-SEAL_BYTES:] == _seal(path.name, content[:-SEAL_BYTES])


def write_whole(path: Path, body: bytes) -> None:
    """Makes `path` hold `body` and its seal, at once for whoever looks.

    Raises:
        OSError: the file system refuses (read-only, full, no permission).
    """
    for leftover in path.parent.glob(f"*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_S:
                leftover.unlink()
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)  # never wider, whatever the umask; the folder guards it
            file.write(body)
            file.write(_seal(path.name, body))
            file.flush()
            os.fsync(file.fileno())  # a full network disk says so here
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of `path` among all processes that share its folder.

    The lock ends with its holder, however that ends. It only keeps two processes from doing the
    same work: after LOCK_TIMEOUT_S, or where no lock can be had, work goes on without it. On a file
    system without locks it spans this machine instead.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            _wait_for(descriptor, path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            os.close(descriptor)
            descriptor = _machine_lock(path)
            _wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _machine_lock(path: Path) -> int:
    folder = open_folder(Path(tempfile.gettempdir()) / f"sonicmoe-locks-{os.geteuid()}")
    name = hashlib.sha256(str(path).encode()).hexdigest()
    return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _wait_for(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                logger.warning("%s has been locked for %.0f s: going on", path, LOCK_TIMEOUT_S)
                return
            time.sleep(LOCK_POLL_S)


def with_fallback(work: Callable[[Path], T]) -> T:
    """`work(folder)` in the cache, or in a folder of this process where the cache refuses writes.

    The folder is temporary and removed when the process ends; one warning says why it was needed.

    Raises:
        OSError: a temporary folder cannot be written either.
    """
    if _private is None:
        try:
            return work(cache_dir())
        except OSError as error:
            _fall_back(error)
    assert _private is not None
    return work(_private)


def _fall_back(error: OSError) -> None:
    global _private
    _private = Path(tempfile.mkdtemp(prefix="sonicmoe-kernels-"))
    atexit.register(_remove_private, _private, os.getpid())
    logger.warning(
        "the kernel cache %s cannot be written (%s): this process compiles for itself alone, into "
        "%s. Free space there, set %s to a folder that can be written, or fill the cache "
        "beforehand with `python -m sonicmoe_kernels.warmup`",
        cache_dir(),
        error.strerror or error,
        _private,
        CACHE_VARIABLE,
    )


def _remove_private(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
