"""How a run ends: exit codes, and Ctrl-C and SIGTERM in one line instead of a traceback."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

USERS_ERROR = 2  # exit code of a process that has explained a wrong configuration in one line
STOPPED_EXIT_CODE = 130  # what a shell reports for a program that Ctrl-C ended


class Stopped(BaseException):
    """Somebody asked this process to end; carries the signal's name."""

    is_reported = False
    """Whether the user has been told."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread at the first SIGINT or SIGTERM; ignore later ones.

    torchrun repeats the signal that the terminal has already sent: a second one says nothing new.
    Whatever exception leaves the block after a signal is its consequence (another rank went first),
    and becomes Stopped as well.
    """
    received: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
            raise Stopped(received[0])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, Stopped):
            raise Stopped(received[0]) from error
        raise
    finally:
        if not received:
            for number, handler in previous.items():
                signal.signal(number, handler)
