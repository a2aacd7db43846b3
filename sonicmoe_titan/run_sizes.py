"""Sizes of a run that follow from its keys: ranks, tokens of a microbatch, and all in a line."""

from sonicmoe_titan.model_args import parameter_counts
from sonicmoe_titan.trainer import SonicTrainer


def summary(config: SonicTrainer.Config, num_processes: int | None) -> str:
    """A run in one line: model, processes, steps and tokens; further ones warn."""
    total, active = parameter_counts(config.model)
    sequences = config.training.global_batch_size
    if sequences < 0:
        sequences = config.training.local_batch_size * (data_ranks(config, num_processes) or 1)
    tokens = sequences * config.training.seq_len
    processes = "process" if num_processes == 1 else "processes"
    machines = f"{num_processes} {processes}, " if num_processes else ""
    return (
        f"{_count(total)} parameters ({_count(active)} active), {config.model.router}, {machines}"
        f"{config.training.steps} steps of {tokens:,} tokens"
        f"{_few_rows(config)}{_other_text(config)}"
    )


def _few_rows(config: SonicTrainer.Config) -> str:
    """Another line when token rounding has less than a tile of rows per expert to round."""
    model, tokens = config.model, microbatch_tokens(config)
    rows, tile = tokens * model.top_k / model.num_experts, model.rounding_tile
    if model.router != "token_rounding" or rows >= tile:
        return ""
    return (
        f"\nwarning: a microbatch of {tokens:,} tokens gives an expert {rows:.0f} rows on average, "
        f"less than a tile (model.rounding_tile = {tile}): rounding empties many experts; give a "
        "microbatch more tokens, best two tiles of rows or more, or lower the tile"
    )


def _other_text(config: SonicTrainer.Config) -> str:
    """Another line when what is held out is not of the text that is trained on."""
    trained = getattr(config.dataloader, "corpus", None)
    held_out = getattr(config.validator.dataloader, "corpus", None)
    if not config.validator.enable or trained == held_out:
        return ""
    return (
        f"\nwarning: training reads {trained}, validation {held_out} "
        "(validator.dataloader.corpus): the held-out loss is of another text"
    )


def data_ranks(config: SonicTrainer.Config, num_processes: int | None) -> int | None:
    """Ranks that read different data, or None when that depends on the number of processes."""
    p = config.parallelism
    shard = p.data_parallel_shard_degree
    if shard < 0:
        if num_processes is None:
            return None
        shard = num_processes // fixed_degree(config)
    return p.data_parallel_replicate_degree * shard


def microbatch_tokens(config: SonicTrainer.Config) -> int:
    """Tokens T that one MoE block routes at a time on one rank."""
    p, training = config.parallelism, config.training
    sequences = training.local_batch_size
    if p.pipeline_parallel_degree > 1:
        sequences = p.pipeline_parallel_microbatch_size
    tokens = sequences * training.seq_len // p.context_parallel_degree
    if p.expert_parallel_degree > 1 and p.enable_sequence_parallel:
        tokens //= p.tensor_parallel_degree  # the block's tokens stay sharded over TP
    return tokens


def fixed_degree(config: SonicTrainer.Config) -> int:
    """Product of the degrees that cannot be negative."""
    p = config.parallelism
    return (
        p.data_parallel_replicate_degree
        * p.context_parallel_degree
        * p.tensor_parallel_degree
        * p.pipeline_parallel_degree
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
