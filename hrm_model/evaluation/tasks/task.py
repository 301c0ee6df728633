"""What a benchmark is: rows, and the example that a row makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choices:
    """A context and what may follow; the likeliest by mean log-probability a token counts as the model's answer."""

    context: str
    choices: Sequence[str]
    """Each is scored after one space, unless it begins with one."""
    label: int
    """Of the right one, from 0."""


@dataclass(frozen=True)
class Question:
    """A prompt that the model continues, and the answers that count as right; none where only depth is looked at."""

    prompt: str
    answers: Sequence[str] = ()


@dataclass(frozen=True)
class Hub:
    """Where the Hugging Face hub has a benchmark's rows."""

    repository: str
    split: str
    config: str | None = None
    files: str | None = None
    """Read instead of what the hub's library would choose, where that is a program: a path or pattern at a revision."""
    revision: str | None = None

    def __str__(self) -> str:
        parts = [self.repository, *([self.config] if self.config else []), f"split {self.split}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    hub: Hub | None
    """None where the rows are part of this package."""
    files: Sequence[str]
    """Names under which a folder may have it, beside NAME.jsonl and the like: those of its authors."""
    source: str
    """Where the authors' files come from, for whoever has no hub."""
    example: Callable[[Mapping[str, Any]], Choices | Question | None]
    """A row's example; None where it has none, as published. Raises ValueError, KeyError or TypeError for a row of
    another layout."""
    layout: str
    """What a row must have, for messages."""
    chance: float | None = None
    """Score of guessing, 0..1."""
    is_right: Callable[[str, Sequence[str]], bool] | None = None
    """Of questions: whether a model's text is one of the answers."""
    max_new_tokens: int = 0
    stop: Sequence[str] = ()
    """Texts of one token that end an answer."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Where there is no hub."""


def text(row: Mapping[str, Any], key: str) -> str:
    """A row's text; ValueError where it is something else."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a text")
    return value


def texts_of(row: Mapping[str, Any], key: str) -> list[str]:
    """A row's list of texts; ValueError where it is something else."""
    value = row[key]
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not a list of texts")
    wrong = [one for one in value if not isinstance(one, str)]
    if wrong:
        raise ValueError(f"{key!r} has {wrong[0]!r} in it, which is no text")
    return value


def label_of(value: Any, names: Sequence[str]) -> int:
    """The place of a label, given as a number from 0 or as one of `names`; ValueError where it is neither."""
    if isinstance(value, str) and value.strip() in names:
        return list(names).index(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    raise ValueError(f"the label is {value!r}, none of {', '.join(names)}")
