"""`torchrun ... -m sonicmoe_titan.train --job.config_file X.toml [--KEY VALUE ...]`"""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.observability import structured_logger
from torchtitan.tools.logging import init_logger

from sonicmoe_titan.check import load_checked
from sonicmoe_titan.stopping import STOPPED_EXIT_CODE, USERS_ERROR, Stop, Stopped, stop_on_signals
from sonicmoe_titan.toml_config import Command
from sonicmoe_titan.trainer import SonicTrainer

USAGE = "usage: torchrun ... -m sonicmoe_titan.train --job.config_file CONFIG [--KEY VALUE ...]"
USERS_MISTAKES = (ValueError, FileNotFoundError, NotImplementedError)
OUR_PACKAGES = ("sonicmoe_titan", "sonicmoe_kernels", "torchtitan")


def main(argv: list[str]) -> int:
    """Train one process of the run that `argv` describes.

    Returns:
        0, 2 after an error of the user (one line on stderr; with a traceback when the environment
        variable SONICMOE_TRACEBACK is set), 130 when it was told to stop.
    """
    init_logger()
    try:
        with stop_on_signals() as stop:
            return _train(argv, stop)
    except Stopped as stopped:
        _leave("" if stopped.stop.is_reported else f"stopped by {stopped}")
    except USERS_MISTAKES as error:
        if not _is_users(error) or os.environ.get("SONICMOE_TRACEBACK"):
            raise
        _say(f"error: {' '.join(str(error).split())}")
        return USERS_ERROR


def _train(argv: list[str], stop: Stop) -> int:
    command = Command.parse(argv, usage=USAGE)
    config = load_checked(command, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    resolved = command.resolved(config)
    if command.print_config:
        if _rank() == 0:
            print(resolved, end="")
        return 0
    structured_logger.init_structured_logger(
        source="training",
        output_dir=config.dump_folder,
        enable=config.debug.enable_structured_logging,
    )
    trainer: SonicTrainer = config.build()
    trainer.config_text = resolved
    try:
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    except BaseException:
        if stop.signal is not None:
            where = f"at step {trainer.step}"
            if config.checkpoint.enable:
                folder = Path(config.dump_folder) / config.checkpoint.folder
                where += f"; resumes from the last checkpoint in {folder}"
            _say(f"stopped by {stop.signal} {where}")
            stop.is_reported = True
        raise
    finally:
        trainer.close()
    dist.destroy_process_group()
    return 0


def _leave(message: str) -> NoReturn:
    """End now: other ranks may be gone, and waiting for them would hang."""
    if message:
        _say(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED_EXIT_CODE)


def _is_users(error: Exception) -> bool:
    """Whether our code or TorchTitan refused something, rather than a library failing inside."""
    module = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(f"{os.sep}{package}{os.sep}" in module for package in OUR_PACKAGES)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))  # torchrun learns what it was that failed
