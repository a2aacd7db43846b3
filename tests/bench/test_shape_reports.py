"""Reports of whole layers and of granularity, of records drawn up here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import bench_granularity
import bench_router
import pytest
from bench import granularity_report, moe_report, router_report

from tests.bench.records import ON, VERSIONS
from tests.cases import BENCHMARK_CASES


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
    text = (tmp_path / f"{router_report.KIND}_h100.md").read_text()
    assert "| 7b | 1536 | nearest | +50.0% |" in text and "another run" not in text
    assert "| 24 (10) |" in text and "| -20.0% |" in text
    assert (tmp_path / f"{router_report.KIND}_h100.png").stat().st_size > 10_000


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
    text = (tmp_path / f"{granularity_report.KIND}_h100.md").read_text()
    assert "| 90.0% |" in text and "routing: 90.0%" in text
    assert (tmp_path / f"{granularity_report.KIND}_h100.png").stat().st_size > 10_000


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
