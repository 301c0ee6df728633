"""A server in this process, on a free port, over a small model whose depth moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from small_models import thinker

from hrm_model.generate import stream
from hrm_model.sampling import Sampling
from hrm_model.serve.jobs import Failure, Job, Told
from hrm_model.serve.scheduler import Scheduler
from hrm_model.tokenizer import get_tokenizer

NAME = "small"
WINDOW = 96


def text_model(seed: int = 0, **shape):
    """float32, as served; its words are noise, often cut inside a character."""
    return thinker(seed, dtype=torch.float32, **dict(vocab_size=50304, block_size=WINDOW) | shape)


class Listener:
    """Takes what a job tells, and knows when it is over."""

    def __init__(self, then: Callable[[Told | Failure], None] = lambda told: None):
        self.told: list[Told] = []
        self.failure: Failure | None = None
        self._then, self._over = then, threading.Event()

    def __call__(self, told: Told | Failure) -> None:
        if isinstance(told, Failure):
            self.failure = told
        else:
            self.told.append(told)
        self._then(told)
        if isinstance(told, Failure) or told.event.finish:
            self._over.set()

    def wait(self) -> Listener:
        assert self._over.wait(120), "the job neither ended nor failed"
        return self

    @property
    def tokens(self) -> list[int]:
        return [told.event.token for told in self.told]

    @property
    def logprobs(self) -> list[float]:
        return [told.event.logprob for told in self.told]

    @property
    def steps(self) -> list[int]:
        return [told.event.steps for told in self.told]

    @property
    def text(self) -> str:
        return "".join(told.event.text for told in self.told)

    @property
    def finish(self) -> str | None:
        return self.told[-1].event.finish


def alone(model, job: Job) -> list:
    """The events of a job that is generated without a server and without neighbours."""
    return list(
        stream(
            model,
            [job.ids],
            job.max_new_tokens,
            sampling=job.sampling,
            min_new_tokens=job.min_new_tokens,
            stop=job.stop,
            stop_tokens=job.stop_tokens,
            seed=job.seed,
            force_steps=job.force_steps or None,
            depth_update="turn" if job.keep_depth else "token",
            tokenizer=get_tokenizer(),
        )
    )


SAMPLINGS: Sequence[Sampling] = (
    Sampling(temperature=0),
    Sampling(temperature=0.8, top_k=40),
    Sampling(temperature=1.2, top_p=0.9),
    Sampling(repetition_penalty=1.3, min_p=0.02),
)


@contextmanager
def served(
    model=None, *, places: int = 8, queue: int = 64, seconds: float = 100, grace: float = 5, api_key: str | None = None,
    max_body: int = 100_000, body_seconds: float = 20,
) -> Iterator[tuple[str, Scheduler]]:  # fmt: skip
    """(address, scheduler) of a server that ends with the block."""
    pytest.importorskip("fastapi")
    from hrm_model.serve.app import make_app
    from hrm_model.serve.guard import LOOPBACK, Guard, Rules
    from hrm_model.serve.requests import Limits
    from hrm_model.serve.run import Service, listen

    model = model or text_model()
    config = model.config
    with Scheduler(model, get_tokenizer(), places=places, queue=queue) as scheduler:
        limits = Limits(NAME, config.block_size, config.hrm_max_steps, config.vocab_size)
        rules = Rules(LOOPBACK, api_key, max_body, body_seconds)
        service = Service(Guard(make_app(scheduler, limits, seconds), rules), scheduler.stop, grace, lambda line: None)
        ready, bound = threading.Event(), listen("127.0.0.1", 0)
        port = bound.getsockname()[1]
        thread = threading.Thread(target=service.run, args=(bound, False, ready.set), daemon=True)
        thread.start()
        assert ready.wait(60)
        try:
            yield f"http://127.0.0.1:{port}", scheduler
        finally:
            service.end()
            thread.join(60)
            bound.close()
            assert not thread.is_alive(), "the server did not end"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another thread brings about."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not come about"
        threading.Event().wait(0.01)
