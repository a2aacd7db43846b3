"""`sonicmoe check CONFIG`: everything about a run that can be known without building it."""

import os
import shutil
from pathlib import Path

import torch
from torch.distributed.pipelining.schedules import get_schedule_class

from sonicmoe_titan.corpus import LOCAL_CORPORA
from sonicmoe_titan.hf_adapter import SonicStateDictAdapter
from sonicmoe_titan.run_sizes import data_ranks, fixed_degree, microbatch_tokens, summary
from sonicmoe_titan.tokenizer import TextTokenizer
from sonicmoe_titan.toml_config import Command
from sonicmoe_titan.trainer import SonicTrainer

USAGE = "usage: sonicmoe check CONFIG [--nproc PROCESSES] [--print-config] [--KEY VALUE ...]"


def main(argv: list[str]) -> int:
    """Print one line about a valid run; ConfigError (a ValueError) on an invalid one."""
    command = Command.parse(argv, usage=USAGE)
    config = load_checked(command, num_processes=command.num_processes)
    if command.print_config:
        print(command.resolved(config), end="")
    else:
        print(f"{command.config_file}: ok: {summary(config, command.num_processes)}")
    return 0


def load_checked(command: Command, *, num_processes: int | None) -> SonicTrainer.Config:
    """The configuration of a command line, checked; ConfigError names the place of the mistake."""
    config = command.load()
    try:
        check_run(config, num_processes=num_processes)
    except ValueError as error:
        raise command.located(error) from None
    return config


def check_run(config: SonicTrainer.Config, *, num_processes: int | None) -> None:
    """Raise ValueError on the first thing that would stop the run.

    Args:
        config: as `load_config` returns it, so keys and types are right.
        num_processes: the world size, or None when the run is for another machine; then nothing
            about this machine is checked.
    """
    _check_numbers(config)
    _check_mesh(config, num_processes)
    _check_model_on_mesh(config)
    _check_batch(config, num_processes)
    _check_tile(config)
    _check_vocabulary(config)
    _check_paths(config)
    if config.checkpoint.last_save_in_hf or config.checkpoint.initial_load_in_hf:
        # pyrefly: ignore[missing-attribute]
        SonicStateDictAdapter(config.model_spec.model, None).architecture()
    if num_processes is not None:
        _check_machine(config)


def _check_numbers(config: SonicTrainer.Config) -> None:
    for table, keys in {
        "training": ("local_batch_size", "seq_len", "steps", "max_norm", "gc_freq"),
        "parallelism": (
            "data_parallel_replicate_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "context_parallel_degree",
            "expert_parallel_degree",
        ),
    }.items():
        for key in keys:
            value = getattr(getattr(config, table), key)
            if value <= 0:
                raise ValueError(f"{table}.{key} = {value}: expected a number above 0")
    warmup = config.lr_scheduler.warmup_steps
    if warmup < 0:
        raise ValueError(f"lr_scheduler.warmup_steps = {warmup}: expected 0 or more")
    shard = config.parallelism.data_parallel_shard_degree
    if shard == 0 or shard < -1:
        raise ValueError(
            f"parallelism.data_parallel_shard_degree = {shard}: expected a number above 0, "
            "or -1 for the ranks that are left"
        )


def _check_mesh(config: SonicTrainer.Config, num_processes: int | None) -> None:
    p = config.parallelism
    fixed, shard = fixed_degree(config), p.data_parallel_shard_degree
    if num_processes is None:
        return
    if shard < 0 and num_processes % fixed:
        raise ValueError(
            f"parallelism: the degrees ask for a multiple of {fixed} processes, there are "
            f"{num_processes}"
        )
    if shard > 0 and fixed * shard != num_processes:
        raise ValueError(
            f"parallelism: replicate {p.data_parallel_replicate_degree} x shard {shard} x context "
            f"{p.context_parallel_degree} x tensor {p.tensor_parallel_degree} x pipeline "
            f"{p.pipeline_parallel_degree} = {fixed * shard} processes, there are {num_processes}: "
            "start that many, or set parallelism.data_parallel_shard_degree = -1 and fewer replicas"
        )


def _check_model_on_mesh(config: SonicTrainer.Config) -> None:
    p, model = config.parallelism, config.model
    tp, ep, pp = (
        p.tensor_parallel_degree,
        p.expert_parallel_degree,
        p.pipeline_parallel_degree,
    )
    if model.num_experts % ep:
        raise ValueError(
            f"parallelism.expert_parallel_degree = {ep} does not divide model.num_experts = "
            f"{model.num_experts}"
        )
    for key, value in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if value % tp:
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {tp} does not divide model.{key} = {value}"
            )
    if ep == 1 and model.expert_dim % (8 * tp):
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {tp} splits model.expert_dim = "
            f"{model.expert_dim} into parts that are no multiple of 8"
        )
    parts = (tp if p.enable_sequence_parallel else 1) * p.context_parallel_degree
    parts *= 2 if p.context_parallel_degree > 1 else 1
    if config.training.seq_len % parts:
        raise ValueError(
            f"training.seq_len = {config.training.seq_len}: expected a multiple of {parts} for "
            "this tensor and context parallelism"
        )
    causal = model.attention in ("auto", "sdpa") and p.spmd_backend == "partial_dtensor"
    if p.context_parallel_degree > 1 and model.attention != "flex" and not causal:
        raise ValueError(
            f'model.attention = "{model.attention}" does not work with context parallelism here: '
            'use "flex", or "sdpa" with parallelism.spmd_backend = "partial_dtensor"'
        )
    if pp > 1 and model.tie_embeddings:
        raise ValueError(
            "model.tie_embeddings = true does not work with pipeline parallelism (first and last "
            "stage would share a matrix): set it to false"
        )
    if pp > 1:
        _check_schedule(p.pipeline_parallel_schedule)
    if pp > model.num_layers:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {pp} is more than model.num_layers = "
            f"{model.num_layers}"
        )


