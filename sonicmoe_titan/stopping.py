"""How a run ends: exit codes, and Ctrl-C and SIGTERM in one line instead of a traceback."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

USERS_ERROR = 2  # exit code of a process that has explained a wrong configuration in one line
STOPPED_EXIT_CODE = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass
class Stop:
    """What is known of the end that a signal asked for."""

    signal: str | None = None
    """The first signal's name, as users know it."""

    is_reported: bool = False
    """Whether the user has been told."""


class Stopped(BaseException):
    """Somebody asked this process to end."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.signal)
        self.stop = stop


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Raise Stopped in the main thread at the first SIGINT or SIGTERM; ignore later ones.

    torchrun repeats the signal that the terminal has already sent: a second one says nothing new.
    Whatever exception leaves the block after a signal is its consequence and becomes Stopped as
    well: another rank went first, or a library put its own exception in the place of ours (a save
    of torch's distributed checkpoints does). Inside the block `Stop.signal` tells.
    """
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.signal is None:
            stop.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            raise Stopped(stop)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield stop
    except BaseException as error:
        if stop.signal is not None and not isinstance(error, Stopped):
            raise Stopped(stop) from error
        raise
    finally:
        if stop.signal is None:
            for number, handler in previous.items():
                signal.signal(number, handler)
