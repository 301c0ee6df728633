"""A Markov chain of characters: what counting alone writes, the baseline of every score of generated text.

    p(c | the last k characters) = count(k characters, c) / count(k characters)

A context that the text does not have is shortened from the left until it has one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import accumulate

from ..keyed import MARKOV_STREAM, keyed_uniform


class Markov:
    """Args:
    text: what is counted, not empty. order: k, at least 0.
    """

    def __init__(self, text: str, order: int):
        if not text or order < 0:
            raise ValueError(
                f"a Markov chain of order {order} on {len(text)} characters cannot be; give a text, order 0 up"
            )
        self.order = order
        counts: list[dict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(order + 1)]
        for k in range(order + 1):
            for i in range(k, len(text)):
                counts[k][text[i - k : i]][text[i]] += 1
        self._tables = [
            {context: (list(found), list(accumulate(found.values()))) for context, found in level.items()}
            for level in counts
        ]

    def generate(self, prompt: str, n: int, seed: int) -> str:
        """`n` characters after `prompt`, each drawn by (seed, its number)."""
        text = prompt
        for i in range(n):
            context = text[len(text) - min(self.order, len(text)) :]
            while context not in self._tables[len(context)]:
                context = context[1:]
            characters, sums = self._tables[len(context)][context]
            u = keyed_uniform(seed, i, MARKOV_STREAM)
            text += characters[bisect_right(sums, u * sums[-1])]
        return text[len(prompt) :]
