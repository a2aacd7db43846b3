"""AdamW by its numbers: `optimizer.lr` instead of a list of parameter groups."""

import dataclasses
from dataclasses import dataclass

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig


class AdamW(OptimizersContainer):
    """One AdamW over all parameters, or TorchTitan's own parameter groups where they are given."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        lr: float | None = 3e-4
        """Peak learning rate; none when param_groups are given."""
        weight_decay: float = 0.1
        """Decoupled weight decay, on every parameter."""
        beta1: float = 0.9
        """Decay of the first moment."""
        beta2: float = 0.95
        """Decay of the second moment."""
        eps: float = 1e-8
        """Added to the root of the second moment."""

        def __post_init__(self) -> None:
            if (self.lr is None) == (not self.param_groups):
                given = f"{len(self.param_groups)} optimizer.param_groups"
                raise ValueError(
                    f"optimizer.lr = {self.lr or 'none'} with {given}: "
                    'give either a rate, or groups and lr = "none"'
                )
            if self.lr is not None and self.lr <= 0:
                raise ValueError(f"optimizer.lr = {self.lr}: expected a number above 0")

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.lr is not None:
            group = ParamGroupConfig(
                pattern=r".*",
                optimizer_name="AdamW",
                optimizer_kwargs={
                    "lr": config.lr,
                    "betas": (config.beta1, config.beta2),
                    "eps": config.eps,
                    "weight_decay": config.weight_decay,
                },
            )
            config = dataclasses.replace(config, lr=None, param_groups=[group])
        super().__init__(config, model_parts=model_parts)
