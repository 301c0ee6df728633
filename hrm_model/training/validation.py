"""Validation by the causal protocol: every exit's loss on fixed windows, and that at the depth each prefix decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..depth_statistics import Comparison, Costs, DepthStatistics, bootstrap, rank_correlation, shuffled, within
from ..exits import exits
from ..halting import executed_by
from ..model import HRMForCausalLM


class Rival(NamedTuple):
    """A loss that learned depths have to beat, nats."""

    loss: float
    difference: float
    """Learned minus rival: below 0 learned depths are better."""
    interval: tuple[float, float] | None
    """95 % interval of the difference, over windows."""

    def is_beaten(self) -> bool:
        """Beyond doubt: the whole interval is below 0."""
        return self.interval is not None and self.interval[1] < 0


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

    def executed(self, extra_bias: float = 0.0, rule: str = "head") -> np.ndarray:
        """[N, T] the steps that each prefix decides, with `extra_bias` more for halting; or those of another rule of
        halting.executed_by."""
        margins = torch.from_numpy(self.margins + np.float32(extra_bias))
        return executed_by(rule, margins, torch.from_numpy(self.change)).numpy()

    def loss(self, executed: np.ndarray) -> float:
        """Nats per token at depths [N, T]."""
        picked = np.take_along_axis(self.losses, executed[..., None] - 1, -1)
        return float(picked.astype(np.float64).mean())

    def statistics(self, executed: np.ndarray) -> DepthStatistics:
        """Of depths [N, T]."""
        return DepthStatistics.of(executed, self.max_steps)

    def comparing(self, executed: np.ndarray, costs: Costs | None = None) -> Callable[[Any], Comparison]:
        """Depths [N, T] against fixed and shuffled ones, as a function of which windows count (slice(None), or a draw
        of a bootstrap). Compute is steps, or with `costs` block applications of windows generated token by token."""
        by_depth = self.losses.astype(np.float64).mean(1)
        learned = np.take_along_axis(self.losses, executed[..., None] - 1, -1).astype(np.float64).mean((1, 2))
        steps = executed.mean(1)
        spent = steps if costs is None else np.array([costs.equal_steps(window) for window in executed])
        histogram = (executed[..., None] == np.arange(1, self.max_steps + 1)).sum(1)

        def compared(windows) -> Comparison:
            fixed = by_depth[windows].mean(0)
            return Comparison(
                float(learned[windows].mean()),
                within(fixed, spent[windows].mean()),
                shuffled(fixed, histogram[windows].sum(0)),
                float(steps[windows].mean()),
            )

        return compared

    def rivals(self, executed: np.ndarray, costs: Costs, draws: int = 1000) -> dict[str, Rival]:
        """What depths [N, T] have to beat: fixed ones of no more steps, fixed ones of no more block applications, and
        the same steps dealt out at random. draws: of the bootstrap over windows; 0 for no intervals."""
        by_steps, by_blocks = self.comparing(executed), self.comparing(executed, costs)

        def against(compared: Callable[[Any], Comparison], rival: str) -> Rival:
            def difference(windows) -> float:
                found = compared(windows)
                return found.learned - getattr(found, rival)

            everything = slice(None)
            interval = self.interval(difference, draws) if draws else None
            return Rival(getattr(compared(everything), rival), difference(everything), interval)

        return {
            "fixed_at_equal_steps": against(by_steps, "fixed"),
            "fixed_at_equal_blocks": against(by_blocks, "fixed"),
            "shuffled": against(by_steps, "shuffled"),
        }

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
