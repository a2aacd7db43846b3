"""Real text that every machine has: sources and documentation of the installed Python.

A corpus is a list of files in the order of their content hash. The hash alone decides duplicates,
order and split, so the same files give the same corpus on every machine, and a file that is added
or changed moves no other file from training to validation.
"""

import functools
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LocalCorpus = Literal["python_stdlib", "site_packages"]
Split = Literal["train", "validation"]

LOCAL_CORPORA: tuple[LocalCorpus, ...] = ("python_stdlib", "site_packages")
SPLITS: tuple[Split, ...] = ("train", "validation")

TEXT_SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})
MIN_FILE_BYTES = 128  # empty __init__.py files and one-line stubs teach nothing
MAX_FILE_BYTES = 1 << 20  # larger text files are tables that a program wrote
# A file most of whose lines stand in earlier files is a vendored or regenerated copy of them. Lines
# too short to tell files apart ("else:", "return x") do not count.
MAX_SHARE_SEEN = 0.7
MIN_LINE_CHARS = 16


@dataclass(frozen=True)
class CorpusFile:
    """One text file: its path, its size in bytes and the sha256 of its content."""

    path: Path
    num_bytes: int
    digest: bytes

    def split(self, validation_fraction: float) -> Split:
        """Return the split that the content hash puts this file into."""
        # The list is ordered by the hash's first bytes: the split must use others.
        position = int.from_bytes(self.digest[8:16], "big") / 2**64
        return "validation" if position < validation_fraction else "train"


def list_files(corpus: LocalCorpus, *, max_bytes: int | None = None) -> list[CorpusFile]:
    """List the files of `corpus` without exact duplicates, in the order of their content hash.

    max_bytes: stop before the file that would exceed this total; a subset by hash is a fair sample.
    Raises ValueError for an unknown corpus, or when this Python has no such files on disk.
    """
    chosen: list[CorpusFile] = []
    total = 0
    for file in _all_files(corpus):
        total += file.num_bytes
        if max_bytes is not None and total > max_bytes:
            break
        chosen.append(file)
    return chosen


def fingerprint(files: list[CorpusFile]) -> str:
    """Return a hash of the files' contents (their paths do not enter)."""
    return hashlib.sha256(b"".join(file.digest for file in files)).hexdigest()


def read_documents(files: list[CorpusFile]) -> Iterator[tuple[CorpusFile, str]]:
    """Yield (file, text) for every file that is not nearly a copy of earlier ones."""
    seen: set[int] = set()
    for file in files:
        text = file.path.read_text(encoding="utf-8")
        lines = {
            zlib.crc32(stripped.encode())
            for line in text.splitlines()
            if len(stripped := line.strip()) >= MIN_LINE_CHARS
        }
        if lines and len(lines & seen) > MAX_SHARE_SEEN * len(lines):
            continue
        seen |= lines
        yield file, text


@functools.cache  # the tokenizer and the loaders of a process ask in turn
def _all_files(corpus: LocalCorpus) -> tuple[CorpusFile, ...]:
    roots = {"python_stdlib": ("stdlib",), "site_packages": ("purelib", "platlib")}
    if corpus not in roots:
        raise ValueError(f"unknown local corpus {corpus!r}: accepted are {', '.join(roots)}")
    folders = {Path(sysconfig.get_path(name)).resolve() for name in roots[corpus]}
    unique = {
        file.digest: file
        for folder in sorted(folders)
        for file in _text_files(folder, into_packages=corpus == "site_packages")
    }
    if not unique:
        raise ValueError(
            f"corpus {corpus!r}: no text files under {', '.join(map(str, sorted(folders)))}; "
            "choose another dataloader.corpus"
        )
    return tuple(sorted(unique.values(), key=lambda file: file.digest))


def _text_files(folder: Path, *, into_packages: bool) -> Iterator[CorpusFile]:
    """Yield the readable UTF-8 text files under `folder`, in the order of their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        if not into_packages and not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
            continue
        try:
            content = path.read_bytes()
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if MIN_FILE_BYTES <= len(content) <= MAX_FILE_BYTES:
            yield CorpusFile(path, len(content), hashlib.sha256(content).digest())
