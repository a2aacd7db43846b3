"""TorchTitan's trainer with a `[model]` table, auxiliary losses and activation accounting."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from sonicmoe_titan.aux_loss import set_loss_scale
from sonicmoe_titan.data import ShardBatches
from sonicmoe_titan.memory_fit import (
    describe_activations,
    measure_first_block,
    predicted_activation_bytes,
)
from sonicmoe_titan.metrics import SonicMetrics
from sonicmoe_titan.model import build_model_spec, with_sequence_positions
from sonicmoe_titan.model_args import ModelArgs
from sonicmoe_titan.peak_flops import use_our_peak_flops
from sonicmoe_titan.run_kernels import prepare_run


class SonicTrainer(Trainer):
    """Trains the decoder that `config.model` describes."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        model: ModelArgs
        """The decoder; `model_spec` is built from it whenever a Config is made."""

        def __post_init__(self) -> None:
            self.model_spec = build_model_spec(self.model, seq_len=self.training.seq_len)
            loss = self.loss
            if isinstance(loss, ChunkedLossWrapper.Config):
                loss = loss.loss_fn
            if isinstance(loss, CrossEntropyLoss.Config):
                loss.global_vocab_size = self.model.vocab_size
            Trainer.Config.__post_init__(self)

    config: Config  # pyrefly: ignore [bad-override-mutable-attribute]
    model_config: Decoder.Config  # pyrefly: ignore [bad-override-mutable-attribute]
    config_text = ""
    """The whole run as TOML, if the dump folder shall hold it."""

    _has_stepped = False

    def __init__(self, config: Config) -> None:
        prepare_run(config)  # first: a process group would count this time against its timeout
        use_our_peak_flops()
        super().__init__(config)
        self._check_vocabulary()
        self._describe_text()
        # the shapes of a run never change, so neither does what one forward pass weighs
        set_loss_scale(self.model_parts, 1 / self._forward_passes())
        if config.model.moe == "sonic":  # the memory model knows no other block
            self._account_activations()

    def train(self) -> None:
        """As stock, in one thread; says so when the checkpoint was already at the last step.

        A process has one GPU, so autograd's thread for it would run nothing at the same time: it
        only has to be woken, and finds its CPU's caches empty.
        """
        with torch.autograd.set_multithreading_enabled(False):
            super().train()
        if not self._has_stepped:
            logger.info(
                f"Nothing to train: the checkpoint is at step {self.step} of "
                f"{self.config.training.steps} (training.steps)"
            )

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """As stock; the first step writes what is trained to the dump folder's config.toml.

        Not sooner: a run whose checkpoint is refused leaves the file of the run that is there.
        """
        if not self._has_stepped and self.config_text and dist.get_rank() == 0:
            folder = Path(self.config.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(self.config_text, encoding="utf-8")
        self._has_stepped = True
        super().train_step(data_iterator)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As stock, with the positions that the attention needs."""
        input_dict = with_sequence_positions(input_dict, self.model_config)
        return super().post_dataloading_process(input_dict, labels)

    def _check_vocabulary(self) -> None:
        entries = self.tokenizer.get_vocab_size()
        if entries > self.config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.config.model.vocab_size}: the tokenizer has {entries} "
                "entries, give at least as many (a multiple of 128 is fastest)"
            )

    def _describe_text(self) -> None:
        """Log how much text there is, and the loss that a model must beat to have learnt."""
        source = getattr(self.dataloader, "source", None)
        if isinstance(source, ShardBatches):
            text = source.shard.manifest
            logger.info(
                f"Training text: {text['files']:,} documents, {text['tokens']:,} tokens of "
                f"{text['bytes_per_token']:.2f} bytes; who knows their frequencies alone loses "
                f"{text['unigram_entropy_nats']:.3f} nats per token"
            )

    def _forward_passes(self) -> int:
        """Forward passes of one layer in one optimizer step, over all ranks with other tokens."""
        dims = self.parallel_dims
        ranks = dims.dp_replicate * dims.dp_shard * dims.cp
        return ranks * self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches

    def _account_activations(self) -> None:
        num_ranks = dist.get_world_size()
        logger.info(describe_activations(self.config, num_gpus=num_ranks))
        measure_first_block(self.config, self.model_parts, num_gpus=num_ranks)
        if isinstance(self.metrics_processor, SonicMetrics):
            self.metrics_processor.activation_bytes = predicted_activation_bytes(
                self.config, num_gpus=num_ranks
            )
