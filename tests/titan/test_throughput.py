"""Tokens per day know neither the warm-up nor validation."""

import pytest

from sonicmoe_titan.throughput import DAY, Throughput


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(*, warmup_steps: int, log_steps: list[int], first_step: int = 1) -> Throughput:
    """Steps of 2 s and 100 tokens on 4 GPUs; everything before step 5 takes 50 times as long."""
    clock = Clock()
    throughput = Throughput(num_gpus=4, warmup_steps=warmup_steps, total_steps=100, clock=clock)
    last, seconds = first_step - 1, 0.0
    for step in range(first_step, max(log_steps) + 1):
        throughput.begin_step(step)
        took = 2.0 if step - first_step >= 4 else 100.0
        clock.now += took
        seconds += took
        if step in log_steps:
            throughput.update(step, tokens=100 * (step - last), seconds=seconds)
            last, seconds = step, 0.0
    return throughput


def test_warmup_steps_never_enter_a_rate() -> None:
    throughput = _run(warmup_steps=4, log_steps=[1, 4, 6, 8])
    assert throughput.window is not None and throughput.average is not None
    assert throughput.window.tokens_per_second == pytest.approx(50)
    assert throughput.average.tokens_per_second == pytest.approx(50)
    assert throughput.average.tokens_per_day == pytest.approx(50 * DAY)
    assert throughput.average.tokens_per_second_per_gpu == pytest.approx(12.5)
    assert throughput.average.gpu_days_per_billion_tokens == pytest.approx(4e9 / (50 * DAY))


def test_a_window_that_began_in_the_warmup_has_no_rate() -> None:
    throughput = _run(warmup_steps=4, log_steps=[1, 3, 6])
    assert throughput.window is None
    assert throughput.average is None
    assert throughput.eta_s is None


def test_resumed_run_warms_up_again() -> None:
    throughput = _run(warmup_steps=4, log_steps=[102, 104, 106], first_step=101)
    assert throughput.average is not None
    assert throughput.average.tokens_per_second == pytest.approx(50)


def test_average_weighs_windows_by_their_length() -> None:
    clock = Clock()
    throughput = Throughput(num_gpus=1, warmup_steps=0, clock=clock)
    throughput.begin_step(1)
    throughput.update(1, tokens=1, seconds=1.0)
    throughput.update(2, tokens=100, seconds=1.0)
    throughput.update(5, tokens=300, seconds=9.0)
    assert throughput.average is not None
    assert throughput.average.tokens_per_second == pytest.approx(40)


def test_eta_counts_validation_but_rates_do_not() -> None:
    clock = Clock()
    throughput = Throughput(num_gpus=1, warmup_steps=1, total_steps=30, clock=clock)
    throughput.begin_step(1)
    clock.now = 10.0
    throughput.update(1, tokens=10, seconds=10.0)
    clock.now += 10.0 + 40.0  # ten steps of a second, then a validation of 40 s
    throughput.update(11, tokens=100, seconds=10.0)
    assert throughput.window is not None
    assert throughput.window.tokens_per_second == pytest.approx(10)
    assert throughput.eta_s == pytest.approx(19 * 5.0)
