"""Tokenised shards of a local corpus: memory-mapped tokens, document offsets and a manifest.

Legend: N tokens of a split, documents included from their first to their last special token;
I input positions of a split: every token but the last of its document predicts its successor;
S tokens of one sequence.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchtitan.tools.logging import logger

from sonicmoe_titan.cache import build_once
from sonicmoe_titan.corpus import (
    SPLITS,
    CorpusFile,
    LocalCorpus,
    Split,
    fingerprint,
    list_files,
    read_documents,
)
from sonicmoe_titan.tokenizer import TextTokenizer

FORMAT = 1  # part of the cache key: raise it when a change below changes the files


class Window(NamedTuple):
    """One training sequence: token ids, next-token targets, positions in the document, all (S,)."""

    inputs_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray


@dataclass(frozen=True)
class TokenShard:
    """One split of a tokenised corpus; opened files, nothing is copied into memory.

    tokens_N: uint16 or uint32 token ids, document after document.
    offsets: (documents + 1,) int64, the first token of each document.
    manifest: files, bytes, tokens, bytes_per_token of this split; unigram_entropy_nats and key of
        the whole corpus.
    """

    tokens_N: np.ndarray
    offsets: np.ndarray
    manifest: dict[str, Any]

    @property
    def num_inputs(self) -> int:
        """Number of (input, target) pairs: a document's last token has no target."""
        return int(self.offsets[-1]) - (len(self.offsets) - 1)

    def window(self, start: int, length: int) -> Window:
        """Return `length` pairs from input position `start`, documents packed end to end.

        A target never lies in the next document. Positions count from the document's beginning, or
        from the window's beginning for a document that started before it, as TorchTitan's do.
        """
        input_offsets = self.offsets - np.arange(len(self.offsets))
        at = np.arange(start, start + length)
        document = np.searchsorted(input_offsets, at, side="right") - 1
        token = at + document  # each earlier document has one token more than inputs
        first, last = token[0], token[-1] + 1
        chunk = self.tokens_N[first : last + 1].astype(np.int64)
        positions = at - np.maximum(input_offsets[document], start)
        return Window(chunk[token - first], chunk[token - first + 1], positions)


def open_shard(
    corpus: LocalCorpus,
    split: Split,
    tokenizer: TextTokenizer,
    *,
    folders: Sequence[str] = (),
    max_bytes: int | None,
    validation_fraction: float,
) -> TokenShard:
    """Open one split of `corpus`, tokenising the corpus into the cache first if it is not there."""
    files = list_files(corpus, folders=folders, max_bytes=max_bytes)
    settings = f"{FORMAT} {validation_fraction} {tokenizer.fingerprint()} {fingerprint(files)}"
    key = f"{corpus}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def build(folder: Path) -> None:
        logger.info(f"Tokenising {len(files)} files of {corpus}")
        _tokenise(files, tokenizer, folder, validation_fraction=validation_fraction)

    folder = build_once("shards", key, build)
    manifest = json.loads((folder / "manifest.json").read_text())
    return TokenShard(
        tokens_N=np.memmap(folder / f"{split}.bin", dtype=manifest["dtype"], mode="r"),
        offsets=np.load(folder / f"{split}_offsets.npy"),
        manifest={**manifest, **manifest[split], "key": key},
    )


def _tokenise(
    files: list[CorpusFile], tokenizer: TextTokenizer, folder: Path, *, validation_fraction: float
) -> None:
    """Write {split}.bin, {split}_offsets.npy and manifest.json into `folder`."""
    texts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for file, text in read_documents(files):
        texts[file.split(validation_fraction)].append(text)
    for split, documents in texts.items():
        if not documents:
            raise ValueError(
                f"the corpus has no {split} file ({len(files)} files, validation_fraction "
                f"{validation_fraction}): raise dataloader.max_bytes or change the fraction"
            )
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    manifest: dict[str, Any] = {
        "dtype": np.dtype(dtype).name,
        "vocab_size": tokenizer.get_vocab_size(),
        "near_duplicates_dropped": len(files) - sum(map(len, texts.values())),
    }
    for split, documents in texts.items():
        lengths, counts_V = _write_tokens(folder / f"{split}.bin", documents, tokenizer, dtype)
        np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        num_bytes, num_tokens = sum(len(text.encode()) for text in documents), sum(lengths)
        manifest[split] = {
            "files": len(documents),
            "bytes": num_bytes,
            "tokens": num_tokens,
            "bytes_per_token": num_bytes / num_tokens,
        }
        if split == "train":
            p_V = counts_V[counts_V > 0] / num_tokens
            manifest["unigram_entropy_nats"] = float(-(p_V * np.log(p_V)).sum())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _write_tokens(
    path: Path, documents: Iterable[str], tokenizer: TextTokenizer, dtype: type[np.unsignedinteger]
) -> tuple[list[int], np.ndarray]:
    """Append every document's tokens to `path`; return their lengths and the counts (V,)."""

    lengths: list[int] = []
    counts_V = np.zeros(0, dtype=np.int64)
    with path.open("wb") as out:
        for tokens in tokenizer.encode_documents(documents):
            ids = np.asarray(tokens, dtype=dtype)
            out.write(ids.tobytes())
            lengths.append(len(ids))
            counts = np.bincount(ids, minlength=len(counts_V))
            counts[: len(counts_V)] += counts_V
            counts_V = counts
    return lengths, counts_V
