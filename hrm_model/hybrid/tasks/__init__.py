"""What the hybrid is trained on: questions with answers that a program can check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...keyed import TASK_CHOICE_STREAM, keyed_integers
from .addition import Addition
from .example import Example
from .gym import GymTask
from .held_out import HeldOut, Task

TOY = "toy_addition"


def make_task(name: str, seed: int) -> Task:
    """toy_addition, toy_addition:DIGITS, or a task of reasoning-gym. Raises ValueError for any other name."""
    kind, _, digits = name.partition(":")
    if kind == TOY:
        if digits and not digits.isdecimal():
            raise ValueError(
                f"unknown task {name!r}: after toy_addition: comes a number of digits, such as toy_addition:3"
            )
        return Addition(seed, int(digits or 2))
    return GymTask(name, seed)


class Mixture:
    """Examples of several tasks, in equal parts: training sample i is a function of (seed, i).

    Args:
        names: of tasks. n_test: held-out examples of all tasks together, at least one each.
    Raises:
        ValueError: a task is unknown, named twice, or has too few prompts.
    """

    def __init__(self, names: Sequence[str], seed: int, n_test: int):
        if not names or len(set(names)) < len(names):
            raise ValueError(f"--tasks {','.join(names) or '(none)'}: name at least one task, and each once")
        if n_test < len(names):
            raise ValueError(f"--eval-n {n_test} is below the number of tasks, {len(names)}: each is tested")
        self.seed = seed
        counts = [n_test // len(names) + (i < n_test % len(names)) for i in range(len(names))]
        self.splits = [HeldOut(make_task(name, seed), n) for name, n in zip(names, counts, strict=True)]
        self.tasks = {split.task.name: split.task for split in self.splits}

    @property
    def test(self) -> list[Example]:
        """Held-out examples, task by task."""
        return [example for split in self.splits for example in split.test]

    def training(self, samples: Sequence[int] | np.ndarray) -> list[Example]:
        """The training examples of these numbers."""
        which = keyed_integers(self.seed, samples, 0, len(self.splits) - 1, TASK_CHOICE_STREAM)
        return [self.splits[task].training(int(i)) for task, i in zip(which, samples, strict=True)]

    def score(self, answer: str, example: Example) -> float:
        """How right an answer is, 0..1, by its task's verifier."""
        return self.tasks[example.task].score(answer, example)


__all__ = ["Example", "HeldOut", "Mixture", "Task", "make_task"]
