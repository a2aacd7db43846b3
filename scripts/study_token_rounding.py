#!/usr/bin/env python3
"""Does token rounding keep quality? Train the same small model with every routing; compare.

    python scripts/study_token_rounding.py cpu                    # one core, minutes a run
    python scripts/study_token_rounding.py h100 --seconds 540 --concurrent 4 --folders CORPUS
    python scripts/study_token_rounding.py report                 # tables and figures again

Every arm and seed is a run of the project's trainer. All arms of a seed with the same experts start
from the same weights and read the same sequences in the same order. A record is appended after each
run, and runs that have one are left out: an interrupted study goes on where it stopped. Groups of
arms run in turn, seed after seed: whatever the time allows, the main arms come first and whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.facts import commit
from bench.train_runs import option_words, run_alone
from study_arms import STUDIES, Arm, Study
from study_report import write_report

from sonicmoe_titan.model_args import ModelArgs, parameter_counts
from sonicmoe_titan.runlog import TRAIN_LOSS, VALIDATION_LOSS, Run, read_run
from sonicmoe_titan.shards import open_shard
from sonicmoe_titan.toml_config import load_config

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks" / "token_rounding.json"
LAST_LOSSES = 5  # logged windows in the last training loss
SHOWN_LINES = 5  # of a failed run's log
MAX_EPOCHS = 4
CORPUS_BYTES = 350_000_000  # of study_corpus.py's text: 100 million tokens, and sooner tokenised


class Records:
    """The list of records in one JSON file; every `add` leaves a whole file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict]:
        return json.loads(self.path.read_text()) if self.path.is_file() else []

    def add(self, record: dict) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps([*self.read(), record], indent=1) + "\n")
            partial.replace(self.path)


@dataclass(frozen=True)
class Job:
    """One run: what its record will be known by."""

    study: str
    arm: Arm
    seed: int
    tokens: int

    @property
    def key(self) -> tuple:
        return (self.study, self.arm.name, self.seed, self.tokens)


def record_key(record: dict) -> tuple:
    return tuple(record[name] for name in ("study", "arm", "seed", "tokens"))


def pending(jobs: list[Job], records: list[dict]) -> list[Job]:
    """The jobs without a record."""
    done = {record_key(record) for record in records}
    return [job for job in jobs if job.key not in done]


def train(job: Job, options: dict[str, object], work: Path, slot: int, timeout_s: float) -> bool:
    """Run a job in a process of its own, on GPU `slot`; whether it ended well.

    A single process, so torchrun would add only its start.
    """
    name = f"{job.arm.name}-seed{job.seed}"
    words = [sys.executable, "-m", "sonicmoe_titan.train", "--job.config_file"]
    words += [str(STUDIES[job.study].config), *option_words(options)]
    gpus = visible_gpus()
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    (Path(str(options["dump_folder"])) / "metrics.jsonl").unlink(missing_ok=True)
    log = work / f"{name}.log"
    code = run_alone(words, log, timeout_s=timeout_s, **gpu)
    if code != 0:
        ended = "the time limit" if code is None else code
        end = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        print(f"{name}: ended with {ended}, see {log}\n{end}", flush=True)
    return code == 0


def prepare_corpus(study: Study, options: dict[str, object], tokens: int) -> dict[str, object]:
    """Tokenise what the runs will read; what a record says of it.

    Raises ValueError when a run would read the training text more than MAX_EPOCHS times.
    """
    config = load_config(study.config, option_words(options))
    data = config.dataloader
    shard = open_shard(
        data.corpus,
        "train",
        config.tokenizer.build(tokenizer_path=config.hf_assets_path),
        folders=data.folders,
        max_bytes=data.max_bytes,
        validation_fraction=data.validation_fraction,
    )
    found = shard.manifest["tokens"]
    if tokens > MAX_EPOCHS * found:
        raise ValueError(
            f"--tokens {tokens}: the corpus has {found} training tokens, give at most "
            f"{MAX_EPOCHS} times as many"
        )
    return {"corpus": data.corpus, "corpus_key": shard.manifest["key"], "corpus_tokens": found}


