"""Toy addition: "47+35=" and "82"."""

from __future__ import annotations

from ...keyed import TASK_STREAM, keyed_words, scaled
from .example import Example


class Addition:
    """Sums of two operands of `digits` digits, none with a leading zero. An example is a function of (seed, number)."""

    def __init__(self, seed: int, digits: int = 2):
        if not 1 <= digits <= 18:
            raise ValueError(f"toy_addition:{digits}: operands have 1 to 18 digits")
        self.name, self.seed, self.digits = f"toy_addition:{digits}", seed, digits

    @property
    def n_prompts(self) -> int:
        """How many there are that differ by more than the order of operands."""
        n = self._operands()
        return n * (n + 1) // 2

    def _operands(self) -> int:
        return 10 if self.digits == 1 else 9 * 10 ** (self.digits - 1)

    def example(self, number: int) -> Example:
        """Example `number`, of any size."""
        low = 0 if self.digits == 1 else 10 ** (self.digits - 1)
        words = keyed_words(self.seed, number, 1, TASK_STREAM)[0]
        a, b = (low + scaled(int(word), self._operands()) for word in words[:2])
        return Example(f"{a}+{b}=", str(a + b), self.name)

    def score(self, answer: str, example: Example) -> float:
        """1 where it is the sum and nothing else, else 0."""
        return float(answer.strip() == example.answer)
