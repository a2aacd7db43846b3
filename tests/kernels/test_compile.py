"""Objects on disk: built once, found again, loaded without the compiler, strict about arguments."""

import multiprocessing
import subprocess
import sys

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.tiles import pick_rows

pytest.importorskip("cutlass")

SPEC = pick_rows("down", d=64, f=64, num_experts=2)


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(folder))
        kernel_cache.build(SPEC)
    return folder


@pytest.fixture
def cache(filled_cache, monkeypatch):
    monkeypatch.setenv(kernel_cache.CACHE_VARIABLE, str(filled_cache))
    kernel_cache.load.cache_clear()
    return filled_cache


def test_a_built_object_is_found_and_not_built_again(cache, monkeypatch):
    monkeypatch.setattr(kernel_cache, "compile_kernel", None)  # calling it would fail
    assert kernel_cache.build(SPEC) == kernel_cache.object_path(SPEC)
    assert not list(cache.glob("*.o")) and not list(cache.glob("*.partial"))


def test_another_arch_dtype_or_tile_is_another_object(cache):
    other = pick_rows("down", d=64, f=64, num_experts=2, dtype="float16")
    assert kernel_cache.object_path(SPEC) is not None
    assert kernel_cache.object_path(other) is None
    assert kernel_cache.object_path(SPEC, arch="sm_100a") is None


def test_changed_sources_make_another_object(cache, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_sources_hash", lambda builder: "edited")
    assert kernel_cache.object_path(SPEC) is None


def test_objects_load_without_the_compiler(cache):
    program = (
        "import sys\n"
        "from sonicmoe_kernels import compile as c\n"
        "from sonicmoe_kernels.tiles import pick_rows\n"
        "c._dsl_version = lambda: None\n"
        "c.load(pick_rows('down', d=64, f=64, num_experts=2))\n"
        "assert 'cutlass' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_missing_object_without_the_compiler_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_dsl_version", lambda: None)
    with pytest.raises(RuntimeError, match="warmup"):
        kernel_cache.build(SPEC)


def test_a_missing_linker_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernel_cache.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install gcc"):
        kernel_cache._link(tmp_path / "k.o", tmp_path / "k.so")


def test_a_loaded_kernel_refuses_other_arguments_before_it_touches_a_gpu(cache):
    kernel = kernel_cache.load(SPEC)
    offsets = torch.zeros(3, dtype=torch.int32)
    rows = torch.zeros(5, 64, dtype=torch.bfloat16)
    weight = torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="Expects 5 parameters"):
        kernel(rows, offsets, weight)
    with pytest.raises(ValueError, match="device_type=cuda"):
        kernel(rows, offsets, weight, rows, 2)


def test_two_processes_that_want_one_object_build_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(kernel_cache.build, [SPEC, SPEC])
    assert first == second and len(list(tmp_path.glob("down-*.so"))) == 1


def test_an_object_depends_on_the_modules_its_builder_imports_and_no_others():
    source = (
        "import sonicmoe_kernels_of_others\n"
        "from sonicmoe_kernels.cute import gather, schedule\n"
        "from sonicmoe_kernels.tiles import RowGemm\n"
        "from torch import Tensor\n"
    )
    assert kernel_cache._imports(source) >= {"cute/gather", "cute/schedule", "tiles"}
    assert not any("Tensor" in name or "others" in name for name in kernel_cache._imports(source))
    rows = kernel_cache._sources_hash("sonicmoe_kernels.cute.build_rows:build")
    sums = kernel_cache._sources_hash("sonicmoe_kernels.cute.build_aggregate:build")
    assert rows != sums
