"""C4 and FineWeb-Edu, read from folders that are laid out like the datasets on the Hub."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.data import TextDataLoader
from sonicmoe_titan.shards import TokenShard
from sonicmoe_titan.streams import HELD_OUT_ONE_IN
from sonicmoe_titan.tokenizer import HUB_FILES, TextTokenizer
from tests.titan.local_hub import local_hub
from tests.titan.test_data import lines, take
from tests.titan.test_train import finish, start
from tests.titan.tiny import TOKENIZER

ROOT = Path(__file__).parents[2]
SHARDS, DOCUMENTS = 4, 400  # of each shard
# A process that finds a corpus by its name alone: (corpus, batches, state, rows, resumes).
READER = """
import sys, torch
from tests.titan.test_data import take
from tests.titan.test_data_streams import stream
from tests.titan.tiny import TOKENIZER
corpus, batches, state, rows, resumes = sys.argv[1:]
loader = stream(TOKENIZER.build(tokenizer_path=""), None, corpus=corpus, ranks=2)
if resumes == "yes":
    loader.load_state_dict(torch.load(state, weights_only=False))
torch.save(take(iter(loader), int(batches)), rows)
torch.save(loader.state_dict(), state)
"""


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


def found_at(url: str, folder: Path) -> dict[str, str]:
    """Environment of processes that find the Hub at `url` and nothing in its cache."""
    return {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}


def stream(tokenizer, dataset, *, corpus="fineweb_edu", ranks=1, rank=0, **config):
    path = dataset and str(dataset)
    return TextDataLoader.Config(corpus=corpus, dataset_path=path, **config).build(
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


@pytest.mark.parametrize("corpus", ["c4", "fineweb_edu"])
def test_a_stream_by_name_is_read_from_the_hub_and_resumed_by_another_process(
    tokenizer: TextTokenizer, dataset: Path, corpus: str, tmp_path: Path
) -> None:
    expected = take(iter(stream(tokenizer, dataset, corpus=corpus, ranks=2)), 16)
    repositories = {
        "datasets/allenai/c4": dataset,
        "datasets/HuggingFaceTB/smollm-corpus": dataset,
    }
    with local_hub(repositories) as (url, seen):
        online, found = found_at(url, tmp_path), []
        for batches, resumes in ((7, "no"), (9, "yes")):
            rows = tmp_path / f"{batches}.pt"
            words = [sys.executable, "-c", READER, corpus, batches, tmp_path / "state.pt", rows]
            subprocess.run(
                [*map(str, words), resumes], cwd=ROOT, env=os.environ | online, check=True
            )
            found.append(torch.load(rows))
    assert torch.equal(torch.cat(found), expected)
    assert any("/resolve/" in request and "train-" in request for request in seen)


def test_a_run_of_the_paper_trains_from_the_hub_and_resumes(
    tokenizer: TextTokenizer, dataset: Path, tmp_path: Path
) -> None:
    """The file as it is but for sizes: corpus, validation and tokenizer by their names."""
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in HUB_FILES:
        shutil.copy(Path(tokenizer.tokenizer_path) / name, source)
    repositories = {
        "datasets/HuggingFaceTB/smollm-corpus": dataset,
        "allenai/OLMoE-1B-7B-0924": source,
    }
    small = {
        **{"model.num_layers": 1, "model.dim": 32, "model.num_heads": 2, "model.expert_dim": 16},
        **{"model.num_experts": 8, "model.vocab_size": 512, "model.rounding_tile": 8},
        **{"training.seq_len": 32, "training.local_batch_size": 2},
        **{"training.global_batch_size": 2, "validator.steps": 1, "validator.freq": 2},
        **{"compile.enable": False, "checkpoint.interval": 2, "lr_scheduler.warmup_steps": 1},
    }
    words = [f"--{key}={str(value).lower()}" for key, value in small.items()]
    train = [str(ROOT / "scripts" / "train.sh"), str(CONFIGS / "moe_0p5b_k2.toml"), *words]
    with local_hub(repositories) as (url, seen):
        for steps in (2, 4):
            online = found_at(url, tmp_path)
            process = start(tmp_path, train, f"--training.steps={steps}", **online)
            output = finish(process)
            assert process.returncode == 0, output
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert max(line.get("step", 0) for line in lines) == 4
    assert "Training starts at step 3" in output
    for name in repositories:
        assert any(f"{name}/resolve/" in request for request in seen)


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
