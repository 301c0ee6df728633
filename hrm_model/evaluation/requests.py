"""What a benchmark asks of a model, in token ids, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or too large for their type"
Progress = Callable[[int], None]
"""Told how many requests more are done."""


@dataclass(frozen=True)
class Request:
    """Continuations of one context, to be scored."""

    context: Sequence[int]
    """At least one id."""
    choices: Sequence[Sequence[int]]
    """At least one, each of at least one id."""
    where: str = ""
    """What it comes from, for messages."""


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    logprob: float
    """Nats: sum over its tokens of log p(token | what precedes it)."""
    n_tokens: int
    greedy: bool
    """Whether each of its tokens is the likeliest one."""
    steps: float
    """Executed steps; where each token decides for itself, their mean over its predictions. 0: a model without."""
    published_steps: float
    """The same as the published code counts: one less where the head decided to halt."""

    def __post_init__(self):
        check_finite([self.logprob])

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.n_tokens


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt."""

    text: str
    """Up to the first of the texts that end it, wherever in a token that stands."""
    tokens: Sequence[int]
    """Without the token that made it stop."""
    logprobs: Sequence[float]
    """Nats, of each token drawn, the one that made it stop included."""
    steps: Sequence[int]
    """Executed steps of each of these; empty for a model without."""
    published_steps: Sequence[int]
    """The same as the published code counts."""

    def __post_init__(self):
        check_finite(self.logprobs)


class Scorer(Protocol):
    """A model under evaluation."""

    name: str
    max_length: int
    """Most tokens that it reads at a time."""
    max_steps: int
    """S; 0 for a model without steps."""

    def encode(self, text: str, is_context: bool = False) -> list[int]:
        """Ids of a text. A context that is empty becomes the one token that begins a text."""

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Score]]:
        """A Score for each choice of each request. A request's result depends on nothing but that request."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str],
        progress: Progress | None = None,
    ) -> list[Continuation]:
        """The likeliest token, again and again, up to the end of text, one of the texts `stop`, or the limit."""

    def rolling(self, ids: Sequence[int], stride: int | None = None, progress: Progress | None = None):
        """See perplexity.py: the loss of every token of a text, and the steps taken for it."""


def check_finite(nats: Iterable[float]) -> None:
    """Raises ValueError where a log-probability is none."""
    if not all(map(math.isfinite, nats)):
        raise ValueError(NOT_FINITE)


def cut_from_left(context: Sequence[int], choice: Sequence[int], longest: int, where: str = "") -> Sequence[int]:
    """The context without as many of its first tokens as context + choice has over `longest`.

    Raises:
        ValueError: the choice alone leaves no room for a token of context.
    """
    over = len(context) + len(choice) - longest
    place = f"{where}: " if where else ""
    if over >= len(context):
        raise ValueError(
            f"{place}a choice of {len(choice)} tokens leaves no room for context: the model reads {longest} at a time; "
            "leave the example out, or take a model with a longer block_size"
        )
    return context[max(over, 0) :]
