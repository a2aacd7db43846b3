"""Reports are made of records alone: the committed ones again, and what drawn-up records must say.

The drawn-up records exist in these tests only and are written to folders of the tests.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import ModuleType

import bench_granularity
import bench_moe
import pytest
from bench import (
    facts,
    granularity_report,
    kernels,
    moe_cited,
    moe_goals,
    moe_report,
    router_report,
    train_losses,
    train_report,
)

from tests.bench.records import ON, VERSIONS
from tests.cases import BENCHMARK_CASES, BENCHMARK_GROUPS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "benchmarks"
CUTE = ROOT / "kernels" / "sonicmoe_kernels" / "cute"
WRITERS = (moe_report, router_report, granularity_report, train_report, train_losses)


def _committed() -> list[tuple[ModuleType, str]]:
    return [(w, path.stem) for w in WRITERS for path in facts.recorded(COMMITTED, w.KIND)]


def test_every_gpu_has_files_of_its_own(tmp_path: Path) -> None:
    names = [facts.record_name("train", device) for device in ("NVIDIA H100 80GB HBM3", "B200")]
    assert names == ["train_h100", "train_b200"]
    for name in (*names, "train_memory_h100", "training"):
        (tmp_path / f"{name}.json").write_text("[]")
    assert [path.stem for path in facts.recorded(tmp_path, "train")] == sorted(names)


@pytest.mark.parametrize(("writer", "name"), _committed(), ids=[n for _, n in _committed()])
def test_committed_reports_are_those_of_the_committed_records(
    writer: ModuleType, name: str, tmp_path: Path
) -> None:
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, tmp_path)
    writer.write(json.loads((tmp_path / f"{name}.json").read_text()), tmp_path)
    made = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert made
    for path in made:
        if path.suffix == ".png":
            assert (COMMITTED / path.name).exists()
        else:
            assert path.read_text() == (COMMITTED / path.name).read_text(), path.name


# ------------------------------------------------------------------- layer


def _moe_record(shape: str, impl: str, *, scale: float = 1.0, **more: object) -> dict:
    """A record as bench_moe.py writes it; every kernel takes twice its floor, times `scale`."""
    case = BENCHMARK_CASES[shape]
    per_kernel = bench_moe.per_kernel({}, case)
    for entry in per_kernel.values():
        entry["ms"] = 2 * scale * entry["floor_ms"]
    floor = sum(k["floor_ms"] for k in per_kernel.values())
    sizes = {key: getattr(case, key) for key in ("T", "D", "F", "E", "K", "routing")}
    loop = 2.5 * scale * floor
    return {
        "shape": shape,
        **sizes,
        "impl": impl,
        "fwd_ms": loop / 3,
        "bwd_ms": loop * 2 / 3,
        "fwd_bwd_ms": loop,
        "host_us": 100.0,
        "fwd_bwd_ms_rounds": [loop, loop],
        "tflops": moe_report.tflops(sizes, loop, passes=3),
        "floor_ms": floor,
        "kernel_ms": 2 * scale * floor,
        "saved_bytes": 2**20,
        "peak_bytes": 2**21,
        "per_kernel": per_kernel,
        "agrees": True,
        **VERSIONS,
        **ON,
        **more,
    }


def test_layer_report_answers_every_question(tmp_path: Path) -> None:
    rates = {"rates": {"matmul_tflops": 700.0, "copy_tb_s": 3.1}, "own_floor_ms": 2.0}
    records = [
        _moe_record("7b", "sonicmoe", **rates, sm_mhz=1500.0, power_w=650.0),
        _moe_record("7b", "official", scale=1.1),
        _moe_record("sparse", "sonicmoe"),
        _moe_record("sparse", "official", scale=1.3, started="earlier"),
        _moe_record("7b_zipf", "sonicmoe", scale=1.07),
        _moe_record("7b_t1k", "sonicmoe", graph_ms=0.2, graph_host_us=9.0),
        _moe_record("7b_t4k", "sonicmoe", graph_error="operation not permitted"),
    ]
    moe_report.write(records, tmp_path)
    text = (tmp_path / f"{moe_report.KIND}_h100.md").read_text()
    # a peer that takes 1.1 and 1.3 times as long: 20% on average, 10% at least
    assert "| official sonic-moe | all | 2 * | +20.0% (+10.0%) | +20.0% (+10.0%) |" in text
    assert "| official sonic-moe | at most 512 | 1 * | +30.0% (+30.0%) |" in text
    assert "| 1.10 (1.10) |" in text and "| 1.30 (1.30) * |" in text
    assert "measured in another run" in text
    assert "| 7b | Zipf 1.2 | SonicMoE (ours) |" in text and "| +7.0% |" in text
    assert "700, 3.10" in text and "| 1500 | 650 |" in text
    assert "| 0.200 | 9 |" in text and "operation not permitted" in text
    assert (tmp_path / f"{moe_report.KIND}_h100_tflops.png").stat().st_size > 10_000
    assert (tmp_path / f"{moe_report.KIND}_h100_memory.png").stat().st_size > 10_000
    header = (tmp_path / f"{moe_report.KIND}_h100.csv").read_text().splitlines()[0]
    assert "graph_ms" in header and "per_kernel" not in header


def test_losses_are_sorted_by_milliseconds_over_the_floor() -> None:
    record = _moe_record("7b", "sonicmoe")
    record["per_kernel"]["up"]["ms"] += 5
    record["per_kernel"]["down"]["ms"] = 0.0
    lines = moe_goals.losses([record])
    rows = [line.split(" | ") for line in lines if line.startswith("| 7b")]
    assert rows[0][1] == "up"
    over = [float(row[-1].rstrip(" |")) for row in rows]
    assert over == sorted(over, reverse=True) and min(over) > 0
    assert "down" not in {row[1] for row in rows}


def test_paper_speedups_stand_beside_what_the_peers_measured() -> None:
    ours = _moe_record("7b", "sonicmoe", fwd_ms=0.904, bwd_ms=2.0)
    text = "\n".join(moe_cited.paper_speedups({"7b": {"sonicmoe": ours}}))
    assert "| forward, MoMoE |  | 0.904 ms, 513 TFLOP/s | 1.808 ms | +100% |" in text
    assert "| backward, ScatterMoE | +83% |" in text and "| +148% |" in text
    assert "not measured" in text  # DeepGEMM: the paper's figure alone


def test_cited_numbers_stand_beside_ours() -> None:
    ours = _moe_record("1.4b", "sonicmoe", fwd_bwd_ms=2.0, kernel_ms=1.0)
    text = "\n".join(moe_cited.official_elsewhere({"1.4b": {"sonicmoe": ours}}))
    assert "| 1.4b | 2.931 | +46.6% | 2.805 | +180.5% | 1.045, 2.328 |" in text
    case = BENCHMARK_CASES["qwen3_30b"]
    flops = 6 * case.T * case.K * case.D * case.F
    fast = _moe_record("qwen3_30b", "sonicmoe", fwd_ms=flops / 501e9, fwd_bwd_ms=flops / 200e9)
    text = "\n".join(moe_cited.liger_claim({"qwen3_30b": {"sonicmoe": fast}}))
    assert "| forward | 501 | 501 | +0.0% |" in text
    assert "| forward + backward | 600 | 413 | +45.3% |" in text


def test_records_are_replaced_shape_and_implementation_alone() -> None:
    records = [_moe_record("7b", impl) for impl in ("sonicmoe", "official")]
    moe_report.merge(records, [_moe_record("7b", "sonicmoe", date="later")])
    assert {r["impl"]: r["date"] for r in records} == {
        "official": ON["date"],
        "sonicmoe": "later",
    }


def test_shape_groups_name_every_case_and_figure_1() -> None:
    every = bench_moe.shapes_named(["paper", "models", "skewed", "small", "fine", "all"])
    assert len(every) == len(set(every)) == len(BENCHMARK_CASES)
    assert all(set(group) <= set(BENCHMARK_CASES) for group in BENCHMARK_GROUPS.values())
    flops = {c.K * c.F for c in (BENCHMARK_CASES[s] for s in bench_granularity.SHAPES)}
    assert flops == {4096}


def test_summary_keeps_medians_and_names_our_kernels() -> None:
    name = f"kernel_cutlass_kernel_{kernels.symbol('up', 'Up')}_at__tensor0"
    details = {
        "kernels": {name: 0.5, "Memset (Device)": 0.1},
        "kernel_ms": 0.6,
        "saved_bytes": 1,
        "peak_bytes": 2,
        "probes": {},
        **VERSIONS,
    }
    answers = [
        {"fwd_ms": ms, "bwd_ms": ms, "fwd_bwd_ms": 2 * ms, "host_us": 9.0, "wall_s": 1.0} | details
        for ms in (1.0, 3.0, 2.0)
    ]
    record = bench_moe.summarise("7b", "sonicmoe", answers)
    assert (record["fwd_ms"], record["fwd_bwd_ms"], record["wall_s"]) == (2.0, 4.0, 3.0)
    assert record["per_kernel"]["up"]["ms"] == 0.5
    assert record["per_kernel"]["other"]["ms"] == 0.1
    assert bench_moe.medians([{}, {}]) == {}


# ----------------------------------------------------------------- kernels


def _kernel_classes() -> set[tuple[str, str]]:
    """(module, class) of every class with a kernel that is a leaf or has a host function."""
    bases: dict[str, list[str]] = {}
    found: dict[str, tuple[str, str]] = {}
    own: set[str] = set()
    called: set[str] = set()
    for path in CUTE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [b.id for b in node.bases if isinstance(b, ast.Name)]
                found[node.name] = (path.stem, node.name)
                decorators = {
                    ast.unparse(d)
                    for f in node.body
                    if isinstance(f, ast.FunctionDef)
                    for d in f.decorator_list
                }
                own |= {node.name} if "cute.kernel" in decorators else set()
                names = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
                called |= {node.name} if "__call__" in names else set()

    def launches(name: str) -> bool:
        return name in own or any(launches(base) for base in bases.get(name, []))

    inherited = {base for name in bases for base in bases[name]}
    concrete = called | (set(found) - inherited)
    return {found[name] for name in concrete if launches(name)}


def test_every_kernel_class_has_a_name_in_the_reports() -> None:
    experts = {pair for kernel in kernels.EXPERTS.values() for pair in kernel.classes.items()}
    named = experts | set(kernels.ROUTING.items())
    assert named == _kernel_classes()


def test_kinds_of_work_in_a_recorded_step() -> None:
    records = json.loads((COMMITTED / f"{router_report.KIND}_h100.json").read_text())
    names = {name for r in records if r["impl"] == "sonicmoe" for name in r["per_kernel"]}
    kinds = {name: kernels.kind(name) for name in names}
    ours = {name: kind for name, kind in kinds.items() if "sonicmoe_kernels" in name}
    assert len(ours) > 8 and len(set(kinds.values())) > 3
    for name, kind in ours.items():
        expected = kernels.is_experts(name, "sonicmoe")
        assert kind.startswith("experts") if expected else kind == "routing", name
    assert {kinds[n] for n in names if n.startswith("nvjet")} == {"other GEMMs"}
