"""The `sonicmoe` command: one line per subcommand, each in a module of its own."""

import importlib
import signal
import sys

from sonicmoe_titan.config_tree import ConfigError, nearest
from sonicmoe_titan.stopping import STOPPED_EXIT_CODE

COMMANDS = {
    "train": ("sonicmoe_titan.launch:main", "[CONFIG] [--KEY VALUE ...]  check, then train here"),
    "check": ("sonicmoe_titan.check:main", "CONFIG [--KEY VALUE ...]  validate without building"),
    "memory": ("sonicmoe_titan.memory:main", "CONFIG  activation memory, predicted and measured"),
    "warmup": ("sonicmoe_titan.warmup:main", "CONFIG  compile the kernels of a run beforehand"),
    "report": ("sonicmoe_titan.report:main", "RUN [RUN ...]  figures and tables of finished runs"),
    "bench": ("sonicmoe_titan.bench:main", "CONFIG  time the MoE block of a run on this machine"),
}


def main() -> None:
    """Entry point of the `sonicmoe` console script; exits with the subcommand's code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see the package's __init__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(STOPPED_EXIT_CODE)


def run(argv: list[str]) -> int:
    """Run a subcommand; errors of its user are one line on stderr and exit code 2."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sonicmoe COMMAND ...\n")
        for name, (_, usage) in COMMANDS.items():
            print(f"  {name:8}{usage}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        return _failed(f"{name}: unknown command; expected one of {', '.join(COMMANDS)}{near}")
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)(rest)
    except ConfigError as error:
        return _failed(str(error))


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
