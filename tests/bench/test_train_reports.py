"""The training benchmark's plan and reports, of records drawn up here."""

from __future__ import annotations

import json
from pathlib import Path

import bench_train
import pytest
from bench import facts, train_losses, train_plan, train_profile, train_report, train_runs

from tests.bench.records import ON, VERSIONS


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
    (tmp_path / f"{train_report.MEMORY_KIND}_h100.json").write_text(json.dumps([memory]))
    train_report.write(records, tmp_path)
    text = (tmp_path / f"{train_report.KIND}_h100.md").read_text()
    best = "| SonicMoE, top-k (compiled+graphs) | compiled, of 2 measured | 1.25x | 9.0 |"
    assert best in text and "1.30x" in text
    assert "| +0.000% | 18.00 | 18.00 |" in text
    assert (tmp_path / f"{train_report.KIND}_h100.png").stat().st_size > 10_000


def test_a_block_that_was_only_run_eager_has_no_best_mode_beside_compiled_ones() -> None:
    records = [_train_record("stock", "compiled", 120e3), _train_record("sonic", "eager", 100e3)]
    model, balance = train_report.groups(records)[0]
    assert list(train_report.best_of(records, model, balance)) == ["stock TorchTitan"]
    eager = [_train_record("stock", "eager", 80e3), records[1]]
    assert len(train_report.best_of(eager, model, balance)) == 2


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


def test_a_profile_names_the_kinds_of_work_and_what_the_gpu_waited_between() -> None:
    names = ("nvjet_sm90", "memcpy128", "void at::native::vectorized_elementwise_kernel<4>")
    begins = (0.0, 500.0, 2000.0)  # us; the second begins while the first runs
    events = [
        {"cat": "kernel", "name": name, "ts": ts, "dur": 1000.0}
        for name, ts in zip(names, begins, strict=True)
    ]
    other = {"cat": "cpu_op", "name": "aten::mm", "ts": -5.0, "dur": 9000.0}
    text = train_profile.profile_table([other, *reversed(events)])
    assert text.startswith("span 3.00 ms, idle 0.50 ms\n")
    for kind in ("other GEMMs", "copies", "pointwise outside the compiler"):
        assert f"     1.00 ms  {kind}\n" in text
    assert "0.500 ms idle after memcpy128 before void at::native" in text


def test_losses_are_on_disk_after_every_run_and_replace_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = facts.record_path(tmp_path, train_losses.KIND), []

    def train(run: train_runs.Run, *_: object) -> list[dict]:
        seen.append(len(json.loads(path.read_text())) if path.exists() else 0)
        return [{train_runs.LOSS: float(len(seen))}] if run.labels["run"] != "torch" else []

    monkeypatch.setattr(bench_train, "train", train)
    words = ["losses", "--routers", "topk", "--modes", "eager", "--concurrent", "1"]
    words += ["--out", str(tmp_path), "--work", str(tmp_path)]
    for _ in range(2):
        bench_train.losses(bench_train.parse(words))
    assert seen == [0, 1, 1, 2, 2, 2]  # a failed run leaves what there is
    found = {row["run"]: row["losses"] for row in json.loads(path.read_text())}
    assert found == {"hopper": [4.0], "torch, other rounding": [6.0]}


def test_losses_report_measures_distances_to_the_torch_backend(tmp_path: Path) -> None:
    curves = {"torch": 0.0, "hopper": 0.01, "torch, other rounding": 0.02}
    rows = [
        {"router": "topk", "mode": "eager", "run": name, "layers": 8, **VERSIONS, **ON}
        | {"losses": [7 - 0.01 * step + off for step in range(60)]}
        for name, off in curves.items()
    ]
    train_losses.write(rows, tmp_path)
    text = (tmp_path / f"{train_losses.KIND}_h100.md").read_text()
    assert "| topk | eager | hopper | 0.01000 | 0.01000 | 0.01000 |" in text
    assert (tmp_path / f"{train_losses.KIND}_h100.png").stat().st_size > 10_000


def test_losses_report_survives_a_failed_torch_run(tmp_path: Path) -> None:
    common = {"router": "topk", "mode": "eager", "layers": 1, "versions": {"torch": "2.14.1"}}
    where = {"device": "NVIDIA H100", "commit": "abc", "date": "2026-11-26"}
    rows = [common | where | {"run": "hopper", "losses": [3.0, 2.0]}]
    assert train_losses.distances(rows, "topk", "eager") == {}
    train_losses.write(rows, tmp_path)
    assert "| topk |" not in (tmp_path / f"{train_losses.KIND}_h100.md").read_text()
