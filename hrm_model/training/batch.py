"""What a stage trains on: micro-batches of rows by number, and the same rows whatever the number of processes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

IGNORE = -1
"""Target of a position that no loss looks at."""


class Batch(NamedTuple):
    """Rows of a micro-batch. B rows, T positions of the longest."""

    inputs: np.ndarray
    """[B, T] int64 token ids, padded on the right."""
    targets: np.ndarray
    """[B, T] int64, already shifted; -1 where no loss looks, padding included."""
    lengths: np.ndarray | None
    """[B] int64, real tokens of each row; None where all have T."""
    samples: np.ndarray
    """[B] int64 sample numbers: what every random draw for a row is keyed by."""


class TrainingData(Protocol):
    """Micro-batches as a pure function of (seed, step): nothing is remembered, so a run resumes anywhere, on any number
    of processes, each of which reads the rows of its own."""

    def plan(self, step: int) -> list[np.ndarray]:
        """Sample numbers [B] of each micro-batch of optimizer step `step` (from 0), of all processes together."""

    def count_targets(self, samples: np.ndarray) -> int:
        """How many targets these rows have, without reading the rows."""

    def batch(self, samples: np.ndarray) -> Batch:
        """The rows of these numbers. Raises ValueError or OSError where they cannot be read."""


class ValidationRows(NamedTuple):
    """Rows that nothing is trained on, always the same."""

    inputs: np.ndarray
    """[N, T] int64, padded on the right."""
    targets: np.ndarray
    """[N, T] int64, -1 where no loss looks."""
    lengths: np.ndarray | None
    """[N] int64; None where all have T."""
