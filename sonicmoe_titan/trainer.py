"""TorchTitan's trainer with a `[model]` table."""

from dataclasses import dataclass

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.trainer import Trainer

from sonicmoe_titan.model import build_model_spec
from sonicmoe_titan.model_args import ModelArgs


class SonicTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        model: ModelArgs
        """The decoder; `model_spec` is built from it whenever a Config is made."""

        def __post_init__(self) -> None:
            self.model_spec = build_model_spec(self.model, seq_len=self.training.seq_len)
            loss = (
                self.loss.loss_fn if isinstance(self.loss, ChunkedLossWrapper.Config) else self.loss
            )
            if isinstance(loss, CrossEntropyLoss.Config):
                loss.global_vocab_size = self.model.vocab_size
            Trainer.Config.__post_init__(self)
