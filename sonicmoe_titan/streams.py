"""C4 and FineWeb-Edu through TorchTitan's Hugging Face loader, streamed and resumable."""

import zlib
from collections.abc import Iterator
from typing import Any, Literal

from datasets import IterableDataset, load_dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from sonicmoe_titan.corpus import Split

StreamedCorpus = Literal["c4", "fineweb_edu"]

FINEWEB_EDU = "HuggingFaceTB/smollm-corpus"
# The set has no validation split of its own: a hash of the text holds out one document in 64. Every
# rank reads 64 documents for one of them, so a rarer choice would make the first validation slow.
HELD_OUT_ONE_IN = 64

# (corpus, split) -> name in TorchTitan's table of datasets
STREAMS: dict[tuple[str, Split], str] = {
    ("c4", "train"): "c4",
    ("c4", "validation"): "c4_validation",
    ("fineweb_edu", "train"): "fineweb_edu",
    ("fineweb_edu", "validation"): "fineweb_edu",
}


class SplitTextDataset(HuggingFaceTextDataset):
    """TorchTitan's dataset; `split` chooses by hash of the text in a set without splits of its own.

    The documents of the other split are read and dropped: `IterableDataset.filter` would do so too,
    but does not resume at the exact document.
    """

    def __init__(self, *args: Any, split: Split | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.split = split

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        for sample in super()._get_data_iter():
            held_out = zlib.crc32(sample["text"].encode()) % HELD_OUT_ONE_IN == 0
            if self.split is None or held_out == (self.split == "validation"):
                yield sample


def _load_fineweb_edu(path: str) -> IterableDataset:
    return load_dataset(path, name="fineweb-edu-dedup", split="train", streaming=True)


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


def open_stream(
    corpus: StreamedCorpus,
    split: Split,
    *,
    path: str | None,
    infinite: bool,
    num_workers: int,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    seq_len: int,
    batch_size: int,
    snapshot_every_n_steps: int | None,
) -> ParallelAwareDataloader:
    """Open one split of a streamed corpus, from the Hub or from its copy in the folder `path`.

    Raises ValueError when neither can be read.
    """
    name = STREAMS[corpus, split]
    DATASETS.setdefault("fineweb_edu", DatasetConfig(FINEWEB_EDU, _load_fineweb_edu, _text))
    try:
        dataset = SplitTextDataset(
            name,
            path,
            tokenizer,
            seq_len=seq_len,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            infinite=infinite,
            split=None if corpus == "c4" else split,
        )
    except Exception as error:  # datasets and its HTTP clients raise many unrelated types
        where = path or DATASETS[name].path
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"corpus {corpus!r} cannot be read from {where} ({type(error).__name__}: {reason}): it "
            "needs a network, or its copy in the folder dataloader.dataset_path; "
            'dataloader.corpus = "python_stdlib" needs neither'
        ) from error
    return ParallelAwareDataloader(
        dataset,
        dp_rank,
        dp_world_size,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        snapshot_every_n_steps=snapshot_every_n_steps,
    )
