"""This process among those of one run: which rows are its own, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class OtherRankError(RuntimeError):
    """Another process of the run failed, and says why itself."""


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `size`. Every method but `share` has to be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints, logs and writes what one is enough for."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's of some rows, perhaps none."""
        return rows[self.rank :: self.size]

    def sum(self, values: list[float]) -> list[float]:
        """Sums over processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of them."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns in the first process. Where it fails, all fail, and nobody waits for ever.

        Raises:
            OtherRankError: in the others, where it failed in the first, which raises its own error.
        """
        if self.size == 1:
            return action()
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as problem:
                error = problem
        told = [result, error is not None]
        dist.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1]:
            raise OtherRankError("the first process failed; its message says why")
        return told[0]


ALONE = Ranks()
