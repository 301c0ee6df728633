"""Any task of reasoning-gym by its name: questions made by a program, answers checked by one.

Source: Stojanovski et al., "Reasoning Gym: Reasoning Environments for RL with Verifiable Rewards", 2025.
"""

from __future__ import annotations

import difflib

from ..language_model import need
from .example import Example

LARGEST = 2**31 - 1


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
        self.name = name
        self._dataset = gym.create_dataset(name, seed=seed, size=LARGEST)

    def example(self, number: int) -> Example:
        """Example `number`, a function of (seed, number)."""
        entry = self._dataset[number]
        return Example(f"{entry['question'].strip()}\nAnswer: ", str(entry["answer"]).strip(), self.name, entry)

    def score(self, answer: str, example: Example) -> float:
        """What the task's own verifier gives, 0..1."""
        return float(self._dataset.score_answer(answer=answer.strip(), entry=example.entry))
