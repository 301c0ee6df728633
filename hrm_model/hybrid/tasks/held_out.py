"""Prompts that nothing is trained on."""

from __future__ import annotations

import re
from typing import Protocol

from .example import Example

TRIES = 1000
FAR = 2**32
"""Between an example's tries: no training run has as many samples."""
HELD_OUT = 2**40
"""Number of the first held-out example."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Task(Protocol):
    """Examples by number, and a verifier."""

    name: str

    def example(self, number: int) -> Example:
        """Example `number`, a function of it alone."""

    def score(self, answer: str, example: Example) -> float:
        """How right an answer is, 0..1."""


def prompt_key(prompt: str) -> tuple[str, tuple[str, ...]]:
    """What a prompt has in common with its commutations: its text without numbers, and its numbers in order of size."""
    return " ".join(_NUMBER.sub("#", prompt).split()), tuple(sorted(_NUMBER.findall(prompt)))


class HeldOut:
    """Splits a task's examples: `n` for tests, all different, and for training those that are none of them, not even
    with their numbers exchanged.

    Raises:
        ValueError: the task has not enough different prompts.
    """

    def __init__(self, task: Task, n: int):
        self.task = task
        self.test: list[Example] = []
        self._keys: set[tuple[str, tuple[str, ...]]] = set()
        number = HELD_OUT
        while len(self.test) < n:
            example = task.example(number)
            key = prompt_key(example.prompt)
            number += 1
            if key not in self._keys:
                self._keys.add(key)
                self.test.append(example)
            elif number - HELD_OUT > n * TRIES:
                raise ValueError(
                    f"the task {task.name} has no {n} different prompts for a test, only {len(self.test)}; "
                    "lower --eval-n"
                )

    def training(self, number: int) -> Example:
        """Training example `number`: the first of its tries that is not held out."""
        for attempt in range(TRIES):
            example = self.task.example(number + attempt * FAR)
            if prompt_key(example.prompt) not in self._keys:
                return example
        raise ValueError(f"nearly all prompts of the task {self.task.name} are held out for the test; lower --eval-n")
