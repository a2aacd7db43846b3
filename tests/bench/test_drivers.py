"""The layer benchmarks' drivers with workers that only answer: records, deadlines, failures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bench_moe
import bench_router
import launch_layers
import pytest
from bench import driver, facts, moe_report, router_report
from sonicmoe_kernels.rounding import ROUNDINGS

RATES = {"matmul_tflops": 700.0, "copy_tb_s": 3.0}
TIMES = {"fwd_ms": 1.0, "bwd_ms": 2.0, "fwd_bwd_ms": 3.0, "fwd_bwd_q1_ms": 2.9}
TIMES |= {"fwd_bwd_q3_ms": 3.1, "host_us": 90.0, "began": 0.0, "ended": 1.0}
MOE_DETAILS = {"kernels": {"a kernel": 2.5}, "kernel_ms": 2.5, "saved_bytes": 10, "peak_bytes": 20}
MOE_DETAILS |= {"versions": {"torch": "2"}}
ROUTER_DETAILS = {"kernels": {"a kernel": [3.0, 2.5]}, "experts_ms": 2.0, "forward_launches": 1}
ROUTER_DETAILS |= {"rows": 100, "padding_waste": 0.0, "versions": {"torch": "2"}}


class Answering:
    """In the place of a WorkerProcess; "liger" fails on every request."""

    killed: list[str]
    details_of: dict[str, dict]

    def __init__(self, module: str, name: str, **_: object) -> None:
        self.module, self.name = module, name

    def ask(self, request: dict, *, limit_s: float) -> dict:
        if self.name == "liger":
            return {"error": "out of memory"}
        more = self.details_of[self.module] if request["details"] else {}
        probes = {"probes": {"out": 1.0 if self.name == "official" else 0.0}}
        return TIMES | more | (probes if more else {})

    def kill(self) -> None:
        self.killed.append(self.name)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    details = {"bench.moe_worker": MOE_DETAILS, "bench.router_worker": ROUTER_DETAILS}
    attributes = {"killed": names, "details_of": details}
    monkeypatch.setattr(driver, "WorkerProcess", type("Worker", (Answering,), attributes))
    monkeypatch.setattr("bench.facts.measured_rates", lambda: RATES)
    return names


def test_layer_driver_keeps_what_others_measured(
    tmp_path: Path, killed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{moe_report.KIND}_h100.json"
    arguments = bench_moe.parse(["--shapes", "small", "--impls", "sonicmoe", "liger", "official"])
    records = [{"shape": "7b_t1k", "impl": "liger", "old": True}]
    bench_moe.measure(arguments, records, path)
    found = {(r["shape"], r["impl"]): r for r in json.loads(path.read_text())}
    assert found["7b_t1k", "liger"] == {"shape": "7b_t1k", "impl": "liger", "old": True}
    assert {shape for shape, impl in found if impl == "sonicmoe"} == {"7b_t1k", "7b_t4k"}
    ours = found["7b_t1k", "sonicmoe"]
    assert ours["fwd_bwd_ms_rounds"] == [3.0] * arguments.rounds
    assert ours["rates"] == RATES and ours["own_floor_ms"] > 0
    assert ours["agrees"] and not found["7b_t1k", "official"]["agrees"]
    assert sorted(killed) == ["liger", "official", "sonicmoe"]
    assert "compute different results" in capsys.readouterr().err


def test_layer_driver_starts_no_shape_after_the_deadline(
    tmp_path: Path, killed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shapes", "7b", "--impls", "sonicmoe", "--deadline", "1e-9"]
    records: list[dict] = []
    bench_moe.measure(bench_moe.parse(words), records, tmp_path / "records.json")
    assert not records and killed == ["sonicmoe"]
    assert "7b: left out" in capsys.readouterr().out


def test_router_driver_asks_the_official_package_for_what_it_has(
    tmp_path: Path, killed: list[str]
) -> None:
    arguments = argparse.Namespace(
        shapes=["sparsest"],
        impls=["sonicmoe", "official"],
        routers=["topk", "balance"],
        rounds=2,
        seconds=0.1,
        limit=10.0,
        deadline=None,
        pythonpath=[],
    )
    records: list[dict] = []
    path = tmp_path / f"{router_report.KIND}_h100.json"
    bench_router.measure(arguments, records, path)
    found = [router_report.key(r) for r in json.loads(path.read_text())]
    assert len(found) == len(set(found)) == 3 * len(bench_router.GROUPS["sparsest"])
    assert {(impl, router) for _, impl, router in found} == {
        ("sonicmoe", "topk"),
        ("sonicmoe", "balance"),
        ("official", "topk"),
    }
    assert sorted(killed) == ["official", "sonicmoe"]


def test_clocks_are_medians_of_the_samples_of_a_span() -> None:
    with facts.sampled_clocks() as clocks:
        pass
    clocks.samples = [(1.0, 1980, 100.0), (2.0, 1500, 690.0), (3.0, 1400, 700.0)]
    assert clocks.between(1.5, 3.5) == {"sm_mhz": 1450, "power_w": 695.0}
    assert clocks.between(5, 6) == {}


def test_every_kind_of_routing_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    launch_layers.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert {line.split()[-1] for line in lines} == {"given", "topk", *ROUNDINGS}
