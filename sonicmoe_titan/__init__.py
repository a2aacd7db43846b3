"""SonicMoE for TorchTitan: `--module sonicmoe_titan` and `python -m sonicmoe_titan.train`."""

import signal
import sys
from pathlib import Path

# The imports of our own programs take seconds. Ctrl-C ends them without a traceback, until `main`
# takes over.
if (sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).name == "sonicmoe") and signal.getsignal(
    signal.SIGINT
) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sonicmoe_titan.cpu import prepare_cpu

prepare_cpu()
