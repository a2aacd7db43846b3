"""Objects on disk: built once, found again, rebuilt when damaged, strict about arguments."""

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.tiles import Aggregation, pick_rows

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
    assert not list(cache.rglob("*.o")) and not list(cache.rglob("*.partial"))


def test_another_arch_dtype_or_tile_is_another_object(cache):
    other = pick_rows("down", d=64, f=64, num_experts=2, dtype="float16")
    assert kernel_cache.object_path(SPEC) is not None
    assert kernel_cache.object_path(other) is None
    assert kernel_cache.object_path(SPEC, arch="sm_100a") is None


def test_changed_sources_make_another_object(cache, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_sources_hash", lambda builder: "edited")
    assert kernel_cache.object_path(SPEC) is None


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
    with pytest.raises(TypeError, match="Expects 6 parameters"):
        kernel(None, rows, offsets, weight)
    with pytest.raises(ValueError, match="device_type=cuda"):
        kernel(None, rows, offsets, weight, rows, 2)


def replace(path, content):
    """Another file under this name: the old one may be loaded, and would change under its user."""
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_object_or_one_of_another_build_is_built_again(cache, caplog):
    path = kernel_cache.object_path(SPEC)
    whole = path.read_bytes()
    other = kernel_cache.build(Aggregation(64, "bfloat16", 2, weighted=True)).read_bytes()
    for content in (whole[: len(whole) // 2], other):
        replace(path, content)
        assert kernel_cache.object_path(SPEC) is None
        caplog.clear()
        assert kernel_cache.build(SPEC) == path
        assert "building it again" in caplog.text
        kernel_cache.load.cache_clear()
        kernel_cache.load(SPEC)


def test_a_damaged_runtime_library_is_installed_again(cache):
    path = kernel_cache.object_path(SPEC)
    runtime = path.parent / kernel_cache.RUNTIME_LIBRARY
    replace(runtime, runtime.read_bytes()[:-1000])
    assert kernel_cache.object_path(SPEC) is None
    assert kernel_cache.build(SPEC) == path
    kernel_cache.load.cache_clear()
    kernel_cache.load(SPEC)


def test_an_object_of_a_folder_that_others_can_write_is_not_loaded(cache):
    folder = kernel_cache.object_path(SPEC).parent
    for path in (folder, folder.parent):
        before = path.stat().st_mode
        path.chmod(before | 0o002)
        kernel_cache.load.cache_clear()
        try:
            with pytest.raises(ValueError, match="other users"):
                kernel_cache.load(SPEC)
        finally:
            path.chmod(before)


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
