"""How fast a run trains, and how long it will go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Tokens and FLOPs per second of training alone, and the time left."""

    def __init__(self, first_step: int):
        self._first_step = first_step
        self._begin = self._mark = time.perf_counter()
        self._tokens = self._flops = 0.0

    def add(self, tokens: int, flops: float) -> None:
        self._tokens += tokens
        self._flops += flops

    def rates(self) -> tuple[float, float]:
        """Since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._mark, 1e-9)
        rates = self._tokens / seconds, self._flops / seconds
        self._mark, self._tokens, self._flops = now, 0.0, 0.0
        return rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A region whose time does not count."""
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin

    def remaining(self, step: int, steps: int) -> float:
        """Seconds, evaluation and saving included at the rate they have taken so far."""
        return (time.perf_counter() - self._begin) / (step - self._first_step) * (steps - step)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
