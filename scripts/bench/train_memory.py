"""Activation bytes of one layer of a training run, predicted and measured by `sonicmoe memory`."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from bench import facts
from bench.process import ROOT, python_environment
from bench.train_runs import MODELS, SEQ_LEN, sizes


def measured_bytes(
    model: str, router: str, *, folder: Path, layers: int | None, sequences: int | None
) -> list[dict]:
    """One record for the experts' op, the MoE block and the layer; none if the command failed."""
    options = sizes(model, steps=1, layers=layers, sequences=sequences)
    words = _command(model, options | {"model.router": router})
    here = folder / f"memory_{model}_{router}"
    here.mkdir(parents=True, exist_ok=True)
    table = here / "memory.csv"
    table.unlink(missing_ok=True)
    with (here / "log").open("w") as log:
        done = subprocess.run(
            [*words, "--out", str(here)],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=python_environment(),
            check=False,
        )
    if not table.exists():
        ended = f"ended with {done.returncode}, see {log.name}"
        print(f"memory of {model}, {router}: {ended}", file=sys.stderr)
        return []
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "measured"]
    return [
        {
            "model": model,
            "router": router,
            "what": row["name"],
            "tokens": SEQ_LEN * int(options["training.local_batch_size"]),
            "layers": options["model.num_layers"],
            "predicted_bytes": int(row["predicted_bytes"]),
            "measured_bytes": int(row["measured_bytes"]),
            "versions": facts.versions(),
            **facts.where_and_when(),
        }
        for row in rows
    ]


def _command(model: str, options: dict[str, object]) -> list[str]:
    config = ROOT / "configs" / MODELS[model].config
    words = [sys.executable, "-m", "sonicmoe_titan.cli", "memory", str(config), "--gpus", "1"]
    options = options | {
        "model.aux_loss_coeff": 0,
        "model.z_loss_coeff": 0,
        "activation_checkpoint.kind": "none",
        "parallelism.data_parallel_replicate_degree": 1,
        "parallelism.data_parallel_shard_degree": 1,
    }
    return words + [word for key, value in options.items() for word in (f"--{key}", str(value))]
