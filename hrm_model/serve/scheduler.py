"""Continuous batching: one thread owns model and cache; jobs join between two tokens and leave when they are done.

    tick:   1  jobs that were cancelled or are late leave; waiting ones take free places, first come first served
            2  every row whose prompt is read gets one token, all of them in one pass
            3  of the rows whose prompt is not read, the oldest get `chunk` tokens of prompt together

A row's tokens are those it has alone, in hrm_model.generate. Draws are a function of (seed, number, token), and what is
computed for a row is cut into passes in a way that depends on that row only: its prompt at multiples of `chunk`, then
token by token; nothing is taken over from another row. On a CPU in float32, where packed products do not depend on how
many rows there are, its logits are then the same to the last bit. Elsewhere they are equal up to rounding.

A prompt of T tokens holds up the others by ceil(T / chunk) passes of `chunk` tokens, between which they go on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import hrm_kernels as ops

from ..cache import HRMCache, bytes_per_token, room
from ..config import is_int
from ..generate import SHARE_OF_MEMORY, Event, Limits, draw_rows, event_of, seen_tokens
from ..incremental import Extending, check_ids
from ..keyed import TOKEN_STREAM
from ..model import HRMForCausalLM, check_halt_bias, checked_depths
from ..rows import READ_AT_ONCE, Row
from ..sampling import N_GPT2_IDS
from ..stops import StoppedText
from ..tokenizer import Tokenizer
from .jobs import Failure, Job, QueueFull, Stopping, Told

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What was done since the start."""

    finished: Counter[str] = field(default_factory=Counter)
    """Jobs by how they ended: an Event's finish, a Failure's kind, "cancelled"."""
    refused: int = 0
    """Jobs that found the queue full."""
    prompt_tokens: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    """New tokens by the HRM steps that they took."""


@dataclass(eq=False)
class _Active:
    job: Job
    row: Row
    limits: Limits
    begun: float


