"""The text data loader: tokenised local text without a network, C4 and FineWeb-Edu with one.

Legend: B sequences of a batch, S tokens of a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from sonicmoe_titan.corpus import LOCAL_CORPORA, Split
from sonicmoe_titan.shards import TokenShard, Window, open_shard
from sonicmoe_titan.streams import open_stream
from sonicmoe_titan.tokenizer import TextTokenizer

Batch = tuple[dict[str, Tensor], Tensor]


class TextDataLoader(BaseDataLoader):
    """Batches of packed text, split over the data-parallel ranks, resumable to the exact sample.

    Yields ({"input": (B, S), "positions": (B, S)}, labels (B, S)), int64 on the CPU.

    Local corpora: the documents form one stream that is cut into sequences; every epoch cuts it at
    another offset and shuffles the sequences, both decided by `seed` and the epoch. Sequences carry
    a global number, and each batch of all ranks together takes the next ones. The checkpoint holds
    that number alone, so another data-parallel degree or microbatch continues with the very next
    sequence.

    Streamed corpora: TorchTitan's own loader; its position belongs to one data-parallel degree.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        corpus: Literal["python_stdlib", "site_packages", "folders", "c4", "fineweb_edu"] = (
            "python_stdlib"
        )
        """Local text ("python_stdlib", "site_packages", "folders": nothing but the key below), or a
        streamed dataset that needs a network ("c4": allenai/c4, "fineweb_edu":
        HuggingFaceTB/smollm-corpus, fineweb-edu-dedup), or its copy in the folder `dataset_path`.
        """

        folders: list[str] = field(default_factory=list)
        """Folders of text and source code that local text is read from besides."""

        split: Literal["train", "validation"] = "train"
        """Which files (documents of a stream) to read; their content hash decides."""

        max_bytes: int | None = 8 << 20
        """Local text to use, in bytes; none means all of it."""

        validation_fraction: float = 0.05
        """Share of the local files that is held out."""

        seed: int = 0
        """Order of the local sequences."""

        infinite: bool = True
        """Start another epoch at the end of the data."""

        num_workers: int = 0
        """Processes that read and tokenise a stream; local text needs none."""

        def __post_init__(self) -> None:
            if self.dataset:
                raise ValueError(
                    f"dataloader.dataset is not used, got {self.dataset!r}: set dataloader.corpus"
                )
            if self.corpus not in LOCAL_CORPORA and self.folders:
                raise ValueError(
                    f"dataloader.folders go with local text, not with corpus {self.corpus!r}: "
                    f"choose {', '.join(LOCAL_CORPORA)}, or leave them out"
                )
            if self.corpus == "folders" and not self.folders:
                raise ValueError('dataloader.corpus = "folders": name them in dataloader.folders')
            if not 0 < self.validation_fraction < 1:
                raise ValueError(
                    "dataloader.validation_fraction must lie between 0 and 1, "
                    f"got {self.validation_fraction}"
                )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **kwargs: Any,
    ):
        if not isinstance(tokenizer, TextTokenizer):
            raise ValueError(
                f"TextDataLoader works with TextTokenizer, got {type(tokenizer).__name__}: "
                "set the recipe's tokenizer to TextTokenizer.Config"
            )
        self.tokenizer = tokenizer
        if config.corpus != "c4" and config.corpus != "fineweb_edu":
            self.source: ShardBatches | BaseDataLoader = ShardBatches(
                open_shard(
                    config.corpus,
                    config.split,
                    tokenizer,
                    folders=config.folders,
                    max_bytes=config.max_bytes,
                    validation_fraction=config.validation_fraction,
                ),
                split=config.split,
                seed=config.seed,
                infinite=config.infinite,
                dp_world_size=dp_world_size,
                dp_rank=dp_rank,
                seq_len=seq_len,
                batch_size=local_batch_size,
            )
        else:
            self.source = open_stream(
                config.corpus,
                config.split,
                path=config.dataset_path,
                infinite=config.infinite,
                num_workers=config.num_workers,
                dp_world_size=dp_world_size,
                dp_rank=dp_rank,
                tokenizer=tokenizer,
                seq_len=seq_len,
                batch_size=local_batch_size,
                snapshot_every_n_steps=snapshot_every_n_steps,
            )

    # A stream's loader draws a seed for its workers whenever it makes an iterator, which its
    # state_dict does too; a resumed run makes one more than a run that was never interrupted.

    def __iter__(self) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=[]):
            return iter(self.source)

    def state_dict(self) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            return self.source.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.source.load_state_dict(state_dict)


class ShardBatches:
    """Endless (or one epoch of) batches of one shard; see TextDataLoader for the order."""

    def __init__(
        self,
        shard: TokenShard,
        *,
        split: Split,
        seed: int,
        infinite: bool,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        batch_size: int,
    ):
        self.shard = shard
        self.seed = seed
        self.infinite = infinite
        self.dp_world_size = dp_world_size
        self.dp_rank = dp_rank
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.samples_seen = 0
        # Every offset in [0, seq_len) leaves this many whole sequences.
        self.samples_per_epoch = (shard.num_inputs - (seq_len - 1)) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"the {split} shard has {shard.num_inputs} tokens, too few for sequences of "
                f"{seq_len}: raise dataloader.max_bytes or shorten training.seq_len"
            )
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self.order = f"{shard.manifest['key']}/{split}/seed{seed}/seq_len{seq_len}"

    def __iter__(self) -> Iterator[Batch]:
        samples_per_batch = self.dp_world_size * self.batch_size
        while self.infinite or self.samples_seen + samples_per_batch <= self.samples_per_epoch:
            first = self.samples_seen + self.dp_rank * self.batch_size
            # Counted before the batch is used: a checkpoint after the step continues behind it.
            self.samples_seen += samples_per_batch
            windows = [self._sample(first + i) for i in range(self.batch_size)]
            inputs_BS, labels_BS, positions_BS = (
                torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True)
            )
            yield {"input": inputs_BS, "positions": positions_BS}, labels_BS

    def _sample(self, number: int) -> Window:
        epoch, index = divmod(number, self.samples_per_epoch)
        offset, order = self._epoch(epoch)
        return self.shard.window(offset + int(order[index]) * self.seq_len, self.seq_len)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Return the offset of the cut and the order of the sequences in `epoch`."""
        if epoch not in self._epochs:
            rng = np.random.default_rng((self.seed, epoch))
            offset = int(rng.integers(self.seq_len))
            self._epochs = {epoch: (offset, rng.permutation(self.samples_per_epoch))}
        return self._epochs[epoch]

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "order": self.order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["order"] != self.order:
            raise ValueError(
                f"the checkpoint's data position belongs to {state_dict['order']}, this run reads "
                f"{self.order}: restore the setting, or start the data anew with "
                "--checkpoint.exclude_from_loading dataloader"
            )
        self.samples_seen = state_dict["samples_seen"]
