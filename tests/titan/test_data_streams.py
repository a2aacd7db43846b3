"""C4 and FineWeb-Edu, read from folders that are laid out like the datasets on the Hub."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

from sonicmoe_titan.data import TextDataLoader
from sonicmoe_titan.shards import TokenShard
from sonicmoe_titan.streams import HELD_OUT_ONE_IN
from sonicmoe_titan.tokenizer import TextTokenizer
from tests.titan.test_data import lines, take
from tests.titan.tiny import TOKENIZER

SHARDS, DOCUMENTS = 4, 400  # of each shard


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TOKENIZER.build(tokenizer_path="")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def write_dataset(folder: Path) -> Path:
    """Fill a dataset folder with the configurations of both streamed corpora."""
    for i in range(SHARDS):
        with gzip.open(folder / f"train-{i}.json.gz", "wt") as out:
            for j in range(DOCUMENTS):
                text = lines(i * DOCUMENTS + j, number=2)
                out.write(json.dumps({"text": text, "url": ""}) + "\n")
    with gzip.open(folder / "held-out.json.gz", "wt") as out:
        out.write(json.dumps({"text": lines(10**6, number=40), "url": ""}) + "\n")
    configs = []
    for name in ("en", "fineweb-edu-dedup"):
        configs += [f"- config_name: {name}", "  data_files:"]
        configs += ["  - {split: train, path: train-*.json.gz}"]
        configs += ["  - {split: validation, path: held-out.json.gz}"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    return folder


def stream(tokenizer, dataset, *, corpus="fineweb_edu", ranks=1, rank=0, **config):
    return TextDataLoader.Config(corpus=corpus, dataset_path=str(dataset), **config).build(
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=tokenizer,
        seq_len=32,
        local_batch_size=2,
    )


@pytest.mark.parametrize("corpus", ["c4", "fineweb_edu"])
def test_resuming_a_stream_is_exact(tokenizer: TextTokenizer, dataset: Path, corpus: str) -> None:
    first = stream(tokenizer, dataset, corpus=corpus, ranks=2)
    batches = iter(first)
    take(batches, 7)
    state = first.state_dict()
    expected = take(batches, 9)
    resumed = stream(tokenizer, dataset, corpus=corpus, ranks=2)
    resumed.load_state_dict(state)
    assert torch.equal(take(iter(resumed), 9), expected)


def test_reading_and_resuming_a_stream_draws_nothing(
    tokenizer: TextTokenizer, dataset: Path
) -> None:
    before = torch.get_rng_state()
    first = stream(tokenizer, dataset)
    take(iter(first), 2)
    stream(tokenizer, dataset).load_state_dict(first.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_read_different_documents(tokenizer: TextTokenizer, dataset: Path) -> None:
    parts = [
        take(iter(stream(tokenizer, dataset, ranks=2, rank=rank, infinite=False)), 10**6)
        for rank in range(2)
    ]
    rows = [{row[0].numpy().tobytes() for row in part} for part in parts]
    assert rows[0] and rows[1]
    assert not rows[0] & rows[1]


def test_held_out_documents_of_fineweb_edu_are_not_trained_on(
    tokenizer: TextTokenizer, dataset: Path
) -> None:
    texts = {}
    for split in ("train", "validation"):
        rows = take(iter(stream(tokenizer, dataset, split=split, infinite=False)), 10**6)
        text = tokenizer.decode(rows[:, 0].flatten().tolist(), skip_special_tokens=True)
        texts[split] = {line for line in text.splitlines() if line.endswith(")")}
    total = SHARDS * DOCUMENTS
    assert 0 < len(texts["validation"]) < 6 * 2 * total / HELD_OUT_ONE_IN
    assert len(texts["train"]) > 0.9 * total
    # A line may be cut at a document's edge: whole lines are 10 and more characters.
    assert not texts["train"] & texts["validation"]


def test_c4_validates_on_its_own_split(tokenizer: TextTokenizer, dataset: Path) -> None:
    rows = take(iter(stream(tokenizer, dataset, corpus="c4", split="validation")), 1)
    expected = tokenizer.encode(lines(10**6, number=40), add_bos=True, add_eos=True)
    assert rows[0, 0].tolist() == expected[:32]


def test_a_missing_dataset_is_one_clear_error(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a network, or its copy") as error:
        stream(tokenizer, tmp_path / "nowhere", corpus="c4")
    assert "\n" not in str(error.value)


def test_shards_pack_as_torchtitan_packs_a_stream(tokenizer: TextTokenizer, dataset: Path) -> None:
    """The same documents in the same order give the same inputs, labels and positions."""
    stock = HuggingFaceTextDataset("c4", str(dataset), tokenizer, seq_len=48)
    documents = [
        tokenizer.encode(sample["text"], add_bos=True, add_eos=True)
        for sample, _ in zip(stock._original_data, range(60), strict=False)
    ]
    shard = TokenShard(
        tokens_N=np.concatenate(documents).astype(np.uint16),
        offsets=np.cumsum([0, *map(len, documents)]),
        manifest={},
    )
    for i, (inputs, labels) in zip(range(shard.num_inputs // 48), stock, strict=False):
        ours = shard.window(48 * i, 48)
        assert inputs["input"].tolist() == ours.inputs_S.tolist(), i
        assert labels.tolist() == ours.labels_S.tolist(), i
        assert inputs["positions"].tolist() == ours.positions_S.tolist(), i
