"""Real trainers on real gloo process groups, many short runs in one launch.

`launch` starts the ranks once; each rank goes through a list of runs with TorchTitan's own trainer
(its meshes, FSDP, pipeline schedules, checkpointing, optimizer) on random tokens and returns the
losses. Starting Python and importing TorchTitan costs more than the runs themselves.
"""

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import (
    CompileConfig,
    DebugConfig,
    ParallelismConfig,
    TrainingConfig,
    derive,
)
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import (
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)

from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.moe import SonicMoE
from sonicmoe_titan.optimizer import AdamW
from sonicmoe_titan.trainer import SonicTrainer

ARGS = ModelArgs(
    num_layers=2,
    dim=64,
    num_heads=4,
    expert_dim=32,
    num_experts=8,
    top_k=2,
    vocab_size=128,
    rounding_tile=16,
)
SEQ_LEN = 64


class RandomTokens(BaseDataLoader):
    """Random sequences that depend on their number in the run alone, not on how ranks, microbatches
    and accumulation steps share them out: every layout sees the same ones in the same step."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        dp_rank: int,
        dp_world_size: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self.batch_size, self.seq_len = local_batch_size, seq_len
        self.batch, self.stride = dp_rank, dp_world_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            first = self.batch * self.batch_size
            rows = [self._sequence(number) for number in range(first, first + self.batch_size)]
            tokens = torch.stack(rows)
            self.batch += self.stride
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def _sequence(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        # half of the vocabulary never shows up, so that there is something to learn
        return torch.randint(0, ARGS.vocab_size // 2, (self.seq_len + 1,), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return ARGS.vocab_size


class ProbeTrainer(SonicTrainer):
    """The trainer, inside a process group that outlives it, noting every step's global loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(SonicTrainer.Config):
        stock: bool = False

        def __post_init__(self) -> None:
            SonicTrainer.Config.__post_init__(self)
            if self.stock:
                for layer in self.model_spec.model.layers:
                    layer.moe = to_stock(layer.moe)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.losses: list[float] = []
        self.collectives = Collectives()
        for part in self.model_parts:
            set_weights(part)

    def init_distributed(self) -> ParallelDims:
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())

    def train_step(self, data_iterator: Any) -> None:
        self.loss = torch.zeros((), dtype=torch.float64)
        with contextlib.nullcontext() if self.config.compile.enable else self.collectives:
            super().train_step(data_iterator)
        dist.all_reduce(self.loss)
        self.losses.append(self.loss.item() / self.parallel_dims.tp)

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            local = loss.to_local() if isinstance(loss, DTensor) else loss
            self.loss += local.detach().double().sum()
        return loss


COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


class Collectives(TorchDispatchMode):
    """Counts the functional collectives that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name in COLLECTIVES:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def set_weights(model: torch.nn.Module) -> None:
    """Give every parameter values that depend on its name alone, whatever the layout."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


@dataclass(frozen=True)
class Run:
    """One short training run.

    `stock` swaps the blocks for TorchTitan's own; `float32` lets everything compute in float32,
    stock's experts included; `inspect` is called with the trainer after the last step and its
    result is returned too.
    """

    model: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    stock: bool = False
    float32: bool = False
    compiled: bool = False
    steps: int = 3
    inspect: Callable[[ProbeTrainer], Any] | None = None


@dataclass(frozen=True)
class Result:
    losses: list[float]
    collectives: Counter[str] = field(default_factory=Counter)
    inspected: Any = None


