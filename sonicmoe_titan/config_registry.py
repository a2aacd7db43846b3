"""Recipes: functions without arguments that return a run's defaults.

`base` is written here. Every file of configs/ is a recipe under its own name, so that another file
can start from it (`[job] recipe = "moe_7b"`) and TorchTitan's command line finds it
(`--module sonicmoe_titan --config moe_7b`).
"""

from pathlib import Path

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

_PACKAGE = Path(__file__).parent
CONFIGS = next(
    (folder for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
"""The folder of this project's TOML files: the repository's, or the installed package's copy."""

RECIPES = ("base", *sorted(file.stem for file in CONFIGS.glob("*.toml")))


def base() -> SonicTrainer.Config:
    """Every component of this project around a small decoder; runs on any machine."""
    return SonicTrainer.Config(
        model=ModelArgs(
            num_layers=4,
            dim=128,
            num_heads=4,
            expert_dim=64,
            num_experts=16,
            top_k=4,
            vocab_size=4096,
        ),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()),
        hf_assets_path="",  # the tokenizer's source decides
        metrics=SonicMetrics.Config(),
        tokenizer=TextTokenizer.Config(),
        dataloader=TextDataLoader.Config(),
        optimizer=AdamW.Config(),
        lr_scheduler=LRSchedulersContainer.Config(decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(
            # a CPU multiplies bfloat16 at half the speed of float32; the experts on a GPU need it
            mixed_precision_param="bfloat16" if torch.cuda.is_available() else "float32",
        ),
        checkpoint=SonicCheckpointManager.Config(),
        validator=SonicValidator.Config(),
        activation_checkpoint=None,
    )


def __getattr__(name: str) -> object:
    """The recipe of a file in configs/."""
    if name not in RECIPES:
        raise AttributeError(f"module {__name__} has no recipe {name}")

    def recipe() -> SonicTrainer.Config:
        from sonicmoe_titan.toml_config import load_config

        return load_config(CONFIGS / f"{name}.toml")

    return recipe


def __dir__() -> list[str]:
    return list(RECIPES)
