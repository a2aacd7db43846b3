"""Checkpoints that resume a run exactly: generator state, complete folders only, clear refusals.

Parameter and optimizer names are TorchTitan's, so its own manager reads what this one writes and
the other way round.
"""

import re
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpoint import (
    DATALOADER,
    OPTIMIZER,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from sonicmoe_titan.hf_adapter import SonicStateDictAdapter

GENERATORS = "generators"
STEP_FOLDER = re.compile(r"step-(\d+)")
# What a save that was interrupted can have left in its folder.
UNFINISHED_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata\.tmp")


class GeneratorState(Stateful):
    """This rank's default random generators, CPU and CUDA, as uint8 tensors."""

    def __init__(self) -> None:
        self._prefix = f"rank_{dist.get_rank() if dist.is_initialized() else 0}"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generators' states; no two ranks use the same names."""
        states = {f"{self._prefix}_cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states[f"{self._prefix}_cuda"] = torch.cuda.get_rng_state()
        return states

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Set the generators to the saved states."""
        torch.set_rng_state(state_dict[f"{self._prefix}_cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict[f"{self._prefix}_cuda"])


class SonicCheckpointManager(CheckpointManager):
    """TorchTitan's checkpoint manager, made exact.

    - Saves the random generators of every rank: stochastic routing draws from them.
    - Resumes from the newest folder that holds a whole training state; folders of interrupted
      saves are removed, model-only and exported ones are passed over.
    - An exported last step (checkpoint.last_save_in_hf) opens in `transformers` as it is: config
      and tokenizer lie beside the weights.

    What a checkpoint lacks is either refused in one line, or left as in a fresh run with a warning:
    generators of a rank that did not exist, and the data position of another kind of loader (a
    stock TorchTitan run has neither).

    Raises ValueError at once when an export or import for `transformers` is configured and the
    model has no place there, not after the last step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        last_save_model_only: bool = False
        """Whether the final checkpoint holds the model alone; such a run cannot be prolonged."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if not self.enable:
            return
        self.states[GENERATORS] = GeneratorState()
        if (self.last_save_in_hf or self.initial_load_in_hf) and isinstance(
            self.sd_adapter, SonicStateDictAdapter
        ):
            self.sd_adapter.architecture()

    def _load(self, step: int = -1) -> bool:
        self._remove_unfinished()
        return super()._load(step)

    def _find_load_step(self, folder: str = "") -> int:
        folder = folder or self.folder
        if filesystem.is_remote(folder):
            return super()._find_load_step(folder)
        for step in sorted(_steps(folder), reverse=True):
            checkpoint = self._create_checkpoint_id(step, folder)
            metadata = _read_metadata(checkpoint)
            # Step 0 is a seed checkpoint: the model alone, by design.
            if metadata is not None and (step == 0 or _holds(metadata, TRAIN_STATE)):
                return step
            logger.warning(f"{checkpoint} holds no whole training state and is passed over")
        return -1

    def _remove_unfinished(self) -> None:
        """Delete what interrupted saves left, so that it can never count as a checkpoint."""
        if filesystem.is_remote(self.folder) or dist.get_rank() != 0:
            return
        for step in _steps(self.folder):
            folder = Path(self._create_checkpoint_id(step))
            if all(UNFINISHED_FILE.fullmatch(path.name) for path in folder.iterdir()):
                logger.warning(f"Removing {folder}, which an interrupted save left")
                filesystem.rmtree(str(folder))

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        """Save as TorchTitan does; a folder that is written anew stops being a checkpoint first."""
        # Rank 0 coordinates the save: no rank writes before it has passed this point.
        if dist.get_rank() == 0 and not filesystem.is_remote(checkpoint_id):
            for name in (".metadata", "model.safetensors.index.json"):
                Path(checkpoint_id, name).unlink(missing_ok=True)
        result = super().dcp_save(
            state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
        )
        if to_hf and dist.get_rank() == 0 and isinstance(self.sd_adapter, SonicStateDictAdapter):
            tokenizer = getattr(self.states[DATALOADER], "tokenizer", None)
            self.sd_adapter.write_config(Path(checkpoint_id), tokenizer=tokenizer)
        return result

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool,
        from_quantized: bool,
    ) -> None:
        """Load as TorchTitan does, after comparing what is asked for with what is there.

        Raises ValueError when a model or optimizer entry is missing, or when the data position
        belongs to another data-parallel degree.
        """
        if not from_hf and not filesystem.is_remote(checkpoint_id):
            state_dict = _loadable(state_dict, checkpoint_id)
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)


def _steps(folder: str) -> list[int]:
    if not filesystem.isdir(folder):
        return []
    matches = map(STEP_FOLDER.fullmatch, filesystem.listdir(folder))
    return [int(match.group(1)) for match in matches if match]


def _read_metadata(checkpoint: str) -> Metadata | None:
    """Return the metadata of a complete checkpoint, None for anything else."""
    if not filesystem.isfile(filesystem.join(checkpoint, ".metadata")):
        return None
    metadata = FileSystemReader(checkpoint).read_metadata()
    ends: dict[str, int] = {}
    for stored in (metadata.storage_data or {}).values():
        end = stored.offset + stored.length
        ends[stored.relative_path] = max(end, ends.get(stored.relative_path, 0))
    files = {Path(checkpoint, name): end for name, end in ends.items()}
    complete = all(file.is_file() and file.stat().st_size >= end for file, end in files.items())
    return metadata if complete else None


def _holds(metadata: Metadata, group: str) -> bool:
    return any(name.startswith(f"{group}.") for name in metadata.state_dict_metadata)


def _loadable(state_dict: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Return the part of `state_dict` to load from `checkpoint`; see dcp_load for errors."""
    metadata = _read_metadata(checkpoint)
    if metadata is None:
        raise ValueError(
            f"{checkpoint} is no complete checkpoint: give the folder of another step, "
            "or --checkpoint.load_step -1 for the newest complete one"
        )
    there = metadata.state_dict_metadata
    loadable = dict(state_dict)
    # a parameter says more than its moments do: what is missing is named by the parameter
    for group, value in sorted(state_dict.items(), key=lambda item: item[0] == OPTIMIZER):
        entries = value.state_dict() if isinstance(value, Stateful) else value
        if group == DATALOADER:
            _check_degree(entries, there, checkpoint)
        wanted = flatten_state_dict({group: entries})[0]
        missing = sorted(wanted.keys() - there.keys())
        if missing and group == DATALOADER:
            logger.warning(f"{checkpoint} has no position for this data loader: data start anew")
            del loadable[group]
        elif missing and group == GENERATORS:
            logger.warning(
                f"{checkpoint} has no random state for this rank: it keeps its fresh one"
            )
            del loadable[group]
        elif missing:
            raise ValueError(
                f"{checkpoint} lacks {missing[0]}: it belongs to another model or holds the model "
                "alone; to start from its weights give it as --checkpoint.initial_load_path with a "
                "new --checkpoint.folder"
            )
        _check_shapes(wanted, there, checkpoint)
    return loadable


def _check_shapes(wanted: dict[str, Any], there: dict[str, Any], checkpoint: str) -> None:
    for name, value in wanted.items():
        saved = getattr(there.get(name), "size", None)
        if isinstance(value, Tensor) and saved is not None and saved != value.shape:
            raise ValueError(
                f"{checkpoint} holds {name} as {tuple(saved)}, this run has {tuple(value.shape)}: "
                "it belongs to another model; restore [model], or give a new --checkpoint.folder"
            )


def _check_degree(position: dict[str, Any], there: Iterable[str], checkpoint: str) -> None:
    """Raise ValueError if `position` is one per rank and was saved for another number of ranks."""
    saved = sum(re.fullmatch(rf"{DATALOADER}\.dp_rank_\d+", name) is not None for name in there)
    if saved and position.get("world_size", saved) != saved:
        raise ValueError(
            f"{checkpoint} has the position of a streamed corpus for {saved} data-parallel ranks "
            f"and this run has {position['world_size']}: resume with {saved}, or start the data "
            "anew with --checkpoint.exclude_from_loading dataloader"
        )