def train(run: Run) -> Result:
    """Execute a run on this rank's process group."""
    config = ProbeTrainer.Config(
        stock=run.stock,
        model=dataclasses.replace(ARGS, **run.model),
        loss=CrossEntropyLoss.Config(),
        metrics=MetricsProcessor.Config(log_freq=1),
        tokenizer=NoTokenizer.Config(),
        dataloader=RandomTokens.Config(),
        optimizer=AdamW.Config(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            **{
                "local_batch_size": 2,
                "seq_len": SEQ_LEN,
                "steps": run.steps,
                "disable_cuda_graphs": True,
                "mixed_precision_param": "float32" if run.float32 else "bfloat16",
                **run.training,
            }
        ),
        parallelism=ParallelismConfig(**run.parallelism),
        checkpoint=CheckpointManager.Config(enable=False),
        compile=CompileConfig(enable=run.compiled, backend="aot_eager"),
        **{"activation_checkpoint": None, "debug": DebugConfig(seed=1), **run.trainer},
    )
    experts_forward = GroupedExperts.forward
    if run.float32:
        GroupedExperts.forward = without_bfloat16(experts_forward)
    torch._dynamo.reset()
    # equal meshes of two runs are different objects, and DTensor's cache hands out the older one
    _clear_sharding_prop_cache()
    try:
        trainer = config.build()
        iterator = trainer.batch_generator(trainer.dataloader)
        for _ in range(run.steps):
            trainer.step += 1
            trainer.train_step(iterator)
        inspected = None if run.inspect is None else run.inspect(trainer)
        # a comparison with stock must be one: what ran is what the run says
        blocks = [block for part in trainer.model_parts for block in part.layers.values()]
        overridden = bool(config.override.imports)
        assert all(isinstance(b.moe, SonicMoE) != (run.stock and not overridden) for b in blocks)
        return Result(trainer.losses, trainer.collectives.count, inspected)
    finally:
        GroupedExperts.forward = experts_forward


def to_stock(cfg: SonicMoE.Config) -> MoE.Config:
    """TorchTitan's own block with the same sizes."""
    experts = cfg.routed_experts
    return derive(
        cfg,
        MoE.Config,
        router=derive(
            cfg.router, TokenChoiceTopKRouter.Config, gate=derive(cfg.router.gate, Linear.Config)
        ),
        routed_experts=derive(
            experts,
            RoutedExperts.Config,
            inner_experts=derive(experts.inner_experts, GroupedExperts.Config),
        ),
    )


def without_bfloat16(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stock's experts without their casts: `Tensor.bfloat16` is the identity while they run."""

    def patched(*args: Any, **kwargs: Any) -> torch.Tensor:
        original = torch.Tensor.bfloat16
        torch.Tensor.bfloat16 = lambda self: self
        try:
            return forward(*args, **kwargs)
        finally:
            torch.Tensor.bfloat16 = original

    return patched


def launch(
    runs: dict[str, Run | Callable[[], Any]], *, ranks: int, folder: Path
) -> dict[str, list[Any]]:
    """Train every run, or call every function, on `ranks` processes; name -> one result per rank.

    Once per `folder` even when pytest's workers ask at the same time. A run that fails is returned
    as the traceback's text in place of its results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "rank0.pt"
        if not done.exists():
            _spawn(ranks, folder, runs)
        outcomes = [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]
    return {name: [outcome[name] for outcome in outcomes] for name in runs}


def _spawn(ranks: int, folder: Path, runs: dict[str, Any]) -> None:
    torch.save(runs, folder / "runs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        log = open(folder / f"rank{rank}.log", "w")  # noqa: SIM115
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.titan.distributed", str(folder)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[2],
            )
        )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        tail = (folder / "rank0.log").read_text()[-4000:]
        raise RuntimeError(f"ranks exited with {codes}; the end of rank 0's log:\n{tail}")


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    outcomes = {}
    for name, run in torch.load(folder / "runs.pt", weights_only=False).items():
        try:
            outcomes[name] = train(run) if isinstance(run, Run) else run()
        except Exception:
            outcomes[name] = traceback.format_exc()
            print(name, outcomes[name], flush=True)
    torch.save(outcomes, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # under its importable name, so that what it pickles can be read elsewhere
    from tests.titan import distributed

    distributed._main(Path(sys.argv[1]))
