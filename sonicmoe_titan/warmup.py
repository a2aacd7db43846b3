"""`sonicmoe warmup CONFIG`: compile a run's kernels into the shared cache before the job starts."""

import sys

from sonicmoe_kernels.compile import ARCH
from sonicmoe_kernels.warmup import check_arch, warm_up

from sonicmoe_titan.check import load_checked
from sonicmoe_titan.config_tree import ConfigError
from sonicmoe_titan.run_kernels import run_specs, why_nothing_to_compile
from sonicmoe_titan.toml_config import COMMAND_LINE, Command, above_zero, pop_option

USAGE = "usage: sonicmoe warmup CONFIG [--arch sm_90a] [--jobs PROCESSES] [--KEY VALUE ...]"


def main(argv: list[str]) -> int:
    """Build what the cache lacks, with a process per core; needs no GPU.

    Returns:
        0 when every kernel is there, 1 when one could not be built.

    Raises:
        ConfigError: a mistake in the command, the run or the cache's permissions.
    """
    rest = list(argv)
    arch = pop_option(rest, "--arch", USAGE) or ARCH
    jobs = pop_option(rest, "--jobs", USAGE)
    processes = None if jobs is None else above_zero(jobs, f"{COMMAND_LINE}: --jobs")
    config = load_checked(Command.parse(rest, usage=USAGE), num_processes=None)
    try:
        check_arch(arch)
        if reason := why_nothing_to_compile(config):
            print(f"nothing to compile: {reason}")
            return 0
        warm_up(run_specs(config), jobs=processes, arch=arch)
    except ValueError as error:
        raise ConfigError(f"{COMMAND_LINE}: {error}") from None
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
