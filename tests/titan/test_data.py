"""Local corpora: files, cached shards, and the order in which the loader reads them."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX

from sonicmoe_titan import corpus
from sonicmoe_titan.cache import build_once
from sonicmoe_titan.corpus import fingerprint, list_files, read_documents
from sonicmoe_titan.data import ShardBatches, TextDataLoader
from sonicmoe_titan.shards import TokenShard, open_shard
from sonicmoe_titan.tokenizer import BATCH_DOCUMENTS, TextTokenizer, trained_tokenizer
from tests.titan.tiny import DATA, TOKENIZER

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TOKENIZER.build(tokenizer_path="")


def loader(tokenizer: TextTokenizer, *, ranks: int = 1, rank: int = 0, batch: int = 2, **config):
    return dataclasses.replace(DATA, **config).build(
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=tokenizer,
        seq_len=SEQ_LEN,
        local_batch_size=batch,
    )


def take(batches, number: int) -> torch.Tensor:
    """The inputs, labels and positions of the next batches, (number * B, 3, S)."""
    rows = [
        torch.stack([inputs["input"], labels, inputs["positions"]], dim=1)
        for _, (inputs, labels) in zip(range(number), batches, strict=False)
    ]
    return torch.cat(rows)


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own making."""
    folder = tmp_path / "stdlib"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    corpus._all_files.cache_clear()
    yield folder
    corpus._all_files.cache_clear()


def lines(seed: int, number: int = 40) -> str:
    words = np.random.default_rng(seed).integers(10**9, size=(number, 3))
    return "\n".join(f"value_{a} = function_{b}({c})" for a, b, c in words)


class TestCorpus:
    def test_exact_and_near_duplicates_are_dropped(self, stdlib: Path) -> None:
        (stdlib / "a.py").write_text(lines(0))
        (stdlib / "copy.py").write_text(lines(0))
        (stdlib / "vendored.py").write_text("# a changed header line\n" + lines(0) + "\n\n")
        (stdlib / "other.md").write_text(lines(1))
        (stdlib / "program.bin").write_text(lines(2))
        (stdlib / "latin.py").write_bytes(("# \xe9" + lines(3)).encode("latin-1"))
        files = list_files("python_stdlib")
        assert len(files) == 3  # a or its copy, vendored, other
        texts = [text for _, text in read_documents(files)]
        assert len(texts) == 2
        assert lines(1) in texts

    def test_a_new_file_moves_no_other_file_to_the_other_split(self, stdlib: Path) -> None:
        for i in range(50):
            (stdlib / f"{i}.py").write_text(lines(i))
        before = {f.digest: f.split(0.3) for f in list_files("python_stdlib")}
        assert set(before.values()) == {"train", "validation"}
        (stdlib / "new.py").write_text(lines(99))
        (stdlib / "0.py").rename(stdlib / "renamed.py")
        corpus._all_files.cache_clear()
        after = {f.digest: f.split(0.3) for f in list_files("python_stdlib")}
        assert len(after) == 51
        assert before.items() <= after.items()

    def test_fingerprint_follows_content_and_not_names(self, stdlib: Path) -> None:
        (stdlib / "a.py").write_text(lines(0))
        first = fingerprint(list_files("python_stdlib"))
        (stdlib / "a.py").rename(stdlib / "b.py")
        corpus._all_files.cache_clear()
        assert fingerprint(list_files("python_stdlib")) == first
        (stdlib / "b.py").write_text(lines(1))
        corpus._all_files.cache_clear()
        assert fingerprint(list_files("python_stdlib")) != first

    def test_files_are_read_again_when_one_has_changed_and_only_then(
        self, stdlib: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for i in range(3):
            (stdlib / f"{i}.py").write_text(lines(i))
        first, read = list_files("python_stdlib"), []
        read_bytes = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: read.append(p.name) or read_bytes(p))
        corpus._all_files.cache_clear()
        assert list_files("python_stdlib") == first and not read
        os.utime(stdlib / "1.py", ns=(1, 1))
        corpus._all_files.cache_clear()
        assert list_files("python_stdlib") == first and sorted(read) == ["0.py", "1.py", "2.py"]

    def test_a_python_without_sources_is_refused(self, stdlib: Path) -> None:
        with pytest.raises(ValueError, match=r"no text files under .*dataloader\.corpus"):
            list_files("python_stdlib")

    def test_folders_add_source_code_and_leave_out_what_programs_wrote(
        self, stdlib: Path, tmp_path: Path
    ) -> None:
        (stdlib / "a.py").write_text(lines(0))
        folder = tmp_path / "more"
        (folder / "deep" / "site-packages").mkdir(parents=True)
        (folder / "deep" / "kernel.c").write_text(lines(1))
        (folder / "deep" / "site-packages" / "module.rs").write_text(lines(2))
        (folder / "copy_of_a.py").write_text(lines(0))
        (folder / "greek.txt").write_text("\u03b1\u03b2\u03b3 \u03b4\u03b5\n" * 40)
        (folder / "page.html").write_text(f"<p>{lines(3)}</p>")
        (folder / "minified.js").write_text("function a(b){return b}" * 500)
        (folder / "table.txt").write_text("0.25, 1e-5, 0x21, 12345\n" * 100)
        both = list_files("python_stdlib", folders=[str(folder)])
        names = {"kernel.c", "module.rs", "greek.txt"}
        assert {file.path.name for file in both} - {"a.py", "copy_of_a.py"} == names
        assert len(both) == 4
        alone = list_files("folders", folders=[str(folder)])
        assert fingerprint(alone) == fingerprint(both)  # the stdlib's one file is in there too
        assert [file.path.name for file in list_files("python_stdlib")] == ["a.py"]

    def test_folders_split_by_content_wherever_they_lie(self, tmp_path: Path) -> None:
        for i in range(60):
            (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
            (tmp_path / f"{i % 3}" / f"{i}.go").write_text(lines(i))
        parts = [list_files("folders", folders=[str(tmp_path / name)]) for name in "012"]
        whole = list_files("folders", folders=[str(tmp_path)])
        split = {file.digest: file.split(0.3) for file in whole}
        assert set(split.values()) == {"train", "validation"} and len(split) == 60
        assert {file.digest: file.split(0.3) for part in parts for file in part} == split

    def test_a_folder_that_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"folders: .*missing is no folder"):
            list_files("folders", folders=[str(tmp_path / "missing")])
        with pytest.raises(ValueError, match=r"no text files under .*dataloader\.folders"):
            list_files("folders", folders=[str(tmp_path)])

    def test_validation_text_is_not_in_the_training_text(self, tokenizer: TextTokenizer) -> None:
        texts = {"train": set(), "validation": set()}
        for file, text in read_documents(list_files("python_stdlib", max_bytes=DATA.max_bytes)):
            texts[file.split(DATA.validation_fraction)].add(text)
        assert texts["train"] and texts["validation"]
        assert not texts["train"] & texts["validation"]


