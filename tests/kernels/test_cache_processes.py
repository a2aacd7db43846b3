"""The kernel cache under real processes: many at once, killed, refused, and without a compiler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.tiles import Aggregation

pytest.importorskip("cutlass")

PROCESSES = 8
SPECS = [Aggregation(64, "bfloat16", 2, weighted) for weighted in (True, False)]  # 0.5 s each
PRELUDE = """
import logging, os, sys, time
from sonicmoe_kernels import compile as kernel_cache, store
from sonicmoe_kernels.parallel_build import make_ready
from sonicmoe_kernels.tiles import Aggregation
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
SPECS = [Aggregation(64, "bfloat16", 2, weighted) for weighted in (True, False)]
"""
READY = PRELUDE + "make_ready(SPECS)\n"
LOAD = "print([kernel_cache.load(spec) for spec in SPECS] and 'loaded')\n"
TIMEOUT_S = 60


def command(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, kernel_cache.CACHE_VARIABLE: str(cache)}


def run(program: str, cache: Path, *before: str) -> str:
    """What a process prints; it must end well."""
    done = subprocess.run(
        [*before, *command(program)],
        env=environment(cache),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def compiled_in(output: str) -> list[str]:
    """The kernels whose compilation a process has reported, one by one."""
    return re.findall(r"compiled (aggregate-\w+) in", output)


def objects(cache: Path) -> list[str]:
    return sorted(path.stem for path in cache.glob("dsl*/aggregate-*.so"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("filled") / "cache"
    assert "compiled 2 kernels" in run(READY, cache)
    return cache


# Forked from one interpreter that has imported everything, so that all begin in the same instant.
TOGETHER = """
import multiprocessing
def work(barrier):
    barrier.wait()
    {work}
    print('done', flush=True)
