"""Reading a run back, and the figures and tables made from it."""

import csv
import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from sonicmoe_titan import plots
from sonicmoe_titan.cli import run as sonicmoe
from sonicmoe_titan.report import main
from sonicmoe_titan.runlog import TRAIN_LOSS, VALIDATION_LOSS, RunLog, read_run, write_load

MODEL = {
    "num_layers": 2,
    "dim": 64,
    "expert_dim": 32,
    "num_experts": 8,
    "top_k": 2,
    "router": "token_rounding",
    "rounding": "nearest",
    "rounding_tile": 16,
}


def _write_run(folder: Path, *, steps: int = 20, loss: float = 3.0) -> Path:
    header = {
        "config": {"model": MODEL},
        "device": "test device",
        "num_devices": 2,
        "date": "2026-01-01",
    }
    log = RunLog(folder, header)
    for step in range(1, steps + 1):
        record = {
            TRAIN_LOSS: loss + 1 / step,
            "n_tokens_seen": 1000 * step,
            "moe/padding_waste": 0.2,
            "moe/rows_added": 0.03,
            "moe/rows_dropped": 0.02,
        }
        if step > 5:
            record["throughput/tokens_per_day"] = 2e9 + step
            record["throughput_average/tokens_per_day"] = 2e9
        log.log(record, step)
        if step % 10 == 0:
            log.log({VALIDATION_LOSS: loss + 0.5}, step)
    write_load(folder, torch.rand(2, 8).tolist(), step=steps)
    return folder


def _rows(folder: Path) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in csv.reader((folder / "summary.csv").open())}


def test_report_writes_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    rows = _rows(folder / "report")
    assert rows["steps"] == ["20"]
    assert rows["training loss, last (nats)"] == ["3.0500"]
    assert rows["validation loss, last (nats)"] == ["3.5000"]
    assert rows["tokens/day"] == ["2B"]
    assert rows["padding waste"] == ["20.00%"]
    printed = capsys.readouterr().out
    assert "test device" in printed and "tile 16" in printed
    for name in ("loss", "tokens_per_day", "padding_waste", "expert_load"):
        image = imread(folder / "report" / f"{name}.png")
        assert image.shape[1] > 900
        assert image[..., :3].std() > 0.02, f"{name} is blank"


def test_comparison_overlays_runs_and_keeps_them_apart(tmp_path: Path) -> None:
    first = _write_run(tmp_path / "first")
    second = _write_run(tmp_path / "second", steps=10, loss=2.0)
    out = tmp_path / "comparison"
    assert main([str(first), str(second), "--out", str(out)]) == 0
    rows = _rows(out)
    assert rows[""] == ["first", "second"]
    assert rows["steps"] == ["20", "10"]
    assert rows["training loss, last (nats)"] == ["3.0500", "2.1000"]
    assert (out / "expert_load_first.png").exists()
    assert (out / "expert_load_second.png").exists()
    alone = tmp_path / "alone"
    assert main([str(first), "--out", str(alone)]) == 0
    assert (alone / "loss.png").read_bytes() != (out / "loss.png").read_bytes()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [_write_run(tmp_path / parent / "run") for parent in ("a", "b")]
    out = tmp_path / "out"
    assert main([*map(str, folders), "--out", str(out)]) == 0
    assert _rows(out)[""] == [str(folder) for folder in folders]


def test_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    folder = _write_run(tmp_path / "run")
    RunLog(folder, {"device": "other"}).log({TRAIN_LOSS: 9.0}, 18)
    run = read_run(folder)
    assert [record["step"] for record in run.training] == list(range(1, 19))
    assert run.training[17][TRAIN_LOSS] == 9.0
    assert [record["step"] for record in run.validation] == [10]
    assert run.header["device"] == "other"


def test_run_that_begins_anew_in_the_same_folder_is_not_mixed_with_the_old_one(
    tmp_path: Path,
) -> None:
    folder = _write_run(tmp_path / "run")
    _write_run(folder, steps=5, loss=2.0)
    run = read_run(folder)
    assert [record["step"] for record in run.training] == [1, 2, 3, 4, 5]
    assert run.last(TRAIN_LOSS) == 2.0 + 1 / 5
    assert run.validation == [] and run.last("throughput/tokens_per_day") is None


def test_process_that_logged_no_step_leaves_the_run_before_it_alone(tmp_path: Path) -> None:
    folder = _write_run(tmp_path / "run")
    RunLog(folder, {"device": "other"})
    run = read_run(folder)
    assert len(run.training) == 20
    assert run.header["device"] == "test device"


def test_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = _write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss_met')
    assert read_run(folder).training[-1]["step"] == 20


def test_run_without_throughput_or_routing_still_reports(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", {}).log({TRAIN_LOSS: 1.0}, 1)
    assert main([str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "report" / "tokens_per_day.png").exists()


@pytest.mark.parametrize("content", [None, "", "{}\n", "not json\n{}\n"])
def test_folder_without_a_run_is_one_line(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert sonicmoe(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


def test_numbers_that_are_no_numbers_survive_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    log.log({TRAIN_LOSS: torch.tensor(2.0), "grad_norm": float("nan")}, 1)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert record[TRAIN_LOSS] == 2.0
    assert record["grad_norm"] != record["grad_norm"]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.25, "0.25"), (999, "999"), (38500, "38.5k"), (2.13e11, "213B"), (1.5e12, "1.5T")],
)
def test_count_writes_three_digits(value: float, written: str) -> None:
    assert plots.count(value) == written


def test_smoothing_keeps_lines_and_ends() -> None:
    line = [float(step) for step in range(20)]
    assert plots.smoothed(line, 3) == pytest.approx(line)
    assert plots.smoothed([0.0, 3.0, 0.0], 1) == [0.0, 1.0, 0.0]
