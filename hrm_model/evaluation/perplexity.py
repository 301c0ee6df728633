"""Causal perplexity: what every token of a text costs, given tokens before it alone.

    nats a token   L = mean of -log p(token | tokens before it in its window)      perplexity = exp(L)
    bits a byte    L * tokens / (ln 2 * bytes of the text in UTF-8)

The text stands after one end-of-text token, so that its first token is predicted too. A window holds as many tokens as
the model reads at a time; its first `stride` (by default all) tokens are new, and the others were scored before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..depth_statistics import DepthStatistics, rank_correlation
from .requests import check_finite


@dataclass(frozen=True)
class Rolled:
    """A text of N tokens, read through."""

    losses: np.ndarray
    """[N] float64, nats."""
    steps: np.ndarray | None
    """[N] int64, executed for each token; None of a model without steps."""

    def __post_init__(self):
        check_finite(self.losses)


def windows(ids: Sequence[int], max_length: int, stride: int | None = None) -> Iterator[tuple[Sequence[int], int]]:
    """(ids read and predicted, how many of the last are new): every id but the first is new in exactly one window.

    Of n ids n - 1 are read and n - 1 predicted, n - 1 <= max_length.

    Raises:
        ValueError: a stride out of range.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride {stride} must lie in 1..{max_length}, the tokens that the model reads at a time")
    done = 1
    while done < len(ids):
        n_new = min(stride if done > 1 else max_length, len(ids) - done)
        end = done + n_new
        yield ids[max(0, end - max_length - 1) : end], n_new
        done = end


def report(name: str, rolled: Rolled, n_bytes: int, max_steps: int, seconds: float) -> dict[str, Any]:
    """What there is to say of a text, as JSON."""
    losses = rolled.losses
    nats = float(losses.mean())
    stderr = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
    found: dict[str, Any] = {
        "model": name,
        "tokens": len(losses),
        "bytes": n_bytes,
        "nats_per_token": nats,
        "nats_stderr": stderr,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
        "bits_per_byte": float(losses.sum()) / math.log(2) / n_bytes,
        "tokens_per_second": len(losses) / max(seconds, 1e-9),
    }
    if rolled.steps is not None:
        depth = DepthStatistics.of(rolled.steps, max_steps)
        found["steps"] = {
            "mean": depth.mean,
            "sd": math.sqrt(depth.variance),
            "histogram": list(depth.histogram),
            "rank_correlation_with_loss": rank_correlation(rolled.steps, losses),
        }
    return found
