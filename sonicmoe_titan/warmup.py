"""`sonicmoe warmup CONFIG`: compile a run's kernels into the shared cache before the job starts."""

import os

from sonicmoe_titan.check import load_checked
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.toml_config import Command
from sonicmoe_titan.trainer import SonicTrainer

USAGE = "usage: sonicmoe warmup CONFIG [--KEY VALUE ...]"


def main(argv: list[str]) -> int:
    """Build what the cache lacks, with a process per core; needs no GPU. 0 when all is there."""
    from sonicmoe_kernels.compile import cache_dir
    from sonicmoe_kernels.warmup import plan_specs, specs, topk_specs, warm_up

    config = load_checked(Command.parse(argv, usage=USAGE), num_processes=None)
    width, experts = local_sizes(config)
    model = config.model
    wanted = specs(d=model.dim, f=width, num_experts=experts, top_k=model.top_k, dtype="bfloat16")
    if model.num_expert_groups is None:  # else torch routes
        wanted += topk_specs(
            num_experts=model.num_experts,
            top_k=model.top_k,
            score_func=model.score_func,
            softmax_order=model.softmax_order,
            renormalize=model.renormalize,
            has_bias=model.load_balance_coeff is not None,
        )
    wanted += plan_specs(
        num_experts=model.num_experts,
        top_k=model.top_k,
        rounding=model.rounding if model.router == "token_rounding" else None,
    )
    warm_up(wanted, jobs=os.cpu_count() or 1)
    print(f"{len(wanted)} kernels in {cache_dir()}")
    return 0


def local_sizes(config: SonicTrainer.Config) -> tuple[int, int]:
    """(expert width, experts) of one rank: tensor parallelism splits F unless experts are split."""
    model: ModelArgs = config.model
    p = config.parallelism
    if p.expert_parallel_degree > 1:
        return model.expert_dim, model.num_experts // p.expert_parallel_degree
    return model.expert_dim // p.tensor_parallel_degree, model.num_experts
