"""Validation on held-out text: loss, perplexity and bits per byte, with plain top-k routing."""

import copy
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from sonicmoe_titan.data import Batch, TextDataLoader
from sonicmoe_titan.metrics import SonicMetrics
from sonicmoe_titan.model import with_sequence_positions
from sonicmoe_titan.tokenizer import TextTokenizer

MAX_LOSS_NATS = 700.0  # exp of more overflows a double


class SonicValidator(Validator):
    """TorchTitan's Validator on a fixed set of batches that leaves no trace in the training.

    The batches are read once and kept on the host, so every validation of a run, and of a resumed
    run, sees the same tokens. The model is in evaluation mode: token rounding routes plain top-k.
    Router statistics, random generators, the training loader and the throughput counters are as if
    no validation had happened (the MoE block itself counts in training only).

    Logs validation_metrics/loss (nats per token), /perplexity (exp of it) and /bits_per_byte: the
    loss of all targets in bits over the bytes of text they stand for. The end-of-text targets count
    in the loss and stand for no bytes.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        freq: int = 100
        """Steps between validations; the first and the last step validate too."""

        steps: int = 8
        """Batches of training.local_batch_size sequences per data-parallel rank."""

        dataloader: BaseDataLoader.Config = field(
            default_factory=lambda: TextDataLoader.Config(split="validation")
        )
        """The held-out text."""

        def __post_init__(self) -> None:
            for key in ("freq", "steps"):
                if getattr(self, key) < 1:
                    raise ValueError(
                        f"validator.{key} must be at least 1, got {getattr(self, key)}"
                    )

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.steps = config.steps
        self._batches: list[Batch] | None = None
        self._tokens_per_byte = math.nan

    def should_validate(self, step: int) -> bool:
        """As stock, and after the last step: a run ends with a held-out loss of its result."""
        metrics = self.metrics_processor
        last = metrics.throughput.total_steps if isinstance(metrics, SonicMetrics) else None
        return super().should_validate(step) or step == last

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Run the fixed batches through the model and log; collective over all ranks."""
        with _undisturbed(self.metrics_processor):
            if self._batches is None:
                self._batches = self._read_batches()
                self._tokens_per_byte = self._count_tokens_per_byte(self._batches)
            stock = copy.copy(self)
            stock.dl_config = cast(Any, _Replay(self._batches))
            stock.metrics_processor = cast(Any, _Log(self.metrics_processor, self._tokens_per_byte))
            Validator.validate(stock, model_parts, step)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As stock, with the positions that the attention needs."""
        input_dict = with_sequence_positions(input_dict, cast(Any, model_parts[0]).config)
        return super().post_dataloading_process(input_dict, labels, model_parts)

    def _read_batches(self) -> list[Batch]:
        microbatch, per_step = self.local_batch_size, 1
        if self.parallel_dims.pp_enabled:
            microbatch = self.parallelism.pipeline_parallel_microbatch_size
            per_step = self.local_batch_size // microbatch
        loader = self.dl_config.build(
            dp_world_size=self.dp_world_size,
            dp_rank=self.dp_rank,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            local_batch_size=microbatch,
        )
        return list(itertools.islice(loader, self.steps * per_step))

    def _count_tokens_per_byte(self, batches: list[Batch]) -> float:
        """Return targets per byte of text over all ranks' batches; nan for a foreign tokenizer."""
        if not isinstance(self.tokenizer, TextTokenizer):
            return math.nan
        num_bytes_V = torch.tensor(self.tokenizer.num_bytes_V())
        labels = torch.cat([labels.flatten() for _, labels in batches])
        labels = labels[labels != IGNORE_INDEX]
        counts = torch.stack([torch.tensor(labels.numel()), num_bytes_V[labels].sum()])
        if self.parallel_dims.dp_enabled:
            mesh = self.parallel_dims.get_mesh("batch")
            counts = dist_utils.dist_sum_tensor(counts.to(utils.device_type), mesh).cpu()
        tokens, num_bytes = counts.tolist()
        return tokens / num_bytes if num_bytes else math.nan


class _Replay:
    """Stands in for the loader's configuration: what it builds are the stored batches."""

    def __init__(self, batches: list[Batch]):
        self.batches = batches

    def build(self, **_: Any) -> Iterator[Batch]:
        # The dicts are copied because their entries are moved to the device in place.
        return iter([(dict(inputs), labels) for inputs, labels in self.batches])


class _Log:
    """Stands in for the metrics processor: adds perplexity and bits per byte to the loss."""

    def __init__(self, metrics: MetricsProcessor, tokens_per_byte: float):
        self.metrics = metrics
        self.tokens_per_byte = tokens_per_byte
        self.ntokens_since_last_log = 0
        self.started = time.perf_counter()

    def log_validation(self, loss: float, step: int) -> None:
        if isinstance(self.metrics, SonicMetrics):
            (loss,) = self.metrics.of_last_stage(loss)
        extra = {"validation_metrics/perplexity": math.exp(min(loss, MAX_LOSS_NATS))}
        if math.isfinite(self.tokens_per_byte):
            bits_per_token = loss / math.log(2)
            extra["validation_metrics/bits_per_byte"] = bits_per_token * self.tokens_per_byte
        self.metrics.ntokens_since_last_log = self.ntokens_since_last_log
        self.metrics.time_last_log = self.started
        self.metrics.log_validation(loss=loss, step=step, extra_metrics=extra)
        logger.info(
            "held out: "
            + "  ".join(f"{name.split('/')[1]} {value:.4f}" for name, value in extra.items())
        )


@contextmanager
def _undisturbed(metrics: MetricsProcessor) -> Iterator[None]:
    """Restore the random generators and the throughput counters afterwards."""
    ntokens, time_last_log = metrics.ntokens_since_last_log, metrics.time_last_log
    started = time.perf_counter()
    on_cuda = utils.device_type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        yield
    metrics.ntokens_since_last_log = ntokens
    # The clock of the training throughput stands still meanwhile.
    metrics.time_last_log = time_last_log + time.perf_counter() - started
