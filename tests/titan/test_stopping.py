"""A signal becomes one exception, whatever it interrupts."""

import os
import signal

import pytest

from sonicmoe_titan.stopping import Stopped, stop_on_signals


@pytest.fixture(autouse=True)
def handlers() -> object:
    """Give the test runner its signal handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")]
)
def test_signal_stops_with_its_name(number: int, name: str) -> None:
    with pytest.raises(Stopped, match=name), stop_on_signals():
        os.kill(os.getpid(), number)


def test_later_signals_are_ignored() -> None:
    with pytest.raises(Stopped, match="Ctrl-C"), stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_fails_after_a_signal_is_its_consequence() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stop_on_signals() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            assert stop.signal == "SIGTERM"
            raise RuntimeError("connection closed by peer") from None


def test_other_errors_pass_and_handlers_return() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError("mine")
    assert signal.getsignal(signal.SIGINT) is before
