"""SonicMoE for TorchTitan: `--module sonicmoe_titan` and `python -m sonicmoe_titan.train`."""

import signal
import sys
from pathlib import Path

# What our own programs import takes seconds. Until their `main` takes over, Ctrl-C ends them without
# a traceback.
_our_program = sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).name == "sonicmoe"
if _our_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sonicmoe_titan.cpu import prepare_cpu

prepare_cpu()
