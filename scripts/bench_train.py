#!/usr/bin/env python3
"""Train the 7B proxy on one GPU with our MoE block and with stock TorchTitan's; compare.

    python scripts/bench_train.py speed --out docs/benchmarks
    python scripts/bench_train.py losses --out docs/benchmarks
    python scripts/bench_train.py profile --modes compiled+graphs --blocks sonic --routing forced

The proxy is configs/moe_7b.toml with fewer layers. `speed` alternates rounds of short runs: both
blocks, eager and compiled, with and without CUDA graphs, natural and forced-balanced routing; same
data, loss, optimizer, metrics; no activation checkpointing, no auxiliary losses (stock has none).
`losses` trains the backends hopper and torch from one seed, and torch again from weights that
differ in their last bits: what rounding alone does to a loss curve. `profile` traces one step of
each combination and sums its GPU time by kind of kernel.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "moe_7b.toml"
TOKENS_PER_S = "throughput/tokens_per_second_per_gpu"
LOSS = "loss_metrics/global_avg_loss"
MEMORY = "memory/max_reserved(GiB)"
ACTIVE_MEMORY = "memory/max_active(GiB)"
MFU = "throughput/mfu(%)"
PROXY = {
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": 1,
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
    "sonic": {"model.backend": "hopper"},
    "sonic rounding": {"model.backend": "hopper", "model.router": "token_rounding"},
    "sonic torch": {"model.backend": "torch"},
    "stock": {"model.moe": "stock"},
}
ROUTINGS = {"natural": {}, "forced": {"debug.moe_force_load_balance": True}}
# Two initialisations that differ by less than bfloat16 resolves: every rounding falls anew.
LOSS_RUNS = {
    "hopper": {"model.backend": "hopper"},
    "torch": {"model.backend": "torch"},
    "torch, other rounding": {"model.backend": "torch", "model.init_std": 0.0200001},
}
# Kinds of GPU work by what its name contains; the first match counts.
KINDS = {
    "experts: grouped GEMMs": r"GroupedGemm|cute(up|down|d_hidden|d_input|grouped)|GroupProblem",
    "experts: aggregation": r"cuteaggregate|Aggregate_object",
    "routing": r"cutetopk|cuteplan|cutemember|cuteround|[Ss]ort|[Ss]can|[Tt]op[Kk]|searchsorted",
    "attention": r"flash|fmha|sdpa|attention",
    "optimizer, gradient norm": r"multi_tensor|adam|lpnorm",
    "other GEMMs": r"nvjet|gemm|xmma|cublas|splitK",
    "compiled pointwise": r"triton_",
    "collectives": r"nccl",
    "copies": r"Memcpy|Memset|copy|fill|FillFunctor|CatArray|split_with",
}


class Run(NamedTuple):
    """One training run: what the tables call it and the options it adds."""

    labels: dict[str, str]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return "_".join(self.labels.values()).replace(" ", "-").replace(",", "")


def command(options: dict[str, object]) -> list[str]:
    """The command line of one run: a single process, so torchrun would add only its start."""
    words = [sys.executable, "-m", "sonicmoe_titan.train", "--job.config_file", str(CONFIG)]
    for key, value in options.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def train(run: Run, folder: Path, timeout_s: float) -> list[dict]:
    """The run's records by step; prints what went wrong and returns nothing if it failed."""
    dump = folder / run.name
    options = PROXY | run.options | {"dump_folder": str(dump)}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = os.environ | ranks | {"MASTER_PORT": str(free_port())}
    started = time.monotonic()
    with (folder / f"{run.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command(options),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - started
    if code != 0:
        print(f"{run.name}: ended with {code} after {seconds:.0f} s, see {log.name}", flush=True)
        return []
    lines = (dump / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def steps(arguments: argparse.Namespace, sequences: int) -> dict[str, object]:
    """Options that every run of this call shares."""
    return {
        "model.num_layers": arguments.layers,
        "training.local_batch_size": sequences,
        "training.global_batch_size": sequences,
        "training.steps": arguments.steps,
        "metrics.log_freq": arguments.log_freq,
        "lr_scheduler.warmup_steps": max(1, arguments.steps // 10),
    }


def speed(arguments: argparse.Namespace) -> None:
    """Rounds over all combinations asked for; medians over the logged windows of all rounds."""
    shared = steps(arguments, sequences=6)
    runs = [
        Run(
            {"block": block, "mode": mode, "routing": routing},
            shared | BLOCKS[block] | MODES[mode] | ROUTINGS[routing],
        )
        for routing in arguments.routing
        for mode in arguments.modes
        for block in arguments.blocks
    ]
    seen: dict[str, list[dict]] = {run.name: [] for run in runs}
    for _ in range(arguments.rounds):
        for run in runs:
            seen[run.name] += train(run, arguments.work, arguments.timeout)
            rows = [summary(r, seen[r.name], arguments) for r in runs if seen[r.name]]
            write(arguments.out / "train_7b_proxy_h100.json", rows)
            if seen[run.name]:
                print(json.dumps(summary(run, seen[run.name], arguments)), flush=True)
    if not any(seen.values()):
        sys.exit("bench_train: no run ended well, see the logs")
    rows = [summary(r, seen[r.name], arguments) for r in runs if seen[r.name]]
    (arguments.out / "train_7b_proxy_h100.md").write_text(speed_table(rows))


def summary(run: Run, records: list[dict], arguments: argparse.Namespace) -> dict:
    """Medians and spread over the windows after the warm-up."""
    windows = [record for record in records if TOKENS_PER_S in record]
    speeds = [record[TOKENS_PER_S] for record in windows]
    return {
        **run.labels,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_windows": speeds,
        "mfu_percent": statistics.median(record[MFU] for record in windows),
        "max_reserved_gib": max(record[MEMORY] for record in records),
        "max_active_gib": max(record[ACTIVE_MEMORY] for record in records),
        "last_loss": records[-1][LOSS],
        "layers": arguments.layers,
        **facts(),
    }


def speed_table(rows: list[dict]) -> str:
    """Markdown: one line a combination, and each block's best beside stock's best."""
    first = rows[0]
    lines = [
        "# Training the 7B proxy on one GPU",
        "",
        f"{first['device']}, torch {first['torch']}, torchtitan {first['torchtitan']}, commit "
        f"{first['commit']}, {first['date']}; `python scripts/bench_train.py speed`. "
        f"{first['layers']} layers of configs/moe_7b.toml, 6 x 4096 tokens a step, bf16 over fp32 "
        "master weights, AdamW, no activation checkpointing, no auxiliary losses. Medians of the "
        "logged windows after the warm-up, rounds of all rows alternating.",
        "",
        "| routing | block | mode | tokens/s | MFU | reserved GiB | active GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['routing']} | {r['block']} | {r['mode']} | {r['tokens_per_s']:,.0f} | "
        f"{r['mfu_percent']:.1f}% | {r['max_reserved_gib']:.1f} | {r['max_active_gib']:.1f} |"
        for r in rows
    ]
    for routing in dict.fromkeys(r["routing"] for r in rows):
        best: dict[str, dict] = {}
        for r in rows:
            if r["routing"] == routing:
                best[r["block"]] = max(
                    best.get(r["block"], r), r, key=lambda row: row["tokens_per_s"]
                )
        if "stock" not in best:
            continue
        stock = best.pop("stock")
        lines += ["", f"{routing} routing, each at its best mode, against stock {stock['mode']}:"]
        lines += [
            f"- {block} ({r['mode']}): {r['tokens_per_s'] / stock['tokens_per_s']:.2f}x the "
            f"tokens/s, {stock['max_reserved_gib'] - r['max_reserved_gib']:.1f} GiB less reserved"
            for block, r in best.items()
        ]
    return "\n".join(lines) + "\n"


def losses(arguments: argparse.Namespace) -> None:
    """Every router and mode with every backend, concurrently; writes curves and their distances."""
    shared = steps(arguments, sequences=1) | {"metrics.log_freq": 1, "debug.seed": 1}
    runs = [
        Run(
            {"router": router, "mode": mode, "run": name},
            shared | {"model.router": router} | MODES[mode] | options,
        )
        for router in ("topk", "token_rounding")
        for mode in arguments.modes
        for name, options in LOSS_RUNS.items()
    ]
    with ThreadPoolExecutor(arguments.concurrent) as pool:
        results = list(pool.map(lambda run: train(run, arguments.work, arguments.timeout), runs))
    rows = [
        {**run.labels, "losses": [r[LOSS] for r in records], "layers": arguments.layers, **facts()}
        for run, records in zip(runs, results, strict=True)
        if records
    ]
    if not rows:
        sys.exit("bench_train: no run ended well, see the logs")
    write(arguments.out / "losses_7b_proxy_h100.json", rows)
    (arguments.out / "losses_7b_proxy_h100.md").write_text(loss_table(rows))
    draw_losses(rows, arguments.out / "losses_7b_proxy_h100.png")


def distances(rows: list[dict], router: str, mode: str) -> dict[str, list[float]]:
    """Absolute difference of the loss to the torch backend's, step by step, for each other run."""
    curves = {r["run"]: r["losses"] for r in rows if (r["router"], r["mode"]) == (router, mode)}
    base = curves.pop("torch", [])
    return {
        name: [abs(a - b) for a, b in zip(curve, base, strict=False)]
        for name, curve in curves.items()
    }


def loss_table(rows: list[dict]) -> str:
    """Markdown: how far each run is from the torch backend's."""
    first = rows[0]
    lines = [
        "# Losses of the Hopper backend beside the torch backend's",
        "",
        f"{first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}; "
        f"`python scripts/bench_train.py losses`. {first['layers']} layers of configs/moe_7b.toml, "
        "4096 tokens a step, real text, one seed. Distance of the loss (nats) to the torch "
        'backend\'s at the same step; "other rounding" is the torch backend from weights that '
        "differ in their last bits.",
        "",
        "| router | mode | run | first step | mean, steps 2-50 | mean, last 50 | last losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for router, mode in dict.fromkeys((r["router"], r["mode"]) for r in rows):
        for name, apart in distances(rows, router, mode).items():
            ends = [
                statistics.mean(r["losses"][-20:])
                for r in rows
                if (r["router"], r["mode"]) == (router, mode) and r["run"] in (name, "torch")
            ]
            lines.append(
                f"| {router} | {mode} | {name} | {apart[0]:.5f} | "
                f"{statistics.mean(apart[1:50]):.5f} | {statistics.mean(apart[-50:]):.5f} | "
                + " / ".join(f"{end:.4f}" for end in ends)
                + " |"
            )
    return "\n".join(lines) + "\n"


def draw_losses(rows: list[dict], path: Path) -> None:
    """Loss curves above, distances to the torch backend below; one column a router and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["router"], r["mode"]) for r in rows))
    colors = dict(zip(LOSS_RUNS, ("#0072B2", "#333333", "#E69F00"), strict=True))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(4 * len(panels), 6), sharex=True, sharey="row", squeeze=False
    )
    for (router, mode), (above, below) in zip(panels, axes.T, strict=True):
        for r in rows:
            if (r["router"], r["mode"]) == (router, mode):
                above.plot(r["losses"], label=r["run"], color=colors[r["run"]], linewidth=1)
        for name, apart in distances(rows, router, mode).items():
            below.semilogy(apart, label=name, color=colors[name], linewidth=0.8)
        above.set_title(f"{router}, {mode}", fontsize=10)
        below.set_xlabel("step")
        below.legend(fontsize=8)
        above.legend(fontsize=8)
    axes[0][0].set_ylabel("loss, nats")
    axes[1][0].set_ylabel("distance to torch, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def profile(arguments: argparse.Namespace) -> None:
    """Milliseconds of GPU time by kind and by kernel for one step of each combination."""
    shared = steps(arguments, sequences=6) | {
        "profiler.enable_profiling": True,
        "profiler.profile_freq": arguments.steps,
    }
    for routing in arguments.routing:
        for mode in arguments.modes:
            for block in arguments.blocks:
                options = shared | BLOCKS[block] | MODES[mode] | ROUTINGS[routing]
                run = Run({"block": block, "mode": mode, "routing": routing}, options)
                train(run, arguments.work, arguments.timeout)
                traces = sorted((arguments.work / run.name).glob("profiling/traces/**/*.json*"))
                if traces:
                    text = profile_table(read_trace(traces[-1])["traceEvents"])
                    (arguments.out / f"profile_{run.name}.txt").write_text(text)
                    print(f"== {run.name}\n{text}", flush=True)


def read_trace(path: Path) -> dict:
    """A trace, compressed or not, whatever its name says."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def profile_table(events: list[dict]) -> str:
    """GPU milliseconds of a trace by kind, and its longest kernels."""
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(e["ts"] for e in work)
    busy, end = 0.0, begin
    for event in sorted(work, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    kinds: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in work:
        matches = (kind for kind, pattern in KINDS.items() if re.search(pattern, event["name"]))
        kind = next(matches, "other")
        kinds[kind] = kinds.get(kind, 0.0) + event["dur"] / 1e3
        kernels.setdefault(event["name"], []).append(event["dur"] / 1e3)
    lines = [f"span {(end - begin) / 1e3:.2f} ms, idle {(end - begin - busy) / 1e3:.2f} ms"]
    lines += [f"{ms:9.2f} ms  {kind}" for kind, ms in sorted(kinds.items(), key=lambda i: -i[1])]
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    lines += [f"{sum(ms):9.3f} ms x{len(ms):<4d} {name[:110]}" for name, ms in longest]
    return "\n".join(lines) + "\n"


def facts() -> dict[str, str]:
    """Where and with what this was measured."""
    from importlib.metadata import version

    import torch

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
        "commit": commit or os.environ.get("SONICMOE_COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "losses", "profile"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, help="default: 40 for speed, 200 for losses")
    parser.add_argument("--log-freq", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--concurrent", type=int, default=2, help="runs of `losses` at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one run")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "bench_train")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or {"speed": 40, "losses": 200, "profile": 20}[arguments.what]
    for folder in (arguments.work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    {"speed": speed, "losses": losses, "profile": profile}[arguments.what](arguments)


if __name__ == "__main__":
    main()
