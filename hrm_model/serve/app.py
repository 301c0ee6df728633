"""The endpoints, as a FastAPI application over a scheduler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from .errors import FAILURES, ApiError
from .jobs import Failure, Job, QueueFull, Stopping, Told
from .page import page
from .replies import DONE, Reply, event_line
from .requests import Asked, Limits, parse
from .scheduler import Scheduler

MARGIN = 5.0
"""Seconds that the scheduler has to tell of a job's end after its deadline."""


def make_app(scheduler: Scheduler, limits: Limits, seconds: float) -> FastAPI:
    """The application.

    Args:
        seconds: that a request may take, waiting included.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    created, shown = int(time.time()), page(limits)
    model = {"id": limits.model, "object": "model", "created": created, "owned_by": "hrm"}
    model["hrm"] = {"window": limits.window, "max_steps": limits.max_steps, "max_tokens": limits.most}

    @app.get("/")
    async def chat_page():
        return HTMLResponse(shown.document, headers={"content-security-policy": shown.policy})

    @app.get("/health")
    async def health():
        status = 200 if scheduler.alive else 503
        told = {
            "status": "ok" if status == 200 else "stopped",
            "active": scheduler.active,
            "waiting": scheduler.waiting,
        }
        return JSONResponse(told, status)

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(_metrics(scheduler), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        if name != limits.model:
            raise ApiError(
                404, f"the model {name[:60]!a} is not here; this server has {limits.model!r}", code="model_not_found"
            )
        return model

    async def answer(request: Request, chat: bool) -> Response:
        deadline = time.monotonic() + seconds
        # elsewhere than in the loop: encoding a long text takes a while, in which others are to be served
        asked = await asyncio.to_thread(parse, await request.body(), chat, limits, scheduler.tokenizer)
        running = Running(scheduler, asked, deadline)
        reply = Reply(asked, limits.model, scheduler.tokenizer)
        if asked.stream:
            return Stream(running, reply)
        try:
            return JSONResponse(await running.whole(reply, request.receive))
        except ConnectionError:
            return Response(status_code=499)  # nginx's number for a client that is gone; nobody reads it

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answer(request, chat=True)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError):
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException):
        remedy = "this server has /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics and /"
        told = ApiError(error.status_code, f"{request.method} {request.url.path[:80]!a}: {error.detail}; {remedy}")
        return JSONResponse(told.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception):
        return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)

    return app


class Running:
    """The jobs of one request, and what they tell, in the event loop.

    Raises:
        ApiError: the scheduler does not take them.
    """

    def __init__(self, scheduler: Scheduler, asked: Asked, deadline: float):
        self.deadline = deadline
        # never larger than the tokens of a request, which the window limits
        self._told: asyncio.Queue[tuple[int, Told | Failure]] = asyncio.Queue()
        self._scheduler, self._loop = scheduler, asyncio.get_running_loop()
        self._left = asked.choices
        self.jobs: list[Job] = asked.jobs(self._sink, deadline)
        try:
            scheduler.submit(self.jobs)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error
        except Stopping as error:
            raise ApiError(503, str(error), retry_after=5) from error

    def _sink(self, number: int, told: Told | Failure) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._told.put_nowait, (number, told))

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._scheduler.cancel(self.jobs)

    async def next(self, gone: asyncio.Task) -> list[tuple[int, Told]]:
        """What was told since, at least one token. [] when all is told.

        Args:
            gone: done when the client is.

        Raises:
            ApiError: a job failed. ConnectionError: the client is gone.
        """
        if not self._left:
            return []
        if self._told.empty():
            getting = asyncio.ensure_future(self._told.get())
            try:
                left = self.deadline + MARGIN - time.monotonic()
                await asyncio.wait({getting, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    raise ConnectionError if gone.done() else _failed(Failure("timeout", "the server is overloaded"))
                found = [getting.result()]
            finally:
                getting.cancel()
        else:
            found = []
        while not self._told.empty():
            found.append(self._told.get_nowait())
        for _, told in found:
            if isinstance(told, Failure):
                raise _failed(told)
            self._left -= told.event.finish is not None
        return found

    async def whole(self, reply: Reply, receive: Callable) -> dict[str, Any]:
        """The reply at once. Raises as `next`; the jobs are then cancelled."""
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while found := await self.next(gone):
                for number, told in found:
                    reply.take(number, told)
        finally:
            gone.cancel()
            self.cancel()
        return reply.whole()


class Stream(Response):
    """The reply as server-sent events, a token in each. A client that is gone cancels its jobs."""

    def __init__(self, running: Running, reply: Reply):
        super().__init__(status_code=200, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._running, self._reply = running, reply

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.ensure_future(_gone(receive))

        async def line(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        reply = self._reply
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await line(b"".join(map(event_line, reply.first())))
            try:
                while found := await self._running.next(gone):
                    await line(b"".join(event_line(reply.piece(number, told)) for number, told in found))
                await line(b"".join(map(event_line, reply.last())) + DONE, more=False)
            except ApiError as error:
                await line(event_line(error.body()), more=False)
        except ConnectionError:
            pass
        finally:
            gone.cancel()
            self._running.cancel()


async def _gone(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _failed(failure: Failure) -> ApiError:
    return ApiError(FAILURES[failure.kind], failure.message, code=failure.kind)


def _metrics(scheduler: Scheduler) -> str:
    """Counts in Prometheus' text format."""
    counts = scheduler.counts
    lines = []

    def metric(name: str, kind: str, what: str, values: dict[str, float]) -> None:
        lines.append(f"# HELP hrm_{name} {what}\n# TYPE hrm_{name} {kind}")
        lines.extend(f"hrm_{name}{labels} {value}" for labels, value in values.items())

    ends = {f'{{end="{end}"}}': n for end, n in sorted(dict(counts.finished).items())}
    steps = {f'{{steps="{n}"}}': count for n, count in sorted(dict(counts.steps).items())}
    metric("choices_total", "counter", "Choices by how they ended.", ends)
    metric("refused_total", "counter", "Choices that found the queue full.", {"": counts.refused})
    metric("prompt_tokens_total", "counter", "Tokens of prompts that were read.", {"": counts.prompt_tokens})
    metric("tokens_total", "counter", "New tokens by the HRM steps that they took.", steps)
    metric("active", "gauge", "Choices that are being generated.", {"": scheduler.active})
    metric("waiting", "gauge", "Choices that wait for a place.", {"": scheduler.waiting})
    return "\n".join(lines) + "\n"
