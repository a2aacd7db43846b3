"""What the tests of the metrics run on two ranks."""

import dataclasses
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from sonicmoe_kernels.moe import moe_experts
from sonicmoe_kernels.routing import RoutingPlan, route_topk, token_rounding_plan
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from sonicmoe_titan.expert_parallel import expert_parallel
from sonicmoe_titan.memory_measure import SavedTensors
from sonicmoe_titan.memory_model import LayerShape, dispatch_terms, experts_terms, total
from sonicmoe_titan.metrics import SonicMetrics
from sonicmoe_titan.model_args import Router
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
        stats.add_entropy(torch.rand((), generator=generator), 1.0)
        block = nn.Module()
        block.moe = nn.Module()
        block.moe.stats = stats
        part.layers[str(layer_id)] = block
    return part


def gather_and_train(
    folder: Path,
) -> tuple[
    tuple[Gathered, Gathered, float],
    tuple[str, int],
    dict[str, tuple[int, int, int]],
    tuple[str, list[str]],
]:
    """All scenarios in one start of the ranks."""
    return (
        _gather_replicated_and_staged(),
        _train_with_metrics(folder),
        _keep_under_ep(),
        _train_a_pipeline(folder),
    )


def _train_a_pipeline(folder: Path) -> tuple[str, list[str]]:
    """The dump folder of a run in two stages, and this rank's lines about losses."""
    run = tiny.config(
        folder / "pipeline",
        model={"tie_embeddings": False},
        training={"steps": 2},
        parallelism={"pipeline_parallel_degree": 2},
        metrics=SonicMetrics.Config(log_freq=1, report=False, disable_color_printing=True),
    )
    run.validator.enable, run.validator.freq, run.validator.steps = True, 2, 1
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        trainer = run.build()
        trainer.train()
        trainer.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    told = ("step:", "validate step:", "held out:")
    return run.dump_folder, [line for line in lines if line.startswith(told)]


def _keep_under_ep() -> dict[str, tuple[int, int, int]]:
    """Expected, bound and measured bytes that the experts keep when two ranks share them."""
    return {router: _keep_with_router(router) for router in ("topk", "token_rounding")}


def _keep_with_router(router: Router) -> tuple[int, int, int]:
    args = dataclasses.replace(tiny.ARGS, router=router)
    expected, bound = (
        LayerShape(args=args, num_tokens=4096, value_bytes=4, expert_parallel=2, load=load)
        for load in ("expected", "bound")
    )
    torch.manual_seed(dist.get_rank())
    routed = route_topk(torch.randn(4096, args.num_experts), top_k=args.top_k, renormalize=True)
    if router == "topk":
        plan = RoutingPlan.from_topk(*routed[:2], num_experts=args.num_experts)
    else:
        plan = token_rounding_plan(*routed, rounding="nearest", tile=args.rounding_tile)
    plan.score_R.requires_grad_()
    e, F, D = expected.local_experts, args.expert_dim, args.dim
    weights = [torch.randn(size).requires_grad_() for size in ((e, F, D), (e, F, D), (e, D, F))]

    def experts(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        return moe_experts(x_TD, *weights, plan)

    x_TD = torch.randn(4096, D, requires_grad=True)
    with SavedTensors(weights) as saved:
        out_TD = expert_parallel(x_TD, plan, experts, group=dist.group.WORLD)
    measured = saved.bytes()
    del out_TD
    kept = [total([*experts_terms(shape), *dispatch_terms(shape)]) for shape in (expected, bound)]
    return kept[0], kept[1], measured


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
    run.validator.enable, run.validator.freq, run.validator.steps = True, 5, 1
    trainer = run.build()
    trainer.train()
    trainer.close()
    tokens = trainer.ntokens_seen * dist.get_world_size()
    return str(folder / "run"), tokens
