"""Validation: loss at several depths on fixed windows, bits per byte, and the n-gram losses that give it a scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from ..model import HRMForCausalLM


@dataclass
class Validation:
    """A fixed set of windows [N, T] and what is known of it before any training."""

    inputs: np.ndarray
    targets: np.ndarray
    n_bytes: int
    """UTF-8 bytes of the targets."""
    unigram: float
    """Nats per token of the training split's token frequencies."""
    bigram: float
    """Nats per token of an interpolated bigram model of the training split."""

    @torch.no_grad()
    def loss(
        self,
        model: HRMForCausalLM,
        force_steps: int | None,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager],
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[float, Counter] | None:
        """(mean nats per token, histogram of executed steps), every row at `force_steps` or at the head's decision,
        pooled over the row; None if `stop` said so in between. Leaves the model in eval mode."""
        model.eval()
        nats, depths = 0.0, Counter()
        for start in range(0, len(self.inputs), batch_size):
            if stop():
                return None
            inputs, targets = (
                torch.from_numpy(a[start : start + batch_size]).to(model.device) for a in (self.inputs, self.targets)
            )
            with autocast():
                out = model(inputs, targets, force_steps=force_steps)
            nats += out.loss.item() * targets.numel()
            depths.update(out.executed_steps.tolist())
        return nats / self.targets.size, depths

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The loss in bits per UTF-8 byte, comparable between tokenizers."""
        return nats_per_token * self.targets.size / self.n_bytes / math.log(2)


def reported_depths(max_steps: int, extra: int = 0) -> list[int]:
    """Depths whose loss is printed: 1, S/2, S, and the run's own fixed depth."""
    return sorted({1, max(1, max_steps // 2), max_steps} | ({extra} if extra else set()))