class TestCache:
    def test_processes_that_start_at_once_build_once(self, tmp_path: Path) -> None:
        processes = [builder(tmp_path, seconds=0.5) for _ in range(4)]
        for process in processes:
            process.join(timeout=60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert (tmp_path / "builds").read_text() == "x"
        assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["key", "key.lock"]

    def test_a_killed_builder_leaves_nothing_that_counts(self, tmp_path: Path) -> None:
        victim = builder(tmp_path, seconds=60)
        deadline = time.monotonic() + 60
        while not (tmp_path / "builds").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        victim.kill()
        victim.join(timeout=60)
        assert victim.exitcode == -signal.SIGKILL
        assert not (tmp_path / "kind" / "key").exists()
        builder(tmp_path, seconds=0).join(timeout=60)
        assert (tmp_path / "kind" / "key" / "result").read_text() == "done"

    def test_a_folder_that_cannot_be_written_is_one_clear_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SONICMOE_CACHE", str(tmp_path / "file"))
        with pytest.raises(ValueError, match="set SONICMOE_CACHE"):
            trained_tokenizer("python_stdlib", vocab_size=300, train_bytes=20_000)


def builder(folder: Path, *, seconds: float) -> multiprocessing.Process:
    """Start a process that builds, notes that it does, and takes its time."""
    process = multiprocessing.get_context("fork").Process(target=_build, args=(folder, seconds))
    process.start()
    return process


def _build(folder: Path, seconds: float) -> None:
    def build(partial: Path) -> None:
        with open(folder / "builds", "a") as log:
            log.write("x")
        time.sleep(seconds)
        (partial / "result").write_text("done")

    os.environ["SONICMOE_CACHE"] = str(folder)
    assert (build_once("kind", "key", build) / "result").read_text() == "done"


class TestTokenizer:
    def test_training_again_gives_the_same_tokenizer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        contents = []
        for name in ("first", "second"):
            monkeypatch.setenv("SONICMOE_CACHE", str(tmp_path / name))
            folder = trained_tokenizer("python_stdlib", vocab_size=400, train_bytes=100_000)
            contents.append((folder / "tokenizer.json").read_text())
        assert contents[0] == contents[1]
        assert len(json.loads(contents[0])["model"]["vocab"]) == 400

    def test_documents_in_batches_are_encoded_as_one_by_one(self, tokenizer: TextTokenizer) -> None:
        texts = [f"def f{i}():\n    return {'x' * (i % 7)}\n" for i in range(BATCH_DOCUMENTS + 3)]
        one_by_one = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
        assert list(tokenizer.encode_documents(iter(texts))) == one_by_one

    def test_text_survives_encoding(self, tokenizer: TextTokenizer) -> None:
        text = "def f(x):\n\treturn 'h\u00e4\u4e2d\U0001f600'  # 12345\n"
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert ids[0] == ids[-1] == tokenizer.eos_id
        sizes = tokenizer.num_bytes_V()
        assert sum(sizes[i] for i in ids) == len(text.encode())

    def test_a_folder_takes_precedence_over_the_source(
        self, tokenizer: TextTokenizer, tmp_path: Path
    ) -> None:
        config = TextTokenizer.Config(source="someone/unreachable")
        same = config.build(tokenizer_path=tokenizer.tokenizer_path)
        assert same.fingerprint() == tokenizer.fingerprint()
        with pytest.raises(ValueError, match="is not a folder"):
            config.build(tokenizer_path=str(tmp_path / "missing"))

    def test_a_vocabulary_below_the_bytes_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"tokenizer\.vocab_size must be at least 257"):
            TextTokenizer.Config(vocab_size=256)


