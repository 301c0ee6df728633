"""One continuation that somebody waits for: what is asked, and how its end is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import END_OF_TEXT
from ..generate import Event
from ..sampling import Sampling


class Told(NamedTuple):
    """A new token of a job."""

    event: Event
    top: list[tuple[int, float]] | None
    """The likeliest tokens in its place and their log-probabilities, where the job asked for them."""


class Failure(NamedTuple):
    """Why a job ends without an end of its own."""

    kind: str
    """"timeout", "stopping" or "internal"."""
    message: str


class QueueFull(Exception):
    """There is no place for a job, and none in the queue."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it may be worth asking again."""


class Stopping(Exception):
    """No job is taken any more."""


@dataclass(eq=False)
class Job:
    """A prompt, how it is continued, and who is told."""

    ids: Sequence[int]
    """The prompt."""
    max_new_tokens: int
    sink: Callable[[Told | Failure], None]
    """Called in the scheduler's thread with each token and, at most once and last, with a failure. Must not wait."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    number: int = 0
    """Which of several continuations with one seed this is: row `number` of hrm_model.generate.stream."""
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = (END_OF_TEXT,)
    force_steps: int = 0
    """Exact HRM steps of every token; 0 lets the head decide."""
    keep_depth: bool = False
    """Decide the depth once, for the prompt."""
    top: int = 0
    """How many of the likeliest tokens are told."""
    deadline: float | None = None
    """On time.monotonic(), in seconds: later the job fails with "timeout"."""
    cancelled: bool = False
    """Nobody waits any more; set by Scheduler.cancel."""