context = multiprocessing.get_context("fork")
barrier = context.Barrier({processes})
workers = [context.Process(target=work, args=(barrier,)) for _ in range({processes})]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert all(worker.exitcode == 0 for worker in workers)
"""


def test_processes_that_start_together_compile_each_kernel_once(tmp_path):
    work = TOGETHER.format(processes=PROCESSES, work="[kernel_cache.load(spec) for spec in SPECS]")
    output = run(PRELUDE + work, tmp_path / "cache")
    assert output.count("done") == PROCESSES
    assert sorted(compiled_in(output)) == objects(tmp_path / "cache")
    assert len(objects(tmp_path / "cache")) == len(SPECS)


def test_ranks_that_start_together_share_one_parallel_build(tmp_path):
    work = TOGETHER.format(processes=PROCESSES, work="make_ready(SPECS); " + LOAD.strip())
    output = run(PRELUDE + work, tmp_path / "cache")
    assert output.count("loaded") == PROCESSES
    built = re.findall(r"compiled (\d+) kernels in [\d.]+ s", output)
    assert built == [str(len(SPECS))]
    assert len(objects(tmp_path / "cache")) == len(SPECS)


def test_a_process_that_imported_the_compiler_for_another_target_builds_elsewhere(tmp_path):
    inductor = "os.environ.pop(kernel_cache.ARCH_VARIABLE, None)\nimport cutlass\n"  # as it does
    run(PRELUDE + inductor + LOAD, tmp_path / "cache")
    assert len(objects(tmp_path / "cache")) == len(SPECS)


def test_a_builder_that_is_killed_leaves_nothing_in_the_way(tmp_path):
    cache = tmp_path / "cache"
    stuck = PRELUDE + (
        "def link(*paths): print('linking', flush=True); time.sleep(60)\n"
        "kernel_cache._link = link\n"
        "kernel_cache.build(SPECS[0])\n"
    )
    builder = subprocess.Popen(
        command(stuck), env=environment(cache), stdout=subprocess.PIPE, text=True
    )
    with builder:
        assert builder.stdout is not None and builder.stdout.readline() == "linking\n"
        builder.send_signal(signal.SIGKILL)
    assert objects(cache) == [] and not list(cache.rglob("*.partial"))
    began = time.monotonic()
    assert len(compiled_in(run(PRELUDE + "kernel_cache.build(SPECS[0])\n", cache))) == 1
    assert time.monotonic() - began < TIMEOUT_S / 2  # the dead one's lock was not waited for


def test_workers_end_after_a_parent_that_was_killed(tmp_path):
    cache = tmp_path / "cache"
    parent = subprocess.Popen(
        command(READY), env=environment(cache), stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None and "compiling 2" in parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        workers: list[int] = []
        deadline = time.monotonic() + TIMEOUT_S
        while len(workers) < min(2, os.cpu_count() or 1) and time.monotonic() < deadline:
            workers = [int(pid) for pid in children.read_text().split()]
        parent.send_signal(signal.SIGKILL)
    assert workers
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)
    assert "loaded" in run(READY + LOAD, cache)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_cache_that_cannot_be_made_is_one_warning_and_training_starts(tmp_path):
    # Tests may run as root, whom no permission stops: a file in the folder's place does.
    (tmp_path / "cache").write_text("")
    output = run(READY + LOAD + "print(store.private_dir())", tmp_path / "cache")
    assert output.count("cannot be written") == 1 and "SONICMOE_CACHE_DIR" in output
    assert "loaded" in output
    private = Path(output.splitlines()[-1])
    assert private.name.startswith("sonicmoe-kernels-") and not private.exists()


def test_a_full_disk_is_one_warning_and_training_starts(tmp_path):
    """A file system of 1 MiB where one may be mounted; else files of at most 1 MiB."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o size=1m,mode=700 none "{cache}"'
    private_mounts = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") and not subprocess.run([*private_mounts, mount]).returncode:
        before, reason = [*private_mounts, f'{mount} && exec "$0" "$@"'], "No space left"
    else:
        before, reason = ["sh", "-c", 'ulimit -f 2048; exec "$0" "$@"'], "File too large"
    output = run(PRELUDE + LOAD, cache, *before)
    assert output.count("cannot be written") == 1 and reason in output
    assert "loaded" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_loads_from_a_folder_that_root_prepared(filled):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lets nobody else in
        shared = Path(folder) / "shared"
        shutil.copytree(filled, shared)
        for path in (Path(folder), shared, *shared.glob("dsl*")):
            path.chmod(0o755)
        before = sorted(shared.rglob("*"))
        root_stays_out = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        program = PRELUDE + "assert os.geteuid() == 65534\nmake_ready(SPECS)\n" + LOAD
        if subprocess.run([*root_stays_out, *command("import multiprocessing")]).returncode:
            pytest.skip("another user cannot read this Python")
        assert run(program, shared, *root_stays_out) == "loaded\n"
        assert sorted(shared.rglob("*")) == before


def test_loading_needs_neither_the_compiler_nor_a_linker(filled, tmp_path):
    """A Python whose packages are ours without the compiler, and a PATH with nothing on it."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("nvidia_cutlass"):
            (packages / path.name).symlink_to(path)
    ours = str(Path(kernel_cache.__file__).parents[1])
    program = (
        f"import sys; sys.path[:0] = [{ours!r}, {str(packages)!r}]\n"
        "import importlib.util, shutil\n"
        "assert not importlib.util.find_spec('cutlass') and not shutil.which('gcc')\n"
        "from sonicmoe_kernels import compile as kernel_cache\n"
        "from sonicmoe_kernels.parallel_build import make_ready\n"
        "from sonicmoe_kernels.tiles import Aggregation\n"
        "assert kernel_cache._dsl_version() is None\n"
        "SPECS = [Aggregation(64, 'bfloat16', 2, weighted) for weighted in (True, False)]\n"
        "make_ready(SPECS)\n" + LOAD
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        env={"PATH": str(tmp_path), kernel_cache.CACHE_VARIABLE: str(filled)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded\n"
