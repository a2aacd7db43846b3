"""Real text that every machine has (sources and documentation of the installed Python), or folders.

A corpus is a list of files in the order of their content hash. The hash alone decides duplicates,
order and split, so the same files give the same corpus on every machine, and a file that is added
or changed moves no other file from training to validation.
"""

import functools
import hashlib
import json
import os
import stat
import string
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sonicmoe_titan.cache import build_once

LocalCorpus = Literal["python_stdlib", "site_packages", "folders"]
Split = Literal["train", "validation"]

LOCAL_CORPORA: tuple[LocalCorpus, ...] = ("python_stdlib", "site_packages", "folders")
SPLITS: tuple[Split, ...] = ("train", "validation")

TEXT_SUFFIXES = frozenset({".py", ".md", ".rst", ".txt"})
# Of a folder that a user names, other languages too. HTML is left out: most of it is generated from
# text that the same packages ship, and without its tags it is menus, indices and code out of shape.
FOLDER_SUFFIXES = TEXT_SUFFIXES | {
    *(".adoc", ".info", ".org", ".pod", ".scrbl", ".tex", ".texi", ".texinfo"),
    *(".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hh", ".hpp", ".cs", ".go", ".java", ".kt", ".rs"),
    *(".el", ".erl", ".ex", ".f90", ".hrl", ".hs", ".jl", ".js", ".lisp", ".lua", ".ml", ".mli"),
    *(".php", ".pl", ".pm", ".r", ".rb", ".rkt", ".scala", ".scm", ".sh", ".sql", ".swift", ".ts"),
    *(".vim", ".R"),
}
# What a program wrote for programs: minified scripts have no lines, tables and dumps few letters.
MAX_MEAN_LINE_BYTES = 1000
MIN_SHARE_OF_LETTERS = 0.25  # of what is no white space
LETTERS = string.ascii_letters.encode() + bytes(range(0x80, 0x100))  # other scripts' count too
MIN_FILE_BYTES = 128  # empty __init__.py files and one-line stubs teach nothing
MAX_FILE_BYTES = 1 << 20  # larger text files are tables that a program wrote
# A file most of whose lines stand in earlier files is a vendored or regenerated copy of them. Lines
# too short to tell files apart ("else:", "return x") do not count.
MAX_SHARE_SEEN = 0.7
MIN_LINE_CHARS = 16
LISTING = "files.json"
FORMAT = 1  # part of a listing's key: raise it when other files are accepted


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


def list_files(
    corpus: LocalCorpus, *, folders: Sequence[str] = (), max_bytes: int | None = None
) -> list[CorpusFile]:
    """List the files of `corpus` without exact duplicates, in the order of their content hash.

    folders: read as well, for text and source code in FOLDER_SUFFIXES; all there is of the corpus
        "folders".
    max_bytes: stop before the file that would exceed this total; a subset by hash is a fair sample.
    Raises ValueError for an unknown corpus, a folder that is none, or when there are no such files.
    """
    chosen: list[CorpusFile] = []
    total = 0
    for file in _all_files(corpus, tuple(folders)):
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
def _all_files(corpus: LocalCorpus, folders: tuple[str, ...]) -> tuple[CorpusFile, ...]:
    roots = {"python_stdlib": ("stdlib",), "site_packages": ("purelib", "platlib"), "folders": ()}
    if corpus not in roots:
        raise ValueError(f"unknown local corpus {corpus!r}: accepted are {', '.join(roots)}")
    unique: dict[bytes, CorpusFile] = {}
    installed = {Path(sysconfig.get_path(name)).resolve() for name in roots[corpus]}
    for folder in sorted(installed):
        for file in _text_files(folder, into_packages=corpus == "site_packages"):
            unique[file.digest] = file
    for folder in sorted(Path(name).resolve() for name in folders):
        if not folder.is_dir():
            raise ValueError(f"folders: {folder} is no folder; give folders with text files")
        for file in _text_files(folder, FOLDER_SUFFIXES, accepts=_is_written_by_people):
            unique[file.digest] = file
    if not unique:
        where = ", ".join([*map(str, sorted(installed)), *folders]) or "no folder"
        raise ValueError(
            f"corpus {corpus!r}: no text files under {where}; "
            "choose another dataloader.corpus or name dataloader.folders"
        )
    return tuple(sorted(unique.values(), key=lambda file: file.digest))


def _text_files(
    folder: Path,
    suffixes: frozenset[str] = TEXT_SUFFIXES,
    *,
    into_packages: bool = True,
    accepts: Callable[[bytes], bool] = bool,
) -> Iterator[CorpusFile]:
    """Yield the readable UTF-8 text files under `folder`, in the order of their paths.

    Read and hashed once: until a path, a size or a time of change is another, the cache knows them.
    """
    found = dict(_candidates(folder, suffixes, into_packages=into_packages))
    settings = (FORMAT, str(folder), accepts.__name__, MIN_FILE_BYTES, MAX_FILE_BYTES)
    digest = hashlib.sha256(repr(settings).encode())
    for path, state in found.items():
        change = (state.st_mtime_ns, state.st_ctime_ns)  # images may fix the first
        digest.update(f"{path}\0{state.st_size}\0{change}\n".encode(errors="surrogateescape"))

    def build(target: Path) -> None:
        files = [
            (str(file.path), file.num_bytes, file.digest.hex())
            for file in _read(found, accepts=accepts)
        ]
        (target / LISTING).write_text(json.dumps(files))

    cached = build_once("listings", digest.hexdigest()[:32], build)
    for path, num_bytes, content in json.loads((cached / LISTING).read_text()):
        yield CorpusFile(Path(path), num_bytes, bytes.fromhex(content))


def _candidates(
    folder: Path, suffixes: frozenset[str], *, into_packages: bool
) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in suffixes:
            continue
        if not into_packages and not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
            continue
        try:
            state = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(state.st_mode) and MIN_FILE_BYTES <= state.st_size <= MAX_FILE_BYTES:
            yield path, state


def _read(paths: Iterable[Path], *, accepts: Callable[[bytes], bool]) -> Iterator[CorpusFile]:
    for path in paths:
        try:
            content = path.read_bytes()
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if accepts(content):
            yield CorpusFile(path, len(content), hashlib.sha256(content).digest())


def _is_written_by_people(content: bytes) -> bool:
    """Whether it has lines, and letters on them."""
    if len(content) > MAX_MEAN_LINE_BYTES * (content.count(b"\n") + 1):
        return False
    visible = content.translate(None, string.whitespace.encode())
    letters = len(visible) - len(visible.translate(None, LETTERS))
    return letters >= MIN_SHARE_OF_LETTERS * len(visible)
