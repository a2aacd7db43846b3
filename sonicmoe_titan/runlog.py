"""The plain record of a run: `metrics.jsonl` in its dump folder, one JSON object a line.

A process begins with a header, {"run": {...}}; every logged record is {"step": ..., "time": ...,
name: number, ...}, with the names that Weights & Biases and TensorBoard show. Another process with
the same dump folder appends: a resumed run goes on, and one that begins anew replaces what was.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torchtitan.components.metrics import BaseLogger

from sonicmoe_titan.config_tree import ConfigError

METRICS_FILE = "metrics.jsonl"
LOAD_FILE = "expert_load.json"
TRAIN_LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"

Record = dict[str, Any]


class RunLog(BaseLogger):
    """Appends to `folder/metrics.jsonl`; every line is complete when `log` returns."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        self._append({"run": header})

    def log(self, metrics: dict[str, Any], step: int) -> None:
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append({"step": step, "time": time.time(), **numbers})

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


def run_header(
    config: Mapping[str, Any], *, device_name: str, num_devices: int, peak_tflops: float | None
) -> Record:
    """What the figures' captions and the comparison of runs need to know of a run.

    `peak_tflops` is the dense bf16 peak of one device that MFU refers to, None if it has none.
    """
    return {
        "config": {key: value for key, value in config.items() if key != "model_spec"},
        "device": device_name,
        "num_devices": num_devices,
        "peak_tflops": peak_tflops,
        "host": platform.node(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": sys.argv,
        "versions": {name: _version(name) for name in ("sonicmoe-titan", "torch", "torchtitan")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Run:
    """A run as it was logged.

    Attributes:
        name: the dump folder's name.
        folder: the dump folder.
        header: of the last process that logged a step to it.
        training: a record per logged training step, by ascending step.
        validation: a record per validation, by ascending step.
        load_LE: rows per layer and expert in the last logged window; None if none was logged.
    """

    name: str
    folder: Path
    header: Record
    training: list[Record]
    validation: list[Record]
    load_LE: list[list[float]] | None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric of the training or validation records that have it."""
        records = self.validation if key.startswith("validation") else self.training
        found = [(record["step"], record[key]) for record in records if key in record]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The latest value of a metric, or None."""
        _, values = self.series(key)
        return values[-1] if values else None


def read_run(folder: str | Path) -> Run:
    """Read a dump folder (or the path of its metrics.jsonl).

    Raises:
        ConfigError: (a ValueError) there is no record in it, or one that is not ours; one line.
    """
    folder = Path(folder)
    if folder.name == METRICS_FILE:
        folder = folder.parent
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no {METRICS_FILE} there; give the dump folder of a run")
    header: Record = {}
    begun: Record | None = None  # the header of a process that has not logged a step yet
    training: dict[int, Record] = {}
    validation: dict[int, Record] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # a run killed while it wrote
            raise ConfigError(f"{path}:{number}: not a line of JSON") from None
        if "run" in record:
            begun = record["run"]
        elif "step" in record:
            if begun is not None:  # the steps from here on are of a run that was given up
                header, begun = begun, None
                for records in (training, validation):
                    for step in [step for step in records if step >= record["step"]]:
                        del records[step]
            kind = validation if VALIDATION_LOSS in record else training
            kind[record["step"]] = record
    if not training:
        raise ConfigError(f"{path}: no training step was logged")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        header=header,
        training=[training[step] for step in sorted(training)],
        validation=[validation[step] for step in sorted(validation)],
        load_LE=_read_load(folder),
    )


def write_load(folder: Path, load_LE: list[list[float]], *, step: int) -> None:
    """Replace `folder/expert_load.json`; a reader sees the old or the new file, never half."""
    partial = folder / f"{LOAD_FILE}.partial"
    partial.write_text(json.dumps({"step": step, "load": load_LE}), encoding="utf-8")
    partial.replace(folder / LOAD_FILE)


def _read_load(folder: Path) -> list[list[float]] | None:
    path = folder / LOAD_FILE
    return json.loads(path.read_text(encoding="utf-8"))["load"] if path.is_file() else None
