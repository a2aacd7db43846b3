"""Training runs as processes: what they are given, and what their metrics say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.process import ROOT, python_environment

TOKENS_PER_S = "throughput/tokens_per_second_per_gpu"
LOSS = "loss_metrics/global_avg_loss"
RESERVED = "memory/max_reserved(GiB)"
ACTIVE = "memory/max_active(GiB)"
PREDICTED = "memory/activations_predicted(GiB)"
MFU = "throughput/mfu(%)"


class Model(NamedTuple):
    """A recipe as one GPU trains it: its file, layers and sequences of 4096 tokens a step."""

    config: str
    layers: int
    sequences: int


SEQ_LEN = 4096
MODELS = {
    "7b_proxy": Model("moe_7b.toml", 8, 6),
    "1.4b_k2": Model("moe_1p4b_k2.toml", 18, 8),
    "1.4b_k8": Model("moe_1p4b_k8.toml", 18, 8),
}
# What one GPU without a network changes about every recipe, for stock and ours alike.
COMMON = {
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": 1,
    "parallelism.fsdp_reshard_after_forward": "never",  # nobody shares: gathering twice only copies
    "dataloader.corpus": "python_stdlib",
    "tokenizer.source": "python_stdlib",
    "tokenizer.vocab_size": 4096,  # of the tokenizer; the model keeps its own 50304 entries
    "validator.enable": False,
    "checkpoint.enable": False,
    "activation_checkpoint.kind": "none",
    "metrics.enable_wandb": False,
    "metrics.enable_tensorboard": False,
    "metrics.report": False,
    "model.aux_loss_coeff": 0,
    "model.z_loss_coeff": 0,
    "model.load_balance_coeff": 1e-3,  # stock's balancing; without any, routing collapses
}
MODES = {
    "eager": {"compile.enable": False, "training.disable_cuda_graphs": True},
    "eager+graphs": {"compile.enable": False, "training.disable_cuda_graphs": False},
    "compiled": {"compile.enable": True, "training.disable_cuda_graphs": True},
    "compiled+graphs": {"compile.enable": True, "training.disable_cuda_graphs": False},
}
BLOCKS = {
    "stock": {"model.moe": "stock"},
    "sonic": {"model.backend": "hopper"},
    "sonic rounding": {"model.backend": "hopper", "model.router": "token_rounding"},
    "sonic torch": {"model.backend": "torch"},
}
BALANCES = {"natural": {}, "forced": {"debug.moe_force_load_balance": True}}


class Run(NamedTuple):
    """One training run: its model, what the tables call it, and the options it adds."""

    model: str
    labels: dict[str, str]
    options: dict[str, object]

    @property
    def name(self) -> str:
        words = "_".join((self.model, *self.labels.values()))
        return words.replace(" ", "-").replace(",", "")


def command(run: Run, *, dump: Path) -> list[str]:
    """The command line of a run: a single process, so torchrun would add only its start."""
    config = ROOT / "configs" / MODELS[run.model].config
    words = [sys.executable, "-m", "sonicmoe_titan.train", "--job.config_file", str(config)]
    return words + option_words(COMMON | run.options | {"dump_folder": str(dump)})


def option_words(options: dict[str, object]) -> list[str]:
    """Keys and values as words of a command line."""
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
    ]


def sizes(model: str, *, steps: int, layers: int | None, sequences: int | None) -> dict:
    """Options for a number of steps; layers and sequences are the model's own if None."""
    own = MODELS[model]
    batch = sequences or own.sequences
    return {
        "model.num_layers": layers or own.layers,
        "training.local_batch_size": batch,
        "training.global_batch_size": batch,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": max(1, steps // 10),
    }


def run_alone(words: list[str], log: Path, *, timeout_s: float, **variables: str) -> int | None:
    """Exit code of a training process that needs no launcher; None when it ran out of time."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]  # that nobody listens on
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = python_environment() | ranks | {"MASTER_PORT": str(port)} | variables
    with log.open("w") as output:
        try:
            return subprocess.run(
                words,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def train(run: Run, folder: Path, timeout_s: float) -> list[dict]:
    """The run's records by step; prints what went wrong and returns nothing if it failed.

    The last record gets the seconds of the whole run as `wall_s`.
    """
    dump = folder / run.name
    (dump / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier run of the name
    log = folder / f"{run.name}.log"
    started = time.monotonic()
    code = run_alone(command(run, dump=dump), log, timeout_s=timeout_s)
    seconds = time.monotonic() - started
    if code != 0:
        print(f"{run.name}: ended with {code} after {seconds:.0f} s, see {log}", flush=True)
        return []
    lines = (dump / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "step" in record]
    records[-1]["wall_s"] = seconds
    return records
