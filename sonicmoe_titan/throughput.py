"""Tokens per day and what follows from it, with warm-up steps and validation left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

DAY = 86400.0  # seconds


class _Mark(NamedTuple):
    step: int
    tokens: int
    training_s: float
    wall_s: float


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
    (compilation, graph capture, first allocations); no rate knows anything from before it. Time
    spent inside `paused` (validation) counts for the ETA only.

    Attributes:
        num_gpus: ranks that train together.
        total_steps: last step of the run; None where unknown, then there is no ETA.
        clock: monotonic seconds.
    """

    num_gpus: int
    warmup_steps: int
    total_steps: int | None = None
    clock: Callable[[], float] = time.perf_counter

    _first_step: int | None = field(default=None, init=False)
    _paused_s: float = field(default=0.0, init=False)
    _start: _Mark | None = field(default=None, init=False)
    _last: _Mark | None = field(default=None, init=False)
    _window: Rate | None = field(default=None, init=False)

    def begin_step(self, step: int) -> None:
        """Called before every step; the first one says where this process began."""
        if self._first_step is None:
            self._first_step = step

    @contextmanager
    def _pause(self):  # noqa: ANN202
        begin = self.clock()
        try:
            yield
        finally:
            self._paused_s += self.clock() - begin

    def paused(self) -> AbstractContextManager[None]:
        """Time within this context is not training."""
        return self._pause()

    def update(self, step: int, tokens: int) -> None:
        """Take the log point after `step`, with the tokens that all ranks have seen so far."""
        wall = self.clock()
        mark = _Mark(step, tokens, wall - self._paused_s, wall)
        first = step if self._first_step is None else self._first_step
        self._window = None
        if self._start is None:
            if step - first + 1 >= self.warmup_steps:
                self._start = mark
        elif self._last is not None:
            self._window = self._rate(self._last, mark)
        self._last = mark

    @property
    def window(self) -> Rate | None:
        """Speed between the last two log points; None during the warm-up."""
        return self._window

    @property
    def average(self) -> Rate | None:
        """Speed since the warm-up; None during it."""
        if self._start is None or self._last is None:
            return None
        return self._rate(self._start, self._last)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step at the pace since the warm-up, validation included."""
        if self._start is None or self._last is None or self.total_steps is None:
            return None
        steps = self._last.step - self._start.step
        if steps <= 0:
            return None
        pace = (self._last.wall_s - self._start.wall_s) / steps
        return max(0, self.total_steps - self._last.step) * pace

    def _rate(self, begin: _Mark, end: _Mark) -> Rate | None:
        seconds, tokens = end.training_s - begin.training_s, end.tokens - begin.tokens
        if seconds <= 0 or tokens <= 0:
            return None
        return Rate(tokens / seconds, self.num_gpus)
