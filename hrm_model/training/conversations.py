"""The conversations of a split, row by row, with what a loss looks at."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .shards import Split


_TOGETHER = 1 << 24
"""Ids whose masks are looked at together, 16 MiB."""


class Conversations:
    """N conversations, each of which is a row of ids that ends with the end-of-text id. len() is N.

    Get it from Dataset.conversations(). Attributes: path (of the dataset), lengths (int64 [N], ids of each), answers.
    """

    def __init__(self, path: Path, ids: Split, mask: Split, lengths: np.ndarray):
        """mask: for each of the ids 1 where a loss looks at it, else 0; lengths: int64 [N], their sum is len(ids)."""
        self.path = path
        self.lengths = lengths
        self._ids = ids
        self._mask = mask
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def answers(self) -> np.ndarray:
        """Targets of each conversation, int64 [N]: how many of its ids belong to answers."""
        counts = np.zeros(len(self), dtype=np.int64)
        for first in range(0, len(self._mask), _TOGETHER):
            mask = self._mask.read(first, min(_TOGETHER, len(self._mask) - first))
            # Conversations with ids in this part: the first may have begun, the last may end in another.
            low, high = np.searchsorted(self._ends, first, "right"), np.searchsorted(self._ends, first + len(mask)) + 1
            starts = self._ends[low:high] - self.lengths[low:high] - first
            counts[low:high] += np.add.reduceat(mask, starts.clip(0), dtype=np.int64)
        return counts

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of conversation i, int64 [n], and which of them belong to answers, bool [n].

        Raises IndexError for an i outside 0..N-1.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"conversation {i} is outside 0..{len(self) - 1} of {self.path}")
        n = int(self.lengths[i])
        start = int(self._ends[i]) - n
        return self._ids.read(start, n).astype(np.int64), self._mask.read(start, n).astype(bool)
