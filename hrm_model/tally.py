"""What generation did: tokens, seconds, and how many steps they took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

BAR = 30


class Tally:
    """Counts generated tokens, the time they took, and the HRM steps of each."""

    def __init__(self):
        self.steps: Counter[int] = Counter()
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return self.steps.total()

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before there are any."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def mean_steps(self) -> float:
        """Mean HRM steps of a token; 0 before there are any."""
        return sum(s * n for s, n in self.steps.items()) / max(self.tokens, 1)

    def counted(self, events: Iterator) -> Iterator:
        """The same events, counted. Only the time that making them takes is measured, not what is done with them."""
        while True:
            begin = time.perf_counter()
            try:
                event = next(events)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - begin
            self.steps[event.steps] += 1
            yield event

    def line(self) -> str:
        """Everything in one line; of the steps, how many tokens took how many."""
        if not self.tokens:
            return "0 tokens"
        counts = " ".join(f"{s}:{n}" for s, n in sorted(self.steps.items()))
        noun = "token" if self.tokens == 1 else "tokens"
        return f"{self.tokens} {noun}, {self.rate:.1f} tokens/s, mean {self.mean_steps:.2f} steps ({counts})"

    def histogram(self, max_steps: int) -> list[str]:
        """A line for each number of steps from 1 to `max_steps`: a bar, the tokens, their share."""
        most = max(self.steps.values(), default=1)
        lines = []
        for s in range(1, max(max_steps, *self.steps, 1) + 1):
            n = self.steps[s]
            bar = "#" * (max(1, round(BAR * n / most)) if n else 0)
            lines.append(f"{s:>4} {bar:<{BAR}} {n:>6} {n / max(self.tokens, 1):>6.1%}")
        return lines
