"""SonicMoE for TorchTitan: `--module sonicmoe_titan` and `python -m sonicmoe_titan.train`."""

import signal
import sys
from pathlib import Path


def _is_our_program() -> bool:
    """Whether this process runs one of our commands, rather than a program that imports us."""
    given = sys.orig_argv
    if "-m" in given[:-1]:
        return given[given.index("-m") + 1].startswith(f"{__name__}.")
    return Path(*sys.argv[:1]).name == "sonicmoe"


# Our imports take seconds. Ctrl-C ends them without a traceback, until `main` takes over.
if _is_our_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sonicmoe_titan.cpu import prepare_cpu  # noqa: E402

prepare_cpu()
