"""Validation by the causal protocol: every exit's loss on fixed windows, and that at the depth each prefix decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..depth_statistics import Comparison, Costs, DepthStatistics, at_steps, bootstrap, rank_correlation, shuffled
from ..exits import exits
from ..halting import executed_steps
from ..model import HRMForCausalLM


@dataclass(frozen=True)
class Reading:
    """What a model says of N windows of T tokens at each of S depths."""

    losses: np.ndarray
    """[N, T, S] float32, nats: each token's, all positions before it at the same depth."""
    margins: np.ndarray
    """[N, T, S] float32: q_halt + bias - q_continue of each prefix, the model's own bias included."""
    change: np.ndarray
    """[N, T, S] float32: relative change of z_H in each step."""

    @property
    def max_steps(self) -> int:
        """S."""
        return self.losses.shape[-1]

    def by_depth(self) -> np.ndarray:
        """[S] nats per token at fixed depths."""
        return self.losses.astype(np.float64).mean((0, 1))

    def executed(self, extra_bias: float = 0.0) -> np.ndarray:
        """[N, T] the steps that each prefix decides, with `extra_bias` more for halting."""
        return executed_steps(torch.from_numpy(self.margins + np.float32(extra_bias))).numpy()

    def loss(self, executed: np.ndarray) -> float:
        """Nats per token at depths [N, T]."""
        picked = np.take_along_axis(self.losses, executed[..., None] - 1, -1)
        return float(picked.astype(np.float64).mean())

    def statistics(self, executed: np.ndarray) -> DepthStatistics:
        """Of depths [N, T]."""
        return DepthStatistics.of(executed, self.max_steps)

    def compare(
        self, executed: np.ndarray, costs: Costs | None = None, windows: np.ndarray | None = None
    ) -> Comparison:
        """Depths [N, T] against fixed and shuffled ones at equal compute: equal steps, or with `costs` equal block
        applications. windows: which of the N count (a bootstrap's draw)."""
        return self.comparing(executed, costs)(slice(None) if windows is None else windows)

    def comparing(self, executed: np.ndarray, costs: Costs | None = None) -> Callable[[Any], Comparison]:
        """`compare` as a function of which windows count: what each of them says is computed once, for any number of
        draws."""
        by_depth = self.losses.astype(np.float64).mean(1)
        learned = np.take_along_axis(self.losses, executed[..., None] - 1, -1).astype(np.float64).mean((1, 2))
        steps = executed.mean(1)
        spent = steps if costs is None else np.array([costs.equal_steps(window) for window in executed])
        histogram = (executed[..., None] == np.arange(1, self.max_steps + 1)).sum(1)

        def compared(windows) -> Comparison:
            fixed = by_depth[windows].mean(0)
            return Comparison(
                float(learned[windows].mean()),
                at_steps(fixed, spent[windows].mean()),
                shuffled(fixed, histogram[windows].sum(0)),
                float(steps[windows].mean()),
            )

        return compared

    def gain_correlation(self, executed: np.ndarray) -> float | None:
        """Spearman's correlation of depth with what all steps gain over one, l_1 - l_S."""
        return rank_correlation(executed, self.losses[..., 0] - self.losses[..., -1])

    def interval(self, statistic: Callable[[np.ndarray], float], draws: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval over windows."""
        return bootstrap(statistic, len(self.losses), draws)


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

    def read(
        self,
        model: HRMForCausalLM,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager],
        stop: Callable[[], bool] = lambda: False,
    ) -> Reading | None:
        """Every exit of every window, in one unroll each; None if `stop` said so in between."""
        return read_windows(model, self.inputs, self.targets, batch_size, autocast, stop)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The loss in bits per UTF-8 byte, comparable between tokenizers."""
        return nats_per_token * self.targets.size / self.n_bytes / math.log(2)


def read_windows(
    model: HRMForCausalLM,
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    stop: Callable[[], bool] = lambda: False,
) -> Reading | None:
    """Every exit of windows inputs, targets [N, T] int64, `batch_size` at a time; None if `stop` said so in between."""
    parts = []
    for start in range(0, len(inputs), batch_size):
        if stop():
            return None
        rows = (torch.from_numpy(a[start : start + batch_size]).to(model.device) for a in (inputs, targets))
        with autocast():
            found = exits(model, *rows)
        parts.append(
            [t.float().cpu().numpy() for t in (found.losses, found.margins(model.config.halt_bias), found.change)]
        )
    return Reading(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def reported_depths(max_steps: int) -> list[int]:
    """Depths whose loss is printed: all of up to 8, else 1, 2, 4, .. and S."""
    if max_steps <= 8:
        return list(range(1, max_steps + 1))
    return [*(2**i for i in range(max_steps.bit_length()) if 2**i < max_steps), max_steps]
