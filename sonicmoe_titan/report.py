"""The end of a run: a summary table and figures; and `sonicmoe report`, which compares runs.

Everything is drawn from `metrics.jsonl` and `expert_load.json` in the dump folder of a run.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sonicmoe_titan import plots
from sonicmoe_titan.config_tree import ConfigError
from sonicmoe_titan.report_figures import AVERAGE_RATE, describe_hardware, describe_model, draw
from sonicmoe_titan.runlog import TRAIN_LOSS, VALIDATION_LOSS, Run, read_run

FOLDER = "report"


@dataclass(frozen=True)
class Row:
    """A line of the summary: what it is called, where it comes from, how it is written."""

    label: str
    value: Callable[[Run], float | None]
    written: Callable[[float], str]


def _last(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.last(key)


def _last_unless_off(key: str) -> Callable[[Run], float | None]:
    """A loss that is switched off is logged as 0."""
    return lambda run: run.last(key) or None


def _mean(key: str) -> Callable[[Run], float | None]:
    def mean(run: Run) -> float | None:
        _, values = run.series(key)
        return sum(values) / len(values) if values else None

    return mean


def _best(key: str) -> Callable[[Run], float | None]:
    return lambda run: min(run.series(key)[1], default=None)


def _largest(key: str) -> Callable[[Run], float | None]:
    return lambda run: max(run.series(key)[1], default=None)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


ROWS = (
    Row("steps", lambda run: run.training[-1]["step"], lambda v: f"{v:.0f}"),
    Row("tokens", _last("n_tokens_seen"), plots.count),
    Row("training loss, last (nats)", _last(TRAIN_LOSS), "{:.4f}".format),
    Row("validation loss, last (nats)", _last(VALIDATION_LOSS), "{:.4f}".format),
    Row("validation loss, best (nats)", _best(VALIDATION_LOSS), "{:.4f}".format),
    Row("perplexity, last", _last("validation_metrics/perplexity"), "{:.3f}".format),
    Row("bits per byte, last", _last("validation_metrics/bits_per_byte"), "{:.4f}".format),
    Row("tokens/day", _last(AVERAGE_RATE), plots.count),
    Row("tokens/s per GPU", _last("throughput_average/tokens_per_second_per_gpu"), plots.count),
    Row(
        "GPU-days per billion tokens",
        _last("throughput_average/gpu_days_per_billion_tokens"),
        "{:.4g}".format,
    ),
    Row("MFU (%)", _last("throughput_average/mfu(%)"), "{:.2f}".format),
    Row("padding waste", _mean("moe/padding_waste"), _percent),
    Row("rows added by rounding", _mean("moe/rows_added"), _percent),
    Row("rows dropped by rounding", _mean("moe/rows_dropped"), _percent),
    Row("max/mean load, last", _last("moe/max_over_mean_load"), "{:.3f}".format),
    Row("router entropy, last (nats)", _last("moe/router_entropy"), "{:.4f}".format),
    Row("auxiliary loss, last", _last_unless_off("moe/aux_loss"), "{:.4f}".format),
    Row("router z-loss, last", _last_unless_off("moe/z_loss"), "{:.4f}".format),
    Row(
        "activations, predicted (GiB)", _last("memory/activations_predicted(GiB)"), "{:.3f}".format
    ),
    Row("peak memory (GiB)", _largest("memory/max_active(GiB)"), "{:.2f}".format),
)


def report_run(folder: str | Path) -> list[Path]:
    """Print one run's summary and draw its figures into `folder/report`; returns what it wrote."""
    run = read_run(folder)
    return _report([run], run.folder / FOLDER)


def main(argv: list[str]) -> int:
    """`sonicmoe report RUN [RUN ...] [--out FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="sonicmoe report",
        description="Summarise a run, or compare several: a table, figures and a CSV file.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="dump folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"where the figures go (RUN/{FOLDER}; for several runs ./{FOLDER})",
    )
    given = parser.parse_args(argv)
    try:
        runs = _with_distinct_names([read_run(folder) for folder in given.runs])
        out = given.out or (runs[0].folder if len(runs) == 1 else Path()) / FOLDER
        _report(runs, out)
    except OSError as error:
        raise ConfigError(str(error)) from None
    return 0


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [
        Run(str(run.folder), run.folder, run.header, run.training, run.validation, run.load_LE)
        for run in runs
    ]


def _report(runs: list[Run], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    summary = _summary(runs)
    Console().print(_table(runs, summary))
    written = [_write_csv(runs, summary, out / "summary.csv")]
    written += draw(runs, out)
    print("wrote " + ", ".join(str(path) for path in written))
    return written


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Label and one written value per run, without the lines that no run has."""
    lines = []
    for row in ROWS:
        values = [row.value(run) for run in runs]
        if any(value is not None for value in values):
            lines.append(
                (row.label, ["-" if value is None else row.written(value) for value in values])
            )
    return lines


def _table(runs: Sequence[Run], summary: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(title="Runs" if len(runs) > 1 else f"Run {runs[0].name}", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    table.add_row("model", *(describe_model(run) for run in runs))
    table.add_row("device", *(describe_hardware(run) for run in runs))
    if any(run.header.get("peak_tflops") for run in runs):
        table.add_row("peak that MFU refers to", *(_peak(run) for run in runs))
    for label, values in summary:
        table.add_row(label, *values)
    return table


def _write_csv(runs: Sequence[Run], summary: Sequence[tuple[str, list[str]]], path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *(run.name for run in runs)])
        writer.writerows([label, *values] for label, values in summary)
    return path


def _peak(run: Run) -> str:
    peak = run.header.get("peak_tflops")
    return "-" if peak is None else f"{peak:.0f} TFLOP/s"
