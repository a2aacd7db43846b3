"""Reports are made of records alone: the committed ones again, and what drawn-up records must say.

The drawn-up records exist in these tests only and are written to folders of the tests.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from pathlib import Path

import bench_granularity
import bench_moe
import bench_router
import bench_train
import pytest
from bench import (
    granularity_report,
    kernels,
    moe_cited,
    moe_goals,
    moe_report,
    router_report,
    train_losses,
    train_plan,
    train_report,
    train_runs,
)

from tests.cases import BENCHMARK_CASES, BENCHMARK_GROUPS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "benchmarks"
CUTE = ROOT / "kernels" / "sonicmoe_kernels" / "cute"
WRITERS = {
    moe_report.NAME: moe_report,
    router_report.NAME: router_report,
    granularity_report.NAME: granularity_report,
    train_report.NAME: train_report,
    train_losses.NAME: train_losses,
}
ON = {"device": "a GPU", "driver": "1.2", "commit": "abc", "date": "2026-01-01"}
VERSIONS = {"versions": {"torch": "2.0"}}


def _committed() -> list[str]:
    return [name for name in WRITERS if (COMMITTED / f"{name}.json").exists()]


@pytest.mark.parametrize("name", _committed())
def test_committed_reports_are_those_of_the_committed_records(name: str, tmp_path: Path) -> None:
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, tmp_path)
    WRITERS[name].write(json.loads((tmp_path / f"{name}.json").read_text()), tmp_path)
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
    text = (tmp_path / f"{moe_report.NAME}.md").read_text()
    # a peer that takes 1.1 and 1.3 times as long: 20% on average, 10% at least
    assert "| official sonic-moe | all | 2 * | +20.0% (+10.0%) | +20.0% (+10.0%) |" in text
    assert "| official sonic-moe | at most 512 | 1 * | +30.0% (+30.0%) |" in text
    assert "| 1.10 (1.10) |" in text and "| 1.30 (1.30) * |" in text
    assert "measured in another run" in text
    assert "| 7b | Zipf 1.2 | SonicMoE (ours) |" in text and "| +7.0% |" in text
    assert "700, 3.10" in text and "| 1500 | 650 |" in text
    assert "| 0.200 | 9 |" in text and "operation not permitted" in text
    assert (tmp_path / f"{moe_report.NAME}_tflops.png").stat().st_size > 10_000
    assert (tmp_path / f"{moe_report.NAME}_memory.png").stat().st_size > 10_000
    header = (tmp_path / f"{moe_report.NAME}.csv").read_text().splitlines()[0]
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
    """(module, class) of every class that defines a kernel or inherits one, leaves alone."""
    bases: dict[str, list[str]] = {}
    found: dict[str, tuple[str, str]] = {}
    own: set[str] = set()
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

    def launches(name: str) -> bool:
        return name in own or any(launches(base) for base in bases.get(name, []))

    inherited = {base for name in bases for base in bases[name]}
    return {found[name] for name in found if launches(name) and name not in inherited}


def test_every_kernel_class_has_a_name_in_the_reports() -> None:
    named = {(k.module, k.name) for k in kernels.EXPERTS.values()} | set(kernels.ROUTING.items())
    assert named == _kernel_classes()


def test_kinds_of_work_in_a_recorded_step() -> None:
    records = json.loads((COMMITTED / f"{router_report.NAME}.json").read_text())
    names = {name for r in records if r["impl"] == "sonicmoe" for name in r["per_kernel"]}
    kinds = {name: kernels.kind(name) for name in names}
    ours = {name: kind for name, kind in kinds.items() if "sonicmoe_kernels" in name}
    assert len(ours) > 8 and len(set(kinds.values())) > 3
    for name, kind in ours.items():
        expected = kernels.is_experts(name, "sonicmoe")
        assert kind.startswith("experts") if expected else kind == "routing", name
    assert {kinds[n] for n in names if n.startswith("nvjet")} == {"other GEMMs"}


# ------------------------------------------------------------------ router


def _router_record(shape: str, impl: str, router: str, *, step_ms: float) -> dict:
    T, D, F, E, K = bench_router.SHAPES[shape]
    return {
        "shape": shape,
        **dict(zip("TDFEK", (T, D, F, E, K), strict=True)),
        "impl": impl,
        "router": router,
        "rows_per_expert": T * K // E,
        "fwd_ms": step_ms / 3,
        "bwd_ms": step_ms * 2 / 3,
        "step_ms": step_ms,
        "kernels_ms": 10.0,
        "router_ms": 1.0,
        "launches": 24,
        "forward_launches": 10,
        "padding_waste": 0.0 if router == "nearest" else 0.2,
        **VERSIONS,
        **ON,
    }


def test_router_report_compares_with_the_official_token_choice(tmp_path: Path) -> None:
    records = [
        _router_record(shape, impl, router, step_ms=ms + (shape == "d1536_n256_E512"))
        for shape in ("d1536_n256_E512", "d1536_n256_E64", "d4096_n1024_E256", "7b")
        for impl, router, ms in (
            ("sonicmoe", "topk", 5.0),
            ("sonicmoe", "nearest", 4.0),
            ("official", "topk", 6.0),
        )
    ]
    router_report.write(records, tmp_path)
    text = (tmp_path / f"{router_report.NAME}.md").read_text()
    assert "| 7b | 1536 | nearest | +50.0% |" in text and "another run" not in text
    assert "| 24 (10) |" in text and "| -20.0% |" in text
    assert (tmp_path / f"{router_report.NAME}.png").stat().st_size > 10_000


def test_router_summary_separates_router_and_launches() -> None:
    details = {
        "kernels": {"experts": (2.0, 3.0), "rest": (5.0, 1.0)},
        "experts_ms": 3.0,
        "forward_launches": 3,
        "rows": 100,
        "padding_waste": 0.0,
        **VERSIONS,
    }
    timing = {"fwd_bwd_ms": 5.0, "fwd_bwd_q1_ms": 4.0, "fwd_bwd_q3_ms": 6.0, "host_us": 50.0}
    answer = {"fwd_ms": 1.5, "bwd_ms": 3.5, "wall_s": 1.0} | timing | details
    record = bench_router.summarise("7b official topk", [answer])
    assert (record["router_ms"], record["launches"], record["step_ms"]) == (1.0, 7, 5.0)
    assert (record["impl"], record["rows_per_expert"]) == ("official", 1536)


# ------------------------------------------------------------- granularity


def test_granularity_report_gives_shares_of_the_bound_and_bytes(tmp_path: Path) -> None:
    records = []
    for shape in bench_granularity.SHAPES:
        case = BENCHMARK_CASES[shape]
        predicted, peers = bench_granularity.predicted_bytes(case)
        sizes = {key: getattr(case, key) for key in "TDFEK"}
        for impl, ms in (("sonicmoe", 5.0), ("sonicmoe_equal", 4.8), ("bound", 4.5)):
            rate = moe_report.tflops(sizes, ms, passes=1)
            record = {"shape": shape, **sizes, "impl": impl, "fwd_ms": ms, "fwd_tflops": rate}
            record |= {"fwd_ms_rounds": [ms, ms + 0.1], **VERSIONS, **ON}
            if impl == "sonicmoe":
                record |= {"resident_bytes": predicted + 1024, "predicted_bytes": predicted}
                record["peers_bytes"] = peers
            if impl == "bound":
                record["pieces"] = {"BMM up": 2.0, "activation": 0.5}
            records.append(record)
    granularity_report.write(records, tmp_path)
    assert granularity_report.shares(records, "sonicmoe") == pytest.approx([0.9] * 4)
    text = (tmp_path / f"{granularity_report.NAME}.md").read_text()
    assert "| 90.0% |" in text and "routing: 90.0%" in text
    assert (tmp_path / f"{granularity_report.NAME}.png").stat().st_size > 10_000


def test_resident_bytes_are_flat_in_granularity_but_for_the_plan() -> None:
    found = [
        bench_granularity.predicted_bytes(BENCHMARK_CASES[shape])[0]
        for shape in bench_granularity.SHAPES
    ]
    case = BENCHMARK_CASES["30b_n256"]
    T, D, F, E, K = (getattr(case, key) for key in "TDFEK")
    paper = 4 * T * D + 4 * T * K * F + 6 * E * D * F  # X, O, H and the weights
    plan = 4 * (3 * T * K + E + 1 + T + 1)
    assert found[-1] == paper + plan
    assert max(found) < 1.01 * min(found)


def test_equal_routing_gives_every_expert_the_same_rows_of_distinct_tokens() -> None:
    case = dataclasses.replace(BENCHMARK_CASES["30b_n512"], T=256)
    ids_TK, scores_TK = bench_granularity.equal_pairs(case)
    assert set(ids_TK.flatten().bincount(minlength=case.E).tolist()) == {case.T * case.K // case.E}
    assert all(len(set(row)) == case.K for row in ids_TK.tolist())
    assert scores_TK.shape == ids_TK.shape


# ---------------------------------------------------------------- training


def _train_record(block: str, mode: str, speed: float, *, model: str = "7b_proxy") -> dict:
    return {
        **train_plan.labels(train_plan.Row(model, block, mode, "natural")),
        "layers": 8,
        "tokens_per_s": speed,
        "tokens_per_day": speed * train_report.SECONDS_A_DAY,
        "step_ms": {"q1": 1.0, "median": 2.0, "q3": 3.0},
        "mfu": 30.0,
        "peak_gib": 40.0 if block == "stock" else 31.0,
        "active_gib": 30.0,
        "wall_s": 77.0,
        **VERSIONS,
        **ON,
    }


def test_training_report_compares_best_modes_and_activation_bytes(tmp_path: Path) -> None:
    records = [
        _train_record("stock", "eager", 80e3),
        _train_record("stock", "compiled", 120e3),
        _train_record("sonic", "compiled+graphs", 150e3),
        _train_record("sonic rounding", "compiled+graphs", 156e3),
        _train_record("sonic torch", "compiled", 90e3),
        _train_record("sonic", "compiled+graphs", 300e3, model="1.4b_k2"),
    ]
    memory = {"model": "1.4b_k2", "router": "topk", "what": "experts' op", "tokens": 32768}
    memory |= {"layers": 18, "predicted_bytes": 2**30, "measured_bytes": 2**30, **VERSIONS, **ON}
    (tmp_path / f"{train_report.MEMORY_NAME}.json").write_text(json.dumps([memory]))
    train_report.write(records, tmp_path)
    text = (tmp_path / f"{train_report.NAME}.md").read_text()
    best = "| SonicMoE, top-k (compiled+graphs) | compiled, of 2 measured | 1.25x | 9.0 |"
    assert best in text and "1.30x" in text
    assert "| +0.000% | 18.00 | 18.00 |" in text
    assert (tmp_path / f"{train_report.NAME}.png").stat().st_size > 10_000


def test_training_plan_puts_stock_beside_ours_first(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_train.chosen(bench_train.parse(["speed"]))
    assert len(rows) == len(set(rows))
    first = rows[:3]
    assert {row.block for row in first} == {"stock", "sonic", "sonic rounding"}
    assert {(row.model, row.mode, row.balance) for row in first} == {
        ("7b_proxy", "compiled+graphs", "natural")
    }
    stock = {(r.mode, r.balance) for r in rows if (r.model, r.block) == ("7b_proxy", "stock")}
    assert len(stock) == len(train_runs.MODES) * len(train_runs.BALANCES)
    for model in train_plan.FULL_MODELS:
        assert {r.block for r in rows if r.model == model} == set(train_plan.BOTH)
    torch = ["speed", "--blocks", "sonic torch"]
    with pytest.raises(SystemExit, match="--all knows every row"):
        bench_train.chosen(bench_train.parse(torch))
    filtered = bench_train.chosen(bench_train.parse([*torch, "--all"]))
    assert {row.block for row in filtered} == {"sonic torch"}


def test_expected_seconds_come_from_records_where_there_are_any() -> None:
    row = train_plan.Row("7b_proxy", "stock", "compiled", "natural")
    timed = _train_record("stock", "compiled", 1.0)
    other = _train_record("sonic", "compiled", 1.0) | {"wall_s": 99.0}
    assert bench_train.expected_s(row, [timed, other]) == 77.0
    assert bench_train.expected_s(row, [other]) == 99.0
    assert bench_train.expected_s(row, []) == bench_train.GUESSED_S["compiled"]


def test_training_summary_has_what_a_record_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.train_runs import ACTIVE, LOSS, MFU, PREDICTED, RESERVED, TOKENS_PER_S

    arguments = bench_train.parse(["speed"])
    row = train_plan.Row("7b_proxy", "sonic rounding", "compiled+graphs", "forced")
    run = bench_train.run_of(row, arguments, {})
    assert run.options["debug.moe_force_load_balance"] and run.options["compile.enable"]
    base = {RESERVED: 30.0, ACTIVE: 29.0, LOSS: 6.0, PREDICTED: 5.0}
    windows = [base | {TOKENS_PER_S: v, MFU: 30.0} for v in (24576.0, 49152.0, 98304.0)]
    record = bench_train.summary(row, run, [base, *windows[:-1], windows[-1] | {"wall_s": 60.0}])
    assert record["tokens_per_step"] == 24576
    assert record["step_ms"]["median"] == pytest.approx(500.0)
    assert record["tokens_per_day"] == pytest.approx(49152 * 86400)
    wanted = {"model", "impl", "router", "balance", "compile", "cuda_graphs", "tokens_per_s"}
    wanted |= {"tokens_per_day", "mfu", "peak_gib", "step_ms", "versions", "commit", "date"}
    assert wanted <= record.keys()
    assert (record["impl"], record["router"]) == ("sonicmoe", "token_rounding")
    assert record["activations_predicted_gib"] == 5.0
    stock = train_plan.Row("7b_proxy", "stock", "eager", "natural")
    assert "activations_predicted_gib" not in bench_train.summary(stock, run, windows)


def test_losses_report_measures_distances_to_the_torch_backend(tmp_path: Path) -> None:
    curves = {"torch": 0.0, "hopper": 0.01, "torch, other rounding": 0.02}
    rows = [
        {"router": "topk", "mode": "eager", "run": name, "layers": 8, **VERSIONS, **ON}
        | {"losses": [7 - 0.01 * step + off for step in range(60)]}
        for name, off in curves.items()
    ]
    train_losses.write(rows, tmp_path)
    text = (tmp_path / f"{train_losses.NAME}.md").read_text()
    assert "| topk | eager | hopper | 0.01000 | 0.01000 | 0.01000 |" in text
    assert (tmp_path / f"{train_losses.NAME}.png").stat().st_size > 10_000
