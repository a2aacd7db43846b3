"""The tokenizer: files in a folder, a repository on the Hugging Face Hub, or trained right here."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger

from sonicmoe_titan.cache import build_once
from sonicmoe_titan.corpus import LOCAL_CORPORA, LocalCorpus, fingerprint, list_files

# Begins and ends every document, so documents need one token between them, not two.
END_OF_TEXT = "<|endoftext|>"
# The tokenizer of the paper's codebase (OLMoE): 50,280 entries, padded to 50,304 in the model.
OLMOE_TOKENIZER = "allenai/OLMoE-1B-7B-0924"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json")
BATCH_DOCUMENTS = 1024  # encoded at once: enough for any number of cores
FORMAT = 1  # part of the cache key: raise it when a change below changes the result


class TextTokenizer(HuggingFaceTokenizer):
    """A HuggingFaceTokenizer that also knows where to get its files and how long a token is.

    Raises ValueError when hf_assets_path is no folder, or the Hub cannot be reached.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        source: str = "python_stdlib"
        """Used when hf_assets_path is empty: a local corpus ("python_stdlib", "site_packages",
        "folders") on which a byte-level BPE is trained once and cached, or a repository on the
        Hugging Face Hub, such as "allenai/OLMoE-1B-7B-0924"."""

        folders: list[str] = field(default_factory=list)
        """Folders of text and source code to train on besides a local corpus."""

        vocab_size: int = 4096
        """Entries of a tokenizer that is trained here; others bring their own number."""

        train_bytes: int = 4 << 20
        """Text to train on, in bytes: more improves a small vocabulary very little."""

        def __post_init__(self) -> None:
            if self.vocab_size < 257:
                raise ValueError(
                    f"tokenizer.vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), "
                    f"got {self.vocab_size}"
                )

    def __init__(self, config: Config, *, tokenizer_path: str):
        if tokenizer_path:
            folder = Path(tokenizer_path)
            if not folder.is_dir():
                raise ValueError(
                    f"hf_assets_path {tokenizer_path!r} is not a folder: give one that holds "
                    f'tokenizer.json, or "" to use tokenizer.source ({config.source!r})'
                )
        elif config.source in LOCAL_CORPORA:
            folder = trained_tokenizer(
                config.source,
                folders=config.folders,
                vocab_size=config.vocab_size,
                train_bytes=config.train_bytes,
            )
        else:
            folder = _download(config.source)
        super().__init__(config, tokenizer_path=str(folder))

    def fingerprint(self) -> str:
        """Return a hash of everything that decides how a document is encoded."""
        content = f"{self.tokenizer.to_str()} {self.bos_id} {self.eos_id}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield what `encode` returns of each text, with its begin and end, on every core.

        Threads that call `encode` take turns: only a batch is encoded in parallel, and not where
        TOKENIZERS_PARALLELISM is false.
        """
        begin = [] if self.hf_adds_bos or self.bos_id is None else [self.bos_id]
        end = [] if self.hf_adds_eos or self.eos_id is None else [self.eos_id]
        remaining = iter(texts)
        while batch := list(islice(remaining, BATCH_DOCUMENTS)):
            for encoded in self.tokenizer.encode_batch_fast(batch):
                yield [*begin, *encoded.ids, *end]

    def num_bytes_V(self) -> list[int]:
        """Return the UTF-8 bytes that each token id stands for; special tokens stand for none."""
        special = {
            i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        byte_level = '"ByteLevel"' in self.tokenizer.to_str()
        sizes = [0] * (max(self.get_vocab().values()) + 1)
        for token, token_id in self.get_vocab().items():
            if token_id in special:
                continue
            # A byte-level vocabulary spells every byte as one character.
            text = token if byte_level else self.tokenizer.decode([token_id])
            sizes[token_id] = len(text) if byte_level else len(text.encode())
        return sizes


def trained_tokenizer(
    corpus: LocalCorpus, *, folders: Sequence[str] = (), vocab_size: int, train_bytes: int
) -> Path:
    """Return the folder of a byte-level BPE trained on `corpus`, training it if there is none.

    Training and validation files are both used: the vocabulary is not what is being measured, and
    bits per byte compare across tokenizers.
    """
    files = list_files(corpus, folders=folders, max_bytes=train_bytes)
    settings = f"{FORMAT} {vocab_size} {fingerprint(files)}"
    key = f"{corpus}-{vocab_size}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def texts() -> Iterator[str]:
        for file in files:
            yield file.path.read_text(encoding="utf-8")

    def build(folder: Path) -> None:
        logger.info(
            f"Training a tokenizer of {vocab_size} entries on {len(files)} files of {corpus}"
        )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts(), trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        config = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))

    return build_once("tokenizers", key, build)


def _download(repository: str) -> Path:
    """Return the local folder of a tokenizer on the Hugging Face Hub."""
    from huggingface_hub import hf_hub_download

    try:
        paths = [hf_hub_download(repository, name) for name in HUB_FILES]
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"tokenizer.source {repository!r} cannot be downloaded ({type(error).__name__}): "
            "it needs a network and a repository of that name; without one give hf_assets_path, "
            f"or a local source ({', '.join(LOCAL_CORPORA)})"
        ) from error
    return Path(paths[0]).parent
