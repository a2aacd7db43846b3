"""What is installed, what an import costs, and how the scripts find their Python."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONTENTS = {  # folder of the wheel -> folder of the repository
    "sonicmoe_titan": "sonicmoe_titan",
    "sonicmoe_kernels": "kernels/sonicmoe_kernels",
    "sonicmoe_titan/configs": "configs",
}
KERNELS_README = REPOSITORY / "kernels/sonicmoe_kernels/README.md"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built as `pip wheel . --no-deps` does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder]
    built = subprocess.run([*command, REPOSITORY], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def run_python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter outside the repository; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_both_packages_and_the_configurations_and_nothing_else(wheel: Path) -> None:
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"{installed_as}/{file.relative_to(REPOSITORY / folder).as_posix()}"
        for installed_as, folder in CONTENTS.items()
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in (".py", ".md", ".toml")
    }
    assert installed == sources


def test_kernels_run_their_readme_from_the_wheel_without_the_training_package(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    example = re.search(r"```python\n(.*?)```", KERNELS_README.read_text(), re.DOTALL)
    assert example is not None
    code = f"""
import sys
sys.modules["torchtitan"] = sys.modules["sonicmoe_titan"] = None  # importing them would raise
{example.group(1)}
import sonicmoe_kernels
assert sonicmoe_kernels.__file__.startswith({str(tmp_path)!r}), sonicmoe_kernels.__file__
for leaf in (x_TD, gate_ED, w1_EFD, w3_EFD, w2_EDF):
    assert leaf.grad.float().norm() > 0
assert not (plan.expert_offsets.diff() % 16).any()
"""
    run_python(code, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "sonicmoe_kernels, sonicmoe_kernels.moe, sonicmoe_kernels.routing, "
            "sonicmoe_kernels.tiles, sonicmoe_kernels.compile",
            ("cutlass", "torchtitan", "tvm_ffi", "triton"),
        ),
        ("sonicmoe_titan", ("cutlass", "torchtitan", "tvm_ffi")),
    ],
)
def test_import_takes_no_compiler_and_initialises_no_gpu(
    modules: str, absent: tuple[str, ...]
) -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import {modules}
assert not torch.cuda.is_initialized()
print([name for name in {absent} if name in set(sys.modules) - before])
"""
    assert run_python(code).strip() == "[]"


# python3, and the environment's python; its `pip install` succeeds where $PIP_WORKS is set.
PYTHON_STUB = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*) echo "installing $*"; [ -n "$PIP_WORKS" ] ;;
  "-c "*) [ -z "$IS_OLD" ] ;;
esac
"""


def source_env(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Source scripts/env.sh with stub Pythons on PATH and print the Python it found."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        (stubs / name).write_text(PYTHON_STUB)
        (stubs / name).chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SONICMOE_")}
    venv, path = str(folder / "venv"), f"{stubs}:{clean['PATH']}"
    return subprocess.run(
        ["bash", "-c", f". {REPOSITORY}/scripts/env.sh; echo $PYTHON"],
        env={**clean, "SONICMOE_VENV": venv, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_given_python_is_used_as_it_is(tmp_path: Path) -> None:
    done = source_env(tmp_path, SONICMOE_PYTHON="/some/python")
    assert done.stdout == "/some/python\n"
    assert not (tmp_path / "venv").exists()


def test_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    done = source_env(tmp_path, IS_OLD="yes")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python >= 3.11 on PATH")
    assert done.stderr.count("\n") == 1


def test_failed_installation_shows_its_log_and_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        done = source_env(tmp_path)
        assert done.returncode == 1
        assert f"installation failed; its whole log: {tmp_path}/venv/install.log" in done.stderr
        assert f"-e {REPOSITORY}[train,dev]" in done.stderr  # the log's last lines


def test_installation_is_not_repeated_until_pyproject_changes(tmp_path: Path) -> None:
    python = f"{tmp_path}/venv/bin/python\n"
    assert source_env(tmp_path, PIP_WORKS="yes").stdout == python
    assert source_env(tmp_path).stdout == python  # pip would fail
    stamp = tmp_path / "venv/sonicmoe-stamp"
    stamp.write_text(stamp.read_text().rsplit(" ", 1)[0] + " 1\n")  # another checksum
    assert source_env(tmp_path).returncode == 1
