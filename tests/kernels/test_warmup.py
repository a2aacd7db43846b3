"""`python -m sonicmoe_kernels.warmup`: progress, exit codes, and one line for each mistake."""

import re
import sys

import pytest
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import store, warmup
from sonicmoe_kernels.kernel_lists import experts_specs, specs
from sonicmoe_kernels.tiles import Aggregation

SPECS = [Aggregation(64, "bfloat16", 2, weighted) for weighted in (True, False)]
SHAPE = ["--shape", "64,64,2,1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_shows_each_kernel_and_builds_none_twice(cache, capsys):
    pytest.importorskip("cutlass")
    warmup.warm_up([SPECS[0], *SPECS], jobs=1)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]
    assert summary.startswith(f"2 kernels in {cache}: 2 compiled in ")
    warmup.warm_up(SPECS)
    assert ": 0 compiled in " in capsys.readouterr().out


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with warmup._progress(1) as show:
        show(kernel_cache.Built(kernel_cache.cache_dir() / "up-0.so", 1.0))
    output = capsys.readouterr().out
    assert "up" in output and "100%" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_100a"], r"'sm_100a'.*accepted: sm_90a.*backend 'torch'"),
        (["--jobs", "0"], "jobs = 0: expected a number above 0"),
        (["--shape", "100,64,2,1"], "D=100 and F=64 must be positive multiples of 64"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, cache, capsys):
    assert warmup.main([*SHAPE, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not cache.exists()


@pytest.mark.parametrize("shape", ["64,64,2", "64,64,x,1", "64,64,2,3", "0,64,2,1"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit) as refused:
        warmup.main(["--shape", shape])
    assert refused.value.code == 2
    assert "give D,F,E,K above 0 with K at most E" in capsys.readouterr().err


def test_without_a_linker_it_says_so_before_it_compiles(monkeypatch, capsys):
    pytest.importorskip("cutlass")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernel_cache.shutil, "which", lambda name: None)
    monkeypatch.setattr(warmup, "build_all", None)  # calling it would fail
    assert warmup.main(SHAPE) == 1
    assert "install gcc" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_an_error_here_and_no_fallback(cache, capsys):
    pytest.importorskip("cutlass")
    cache.write_text("a file in the folder's place")
    assert warmup.main(SHAPE) == 1
    assert f"{cache} cannot be written (it is a file)" in capsys.readouterr().err
    assert store.private_dir() is None


def test_a_kernel_that_cannot_be_compiled_ends_the_build_with_its_reason():
    pytest.importorskip("cutlass")
    with pytest.raises(ValueError, match="multiple of 8"):
        warmup.warm_up([Aggregation(12, "bfloat16", 2, weighted=True)])


def test_a_layer_needs_eight_kernels_and_every_kind_of_plan_two_sums():
    sizes = {"d": 64, "f": 64, "num_experts": 4}
    fixed, ragged = (experts_specs(**sizes, rows_per_token=k) for k in (2, None))
    assert len(set(fixed)) == len(set(ragged)) == 8
    assert set(specs(**sizes, top_k=2)) == {*fixed, *ragged}
    assert len(set(fixed) & set(ragged)) == 6
