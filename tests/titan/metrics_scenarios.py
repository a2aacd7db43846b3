"""What the tests of the metrics run on two ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sonicmoe_titan.metrics import SonicMetrics
from sonicmoe_titan.routing_metrics import Gathered, gather_stats
from sonicmoe_titan.stats import RouterStats
from tests.titan import tiny

NUM_EXPERTS = 4


def model_with_stats(layer_ids: list[int], *, seed: int) -> nn.Module:
    """Blocks whose routers counted something; a layer depends on `seed` and its id."""
    part = nn.Module()
    part.layers = nn.ModuleDict()
    for layer_id in layer_ids:
        generator = torch.Generator().manual_seed(100 * seed + layer_id)
        stats = RouterStats(NUM_EXPERTS)
        stats.values_V.copy_(torch.rand(len(stats.NAMES), generator=generator))
        stats.load_E.copy_(torch.rand(NUM_EXPERTS, generator=generator))
        block = nn.Module()
        block.moe = nn.Module()
        block.moe.stats = stats
        part.layers[str(layer_id)] = block
    return part


def gather_and_train(folder: Path) -> tuple[tuple[Gathered, Gathered, float], tuple[str, int]]:
    """Both scenarios in one start of the ranks."""
    return _gather_replicated_and_staged(), _train_with_metrics(folder)


def _gather_replicated_and_staged() -> tuple[Gathered, Gathered, float]:
    """Both ranks hold both layers; then rank 0 holds layer 1 and rank 1 layer 3 of a pipeline."""
    rank, cpu = dist.get_rank(), torch.device("cpu")
    replicated = model_with_stats([0, 1], seed=rank)
    both = gather_stats([replicated], cpu)
    left = sum(
        float(stats.values_V.abs().sum() + stats.load_E.sum())
        for stats in (block.moe.stats for block in replicated.layers.values())
    )
    staged = gather_stats([model_with_stats([2 * rank + 1], seed=7)], cpu)
    assert both is not None and staged is not None
    assert gather_stats([nn.Module()], cpu) is None
    return both, staged, left


def _train_with_metrics(folder: Path) -> tuple[str, int]:
    """A short run with token rounding and validation, all loggers on."""
    run = tiny.config(
        folder / "run",
        model={"router": "token_rounding", "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
        training={"steps": 8},
        metrics=SonicMetrics.Config(
            log_freq=2, warmup_steps=2, enable_tensorboard=True, enable_wandb=True
        ),
    )
    run.validator.enable, run.validator.freq, run.validator.steps = True, 4, 1
    trainer = run.build()
    trainer.train()
    trainer.close()
    tokens = trainer.ntokens_seen * dist.get_world_size()
    return str(folder / "run"), tokens
