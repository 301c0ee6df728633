"""Any task of reasoning-gym by its name: questions made by a program, answers checked by one.

Source: Stojanovski et al., "Reasoning Gym: Reasoning Environments for RL with Verifiable Rewards", 2025.
"""

from __future__ import annotations

import difflib
from typing import Any

from ...keyed import TASK_STREAM, keyed_words, scaled
from ..language_model import need
from .example import Example

BLOCK = 4096
"""Examples of one dataset object: some draw something for each when they are made, so that none may be very long."""
KEPT = 16
"""Of those."""


class GymTask:
    """A dataset of reasoning-gym with its own defaults.

    Raises:
        ValueError: the package is missing, or has no such task.
    """

    def __init__(self, name: str, seed: int):
        gym = need("reasoning_gym", "hybrid")
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, [*DATASETS, "toy_addition"], n=3)
            raise ValueError(
                f"unknown task {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
                + f" There are toy_addition, toy_addition:DIGITS and the {len(DATASETS)} tasks of reasoning-gym"
            )  # fmt: skip
        self.name, self.seed = name, seed
        self._make = lambda seed: gym.create_dataset(name, seed=seed, size=BLOCK)
        self._blocks: dict[int, Any] = {}

    def example(self, number: int) -> Example:
        """Example `number`, a function of (seed, number)."""
        entry = self._block(number // BLOCK)[number % BLOCK]
        return Example(f"{entry['question'].strip()}\nAnswer: ", str(entry["answer"]).strip(), self.name, entry)

    def score(self, answer: str, example: Example) -> float:
        """What the task's own verifier gives, 0..1."""
        return float(self._block(0).score_answer(answer=answer.strip(), entry=example.entry))

    def _block(self, block: int):
        """The dataset of these examples; of the last few the objects are kept."""
        if block not in self._blocks:
            if len(self._blocks) >= KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            word = int(keyed_words(self.seed, block, 1, TASK_STREAM)[0, 0])
            self._blocks[block] = self._make(scaled(word, 2**31))
        return self._blocks[block]
