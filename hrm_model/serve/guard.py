"""What stands before the application: who may ask, how much, and that nothing else can be made of the answers.

Host         on a loopback address only that address's names: a page elsewhere whose name is made to point here
             (DNS rebinding) is refused
Origin       a browser sends it with a page's requests: only this server's own pages may ask
key          of /v1, where one is set
body         at most so many bytes, within so many seconds, whether Content-Length says so or not
headers      no content sniffing, no framing, no cache, no CORS
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .errors import ApiError

LOOPBACK = "localhost", "127.0.0.1", "::1"
DRAIN_BYTES, DRAIN_SECONDS = 16_000_000, 2.0
"""Of a body that is too large, what is read and thrown away, so that the client is still there to be told."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much."""

    hosts: Sequence[str] | None = LOOPBACK
    """Names under which the server may be asked; None is any."""
    api_key: str | None = None
    max_body: int = 1_000_000
    """Bytes of a body."""
    body_seconds: float = 30.0
    """Time that a client has to send it."""


class Guard:
    """An ASGI application around another."""

    def __init__(self, app, rules: Rules):
        self._app, self._rules = app, rules
        self.draining = False
        """Whether new requests are refused because the server is about to end."""
        self.in_flight = 0
        """Requests that are being answered."""

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return  # there are no websockets, and uvicorn is told to start no lifespan
        self.in_flight += 1
        try:
            await self._answer(scope, receive, _with_headers(send))
        finally:
            self.in_flight -= 1

    async def _answer(self, scope, receive, send) -> None:
        try:
            self._check(scope)
            if scope["method"] == "POST":
                receive = _given(await self._body(scope, receive), receive)
        except ApiError as error:
            await send_json(send, error.status, error.body(), error.headers() | {"connection": "close"})
            return
        except ConnectionError:
            return  # nobody is there to be told
        await self._app(scope, receive, send)

    def _check(self, scope) -> None:
        headers = scope["headers"]
        hosts = _values(headers, b"host")
        if len(hosts) > 1 or any(
            len(_values(headers, name)) > 1 for name in (b"content-length", b"origin", b"authorization")
        ):
            raise ApiError(400, "a header that may come once comes twice")
        host = hosts[0] if hosts else ""
        if self._rules.hosts is not None and _name_of(host) not in self._rules.hosts:
            raise ApiError(
                403,
                f"the host {host[:80]!a} is not served here; known are {', '.join(self._rules.hosts)} "
                "(--allow-host adds one)",
            )
        origin = next(iter(_values(headers, b"origin")), None)
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"pages of {origin[:80]!a} may not ask this server; only its own may")
        if not scope["path"].startswith("/v1/"):
            return
        if self._rules.api_key is not None:
            given = next(iter(_values(headers, b"authorization")), "")
            scheme, _, key = given.partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._rules.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )
        if scope["method"] == "POST":
            kind = next(iter(_values(headers, b"content-type")), "")
            if kind.partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, f"the content type is {kind[:80]!a}; send application/json")
            if any(value.lower() != "identity" for value in _values(headers, b"content-encoding")):
                raise ApiError(415, "a body with a content encoding is not read; send it as it is")
            if self.draining:
                raise ApiError(503, "the server is shutting down", retry_after=5)

    async def _body(self, scope, receive) -> bytes:
        """The whole body. Raises ApiError where it is too large or too slow, ConnectionError where it ends early."""
        most, announced = self._rules.max_body, next(iter(_values(scope["headers"], b"content-length")), "0")
        too_large = ApiError(413, f"the body is larger than {most:,} bytes, the limit here; send less at once")
        if announced.isdecimal() and int(announced[:20]) > max(most, DRAIN_BYTES):
            raise too_large
        body, ends = bytearray(), time.monotonic() + self._rules.body_seconds
        size, more = 0, True
        while more:
            if size > most:
                ends = min(ends, time.monotonic() + DRAIN_SECONDS)
            try:
                message = await asyncio.wait_for(receive(), ends - time.monotonic())
            except asyncio.TimeoutError as error:
                if size > most:
                    break
                raise ApiError(408, f"the body did not come within {self._rules.body_seconds:g} s") from error
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= most:
                body += part
            elif size > DRAIN_BYTES:
                break
        if size > most:
            raise too_large
        return bytes(body)


def _given(body: bytes, receive: Callable) -> Callable:
    """A channel with the whole body, and then whatever else comes: the client going away."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving():
        return waiting.pop() if waiting else await receive()

    return receiving


def _with_headers(send: Callable) -> Callable:
    async def sending(message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            message = message | {"headers": [*message["headers"], *(one for one in HEADERS if one[0] not in own)]}
        await send(message)

    return sending


async def send_json(send: Callable, status: int, value: dict, headers: dict[str, str]) -> None:
    """A small JSON response."""
    body = json.dumps(value).encode()
    told = {"content-type": "application/json", "content-length": str(len(body))} | headers
    pairs = [(name.encode(), text.encode("latin-1")) for name, text in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]


def _name_of(host: str) -> str:
    """The name in a Host header, without its port: "[::1]:8000" is "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
