"""Which tokens of a cache an op works on: some positions of some rows, one row after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .transfer import to_device


class Span(NamedTuple):
    """Positions begin..end-1 of a row."""

    row: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.end - self.begin


@dataclass(frozen=True)
class Tokens:
    """N tokens of a cache of `n_positions` a row, row after row; each comes with all that precede it in its row."""

    spans: tuple[Span, ...]
    """None empty, each row once."""
    n_positions: int
    device: torch.device

    @classmethod
    def of(cls, spans: Sequence[Span], n_positions: int, device: torch.device) -> Tokens:
        """These spans of a cache.

        Raises:
            ValueError: there are none, one is empty or negative, or a row comes twice.
        """
        spans = tuple(spans)
        if not spans:
            raise ValueError("no tokens of a cache were named; give at least one span")
        for span in spans:
            if span.row < 0 or span.begin < 0:
                raise ValueError(f"{span} would lie outside a cache; rows and positions begin at 0")
            if span.size < 1:
                raise ValueError(f"{span} is empty; leave the row out")
        twice = [row for row, n in Counter(span.row for span in spans).items() if n > 1]
        if twice:
            raise ValueError(f"row {twice[0]} comes twice; give all of its tokens in one span")
        return cls(spans, n_positions, device)

    @cached_property
    def size(self) -> int:
        """N."""
        return sum(span.size for span in self.spans)

    @cached_property
    def _told(self) -> tuple[Tensor, Tensor]:
        rows = [span.row for span in self.spans for _ in range(span.size)]
        positions = [t for span in self.spans for t in range(span.begin, span.end)]
        return to_device(torch.tensor([rows, positions], dtype=torch.int64, device="cpu"), self.device).unbind(0)

    @property
    def row(self) -> Tensor:
        """[N] int64."""
        return self._told[0]

    @property
    def position(self) -> Tensor:
        """[N] int64, in its row."""
        return self._told[1]

    @cached_property
    def place(self) -> Tensor:
        """[N] int64: row * n_positions + position."""
        return self.row * self.n_positions + self.position

    @cached_property
    def last(self) -> Tensor:
        """[rows] int64: index, among the N, of each row's last token."""
        ends = torch.tensor([span.size for span in self.spans], dtype=torch.int64, device="cpu").cumsum(0) - 1
        return to_device(ends, self.device)

    @cached_property
    def in_step(self) -> bool:
        """Whether these are one token of each of some neighbouring rows, all at the same position."""
        first = self.spans[0]
        return first.size == 1 and all(
            span == (first.row + i, first.begin, first.end) for i, span in enumerate(self.spans)
        )

    @cached_property
    def longest(self) -> int:
        """Positions up to the last of any row's tokens."""
        return max(span.end for span in self.spans)


@dataclass(frozen=True)
class NewestTokens:
    """One token of each of some rows of a cache, which only the device knows: for kernels that a CUDA graph holds."""

    row: Tensor
    """[N] int64, each row once."""
    position: Tensor
    """[N] int64, in its row; -1: there is no such token, nothing is computed or written for it."""
    n_positions: int

    @property
    def size(self) -> int:
        """N."""
        return self.row.shape[0]


class Past(NamedTuple):
    """A block application's keys and values, and the tokens whose own are to be added."""

    kv: Tensor
    """[R, P, 2, K, D]: rows, positions, keys and values, heads, channels."""
    tokens: Tokens | NewestTokens


class StepPast(NamedTuple):
    """What the cache holds for the steps of the loop, for one new token a row. S steps, A block applications in each, R
    rows, P positions, K heads of D channels. Every step reads and writes it."""

    kv: Tensor
    """[S, A, R, P, 2, K, D]"""
    z_H: Tensor
    """[S, R, P, C], after each step."""
    z_L: Tensor
    """[R, P, C], after the latest."""
    sums: Tensor
    """[S, R, C] float32 or float64: of z_H over the positions before the new one; over all of them afterwards."""
    position: Tensor
    """[R] int64, of the new token of each row."""
