"""Which sequences a step sees: all windows of the new text in a new order each epoch, and replayed ones of old texts.

Of the B rows of a micro-batch R = round(share B) are replayed, the last. Row p of micro-batch m is sample m B + p:

    new       window number m (B - R) + p in the endless sequence of epochs, each a permutation of all starts
    replayed  an old text, and one of its stored samples, both uniform, drawn by (seed, sample number)

Everything is a function of (seed, step), so a run resumes anywhere. Implements TrainingData (training/batch.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..keyed import REPLAY_STREAM, WINDOW_STREAM, keyed_words, scaled
from ..training.batch import Batch


class TextWindows:
    """Args:
        ids: uint16 [n], the text. old: samples of earlier texts, each uint16 [m, seq_length + 1], m at least 1.
        share: of a micro-batch, the rows that are replayed, 0 <= share < 1. stride: characters between starts.

    Raises:
        ValueError: a replay that leaves no row for the new text.
    """

    def __init__(
        self, ids: np.ndarray, seq_length: int, stride: int, batch_size: int, accumulation: int, seed: int,
        old: Sequence[np.ndarray] = (), share: float = 0.0,
    ):  # fmt: skip
        self.replayed = round(share * batch_size) if old else 0
        if self.replayed >= batch_size:
            raise ValueError(
                f"--replay {share:g} leaves none of the {batch_size} rows of a batch to the new text; lower it to at "
                f"most {(batch_size - 1) / batch_size:.2f}"
            )
        self._windows = np.lib.stride_tricks.sliding_window_view(ids, seq_length + 1)[::stride]
        self.size, self.batch_size, self.accumulation, self.seed = seq_length, batch_size, accumulation, seed
        self._old = list(old)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def windows(self) -> int:
        """Sequences of the new text; an epoch sees each once."""
        return len(self._windows)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which each window comes once."""
        return self.windows / ((self.batch_size - self.replayed) * self.accumulation)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs, at least 1."""
        return max(1, math.ceil(epochs * self.steps_per_epoch))

    def plan(self, step: int) -> list[np.ndarray]:
        """Sample numbers [B] of each of `accumulation` micro-batches."""
        first = step * self.accumulation * self.batch_size
        numbers = np.arange(first, first + self.accumulation * self.batch_size, dtype=np.int64)
        return list(numbers.reshape(self.accumulation, self.batch_size))

    def count_targets(self, samples: np.ndarray) -> int:
        """seq_length for each row."""
        return len(samples) * self.size

    def batch(self, samples: np.ndarray) -> Batch:
        """The rows of these numbers."""
        rows = np.stack([self._row(int(sample)) for sample in samples]).astype(np.int64)
        return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), None, samples)

    def _row(self, sample: int) -> np.ndarray:
        batch, place = divmod(sample, self.batch_size)
        fresh = self.batch_size - self.replayed
        if place < fresh:
            epoch, number = divmod(batch * fresh + place, self.windows)
            return self._windows[self._permutation(epoch)[number]]
        words = keyed_words(self.seed, sample, 1, REPLAY_STREAM)[0].tolist()
        rows = self._old[scaled(words[0], len(self._old))]
        return rows[scaled(words[1], len(rows))]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            words = keyed_words(self.seed, epoch * self.windows, self.windows, WINDOW_STREAM)[:, 0]
            self._order = epoch, np.argsort(words, kind="stable")
        return self._order[1]