class TestShards:
    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_manifest_describes_the_tokens(self, tokenizer: TextTokenizer, split: str) -> None:
        shard = loader(tokenizer, split=split).source.shard
        sizes_V = np.array(tokenizer.num_bytes_V())
        assert shard.manifest["tokens"] == len(shard.tokens_N) == shard.offsets[-1]
        assert shard.manifest["bytes"] == sizes_V[shard.tokens_N].sum()
        assert shard.manifest["files"] == len(shard.offsets) - 1
        assert shard.manifest["bytes_per_token"] == shard.manifest["bytes"] / len(shard.tokens_N)
        assert shard.tokens_N.dtype == np.uint16

    def test_unigram_entropy_is_that_of_the_training_tokens(self, tokenizer: TextTokenizer) -> None:
        shard = loader(tokenizer).source.shard
        counts = np.bincount(shard.tokens_N)
        expected = math.fsum(-c / counts.sum() * math.log(c / counts.sum()) for c in counts if c)
        assert shard.manifest["unigram_entropy_nats"] == pytest.approx(expected, rel=1e-12)
        assert loader(tokenizer, split="validation").source.shard.manifest[
            "unigram_entropy_nats"
        ] == pytest.approx(expected, rel=1e-12)

    def test_a_window_packs_documents_and_predicts_inside_them(self) -> None:
        shard = TokenShard(
            tokens_N=np.array([0, 1, 2, 0, 0, 0, 3, 4, 5, 0], dtype=np.uint16),
            offsets=np.array([0, 4, 5, 10]),  # four tokens, a single one, five tokens
            manifest={},
        )
        assert shard.num_inputs == 7
        window = shard.window(0, 7)
        assert window.inputs_S.tolist() == [0, 1, 2, 0, 3, 4, 5]
        assert window.labels_S.tolist() == [1, 2, 0, 3, 4, 5, 0]
        assert window.positions_S.tolist() == [0, 1, 2, 0, 1, 2, 3]
        cut = shard.window(5, 2)
        assert cut.inputs_S.tolist() == [4, 5]
        assert cut.positions_S.tolist() == [0, 1]

    def test_an_empty_split_is_refused(self, tokenizer: TextTokenizer) -> None:
        with pytest.raises(ValueError, match=r"no validation file .*dataloader\.max_bytes"):
            open_shard(
                "python_stdlib", "train", tokenizer, max_bytes=50_000, validation_fraction=1e-6
            )


