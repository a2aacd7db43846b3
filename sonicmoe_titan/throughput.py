"""Tokens per day and what follows from it, with warm-up steps and validation left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Rate:
    """A speed; tokens are those of all ranks together."""

    tokens_per_second: float
    num_gpus: int

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * DAY

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.num_gpus

    @property
    def gpu_days_per_billion_tokens(self) -> float:
        return 1e9 * self.num_gpus / self.tokens_per_day


@dataclass
class Throughput:
    """Turns log points into rates.

    The first log point at or after `warmup_steps` steps of this process ends the warm-up
    (compilation, graph capture, first allocations); no rate knows anything from before it.

    Attributes:
        num_gpus: ranks that train together.
        total_steps: last step of the run; None where unknown, then there is no ETA.
        clock: seconds that include validation; for the ETA alone.
        window: speed between the last two log points; None during the warm-up.
    """

    num_gpus: int
    warmup_steps: int
    total_steps: int | None = None
    clock: Callable[[], float] = time.perf_counter

    window: Rate | None = field(default=None, init=False)
    _first_step: int | None = field(default=None, init=False)
    _warm_step: int | None = field(default=None, init=False)
    _warm_clock: float = field(default=0.0, init=False)
    _last_step: int = field(default=0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)

    def begin_step(self, step: int) -> None:
        """Called before every step; the first one says where this process began."""
        if self._first_step is None:
            self._first_step = step

    def update(self, step: int, *, tokens: float, seconds: float) -> None:
        """Take the log point after `step`.

        Args:
            step: the step that has just ended.
            tokens: what all ranks have trained on since the last log point.
            seconds: how long that took, without validation.
        """
        self.window, self._last_step = None, step
        if self._warm_step is not None:
            self._tokens += tokens
            self._seconds += seconds
            self.window = self._rate(tokens, seconds)
            return
        first = step if self._first_step is None else self._first_step
        if step - first + 1 >= self.warmup_steps:
            self._warm_step, self._warm_clock = step, self.clock()

    @property
    def average(self) -> Rate | None:
        """Speed since the warm-up; None during it."""
        return self._rate(self._tokens, self._seconds)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step at the pace since the warm-up, validation included."""
        if self._warm_step is None or self.total_steps is None:
            return None
        steps = self._last_step - self._warm_step
        if steps <= 0:
            return None
        pace = (self.clock() - self._warm_clock) / steps
        return max(0, self.total_steps - self._last_step) * pace

    def _rate(self, tokens: float, seconds: float) -> Rate | None:
        return Rate(tokens / seconds, self.num_gpus) if tokens > 0 and seconds > 0 else None
