"""What a run logs, over all ranks."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchtitan.components.metrics import BaseLogger
from torchtitan.tools import utils

from sonicmoe_titan.metrics import SonicMetrics, _console_line
from sonicmoe_titan.peak_flops import known_peak_flops
from sonicmoe_titan.routing_metrics import Gathered, routing_metrics
from sonicmoe_titan.runlog import TRAIN_LOSS, VALIDATION_LOSS, Run, read_run
from sonicmoe_titan.stats import RouterStats
from sonicmoe_titan.throughput import Throughput
from tests.titan import tiny
from tests.titan.metrics_scenarios import (
    gather_and_train,
    model_with_stats,
)
from tests.titan.ranks import run_on_ranks


@pytest.fixture(scope="module")
def logged(shared_folder: Path) -> tuple[Run, int]:
    """A finished run of two ranks and the tokens that it saw."""
    (_, (folder, tokens), *_), _ = run_on_ranks(gather_and_train, ranks=2, base=shared_folder)
    return read_run(folder), tokens


def _gathered(**values: float) -> Gathered:
    """One layer with load 3, 1, 0, 0."""
    row = [values.get(name, 0.0) for name in RouterStats.NAMES]
    load_LE = torch.tensor([[3.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    return Gathered([2], torch.tensor([row], dtype=torch.float64), load_LE)


def test_routing_metrics_are_the_ratios_they_say() -> None:
    metrics = routing_metrics(
        _gathered(
            microbatches=4,
            tokens=10,
            rows=40,
            rows_computed=50,
            rows_added=5,
            rows_dropped=3,
            entropy=20,
            aux_loss=6,
            z_loss=2,
        )
    )
    expected = {
        "padding_waste": 0.25,
        "rows_added": 5 / 38,
        "rows_dropped": 3 / 38,
        "max_over_mean_load": 3.0,
        "router_entropy": 2.0,
        "aux_loss": 1.5,
        "z_loss": 0.5,
    }
    for name, value in expected.items():
        assert metrics[f"moe/{name}"] == pytest.approx(value), name
        assert metrics[f"moe_layer_02/{name}"] == pytest.approx(value), name


def test_statistics_add_up_over_ranks_and_pipeline_stages_and_start_again(
    shared_folder: Path,
) -> None:
    results = run_on_ranks(gather_and_train, ranks=2, base=shared_folder)
    for (both, staged, left), *_ in results:
        assert both.layer_ids == [0, 1]
        assert staged.layer_ids == [1, 3]
        assert left == 0.0
        for row, layer in enumerate((0, 1)):
            stats = [
                model_with_stats([layer], seed=rank).layers[str(layer)].moe.stats for rank in (0, 1)
            ]
            summed = sum(s.values_V.double() for s in stats)
            torch.testing.assert_close(both.values_LV[row], summed)
            torch.testing.assert_close(both.load_LE[row], sum(s.load_E.double() for s in stats))


def test_expert_parallelism_keeps_what_the_memory_model_expects(shared_folder: Path) -> None:
    for _, _, kept, _ in run_on_ranks(gather_and_train, ranks=2, base=shared_folder):
        for router, (expected, bound, measured) in kept.items():
            assert measured == pytest.approx(expected, rel=0.02), router
            assert measured <= bound, router


def test_record_holds_every_metric(logged: tuple[Run, int]) -> None:
    run, _ = logged
    record = run.training[-1]
    for name in (
        TRAIN_LOSS,
        "n_tokens_seen",
        "throughput/tokens_per_day",
        "throughput/tokens_per_second_per_gpu",
        "throughput/gpu_days_per_billion_tokens",
        "throughput/eta_hours",
        "throughput_average/tokens_per_day",
        "moe/padding_waste",
        "moe/rows_added",
        "moe/rows_dropped",
        "moe/max_over_mean_load",
        "moe/router_entropy",
        "moe/aux_loss",
        "moe/z_loss",
        "moe_layer_01/padding_waste",
        "memory/activations_predicted(GiB)",
    ):
        assert name in record, name
    assert [r["step"] for r in run.training] == [1, 2, 4, 6, 8]
    assert "throughput/tokens_per_day" not in run.training[1]  # it ends the warm-up
    assert "throughput/mfu(%)" not in record or run.header["peak_tflops"]


def test_tokens_and_rows_count_all_ranks(logged: tuple[Run, int]) -> None:
    run, tokens = logged
    assert run.last("n_tokens_seen") == tokens == 8 * 2 * 2 * 64
    rate = run.training[-1]
    per_gpu = rate["throughput/tokens_per_second_per_gpu"]
    assert rate["throughput/tokens_per_day"] == pytest.approx(2 * 86400 * per_gpu)
    assert rate["throughput/gpu_days_per_billion_tokens"] == pytest.approx(
        2e9 / rate["throughput/tokens_per_day"]
    )
    # tiles of 8 rounded to: each expert's rows are whole tiles on both ranks, in both steps
    assert run.load_LE is not None
    assert len(run.load_LE) == 2
    assert all(load % 8 == 0 for layer in run.load_LE for load in layer)
    chosen = 2 * 2 * (2 * 64) * 2
    change = run.training[-1]["moe_layer_00/rows_added"] - rate["moe_layer_00/rows_dropped"]
    assert sum(run.load_LE[0]) == pytest.approx(chosen * (1 + change))


def test_validation_is_recorded_and_does_not_disturb_the_routing_numbers(
    logged: tuple[Run, int],
) -> None:
    run, _ = logged
    assert [record["step"] for record in run.validation] == [1, 5, 8]  # the last step too
    assert all(record[VALIDATION_LOSS] > 0 for record in run.validation)
    # a validation in the window would add top-k rows that are no whole tiles
    assert all(record["moe/rows_added"] > 0 for record in run.training[1:])


def test_rank_0_of_a_pipeline_tells_the_loss_of_its_last_stage(shared_folder: Path) -> None:
    first, last = run_on_ranks(gather_and_train, ranks=2, base=shared_folder)
    (folder, lines), (_, same) = first[3], last[3]
    run = read_run(folder)
    assert [record["step"] for record in run.training] == [1, 2]
    losses = [record[TRAIN_LOSS] for record in run.training]
    losses += [record[VALIDATION_LOSS] for record in run.validation]
    assert all(5 < loss < 8 for loss in losses), losses  # about log 512
    assert len(losses) == 4 and len(lines) == len(same) == 6
    without_memory = [re.sub(r"(memory|tps|tflops|mfu): *\S+", "", line) for line in lines]
    assert without_memory == [re.sub(r"(memory|tps|tflops|mfu): *\S+", "", line) for line in same]


def test_end_of_run_leaves_figures_a_table_and_loggers_files(logged: tuple[Run, int]) -> None:
    run, _ = logged
    report = run.folder / "report"
    for name in ("loss", "tokens_per_day", "padding_waste", "expert_load"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    rows = dict(csv.reader((report / "summary.csv").open()))
    assert rows["steps"] == "8"
    assert list(run.folder.glob("tb/*/events.out.tfevents.*"))
    assert list(run.folder.glob("tb/*/wandb/offline-run-*"))


def test_process_that_logged_nothing_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    monkeypatch.setattr(SonicMetrics, "_report", lambda self: reports.append(self))
    metrics = SonicMetrics.__new__(SonicMetrics)
    metrics.config, metrics._is_reporter, metrics.logger = SonicMetrics.Config(), True, BaseLogger()
    for metrics._has_logged in (False, True):
        metrics.close()
        assert bool(reports) == metrics._has_logged


def test_wandb_goes_offline_without_a_key_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from sonicmoe_titan import metrics

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(metrics.logger, "propagate", True)
    with caplog.at_level("INFO"):
        metrics._prepare_wandb()
        metrics._prepare_wandb()
    assert metrics.os.environ["WANDB_MODE"] == "offline"
    assert caplog.text.count("recorded offline") == 1


@pytest.mark.parametrize("key", ["WANDB_API_KEY", "WANDB_MODE"])
def test_wandb_setting_of_the_user_stands(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    from sonicmoe_titan import metrics

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(key, "online")
    metrics._prepare_wandb()
    assert metrics.os.environ["WANDB_MODE"] == ("online" if key == "WANDB_MODE" else "")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_mfu_refers_to_a_peak_that_is_known(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TorchTitan asks lspci first: this machine's answer must not decide
    monkeypatch.setattr(utils.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    known_peak_flops.cache_clear()
    assert known_peak_flops(name) == peak
    known_peak_flops.cache_clear()


@pytest.mark.parametrize(("tile", "warns"), [(128, False), (256, False), (96, True), (32, True)])
def test_partial_tile_warns(tile: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    from sonicmoe_titan import metrics

    metrics.logger.propagate = True
    with caplog.at_level("WARNING"):
        metrics._warn_of_partial_tiles({"router": "token_rounding", "rounding_tile": tile})
        metrics._warn_of_partial_tiles({"router": "topk", "rounding_tile": tile})
    assert ("rounding_tile" in caplog.text) == warns
    assert caplog.text.count("rounding_tile") == (1 if warns else 0)


def test_illegal_settings_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"metrics.log_freq = 0: expected 1 or more"):
        SonicMetrics.Config(log_freq=0)


def test_console_line_shows_what_is_there() -> None:
    assert _console_line({}, None) == ""
    line = _console_line({"throughput/tokens_per_day": 2.13e11}, 3600.0)
    assert line == "tokens/day: 2.13e+11  ETA: 1:00:00"


def test_run_config_is_recorded_without_the_model_spec(logged: tuple[Run, int]) -> None:
    run, _ = logged
    config = run.header["config"]
    assert config["model"]["router"] == "token_rounding"
    assert config["training"]["steps"] == 8
    assert "model_spec" not in config
    assert json.dumps(run.header)
    assert run.header["num_devices"] == 2
    assert tiny.ARGS.num_experts == config["model"]["num_experts"]


def _of_a_pipeline(part: torch.nn.Module) -> SonicMetrics:
    metrics = SonicMetrics.__new__(SonicMetrics)
    metrics.config = SonicMetrics.Config(log_freq=10)
    metrics.parallel_dims = SimpleNamespace(pp_enabled=True)
    metrics.throughput = Throughput(num_gpus=1, warmup_steps=0)
    metrics.model_parts, metrics._steps_begun, metrics._is_reporter = [part], 0, False
    return metrics


def test_tensors_that_teach_a_pipeline_its_shapes_are_not_counted() -> None:
    part = model_with_stats([0], seed=1)
    stats = part.layers["0"].moe.stats
    stats.values_V.fill_(float("nan"))
    metrics = _of_a_pipeline(part)
    assert metrics.should_log(1)
    assert metrics._routing_metrics(1) == {}

    stats.values_V.fill_(float("nan"))
    resumed = _of_a_pipeline(part)
    assert not resumed.should_log(11)
    assert not resumed.should_log(12)
    assert not stats.values_V.any()
    stats.values_V.fill_(1.0)
    stats.add_entropy(stats.one, 1.0)
    assert resumed.should_log(20)
    assert resumed._routing_metrics(20)["moe/router_entropy"] == 1.0
