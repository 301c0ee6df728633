"""Which documents of a stream validate: an exact share, decided document by document."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ..keyed import SPLIT_STREAM, keyed_integers

_LONGEST_WAIT = 100


class StreamSplit:
    """Train or val for each document of a stream, so that val has its share of the tokens at every moment.

    Whenever val is behind its share, a document somewhat later is chosen: how many documents later is a function of
    (seed, document number). Neither its text nor its length plays a part, so what validates is like what trains.
    After every document

        -longest / 2  <=  val tokens - fraction * all tokens  <=  longest document,

    as the wait is at most 1 / (2 * fraction) documents. What is remembered is a few numbers.

    Args:
        fraction: val's share of the tokens, 0 <= fraction < 1. With 0 nothing validates.
        seed: any integer.
        state: what state() returned, to go on from there.
    """

    def __init__(self, fraction: float, seed: int, state: dict[str, Any] | None = None):
        self._fraction = Fraction(str(fraction))  # exact, so that no rounding depends on the platform
        self._waits = min(_LONGEST_WAIT, max(1, int(1 / (2 * self._fraction)))) if fraction else 1
        self._seed = seed
        state = state or {"train": 0, "val": 0, "wait": None}
        self.tokens = {"train": state["train"], "val": state["val"]}
        self._wait: int | None = state["wait"]

    @property
    def total(self) -> int:
        """Tokens so far."""
        return sum(self.tokens.values())

    def side(self, number: int) -> str:
        """Where document `number` goes. To be asked once for each, in order, before its tokens are added."""
        if self._wait is None and self.tokens["val"] < self._fraction * self.total:
            self._wait = int(keyed_integers(self._seed, [number], 0, self._waits - 1, SPLIT_STREAM)[0])
        if self._wait is None:
            return "train"
        if self._wait:
            self._wait -= 1
            return "train"
        self._wait = None
        return "val"

    def add(self, side: str, tokens: int) -> None:
        """Count tokens of the document that side() was last asked about."""
        self.tokens[side] += tokens

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON."""
        return {**self.tokens, "wait": self._wait}