def summarise(job: Job, run: Run, seconds: float) -> dict:
    """The record of a finished run."""
    steps, losses = run.series(VALIDATION_LOSS)
    total, active = parameter_counts(ModelArgs(**run.header["config"]["model"]))
    numbers = {
        name: statistics.mean(values) if (values := run.series(f"moe/{name}")[1]) else None
        for name in ("rows_added", "rows_dropped", "padding_waste", "max_over_mean_load")
    }
    return {
        "study": job.study,
        "arm": job.arm.name,
        "seed": job.seed,
        "tokens": job.tokens,
        "rows_per_expert": job.arm.rows_per_expert,
        "microbatch_tokens": job.arm.microbatch_tokens(),
        "step_tokens": STUDIES[job.study].step_tokens,
        "steps": run.training[-1]["step"],
        "validation_steps": steps,
        "validation_losses": losses,
        "validation_loss": losses[-1],
        "validation_ppl": run.last("validation_metrics/perplexity"),
        "bits_per_byte": run.last("validation_metrics/bits_per_byte"),
        "train_loss": statistics.mean(run.series(TRAIN_LOSS)[1][-LAST_LOSSES:]),
        **numbers,
        "tokens_per_s": run.last("throughput_average/tokens_per_second_per_gpu"),
        "seconds": round(seconds, 1),
        "parameters": total,
        "active_parameters": active,
        "device": run.header["device"],
        "versions": run.header["versions"],
        "date": datetime.date.today().isoformat(),
    }


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def run_study(arguments: argparse.Namespace) -> None:
    """All pending jobs, `--concurrent` at a time; starts none that would not end in time."""
    study, records = STUDIES[arguments.what], Records(arguments.records)
    tokens = arguments.tokens or study.tokens
    jobs = [
        Job(arguments.what, arm, seed, tokens)
        for name in arguments.arms or study.groups
        for seed in arguments.seeds
        for arm in study.groups.get(name) or [Arm.parse(name)]
    ]
    extra = dict(option.split("=", 1) for option in arguments.set)
    if arguments.folders:
        extra |= corpus_options(arguments.folders)
    todo = pending(jobs, records.read())
    options = {job: study.run_options(job.arm, job.seed, tokens) | extra for job in todo}
    print(f"{len(todo)} of {len(jobs)} runs to do", flush=True)
    if not todo:
        return
    started, longest = time.monotonic(), 0.0
    common = prepare_corpus(study, options[todo[0]], tokens)
    common |= {"options": extra, "concurrent": arguments.concurrent, "commit": commit()}
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(arguments.concurrent):
        slots.put(slot)

    def work(job: Job) -> None:
        nonlocal longest
        name = f"{job.arm.name}-seed{job.seed}"
        began = time.monotonic()
        left = arguments.seconds - (began - started)
        if left <= longest:
            print(f"{name}: no time left", flush=True)
            return
        slot, folder = slots.get(), arguments.work / arguments.what / name
        run_options = options[job] | {"dump_folder": folder}
        try:
            if not train(job, run_options, arguments.work, slot, left):
                return
        finally:
            slots.put(slot)
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        record = summarise(job, read_run(folder), seconds) | common
        records.add(record)
        print(
            f"{name}: perplexity {record['validation_ppl']:.3f}, "
            f"{record['tokens_per_s']:,.0f} tokens/s, {seconds:.0f} s",
            flush=True,
        )

    with ThreadPoolExecutor(arguments.concurrent) as pool:
        list(pool.map(work, todo))


def corpus_options(folder: Path) -> dict[str, object]:
    """Keys that read CORPUS_BYTES of a corpus that study_corpus.py has made, with its tokenizer."""
    keys = {"corpus": "folders", "folders": str(folder / "text"), "max_bytes": CORPUS_BYTES}
    options = {f"dataloader.{key}": value for key, value in keys.items()}
    options |= {f"validator.dataloader.{key}": value for key, value in keys.items()}
    return options | {"hf_assets_path": str(folder / "tokenizer")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*STUDIES, "report"))
    parser.add_argument("--arms", nargs="+", help="groups, or nearest-e64k4-tile128-ratio4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, help="of one run; the study's own otherwise")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--concurrent", type=int, default=1, help="runs at a time, over all GPUs")
    parser.add_argument("--folders", type=Path, help="corpus made by study_corpus.py")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "token_rounding")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what != "report":
        try:
            run_study(arguments)
        except ValueError as error:
            parser.error(str(error))
    write_report(Records(arguments.records).read(), arguments.docs)


if __name__ == "__main__":
    main()
