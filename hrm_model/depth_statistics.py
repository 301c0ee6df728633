"""What the steps that a model took say about it: their spread, what they follow, and whether they were worth it.

N decisions, S steps at most. Losses in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DepthStatistics:
    """Of a histogram of executed steps; entry s - 1 counts the decisions that ran s."""

    histogram: Sequence[int]

    @classmethod
    def of(cls, executed: np.ndarray, max_steps: int) -> DepthStatistics:
        """Of executed steps [N], each in 1..max_steps."""
        return cls(np.bincount(np.asarray(executed).ravel(), minlength=max_steps + 1)[1:].tolist())

    @property
    def mean(self) -> float:
        """Steps a decision."""
        return sum(s * n for s, n in enumerate(self.histogram, 1)) / max(1, sum(self.histogram))

    @property
    def variance(self) -> float:
        """In steps squared."""
        return sum(n * (s - self.mean) ** 2 for s, n in enumerate(self.histogram, 1)) / max(1, sum(self.histogram))

    @property
    def dispersion(self) -> float | None:
        """D = Var / ((mean - 1)(S - mean)), 0..1: 1 where depth is only ever 1 or S, 0 where it is the same for all;
        None (undefined) at a mean of 1 or S."""
        room = (self.mean - 1) * (len(self.histogram) - self.mean)
        return self.variance / room if room > 1e-12 else None

    def __str__(self) -> str:
        d = "constant" if self.dispersion is None else f"{self.dispersion:.3f}"
        return f"mean {self.mean:.2f}, sd {math.sqrt(self.variance):.2f}, D {d}"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation, -1..1; None where one is constant or there are fewer than two values."""
    found = ranks(np.ravel(a)), ranks(np.ravel(b))
    if len(found[0]) < 2 or min(np.ptp(r) for r in found) == 0:
        return None
    return float(np.corrcoef(*found)[0, 1])


# -- was it worth it ---------------------------------------------------------------------------------------------------


def within(by_depth: np.ndarray, steps: float, best: Callable = np.minimum) -> float:
    """The best that fixed depths give for at most `steps` steps: by_depth [S] is a loss, or with best=np.maximum a
    score; between two depths a mix of both. Where going deeper makes it worse, that is a shallower depth."""
    reached = best.accumulate(by_depth)
    return float(np.interp(steps, np.arange(1, len(by_depth) + 1), reached))


def shuffled(by_depth: np.ndarray, histogram: Sequence[int]) -> float:
    """What the same steps give when they are dealt out to the decisions at random: the exact mean over all deals."""
    return float(np.dot(by_depth, histogram) / sum(histogram))


@dataclass(frozen=True)
class Comparison:
    """Learned depth against rivals that take no more compute, in the loss's unit."""

    learned: float
    fixed: float
    """The best of fixed depths, and mixes of two, that take no more compute."""
    shuffled: float
    """The same steps dealt out at random."""
    mean_steps: float


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of statistic(indices) when `n` independent units are drawn anew with replacement."""
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, n, n)) for _ in range(draws)]
    tail = 50 * (1 - level)
    low, high = np.percentile(found, (tail, 100 - tail))
    return float(low), float(high)


@dataclass(frozen=True)
class Costs:
    """Block applications of generation over the cache, counted."""

    per_step: int
    """Of one HRM step, for a token."""
    outer: tuple[int, int]
    """Input and output blocks, for a token."""

    @classmethod
    def of(cls, config) -> Costs:
        """A model's."""
        return cls(config.blocks_per_step, (config.n_input_layers, config.n_output_layers))

    def applications(self, executed: np.ndarray) -> np.ndarray:
        """Of each token of rows that were generated token by token at depths executed [..., T]: [..., T].

        A position is in the end run to the largest depth that it or any later position asks for, and the output blocks
        once for each depth in use from it on (docs/generation.md).
        """
        executed = np.asarray(executed)
        reverse = executed[..., ::-1]
        deepest = np.maximum.accumulate(reverse, -1)[..., ::-1]
        used = np.zeros(executed.shape, dtype=np.int64)
        for depth in range(1, int(executed.max(initial=0)) + 1):
            used += np.maximum.accumulate(reverse == depth, -1)[..., ::-1]
        return self.outer[0] + self.per_step * deepest + self.outer[1] * used

    def of_fixed(self, depth: float) -> float:
        """Of a token at a fixed depth."""
        return sum(self.outer) + self.per_step * depth

    def equal_steps(self, executed: np.ndarray) -> float:
        """The fixed depth (a mix, if no whole number) that costs what executed [..., T] do."""
        return (float(self.applications(executed).mean()) - self.of_fixed(0)) / self.per_step
