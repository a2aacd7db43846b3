"""`sonicmoe train [CONFIG] [--KEY VALUE ...]`: check a run, then train it with torchrun here."""

import logging
import os
import sys
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sonicmoe_titan import check
from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.run_sizes import summary
from sonicmoe_titan.stopping import STOPPED_EXIT_CODE, USERS_ERROR
from sonicmoe_titan.toml_config import Command, above_zero

USAGE = "usage: sonicmoe train [CONFIG] [--nproc PROCESSES] [--KEY VALUE ...]"
DEFAULT_CONFIG = CONFIGS / "debug.toml"


def main(argv: list[str]) -> int:
    """Train on every GPU of this machine, or in one process on the CPU.

    Args:
        argv: the configuration (configs/debug.toml if none), `--nproc` (or the environment variable
            NPROC) for another number of processes, and overrides.

    Returns:
        torchrun's exit code; ConfigError before anything starts on a run that is not valid.
    """
    command = Command.parse(argv, usage=USAGE, default=_relative(DEFAULT_CONFIG))
    processes = command.num_processes
    if processes is None and (given := os.environ.get("NPROC")):
        processes = above_zero(given, "environment: NPROC")
    processes = processes or torch.cuda.device_count() or 1
    config = check.load_checked(command, num_processes=processes)
    if command.print_config:
        print(command.resolved(config), end="")
        return 0
    print(f"{command.config_file}: ok: {summary(config, processes)}", flush=True)
    arguments = [
        f"--nproc_per_node={processes}",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        "--local-ranks-filter=0",
        *("-m", "sonicmoe_titan.train"),
        *("--job.config_file", command.config_file, *command.overrides),
    ]
    # its lines about a signal or an exit code say nothing that the processes or we do not say
    for name in ("agent.server.api", "multiprocessing.api"):  # torch gives the first its own level
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.get_args_parser().parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (USERS_ERROR, STOPPED_EXIT_CODE):  # those explain themselves
            if rank != 0:  # whose own words nobody has seen
                print(_traceback(failure), file=sys.stderr)
            print(f"error: process {rank} ended with {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return STOPPED_EXIT_CODE
    return 0


def _traceback(failure: ProcessFailure) -> str:
    """What a process raised, or what torchrun says of one that was killed."""
    recorded = failure.error_file_data["message"]
    if isinstance(recorded, str):
        return failure.message
    return recorded["extraInfo"]["py_callstack"].rstrip()


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
