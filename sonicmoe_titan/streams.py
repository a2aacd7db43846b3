"""C4 and FineWeb-Edu through TorchTitan's Hugging Face loader, streamed and resumable."""

import zlib
from functools import partial
from typing import Any, Literal

from datasets import IterableDataset, load_dataset
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from sonicmoe_titan.corpus import Split

StreamedCorpus = Literal["c4", "fineweb_edu"]

FINEWEB_EDU = "HuggingFaceTB/smollm-corpus"
# The set has no validation split of its own: a hash of the text holds out one document in 256.
HELD_OUT_ONE_IN = 256

# (corpus, split) -> name in TorchTitan's table of datasets
STREAMS: dict[tuple[str, Split], str] = {
    ("c4", "train"): "c4",
    ("c4", "validation"): "c4_validation",
    ("fineweb_edu", "train"): "fineweb_edu",
    ("fineweb_edu", "validation"): "fineweb_edu_validation",
}


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


def _in_split(sample: dict[str, Any], split: Split) -> bool:
    held_out = zlib.crc32(sample["text"].encode()) % HELD_OUT_ONE_IN == 0
    return held_out == (split == "validation")


def _load_fineweb_edu(path: str, split: Split) -> IterableDataset:
    data = load_dataset(path, name="fineweb-edu-dedup", split="train", streaming=True)
    return data.filter(partial(_in_split, split=split))


def register_streams() -> None:
    """Add FineWeb-Edu to TorchTitan's table of datasets."""
    for split in ("train", "validation"):
        DATASETS[STREAMS["fineweb_edu", split]] = DatasetConfig(
            path=FINEWEB_EDU,
            loader=partial(_load_fineweb_edu, split=split),
            sample_processor=_text,
        )


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
) -> HuggingFaceTextDataLoader:
    """Open one split of a streamed corpus, from the Hub or from its copy in the folder `path`.

    Raises ValueError when neither can be read.
    """
    register_streams()
    config = HuggingFaceTextDataLoader.Config(
        dataset=STREAMS[corpus, split],
        dataset_path=path,
        infinite=infinite,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    try:
        return config.build(
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=batch_size,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )
    except Exception as error:  # datasets and its HTTP clients raise many unrelated types
        where = path or DATASETS[config.dataset].path
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"corpus {corpus!r} cannot be read from {where} ({type(error).__name__}: {reason}): it "
            "needs a network, or its copy in the folder dataloader.dataset_path; "
            'dataloader.corpus = "python_stdlib" needs neither'
        ) from error
