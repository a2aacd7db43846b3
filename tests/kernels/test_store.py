"""The cache's folder: whom it trusts, what a whole entry is, its locks, and refused writes."""

import errno
import fcntl
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from sonicmoe_kernels import store

BODY = b"machine code" * 100
SOMEBODY = 12345  # a user id that is neither ours nor root's


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    folder = store.open_folder(tmp_path / "cache")
    store.write_whole(folder / "kernel.so", BODY)
    return folder / "kernel.so"


@contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `path` somebody else's: in truth as root, who else may not; else we become another."""
    if os.geteuid() == 0:
        os.chown(path, SOMEBODY, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_a_new_folder_is_its_owners_alone_and_its_entries_nobody_elses_to_write(mask, tmp_path):
    with umask(mask):
        folder = store.open_folder(tmp_path / "a" / "b")
        store.write_whole(folder / "kernel.so", BODY)
    assert mode(folder) == 0o700
    assert mode(folder / "kernel.so") == 0o644


def test_a_folder_or_entry_of_another_user_is_refused(entry, monkeypatch):
    give_away(entry, monkeypatch)
    with pytest.raises(ValueError, match=r"belongs to user .* SONICMOE_CACHE_DIR"):
        store.is_whole(entry)
    give_away(entry.parent, monkeypatch)
    with pytest.raises(ValueError, match="belongs to user"):
        store.open_folder(entry.parent)


@pytest.mark.parametrize("bits", [0o020, 0o002, 0o022])
def test_a_folder_or_entry_that_others_can_write_is_refused(bits, entry):
    for path, look in ((entry, store.is_whole), (entry.parent, store.open_folder)):
        path.chmod(mode(path) | bits)
        with pytest.raises(ValueError, match=f"other users.*chmod -R go-w {path}"):
            look(path)
        path.chmod(mode(path) & ~bits)
        assert look(path)


def test_what_root_owns_and_nobody_else_can_write_is_trusted(monkeypatch):
    system = Path(sys.base_prefix)
    while system.stat().st_uid != 0 or system.stat().st_mode & store.OTHERS_WRITE:
        if system == system.parent:
            pytest.skip("nothing here belongs to root alone")
        system = system.parent
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    store.check_trust(system, system.stat())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],
        lambda content: BODY,  # never sealed
    ],
)
def test_a_cut_or_altered_entry_is_not_whole(damage, entry):
    assert store.is_whole(entry)
    entry.write_bytes(damage(entry.read_bytes()))
    assert not store.is_whole(entry)


def test_a_whole_entry_under_another_name_is_not_whole(entry):
    other = entry.rename(entry.with_name("other.so"))
    assert not store.is_whole(other) and not store.is_whole(entry)


def test_a_refused_write_leaves_the_old_entry_and_nothing_else(entry):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # Python ignores the signal
    try:
        with pytest.raises(OSError) as refused:
            store.write_whole(entry, BODY * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == errno.EFBIG
    assert store.is_whole(entry) and list(entry.parent.iterdir()) == [entry]


def test_partial_files_of_killed_builders_go_when_they_are_old(entry):
    old, young = (entry.with_name(f"{age}{store.PARTIAL}") for age in ("old", "young"))
    for path in (old, young):
        path.touch()
    long_ago = time.time() - store.STALE_S - 60
    os.utime(old, (long_ago, long_ago))
    store.write_whole(entry, BODY)
    assert young.exists() and not old.exists()


@contextmanager
def another_holder(path: Path):
    """A process that holds the lock of `path` until it is killed."""
    program = (
        "import pathlib, time\n"
        "from sonicmoe_kernels import store\n"
        f"with store.locked(pathlib.Path({str(path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_a_lock_ends_with_a_killed_holder(entry, monkeypatch, caplog):
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 30.0)
    with another_holder(entry) as holder:
        holder.send_signal(signal.SIGKILL)
        with store.locked(entry):
            pass
    assert not caplog.records


def test_a_lock_that_never_opens_delays_work_and_does_not_stop_it(entry, monkeypatch, caplog):
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.2)
    with another_holder(entry):
        began = time.monotonic()
        with store.locked(entry):
            assert time.monotonic() - began >= 0.2
    assert "going on" in caplog.text


def test_where_the_file_system_has_no_locks_one_spans_the_machine(
    entry, tmp_path, monkeypatch, caplog
):
    # No file system without locks can be mounted here, so flock itself says what one would say.
    real_flock = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == entry.parent:
            raise OSError(errno.ENOLCK, "No locks available")
        real_flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.1)
    with store.locked(entry):
        assert not caplog.records
        with store.locked(entry.with_name("other.so")):
            assert not caplog.records
        with store.locked(entry):
            assert "going on" in caplog.text  # the second one waited for the first
    assert mode(next(tmp_path.glob("sonicmoe-locks-*"))) == 0o700


@pytest.fixture
def no_fallback_yet(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "_private", None)
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(store.atexit, "register", lambda *call: None)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_cache_that_refuses_writes_gives_one_warning_and_a_private_folder(
    code, no_fallback_yet, tmp_path, caplog
):
    seen = []

    def work(root: Path) -> str:
        seen.append(root)
        if root == store.cache_dir():
            raise OSError(code, os.strerror(code))
        return "done"

    assert store.with_fallback(work) == store.with_fallback(work) == "done"
    assert seen == [store.cache_dir(), store.private_dir(), store.private_dir()]
    assert seen[1].parent == tmp_path and mode(seen[1]) == 0o700
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert os.strerror(code) in warning.message and "SONICMOE_CACHE_DIR" in warning.message


def test_a_cache_that_is_not_trusted_is_no_reason_to_fall_back(no_fallback_yet):
    def work(root: Path) -> None:
        raise ValueError("not to be trusted")

    with pytest.raises(ValueError, match="not to be trusted"):
        store.with_fallback(work)
    assert store.private_dir() is None
