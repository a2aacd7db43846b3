"""`sonicmoe warmup` and `sonicmoe bench` on the sizes of a run."""

from collections.abc import Sequence
from typing import Any

import pytest

from sonicmoe_titan import bench, cli
from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.run_kernels import local_sizes
from sonicmoe_titan.toml_config import load_config

DEBUG = str(CONFIGS / "debug.toml")


def test_sizes_are_what_parallelism_leaves_to_a_rank() -> None:
    def sizes(*overrides: str) -> tuple[int, int]:
        return local_sizes(load_config(DEBUG, overrides))

    tp, ep = "--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=4"
    assert sizes() == (64, 16)
    assert sizes(tp) == (32, 16)
    assert sizes(ep) == sizes(tp, ep) == (64, 4)


def test_warmup_builds_every_kernel_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cutlass")
    wanted: list[Any] = []

    def record(specs: Sequence[Any], *, jobs: int) -> None:
        wanted.extend(specs)

    monkeypatch.setattr("sonicmoe_kernels.warmup.warm_up", record)
    assert cli.run(["warmup", str(CONFIGS / "moe_7b.toml")]) == 0
    assert len(wanted) >= 8 and len(set(wanted)) == len(wanted)
    assert {"up", "d_weight2", "aggregate", "topk", "topk_backward"} <= {s.kernel for s in wanted}
    assert f"{len(wanted)} kernels in " in capsys.readouterr().out


def test_bench_times_the_experts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SECONDS_PER_ROUND", 0.0)
    assert cli.run(["bench", DEBUG, "--model.dim=32", "--training.local_batch_size=1"]) == 0
    shape, result = capsys.readouterr().out.splitlines()
    assert shape.startswith("T 128  D 32  F 64  E 16  K 4")
    assert result.startswith("torch") and "forward+backward" in result
