"""What generated text is like, in numbers of 0 to 100, each defined here; they mean something beside a baseline's.

trigrams    100 cos of the two texts' counts of character trigrams
characters  100 (1 - total variation between the shares of letters, digits, spaces, line breaks and other signs)
words       share of the words of at least four letters that the training text has
structure   mean of three shares: sentences that begin with a capital, that have 2 to 40 words, and quotes and
            brackets that are closed
meaning     share of neighbouring word pairs that the training text has within ten words of each other, of pairs of
            words of four letters that it has: a proxy that knows no meaning, only what goes together
diversity   100 different words / words, over the first 500 words
copied      share of the 20-character sequences that stand in the training text: how much is recitation
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise

LETTERS = 4
COPY = 20
NEAR = 10
WORDS_OF_DIVERSITY = 500
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE = re.compile(r"[^.!?]+[.!?]+")
_PAIRS = (("(", ")"), ("[", "]"), ("\u201c", "\u201d"))


@dataclass(frozen=True)
class Scores:
    """Of one text against a training text, each 0 to 100."""

    trigrams: float
    characters: float
    words: float
    structure: float
    meaning: float
    diversity: float
    copied: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return asdict(self)


class Reference:
    """A training text, counted once.

    Args:
        text: not empty.
    """

    def __init__(self, text: str):
        if len(text) < COPY:
            raise ValueError(f"{len(text)} characters are too few to compare with; give a text of at least {COPY}")
        self.trigrams = _ngrams(text, 3)
        self.kinds = _kinds(text)
        words = [w.lower() for w in _WORD.findall(text)]
        self.words = {w for w in words if len(w) >= LETTERS}
        long = [w for w in words if len(w) >= LETTERS]
        self.near = {(a, b) for i, a in enumerate(long) for b in long[i + 1 : i + 1 + NEAR]}
        self.copies = {text[i : i + COPY] for i in range(len(text) - COPY + 1)}

    def scores(self, text: str) -> Scores:
        """Of a text that was generated, or of any other.

        Raises:
            ValueError: it is shorter than a copied sequence.
        """
        if len(text) < COPY:
            raise ValueError(f"{len(text)} characters are too few to analyse; generate at least {COPY}")
        words = [w.lower() for w in _WORD.findall(text)]
        long = [w for w in words if len(w) >= LETTERS]
        known = [w in self.words for w in long]
        pairs = [(a, b) for a, b in pairwise(long) if a in self.words and b in self.words]
        first = words[:WORDS_OF_DIVERSITY]
        sequences = [text[i : i + COPY] for i in range(len(text) - COPY + 1)]
        return Scores(
            trigrams=100 * _cosine(self.trigrams, _ngrams(text, 3)),
            characters=100 * (1 - _variation(self.kinds, _kinds(text))),
            words=_percent(known),
            structure=_structure(text),
            meaning=_percent([pair in self.near for pair in pairs]),
            diversity=100 * len(set(first)) / len(first) if first else 0.0,
            copied=_percent([s in self.copies for s in sequences]),
        )


def _percent(flags: list[bool]) -> float:
    return 100 * sum(flags) / len(flags) if flags else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    dot = sum(n * b[gram] for gram, n in a.items())
    return dot / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))


def _kinds(text: str) -> dict[str, float]:
    counts = Counter(map(_kind, text))
    return {kind: n / len(text) for kind, n in counts.items()}


def _kind(c: str) -> str:
    if c.isalpha() or c.isdigit():
        return "letter" if c.isalpha() else "digit"
    return "line" if c == "\n" else "space" if c.isspace() else "sign"


def _variation(a: dict[str, float], b: dict[str, float]) -> float:
    return sum(abs(a.get(kind, 0.0) - b.get(kind, 0.0)) for kind in a.keys() | b.keys()) / 2


def _structure(text: str) -> float:
    sentences = [s.strip() for s in _SENTENCE.findall(text)]
    starts = [next((c for c in s if c.isalpha()), "a").isupper() for s in sentences]
    sizes = [2 <= len(_WORD.findall(s)) <= 40 for s in sentences]
    closed = []
    for opening, closing in _PAIRS:
        n = text.count(opening) + text.count(closing)
        if n:
            closed.append(100 * (1 - abs(text.count(opening) - text.count(closing)) / n))
    parts = [_percent(starts), _percent(sizes), sum(closed) / len(closed) if closed else 100.0]
    return sum(parts) / len(parts)
