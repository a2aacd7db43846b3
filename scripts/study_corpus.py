#!/usr/bin/env python3
"""Make a corpus of about 100 million tokens of text and code from packages; needs Debian and pip.

    python scripts/study_corpus.py --out outputs/study_corpus
    ./scripts/train.sh CONFIG --dataloader.corpus folders --dataloader.folders OUT/text \\
        --dataloader.max_bytes none --hf_assets_path OUT/tokenizer    # the validator's likewise

Documentation and source packages of Debian and wheels of PyPI are downloaded by their own clients,
unpacked and never installed or run. What list_files() accepts of each, up to --package-bytes in the
order of the content hash, is copied to OUT/text/PACKAGE; a byte-level BPE trained on it goes to
OUT/tokenizer; OUT/manifest.json says what came of which version, and a call that was interrupted
goes on behind the packages in it. The wheels are pinned; a Debian package has the version of the
release that this runs on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sonicmoe_titan.corpus import FOLDER_SUFFIXES, SPLITS, list_files
from sonicmoe_titan.shards import open_shard
from sonicmoe_titan.tokenizer import TextTokenizer, trained_tokenizer

DEBIAN = (
    # prose: reST, Markdown, Texinfo, POD and plain text
    *("anarchism", "debian-policy", "debian-reference-en", "developers-reference", "git-doc"),
    *("linux-doc-6.1", "perl-doc", "python3.11-doc", "python-pandas-doc", "python-sqlalchemy-doc"),
    *("python-sympy-doc", "vim-runtime"),
    # sources: C, C++, Rust, Go, Java, JavaScript, PHP, Perl, Ruby, Lisps, Erlang, Python
    *("emacs-el", "erlang-src", "gcc-12-source", "glibc-source", "golang-1.19-src"),
    *("libboost1.74-dev", "libcgal-dev", "libeigen3-dev", "libpython3.11-testsuite", "libruby3.1"),
    *("linux-source-6.1", "maxima-share", "node-typescript", "openjdk-17-source"),
    *("perl-modules-5.36", "racket-common", "rust-src", "sbcl-source", "wordpress"),
)
WHEELS = (
    *("ansible==12.3.0", "astropy==8.0.2", "django==5.2.19", "matplotlib==3.11.2", "mypy==2.4.1"),
    *("networkx==3.6.1", "nltk==3.10.4", "numpy==2.4.6", "pandas==3.1.1", "pylint==4.1.4"),
    *("scikit-learn==1.9.1", "scipy==1.17.1", "sphinx==9.0.4", "sqlalchemy==2.1.9"),
    *("statsmodels==0.15.0", "sympy==1.14.0", "transformers==5.24.0", "twisted==26.10.0"),
)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.bz2")
MIN_ARCHIVE_BYTES = 1 << 20  # smaller ones are examples for tests, many of them broken on purpose


def download(package: str, folder: Path) -> Path:
    """Fetch a Debian package, or a wheel when a version stands behind `==`, into `folder`."""
    if "==" in package:
        pip = (sys.executable, "-m", "pip") if _has_pip() else ("pip",)
        command = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", package]
    else:
        command = ["apt-get", "download", "-q", package]
    before = set(folder.iterdir())
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (path,) = set(folder.iterdir()) - before
    return path


def _has_pip() -> bool:
    words = [sys.executable, "-m", "pip", "--version"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a package, the archives inside it, and its compressed text files."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    else:
        shutil.unpack_archive(archive, folder, "zip")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if path.name.endswith(ARCHIVES) and path.stat().st_size >= MIN_ARCHIVE_BYTES:
            # "data" refuses what would leave the folder
            safely = {} if path.suffix == ".zip" else {"filter": "data"}
            shutil.unpack_archive(path, path.with_name(f"{path.name}.unpacked"), **safely)
        elif path.suffix == ".gz" and Path(path.stem).suffix in FOLDER_SUFFIXES:
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))


def take(package: str, downloads: Path, text: Path, *, max_bytes: int) -> dict[str, object]:
    """Copy one package's share to `text`; what the manifest says of it."""
    archive = download(package, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as unpacked:
        unpack(archive, Path(unpacked))
        files = list_files("folders", folders=(unpacked,), max_bytes=max_bytes)
        for file in files:
            target = text / package.partition("==")[0] / file.path.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, target)
    archive.unlink()
    size = sum(file.num_bytes for file in files)
    return {"name": package, "file": archive.name, "files": len(files), "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--package-bytes", type=int, default=16 << 20, help="most of one package")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--train-bytes", type=int, default=48 << 20, help="the tokenizer's text")
    parser.add_argument("--packages", nargs="+", default=[*DEBIAN, *WHEELS])
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    text, downloads, manifest = out / "text", out / "downloads", out / "manifest.json"
    taken = json.loads(manifest.read_text())["packages"] if manifest.is_file() else []
    for package in arguments.packages:
        if package in [one["name"] for one in taken]:
            continue
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        taken.append(take(package, downloads, text, max_bytes=arguments.package_bytes))
        manifest.write_text(json.dumps({"packages": taken}, indent=1) + "\n")
        print("{file}: {files} files, {bytes:,} bytes".format(**taken[-1]), flush=True)
    shutil.rmtree(downloads, ignore_errors=True)
    folders = (str(text),)
    trained = trained_tokenizer(
        "folders",
        folders=folders,
        vocab_size=arguments.vocab_size,
        train_bytes=arguments.train_bytes,
    )
    shutil.copytree(trained, out / "tokenizer", dirs_exist_ok=True)
    tokenizer = TextTokenizer.Config().build(tokenizer_path=str(out / "tokenizer"))
    shards = {
        split: open_shard(
            "folders", split, tokenizer, folders=folders, max_bytes=None, validation_fraction=0.05
        ).manifest
        for split in SPLITS
    }
    corpus = shards["train"]
    manifest.write_text(json.dumps({"packages": taken, **corpus}, indent=1) + "\n")
    print(json.dumps(corpus, indent=1))


if __name__ == "__main__":
    main()
