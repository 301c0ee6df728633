"""An exponential moving average of the weights, often a better model than the last step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + n) / (10 + n)) at step n.

    The smaller d of the first steps keeps the random start from being remembered. The average is float32, of the same
    shapes (and shards) as the parameters.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p.float(), weight)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights within the context."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(values[name])
