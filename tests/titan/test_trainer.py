"""What our trainer says beside TorchTitan's."""

from types import SimpleNamespace
from typing import Any

import pytest
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

import sonicmoe_titan  # prepares TorchTitan for the CPU  # noqa: F401
from sonicmoe_titan.trainer import SonicTrainer


@pytest.mark.parametrize("steps", [0, 1])
def test_run_that_was_complete_says_that_it_trained_nothing(
    steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def train(self: Any) -> None:
        self.step = 20  # as the checkpoint says
        for _ in range(steps):
            self.train_step(iter(()))

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Trainer, "train_step", lambda self, data_iterator: None)
    monkeypatch.setattr(logger, "propagate", True)
    trainer: Any = SonicTrainer.__new__(SonicTrainer)
    trainer.config = SimpleNamespace(training=SimpleNamespace(steps=20))
    with caplog.at_level("INFO"):
        trainer.train()
    said = "Nothing to train: the checkpoint is at step 20 of 20" in caplog.text
    assert said == (steps == 0)
