"""A connection that is given up when nothing comes or nothing is read: uvicorn waits for both without end."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""From the first byte (of a new connection: from its start) to the end of a request's head."""
WRITE_SECONDS = 30.0
"""How long a client may leave what was sent unread before it is given up."""
LEAST_READ = 65_536
"""Bytes that it must take in that time, where there are more."""


class Connection(H11Protocol):
    """HTTP/1.1 with a time limit on each request's head, and on each answer's way to the client."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._head_timer = self._unread_timer = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that whatever is unsent is known
        self._expect_head()

    def connection_lost(self, exc) -> None:
        self._head_is_here()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_is_here()
        elif self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def on_response_complete(self) -> None:
        self._head_is_here()  # what limits the time until the next one is keep-alive
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. Who is answering an earlier part of it is told that the client is gone: uvicorn would
        let it run into an error with a traceback, as often as anybody likes."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if answering and self.cycle.response_started:
            self.abort()
        else:
            super().send_400_response(msg)

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def _expect_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() > unread - LEAST_READ:
                self.abort()
            else:
                self._expect_reading()

        self._unread_timer = self.loop.call_later(WRITE_SECONDS, check)

    def _is_read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.abort)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
