"""What a model scored on a benchmark, how sure that is, and how many steps it took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..depth_statistics import rank_correlation
from .requests import Progress, Request, Score, Scorer
from .tasks.task import Choices, Question, Task

if TYPE_CHECKING:
    from .hrm_scorer import HRMScorer

SHOWN_CHARS = 60


@dataclass(frozen=True)
class Steps:
    """Executed steps of R rows: each choice of each example, or each example that was generated."""

    executed: np.ndarray
    """[R] float64. A row of several decisions has their mean."""
    published: np.ndarray
    """[R] float64: as the published code counts, a mean over generated tokens rounded down."""
    correlation: float | None
    """Spearman's, over examples, of steps with difficulty: the loss of the right answer in nats a token, or of what was
    generated. None where one of them is constant."""
    max_steps: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        counts = np.bincount(np.rint(self.executed).astype(int), minlength=self.max_steps + 1)[1:]
        return {
            "mean": float(self.executed.mean()),
            "sd": _sd(self.executed),
            "histogram": counts.tolist(),
            "rank_correlation_with_loss": self.correlation,
            "published_mean": float(self.published.mean()),
            "published_sd": _sd(self.published),
        }


@dataclass(frozen=True)
class TaskResult:
    """A benchmark's outcome."""

    model: str
    task: Task
    right: np.ndarray | None
    """[n] bool, of each example; None where nothing is right or wrong."""
    losses: np.ndarray
    """[n] float64, nats a token: of the right answer, or of what was generated."""
    steps: Steps | None
    """None of a model without steps."""
    left_out: int
    """Rows without an example."""
    seconds: float

    @property
    def score(self) -> float | None:
        """Share of right answers."""
        return None if self.right is None else float(self.right.mean())

    @property
    def stderr(self) -> float | None:
        """Standard error of the score: sqrt(p (1 - p) / (n - 1))."""
        if self.right is None or len(self.right) < 2:
            return None
        return math.sqrt(self.score * (1 - self.score) / (len(self.right) - 1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.model,
            "task": self.task.name,
            "examples": len(self.losses),
            "left_out": self.left_out,
            "correct": None if self.right is None else int(self.right.sum()),
            "score": self.score,
            "stderr": self.stderr,
            "chance": self.task.chance,
            "nats_per_token": float(self.losses.mean()),
            "steps": None if self.steps is None else self.steps.to_dict(),
            "seconds": self.seconds,
            "examples_per_second": len(self.losses) / max(self.seconds, 1e-9),
        }


def evaluate(
    scorer: Scorer, task: Task, examples: Sequence[Choices | Question], left_out: int = 0,
    progress: Progress | None = None,
) -> TaskResult:  # fmt: skip
    """A model's answers to a task's examples, and what they are worth.

    Raises:
        ValueError: logits that are not finite, or a choice too long for the model; names the model and the task.
    """
    with _named(scorer, task):
        begin = time.perf_counter()
        if isinstance(examples[0], Question):
            told = _questions(scorer, task, examples, progress)
        else:
            told = _choices(examples, scorer.score(requests_of(scorer, examples), progress))
        return _result(scorer, task, left_out, *told, time.perf_counter() - begin)


def sweep(
    scorer: HRMScorer, halt_biases: Sequence[float], task: Task, examples: Sequence[Choices | Question],
    left_out: int = 0, progress: Progress | None = None,
) -> list[TaskResult]:  # fmt: skip
    """`evaluate` at each bias: choices by the same steps, an equal part of the time counted for each; text is generated
    for one bias after the other."""
    if isinstance(examples[0], Question):
        return [evaluate(scorer.with_bias(bias), task, examples, left_out, progress) for bias in halt_biases]
    with _named(scorer, task):
        begin = time.perf_counter()
        found = scorer.score_at(halt_biases, requests_of(scorer, examples), progress)
        told = [_choices(examples, of_bias) for of_bias in found]
        share = (time.perf_counter() - begin) / len(halt_biases)
        return [_result(scorer, task, left_out, *one, share) for one in told]


@contextmanager
def _named(scorer: Scorer, task: Task) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{scorer.name}, {task.name}: {error}") from error


def _result(
    scorer: Scorer, task: Task, left_out: int, right: list | None, losses: list, executed: list, published: list,
    of_example: list, seconds: float,
) -> TaskResult:  # fmt: skip
    steps = None
    if scorer.max_steps:
        correlation = rank_correlation(np.array(of_example), np.array(losses))
        steps = Steps(np.array(executed, dtype=float), np.array(published, dtype=float), correlation, scorer.max_steps)
    right = None if right is None else np.array(right)
    return TaskResult(scorer.name, task, right, np.array(losses), steps, left_out, seconds)


def requests_of(scorer: Scorer, examples: Sequence[Choices]) -> list[Request]:
    """Context and choices, each encoded by itself; a choice after a space, unless it begins with one. Equal choices are
    asked for once: twice, their scores may round apart, and then the first would not be the answer."""
    found = []
    for number, example in enumerate(examples, 1):
        choices = [tuple(scorer.encode(choice)) for choice in _different(example)]
        where = f"example {number}, {example.context[:SHOWN_CHARS]!r}"
        found.append(Request(scorer.encode(example.context, is_context=True), choices, where))
    return found


def _spaced(choice: str) -> str:
    return choice if choice.startswith(" ") else f" {choice}"


def _different(example: Choices) -> list[str]:
    return list(dict.fromkeys(map(_spaced, example.choices)))


def _choices(examples: Sequence[Choices], found: Sequence[Sequence[Score]]):
    found = [
        [scores[_different(example).index(_spaced(choice))] for choice in example.choices]
        for example, scores in zip(examples, found, strict=True)
    ]
    right, losses, of_example = [], [], []
    for example, scores in zip(examples, found, strict=True):
        means = [score.mean_logprob for score in scores]
        right.append(means.index(max(means)) == example.label)
        losses.append(-means[example.label])
        of_example.append(scores[example.label].steps)
    rows = [score for scores in found for score in scores]
    return right, losses, [row.steps for row in rows], [row.published_steps for row in rows], of_example


def _questions(scorer: Scorer, task: Task, examples: Sequence[Question], progress: Progress | None):
    prompts = [scorer.encode(example.prompt, is_context=True) for example in examples]
    found = scorer.generate(prompts, task.max_new_tokens, task.stop, progress)
    right = None
    if task.is_right:
        right = [task.is_right(row.text.strip(), example.answers) for row, example in zip(found, examples, strict=True)]
    losses = [-sum(row.logprobs) / len(row.logprobs) for row in found]
    steps = [float(np.mean(row.steps)) for row in found] if scorer.max_steps else [0.0] * len(found)
    published = [sum(row.published_steps) // len(row.published_steps) for row in found] if scorer.max_steps else steps
    return right, losses, steps, published, steps


def _sd(values: np.ndarray) -> float:
    """Of a sample, as published."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
