"""What our trainer says beside TorchTitan's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

import sonicmoe_titan  # prepares TorchTitan for the CPU  # noqa: F401
from sonicmoe_titan.data import ShardBatches
from sonicmoe_titan.trainer import SonicTrainer


def test_log_names_the_loss_of_token_frequencies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    source: Any = ShardBatches.__new__(ShardBatches)
    manifest = {"files": 3, "tokens": 4000, "bytes_per_token": 2.5, "unigram_entropy_nats": 5.8071}
    source.shard = SimpleNamespace(manifest=manifest)
    trainer: Any = SonicTrainer.__new__(SonicTrainer)
    with caplog.at_level("INFO"):
        for trainer.dataloader in (SimpleNamespace(), SimpleNamespace(source=source)):
            trainer._describe_text()
    (line,) = caplog.messages
    assert "4,000 tokens of 2.50 bytes" in line and "5.807 nats per token" in line


def test_backward_runs_in_the_thread_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        Trainer, "train", lambda self: seen.append(torch.autograd.is_multithreading_enabled())
    )
    trainer: Any = SonicTrainer.__new__(SonicTrainer)
    trainer._has_stepped = True
    assert torch.autograd.is_multithreading_enabled()
    trainer.train()
    assert seen == [False]
    assert torch.autograd.is_multithreading_enabled()


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