def _check_schedule(name: str) -> None:
    try:
        get_schedule_class(name)
    except ValueError as error:
        key = "parallelism.pipeline_parallel_schedule"
        raise ValueError(f'{key} = "{name}": {error}') from None


def _check_batch(config: SonicTrainer.Config, num_processes: int | None) -> None:
    training, ranks = config.training, data_ranks(config, num_processes)
    if num_processes is not None:
        p = config.parallelism
        sparse = num_processes // (p.data_parallel_replicate_degree * p.pipeline_parallel_degree)
        if sparse % p.expert_parallel_degree:
            raise ValueError(
                f"parallelism.expert_parallel_degree = {p.expert_parallel_degree}: expected a "
                f"divisor of {sparse}, the processes of one replica and stage"
            )
    if training.global_batch_size < 0 or ranks is None:
        return
    together = training.local_batch_size * ranks
    if training.global_batch_size == 0 or training.global_batch_size % together:
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size}: expected -1 or a multiple "
            f"of {together} (training.local_batch_size = {training.local_batch_size} on {ranks} "
            "data-parallel ranks)"
        )


def _check_tile(config: SonicTrainer.Config) -> None:
    model, tokens = config.model, microbatch_tokens(config)
    if model.router == "token_rounding" and model.rounding_tile > tokens:
        raise ValueError(
            f"model.rounding_tile = {model.rounding_tile} is more than the {tokens} tokens of a "
            "microbatch: lower it, or raise training.local_batch_size"
        )


def _check_vocabulary(config: SonicTrainer.Config) -> None:
    tokenizer, entries = config.tokenizer, config.model.vocab_size
    if not isinstance(tokenizer, TextTokenizer.Config) or config.hf_assets_path:
        return
    if tokenizer.source in LOCAL_CORPORA and tokenizer.vocab_size > entries:
        raise ValueError(
            f"tokenizer.vocab_size = {tokenizer.vocab_size} is more than model.vocab_size = "
            f"{entries}: raise model.vocab_size or lower tokenizer.vocab_size"
        )


def _check_paths(config: SonicTrainer.Config) -> None:
    paths = {
        "hf_assets_path": config.hf_assets_path,
        "dataloader.dataset_path": config.dataloader.dataset_path,
        "checkpoint.initial_load_path": config.checkpoint.initial_load_path,
    }
    tables: dict[str, object] = {
        "tokenizer": config.tokenizer,
        "dataloader": config.dataloader,
    }
    if config.validator.enable:
        tables["validator.dataloader"] = config.validator.dataloader
        # pyrefly: ignore[missing-attribute]
        paths["validator.dataloader.dataset_path"] = config.validator.dataloader.dataset_path
    for table, keys in tables.items():
        for index, folder in enumerate(getattr(keys, "folders", ())):
            paths[f"{table}.folders[{index}]"] = folder
    for key, path in paths.items():
        if path and "://" not in path and not Path(path).exists():
            raise ValueError(f'{key} = "{path}": no such path')
    folder = Path(config.dump_folder).absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f'dump_folder = "{config.dump_folder}": {folder} is no folder to write to')


def _check_machine(config: SonicTrainer.Config) -> None:
    from sonicmoe_kernels.backends import resolve_backend

    on_gpu = torch.cuda.is_available()
    model, compile_config = config.model, config.compile
    if not on_gpu and model.attention in ("flex", "varlen"):
        raise ValueError(
            f'model.attention = "{model.attention}" needs a GPU, there is none: use sdpa or auto'
        )
    if not on_gpu and config.parallelism.context_parallel_degree > 1:
        raise ValueError(
            f"parallelism.context_parallel_degree = {config.parallelism.context_parallel_degree} "
            "needs GPUs, there is none: its attention has no CPU kernels"
        )
    precision = config.training.mixed_precision_param
    if on_gpu and model.moe == "sonic" and precision != "bfloat16":
        raise ValueError(
            f'training.mixed_precision_param = "{precision}": the experts on a GPU multiply in '
            'bfloat16 (parameters and sums stay in training.dtype): set it to "bfloat16"'
        )
    if model.backend == "hopper":
        device = torch.device("cuda" if on_gpu else "cpu")
        width = model.expert_dim
        if config.parallelism.expert_parallel_degree == 1:
            width //= config.parallelism.tensor_parallel_degree
        try:
            resolve_backend("hopper", device, torch.bfloat16, model.dim, width)
        except ValueError as error:
            raise ValueError(f'model.backend = "hopper": {error}') from None
    inductor = compile_config.enable and compile_config.backend == "inductor"
    if inductor and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise ValueError(
            'compile.backend = "inductor" needs a C++ compiler, there is none: install one, or use '
            '"aot_eager"'
        )