class TestOrder:
    def test_ranks_share_an_epoch_without_overlap(self, tokenizer: TextTokenizer) -> None:
        loaders = [loader(tokenizer, ranks=3, rank=rank, infinite=False) for rank in range(3)]
        parts = [take(iter(one), 10**6) for one in loaders]
        assert len({len(part) for part in parts}) == 1
        source: ShardBatches = loaders[0].source
        rows = torch.cat(parts)
        assert source.samples_per_epoch - 6 < len(rows) <= source.samples_per_epoch
        # A window is known by its place in the shard: texts may repeat, 64 tokens and more do not.
        starts = {row.numpy().tobytes() for row in rows}
        assert len(starts) > 0.98 * len(rows)

    def test_another_degree_and_microbatch_continue_with_the_next_sample(
        self, tokenizer: TextTokenizer
    ) -> None:
        whole = take(iter(loader(tokenizer, batch=4)), 6)
        two = [loader(tokenizer, ranks=2, rank=rank) for rank in range(2)]
        halves = [take(iter(one), 3) for one in two]
        interleaved = torch.cat(
            [torch.cat([h[2 * i : 2 * i + 2] for h in halves]) for i in range(3)]
        )
        assert torch.equal(interleaved, whole[:12])
        state = two[0].state_dict()
        assert state == two[1].state_dict()
        four = [loader(tokenizer, ranks=4, rank=rank, batch=1) for rank in range(4)]
        for one in four:
            one.load_state_dict(state)
        rest = torch.cat([take(iter(one), 1) for one in four])
        assert torch.equal(rest, whole[12:16])

    def test_resuming_across_an_epoch_is_exact(self, tokenizer: TextTokenizer) -> None:
        first = loader(tokenizer, split="validation", batch=3)
        batches = iter(first)
        take(batches, 1)
        state = json.loads(json.dumps(first.state_dict()))
        number = 2 * first.source.samples_per_epoch // 3
        expected = take(batches, number)
        resumed = loader(tokenizer, split="validation", batch=3)
        resumed.load_state_dict(state)
        assert torch.equal(take(iter(resumed), number), expected)

    def test_epochs_and_seeds_differ(self, tokenizer: TextTokenizer) -> None:
        source = loader(tokenizer, split="validation", batch=1).source
        epochs = [take(iter(source), source.samples_per_epoch) for _ in range(2)]
        assert not torch.equal(epochs[0], epochs[1])
        reseeded = loader(tokenizer, split="validation", batch=1, seed=1)
        assert not torch.equal(take(iter(reseeded), source.samples_per_epoch), epochs[0])

    def test_a_position_of_other_data_is_refused(self, tokenizer: TextTokenizer) -> None:
        state = loader(tokenizer, seed=1).state_dict()
        with pytest.raises(ValueError, match="exclude_from_loading dataloader"):
            loader(tokenizer).load_state_dict(state)

    def test_sequences_longer_than_the_shard_are_refused(self, tokenizer: TextTokenizer) -> None:
        with pytest.raises(ValueError, match=r"too few for sequences of 10000000"):
            DATA.build(
                dp_world_size=1,
                dp_rank=0,
                tokenizer=tokenizer,
                seq_len=10_000_000,
                local_batch_size=1,
            )

    def test_every_label_counts_in_the_loss(self, tokenizer: TextTokenizer) -> None:
        assert not (take(iter(loader(tokenizer)), 20)[:, 1] == IGNORE_INDEX).any()


def test_keys_of_other_loaders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set dataloader\.corpus"):
        TextDataLoader.Config(dataset="c4")
    with pytest.raises(ValueError, match="between 0 and 1"):
        TextDataLoader.Config(validation_fraction=1.5)
    with pytest.raises(ValueError, match=r"name them in dataloader\.folders"):
        TextDataLoader.Config(corpus="folders")
    with pytest.raises(ValueError, match=r"dataloader\.folders go with local text"):
        TextDataLoader.Config(corpus="c4", folders=["text"])


def test_a_run_reads_its_folders_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.java").write_text(lines(i))
    folders = [str(tmp_path)]
    source = TextTokenizer.Config(
        source="folders", folders=folders, vocab_size=300, train_bytes=50_000
    )
    own = source.build(tokenizer_path="")
    texts = []
    for split in ("train", "validation"):
        shard = loader(
            own, corpus="folders", folders=folders, split=split, validation_fraction=0.3
        ).source.shard
        assert shard.manifest["key"].startswith("folders-")
        texts.append(own.decode(shard.tokens_N.tolist(), skip_special_tokens=True))
    in_training = [lines(i) in texts[0] for i in range(40)]
    assert in_training.count(True) + sum(lines(i) in texts[1] for i in range(40)) == 40
    assert 0 < sum(in_training) < 40
