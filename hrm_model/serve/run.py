"""A server from its first connection to its end: listening, signals, and time for what is being answered."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from .connection import Connection
from .guard import Guard

CLOSING_SECONDS = 2
"""That clients have to take their last bytes when the time for answers is over."""
KEEP_ALIVE_SECONDS = 15
MOST_CONNECTIONS = 512
SEND_BUFFER = 65_536
"""Bytes that the kernel keeps of a connection for a client that does not read; left to itself it takes megabytes."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises:
        ValueError: there is no such address here, or the port is taken; with a remedy.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is no address here; give one such as 127.0.0.1") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        bound.bind(address)
        bound.listen(MOST_CONNECTIONS)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"{host} port {port}: {error.strerror}; take another with --port, or --port 0 for any that is free"
        ) from error
    return bound


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        """Signals are ours: uvicorn's own handler would refuse connections at once and end by the signal."""
        yield


class Service:
    """An application that is served until it is told to end.

    Args:
        app: with its guard. stop: called when the time for answers is over; returns when nothing is worked on any more.
        grace: seconds that requests have to end by themselves.
        tell: gets a line for whoever started the server.
    """

    def __init__(self, app: Guard, stop: Callable[[], None], grace: float, tell: Callable[[str], None]):
        self._app, self._stop, self._grace, self._tell = app, stop, grace, tell
        self._ending: asyncio.Event | None = None
        self._at_once: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, bound: socket.socket, signals: bool = True, ready: Callable[[], None] = lambda: None) -> None:
        """Serve on this socket until SIGINT, SIGTERM or `end`. New requests are then refused with 503 while others are
        finished; a second signal ends these too.

        Args:
            signals: whether to listen to signals; only a process's first thread can. ready: called when it is served.
        """
        asyncio.run(self._serve(bound, signals, ready))

    def end(self) -> None:
        """As a signal; from any thread."""
        self._loop.call_soon_threadsafe(self._signalled)

    def _signalled(self) -> None:
        if self._ending.is_set():
            self._at_once.set()
        else:
            self._ending.set()

    async def _serve(self, bound: socket.socket, signals: bool, ready: Callable[[], None]) -> None:
        self._loop, self._ending, self._at_once = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        config = uvicorn.Config(
            self._app,
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=16_384,
        )
        server = _Server(config)
        if signals:
            self._listen_to_signals()
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            ready()
            ending = asyncio.ensure_future(self._ending.wait())
            await asyncio.wait({ending, serving}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            await self._wind_up()
        server.should_exit = True
        await serving

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._loop.add_signal_handler(number, self._signalled)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: self._loop.call_soon_threadsafe(self._signalled))

    async def _wind_up(self) -> None:
        self._app.draining = True
        if self._app.in_flight:
            n = self._app.in_flight
            requests = f"{n} request{'s have' if n > 1 else ' has'}"
            self._tell(f"ending: {requests} {self._grace:g} s to finish; Ctrl-C once more ends at once")
        await self._until(lambda: not self._app.in_flight, self._grace)
        await asyncio.to_thread(self._stop)
        # those that were cut are told so
        await self._until(lambda: not self._app.in_flight, CLOSING_SECONDS)

    async def _until(self, over: Callable[[], bool], seconds: float) -> None:
        ends = self._loop.time() + seconds
        while not over() and self._loop.time() < ends and not self._at_once.is_set():
            await asyncio.sleep(0.02)


def to_standard_error(line: str) -> None:
    """For the person at the terminal."""
    print(line, file=sys.stderr, flush=True)