def places_that_fit(model: HRMForCausalLM, most: int, max_steps: int | None = None) -> int:
    """How many whole windows fit into the memory that is free, at least 1 and at most `most`."""
    free = room(model)
    if free is None:
        return most
    window = model.config.block_size * bytes_per_token(model.config, max_steps, model.compute_dtype)
    return max(1, min(most, int(SHARE_OF_MEMORY * free) // window))


class Scheduler:
    """Continues the prompts of many, in one thread. Use it as a context, or call `start` and `stop`.

    Args:
        places: rows at a time. queue: jobs that may wait for a place.
        chunk: tokens of prompts in a pass, and where prompts are cut; hrm_model.generate cuts at the default.
        max_steps, halt_bias: of every job, as in HRMForCausalLM.forward.

    Raises:
        ValueError: an option out of range, or no memory for so many places.
    """

    def __init__(
        self,
        model: HRMForCausalLM,
        tokenizer: Tokenizer,
        *,
        places: int = 8,
        queue: int = 64,
        chunk: int = READ_AT_ONCE,
        max_steps: int | None = None,
        halt_bias: float | None = None,
    ):
        for name, value, least in (("places", places, 1), ("queue", queue, 0), ("chunk", chunk, 1)):
            if not is_int(value) or value < least:
                raise ValueError(f"{name} {value!r} must be an integer of at least {least}")
        check_halt_bias(0.0 if halt_bias is None else halt_bias)
        self.model, self.tokenizer = model, tokenizer
        self.places, self.queue, self.chunk = places, queue, chunk
        self.window = model.config.block_size
        """Tokens of a prompt and its continuation together, at most."""
        self.max_steps = model.config.hrm_max_steps if max_steps is None else max_steps
        self.counts = Counts()
        self.on_failure: Callable[[], None] = lambda: None
        """Called in the thread when it ends by an error, after every job has been told."""
        self.failed = False
        self._options = {"max_steps": max_steps, "halt_bias": halt_bias}
        self._cache = HRMCache(model, places, max_steps=max_steps)
        self._cache.packed = ops.PackedWeights(always=True)
        self._free = set(range(places))
        self._active: list[_Active] = []
        self._waiting: deque[Job] = deque()
        self._seconds = 1.0
        self._changed = threading.Condition()  # reentrant
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def __enter__(self) -> Scheduler:
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Jobs that have a place."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Jobs that wait for one."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to take jobs. One token is run first, so that what is made at the first use is there."""
        with torch.no_grad():
            Extending(self.model, self._cache, {0: [0]}, **self._options).finish()
        self._cache.clear(0)
        self._thread.start()

    def check(self, job: Job) -> None:
        """Raise ValueError, naming value, limit and remedy, where a job cannot be done."""
        config = self.model.config
        if len(job.ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        check_ids(job.ids, min(config.vocab_size, N_GPT2_IDS), "prompt: ")
        if not is_int(job.max_new_tokens) or job.max_new_tokens < 1:
            raise ValueError(f"max_tokens {job.max_new_tokens!r} must be an integer of at least 1")
        if not is_int(job.min_new_tokens) or not 0 <= job.min_new_tokens <= job.max_new_tokens:
            raise ValueError(f"min_tokens {job.min_new_tokens!r} must be in 0..{job.max_new_tokens} (max_tokens)")
        if len(job.ids) + job.max_new_tokens > self.window:
            raise ValueError(
                f"the prompt has {len(job.ids):,} tokens and max_tokens is {job.max_new_tokens:,}; together they are "
                f"more than the model's window of {self.window:,}: shorten one of them"
            )
        if "" in job.stop:
            raise ValueError("stop has an empty string, which every text contains; leave it out")
        job.sampling.check_vocabulary(config.vocab_size)
        checked_depths([job.force_steps], self.max_steps, 1)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these, or none.

        Raises:
            ValueError: as `check`. QueueFull: there is no room for so many. Stopping: none are taken any more.
        """
        for job in jobs:
            self.check(job)
        most = self.places + self.queue
        if len(jobs) > most:
            raise ValueError(
                f"{len(jobs)} choices are more than the {most} that this server has room for; ask for fewer"
            )
        with self._changed:
            if self._stopping or not self.alive:
                raise Stopping("the server is shutting down")
            if len(self._active) + len(self._waiting) + len(jobs) > self.places + self.queue:
                self.counts.refused += len(jobs)
                turns = len(self._waiting) / self.places + 1
                raise QueueFull(
                    f"{len(self._active)} requests are answered and {len(self._waiting)} of at most {self.queue} wait; "
                    "try again later",
                    retry_after=max(1, min(60, math.ceil(turns * self._seconds))),
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more: they leave before the next token."""
        for job in jobs:
            job.cancelled = True

    def stop(self) -> None:
        """End: jobs that are there fail with "stopping". Returns when the thread is over."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        failure = Failure("internal", "the scheduler stopped")
        try:
            with torch.no_grad():
                while self._gather():
                    self._tick()
            failure = Failure("stopping", "the server is shutting down")
        except BaseException:
            logger.exception("the scheduler stopped")
            self.failed = True
        finally:
            with self._changed:
                self._stopping = True
                left = [active.job for active in self._active] + list(self._waiting)
                self._active, self._waiting = [], deque()
            for job in left:
                self._fail(job, failure)
            if self.failed:
                self.on_failure()

    def _gather(self) -> bool:
        """Wait for jobs; let those that are over leave and others take their places. False: it is time to stop."""
        with self._changed:
            while not (self._active or self._waiting or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            now = time.monotonic()
            for active in [active for active in self._active if not self._is_wanted(active.job, now)]:
                self._end(active)
            self._waiting = deque(job for job in self._waiting if self._is_wanted(job, now))
            while self._waiting and self._free:
                self._active.append(self._settled(self._waiting[0], now))
                self._waiting.popleft()  # not before: who waits is told if that fails
        return True

    def _is_wanted(self, job: Job, now: float) -> bool:
        if job.cancelled:
            self.counts.finished["cancelled"] += 1
            return False
        if job.deadline is not None and now >= job.deadline:
            self._fail(job, Failure("timeout", "the request took longer than this server's time limit"))
            return False
        return True

    def _settled(self, job: Job, now: float) -> _Active:
        """A job at a place of its own. Its number tells it from others with the same seed, as in `stream`."""
        text = StoppedText(self.tokenizer, job.stop)
        key = (job.seed, TOKEN_STREAM + (job.number << 8))
        row = Row(job.number, list(job.ids), len(job.ids), key, [job.force_steps], text, slot=min(self._free))
        row.seen = seen_tokens(self.model, row.ids, job.sampling)
        self._free.discard(row.slot)
        limits = Limits(job.max_new_tokens, job.min_new_tokens, job.stop_tokens, self.window, 1, job.keep_depth)
        return _Active(job, row, limits, now)

    def _leave(self, active: _Active) -> None:
        self._cache.clear(active.row.slot)
        self._free.add(active.row.slot)

    def _fail(self, job: Job, failure: Failure) -> None:
        self.counts.finished[failure.kind] += 1
        job.sink(failure)

    def _tick(self) -> None:
        reading = [active for active in self._active if self._cache.length(active.row.slot) < active.row.n_prompt]
        decoding = [active for active in self._active if active not in reading]
        if decoding:
            self._pass({active: active.row.ids[-1:] for active in decoding})
        spans, left = {}, self.chunk
        for active in reading:
            held = self._cache.length(active.row.slot)
            span = active.row.ids[held : (held // self.chunk + 1) * self.chunk]
            if len(span) > left:
                break  # whoever came first is read first
            spans[active], left = span, left - len(span)
        if spans:
            self._pass(spans)
            self.counts.prompt_tokens += sum(map(len, spans.values()))

    def _pass(self, spans: dict[_Active, list[int]]) -> None:
        """These tokens of these rows through the model; rows that are read to their end get a new one."""
        try:
            told = self._new_tokens(spans)
        except Exception:
            logger.exception("a pass of %d rows failed", len(spans))
            for active in spans:  # the cache has emptied their rows
                self._end(active)
                self._fail(active.job, Failure("internal", "the model failed; the server's log says why"))
            return
        for active, token in told.items():
            if not math.isfinite(token.event.logprob):
                self._cache.wipe(active.row.slot)
                self._end(active)
                self._fail(
                    active.job, Failure("internal", "the model's logits are not finite: its weights are damaged")
                )
                continue
            self.counts.steps[token.event.steps] += 1
            if token.event.finish:
                self._end(active)
                self.counts.finished[token.event.finish] += 1
                self._seconds += 0.1 * (time.monotonic() - active.begun - self._seconds)
            active.job.sink(token)

    def _end(self, active: _Active) -> None:
        with self._changed:
            self._active.remove(active)
            self._leave(active)

    def _new_tokens(self, spans: dict[_Active, list[int]]) -> dict[_Active, Told]:
        actives = list(spans)
        new = {active.row.slot: span for active, span in spans.items()}
        forced = [active.row.depth() for active in actives]
        work = Extending(self.model, self._cache, new, force_steps=forced, **self._options)
        whole = [i for i, a in enumerate(actives) if self._cache.length(a.row.slot) == len(a.row.ids)]
        drawing = [actives[i] for i in whole]
        if len(drawing) == len(actives):  # what is drawn now comes over in the wait that there is anyway
            result, drawn, again = work.finish(self._drawn(drawing, work.logits))
            logits = result.logits
            for place, *values in zip(again, *self._drawn_again(drawing, logits, again), strict=True):
                drawn[0][place], drawn[1][place] = values
        else:
            result, *_ = work.finish()
            logits = result.logits[whole]
            drawn = self._drawn(drawing, logits).tolist() if drawing else [[], []]
        depths = [(result.executed_steps[i], result.halted[i]) for i in whole]
        return {
            active: Told(self._event(active, int(token), logprob, *depth), self._top(active.job, row_logits))
            for active, token, logprob, depth, row_logits in zip(drawing, *drawn, depths, logits, strict=True)
        }

    def _event(self, active: _Active, token: int, logprob: float, executed: int, halted: bool) -> Event:
        if not math.isfinite(logprob):  # whatever was drawn is no token
            return Event(active.row.number, 0, "", logprob, executed, None, False)
        return event_of(active.row, token, logprob, executed, halted, active.limits)

    def _drawn_again(self, actives: list[_Active], logits: Tensor, again: list[int]) -> list[list[float]]:
        return self._drawn([actives[i] for i in again], logits[again]).tolist() if again else [[], []]

    def _drawn(self, actives: list[_Active], logits: Tensor) -> Tensor:
        """[2, n]: tokens and log-probabilities. Rows that draw alike draw together; on a CPU, where that wins nothing,
        each for itself: sums over a vocabulary are cut into other parts when there is one row."""
        alike: dict[tuple, list[int]] = {}
        for i, active in enumerate(actives):
            alone = i if logits.device.type == "cpu" else -1
            alike.setdefault((alone, active.job.sampling, active.limits), []).append(i)
        drawn = torch.empty((2, len(actives)), dtype=torch.float32, device=logits.device)
        for (_, sampling, limits), places in alike.items():
            rows = [actives[i].row for i in places]
            drawn[:, places] = draw_rows(rows, logits[places], sampling, limits)
        return drawn

    def _top(self, job: Job, logits: Tensor) -> list[tuple[int, float]] | None:
        if not job.top:
            return None
        logits = logits[:N_GPT2_IDS].float()
        best = logits.topk(min(job.top, len(logits)))
        values = best.values - logits.logsumexp(-1)
        return list(zip(best.indices.tolist(), values.tolist(), strict=True))
