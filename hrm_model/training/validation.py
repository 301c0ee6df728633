"""Validation by the causal protocol: every exit's loss on fixed windows, and that at the depth each prefix decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..depth_statistics import Comparison, Costs, DepthStatistics, bootstrap, rank_correlation, shuffled, within
from ..exits import exits
from ..halting import executed_by
from ..model import HRMForCausalLM
from ..ranks import ALONE, Ranks
from ..tokenizer import get_tokenizer
from .batch import IGNORE, ValidationRows
from .ngram import ngram_losses
from .shards import Split


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
    """What a model says of N rows of T tokens at each of S depths."""

    losses: np.ndarray
    """[N, T, S] float32, nats: each token's, all positions before it at the same depth."""
    margins: np.ndarray
    """[N, T, S] float32: q_halt + bias - q_continue of each prefix, the model's own bias included."""
    change: np.ndarray
    """[N, T, S] float32: relative change of z_H in each step."""
    weights: np.ndarray | None = None
    """[N, T] float64, what each position counts; 0 where it has no target. None: all alike."""

    @classmethod
    def joined(cls, parts: Sequence[Reading], shares: Sequence[float]) -> Reading:
        """All rows of several, those of each weighing its share in all."""
        most = max(part.losses.shape[1] for part in parts)

        def padded(a: np.ndarray) -> np.ndarray:
            return np.pad(a, [(0, 0), (0, most - a.shape[1])] + [(0, 0)] * (a.ndim - 2))

        scaled = [part.counts * (share / part.counts.sum()) for part, share in zip(parts, shares, strict=True)]
        columns = ([getattr(part, name) for part in parts] for name in ("losses", "margins", "change"))
        return cls(*(np.concatenate([padded(a) for a in column]) for column in (*columns, scaled)))

    @property
    def max_steps(self) -> int:
        """S."""
        return self.losses.shape[-1]

    @property
    def counts(self) -> np.ndarray:
        """[N, T] float64: the weights, or ones."""
        return np.ones(self.losses.shape[:2]) if self.weights is None else self.weights

    def by_depth(self) -> np.ndarray:
        """[S] nats per token at fixed depths."""
        if self.weights is None:
            return self.losses.astype(np.float64).mean((0, 1))
        return np.average(self.losses.astype(np.float64), axis=(0, 1), weights=self.weights)

    def executed(self, extra_bias: float = 0.0, rule: str = "head") -> np.ndarray:
        """[N, T] the steps that each prefix decides, with `extra_bias` more for halting; or those of another rule of
        halting.executed_by."""
        margins = torch.from_numpy(self.margins + np.float32(extra_bias))
        return executed_by(rule, margins, torch.from_numpy(self.change)).numpy()

    def loss(self, executed: np.ndarray) -> float:
        """Nats per token at depths [N, T]."""
        picked = np.take_along_axis(self.losses, executed[..., None] - 1, -1)[..., 0].astype(np.float64)
        return float(np.average(picked, weights=self.weights))

    def statistics(self, executed: np.ndarray) -> DepthStatistics:
        """Of depths [N, T]."""
        return DepthStatistics.of(executed[self.counts > 0], self.max_steps)

    def applications(self, executed: np.ndarray, costs: Costs) -> float:
        """Block applications a token, of rows generated token by token at depths [N, T]."""
        return float(np.mean([costs.applications(row).mean() for row in self._rows(executed)]))

    def _rows(self, of_tokens: np.ndarray) -> list[np.ndarray]:
        """[N, T] as rows without what comes after the last target."""
        ends = of_tokens.shape[1] - np.argmax(self.counts[:, ::-1] > 0, 1)
        return [row[:end] for row, end in zip(of_tokens, ends, strict=True)]

    def comparing(self, executed: np.ndarray, costs: Costs | None = None) -> Callable[[Any], Comparison]:
        """Depths [N, T] against fixed and shuffled ones, as a function of which rows count (slice(None), or a draw of a
        bootstrap). Compute is steps, or with `costs` block applications of rows generated token by token."""
        counts = self.counts
        of_row = counts.sum(1)
        by_depth = np.einsum("nts,nt->ns", self.losses.astype(np.float64), counts)
        picked = np.take_along_axis(self.losses, executed[..., None] - 1, -1)[..., 0].astype(np.float64)
        learned, steps = (picked * counts).sum(1), (executed * counts).sum(1)
        spent = steps
        if costs is not None:
            spent = of_row * np.array([costs.equal_steps(row) for row in self._rows(executed)])
        histogram = np.stack([((executed == s) * counts).sum(1) for s in range(1, self.max_steps + 1)], 1)

        def compared(rows) -> Comparison:
            total = of_row[rows].sum()
            fixed = by_depth[rows].sum(0) / total
            return Comparison(
                float(learned[rows].sum() / total),
                within(fixed, spent[rows].sum() / total),
                shuffled(fixed, histogram[rows].sum(0)),
                float(steps[rows].sum() / total),
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
        counted = self.counts > 0
        return rank_correlation(executed[counted], (self.losses[..., 0] - self.losses[..., -1])[counted])

    def interval(self, statistic: Callable[[np.ndarray], float], draws: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval over windows."""
        return bootstrap(statistic, len(self.losses), draws)


class Validation:
    """A fixed set of rows, and what is known of it before any training.

    Args:
        rows: inputs and targets [N, T], lengths. train: tokens of the training split, for the n-gram losses.
        vocab_size: of the model. token_bytes: length of each token, int64 [n]; default GPT-2's.
    """

    def __init__(
        self, rows: ValidationRows, train: list[Split], vocab_size: int, token_bytes: np.ndarray | None = None
    ):
        self.rows = rows
        real = rows.targets != IGNORE
        targets, inputs = rows.targets[real][None], rows.inputs[real][None]
        self.n_targets = targets.size
        token_bytes = get_tokenizer().token_bytes() if token_bytes is None else token_bytes
        self.n_bytes = int(token_bytes[targets].sum())
        """UTF-8 bytes of the targets."""
        found = ngram_losses(train, targets, inputs, vocab_size)
        self.unigram = found["unigram"]
        """Nats per token of the training split's token frequencies."""
        self.bigram = found["bigram"]
        """Nats per token of an interpolated bigram model of the training split."""

    def read(
        self,
        model: HRMForCausalLM,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager],
        stop: Callable[[], bool] = lambda: False,
        ranks: Ranks = ALONE,
    ) -> Reading | None:
        """Every exit of every row, in one unroll each, shared out over processes; None if `stop` said so in between."""
        mine = ranks.share(np.arange(len(self.rows.inputs)))
        lengths = self.rows.lengths
        part = None
        if len(mine):
            part = read_windows(
                model, self.rows.inputs[mine], self.rows.targets[mine], batch_size, autocast, stop,
                None if lengths is None else lengths[mine],
            )  # fmt: skip
        if ranks.any(bool(stop()) or (part is None and len(mine) > 0)):
            return None
        if ranks.size == 1:
            return part
        order = np.argsort(np.concatenate(ranks.gather(mine)), kind="stable")
        parts = [p for p in ranks.gather(part) if p is not None]
        columns = ([getattr(p, name) for p in parts] for name in ("losses", "margins", "change"))
        return Reading(*(np.concatenate(column)[order] for column in columns), _weights(self.rows.targets))

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The loss in bits per UTF-8 byte, comparable between tokenizers."""
        return nats_per_token * self.n_targets / self.n_bytes / math.log(2)


def read_windows(
    model: HRMForCausalLM,
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    stop: Callable[[], bool] = lambda: False,
    lengths: np.ndarray | None = None,
) -> Reading | None:
    """Every exit of rows inputs, targets [N, T] int64 (-1: no target), of `lengths` [N] real tokens, `batch_size` at a
    time; None if `stop` said so in between."""
    n_rows, n_tokens = inputs.shape
    columns: list[np.ndarray] | None = None
    for start in range(0, n_rows, batch_size):
        if stop():
            return None
        part = slice(start, start + batch_size)
        longest = n_tokens if lengths is None else int(lengths[part].max())
        rows = [torch.from_numpy(a[part, :longest]).to(model.device) for a in (inputs, targets)]
        if lengths is not None:
            rows.append(torch.from_numpy(lengths[part]).to(model.device))
        with autocast():
            found = exits(model, *rows)
        here = [t.float().cpu().numpy() for t in (found.losses, found.margins(model.config.halt_bias), found.change)]
        if columns is None:
            columns = [np.zeros((n_rows, n_tokens, here[0].shape[-1]), dtype=np.float32) for _ in here]
        for column, values in zip(columns, here, strict=True):
            column[part, :longest] = values
    return Reading(*columns, _weights(targets))


def _weights(targets: np.ndarray) -> np.ndarray | None:
    """What each position counts; None where all have a target."""
    counted = targets != IGNORE
    return None if counted.all() else counted.astype(np.float64)


def reported_depths(max_steps: int) -> list[int]:
    """Depths whose loss is printed: all of up to 8, else 1, 2, 4, .. and S."""
    if max_steps <= 8:
        return list(range(1, max_steps + 1))
    return [*(2**i for i in range(max_steps.bit_length()) if 2**i < max_steps), max_steps]
