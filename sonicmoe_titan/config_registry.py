"""Recipes: functions without arguments that return a run's defaults, one per TOML in configs/."""

import torch
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import TrainingConfig

from sonicmoe_titan.checkpoint import SonicCheckpointManager
from sonicmoe_titan.data import TextDataLoader
from sonicmoe_titan.metrics import SonicMetrics
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.optimizer import AdamW
from sonicmoe_titan.tokenizer import TextTokenizer
from sonicmoe_titan.trainer import SonicTrainer
from sonicmoe_titan.validate import SonicValidator

__all__ = ["debug"]


def debug() -> SonicTrainer.Config:
    """Learns real text on any machine in minutes."""
    return SonicTrainer.Config(
        model=ModelArgs(
            num_layers=4,
            dim=128,
            num_heads=4,
            expert_dim=64,
            num_experts=16,
            top_k=4,
            vocab_size=1024,
            router="token_rounding",
            rounding_tile=32,
            aux_loss_coeff=0.01,
        ),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()),
        hf_assets_path="",
        metrics=SonicMetrics.Config(log_freq=10),
        tokenizer=TextTokenizer.Config(vocab_size=1024),
        dataloader=TextDataLoader.Config(),
        optimizer=AdamW.Config(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=10, decay_type="cosine"),
        training=TrainingConfig(
            local_batch_size=4,
            seq_len=128,
            steps=200,
            mixed_precision_param="bfloat16" if torch.cuda.is_available() else "float32",
            disable_cuda_graphs=True,
        ),
        checkpoint=SonicCheckpointManager.Config(interval=100),
        validator=SonicValidator.Config(enable=True, freq=50),
        activation_checkpoint=None,
    )
