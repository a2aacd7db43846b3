"""A tiny run of the real trainer on real text: seconds on one core."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.trainer import Trainer

import sonicmoe_titan  # prepares TorchTitan for the CPU  # noqa: F401
from sonicmoe_titan.checkpoint import SonicCheckpointManager
from sonicmoe_titan.data import TextDataLoader
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.optimizer import AdamW
from sonicmoe_titan.tokenizer import TextTokenizer
from sonicmoe_titan.trainer import SonicTrainer
from sonicmoe_titan.validate import SonicValidator

ARGS = ModelArgs(
    num_layers=2,
    dim=32,
    num_heads=2,
    expert_dim=16,
    num_experts=8,
    top_k=2,
    vocab_size=512,
    rounding_tile=8,
)
TOKENIZER = TextTokenizer.Config(vocab_size=512, train_bytes=200_000)
DATA = TextDataLoader.Config(max_bytes=1_000_000, validation_fraction=0.1)
VALIDATION = dataclasses.replace(DATA, split="validation")


def forget_meshes() -> None:
    """Drop DTensor's cache: equal meshes of two runs are two objects, it hands out the older."""
    _clear_sharding_prop_cache()


class TinyTrainer(SonicTrainer):
    """The trainer inside a process group that outlives it, noting every step's mean loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(SonicTrainer.Config):
        pass

    def init_distributed(self) -> ParallelDims:
        self.losses: dict[int, float] = {}
        forget_meshes()
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)
        total = loss.detach().double().clone()
        dist.all_reduce(total)
        self.losses[self.step] = self.losses.get(self.step, 0.0) + total.item()
        return loss


def config(
    folder: Path,
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    parallelism: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    **trainer: Any,
) -> TinyTrainer.Config:
    """Return a run in float32 that writes to `folder`."""
    defaults: dict[str, Any] = {
        "loss": CrossEntropyLoss.Config(),
        "metrics": MetricsProcessor.Config(log_freq=1),
        "hf_assets_path": "",
        "tokenizer": TOKENIZER,
        "dataloader": DATA,
        "optimizer": AdamW.Config(lr=1e-2),
        "lr_scheduler": LRSchedulersContainer.Config(warmup_steps=2, total_steps=100),
        "activation_checkpoint": None,
        "debug": DebugConfig(seed=1),
        "validator": SonicValidator.Config(dataloader=VALIDATION),
    }
    run = {"local_batch_size": 2, "seq_len": 64, "steps": 3, "disable_cuda_graphs": True}
    run |= {"mixed_precision_param": "float32"} | (training or {})
    saving = {"enable": checkpoint is not None, **(checkpoint or {})}
    return TinyTrainer.Config(
        model=dataclasses.replace(ARGS, **(model or {})),
        dump_folder=str(folder),
        training=TrainingConfig(**run),
        parallelism=ParallelismConfig(**(parallelism or {})),
        checkpoint=SonicCheckpointManager.Config(**saving),
        **(defaults | trainer),
    )


@dataclass
class Recorder(BaseLogger):
    """Keeps what would go to wandb and TensorBoard."""

    logged: dict[int, dict[str, Any]] = field(default_factory=dict)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.setdefault(step, {}).update(metrics)


@dataclass(frozen=True)
class Result:
    """What a run left behind: global loss of every step, digest of its state, logged metrics."""

    losses: dict[int, float]
    digest: str
    logged: dict[int, dict[str, Any]]


def train(run: Trainer.Config) -> Result:
    """Train from the newest checkpoint to the last step."""
    trainer = run.build()
    trainer.metrics_processor.logger = recorder = Recorder()
    with mock.patch("time.sleep"):  # rank 0 waits two seconds for ranks that are long done
        trainer.train()
    trainer.close()
    return Result(getattr(trainer, "losses", {}), digest(trainer), recorder.logged)


def digest(trainer: Trainer) -> str:
    """Return a hash of this rank's parameters, buffers and optimizer state."""
    sha = hashlib.sha256()
    for part in trainer.model_parts:
        for name, value in sorted(part.state_dict().items()):
            sha.update(name.encode() + _bytes(value))
    for name, value in sorted(trainer.optimizers.state_dict().items()):
        sha.update(name.encode() + _bytes(value))
    return sha.hexdigest()


def _bytes(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return repr(value).encode()
    local = getattr(value, "_local_tensor", value).detach().contiguous().cpu()
    return local.view(torch.uint8).numpy().tobytes() if local.ndim else repr(local).encode()
