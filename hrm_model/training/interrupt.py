"""Ctrl-C and SIGTERM: the first asks a run to finish its step and save, the second leaves at once."""

from __future__ import annotations

import os
import signal
import time


class Interrupt:
    """Context manager that turns the first SIGINT or SIGTERM into a flag.

    A second one ends the process immediately with the shell's code for the signal. Checkpoints are renamed into place
    when complete, so leaving in the middle of one harms nothing.

    Args:
        seconds: after so long the flag is set without a signal; 0: never.
    """

    def __init__(self, seconds: float = 0.0):
        self.requested = False
        self._end = time.monotonic() + seconds if seconds else None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.requested or (self._end is not None and time.monotonic() >= self._end)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        # os.write, not print: a handler may run in the middle of another write to the same stream
        os.write(2, b"\nstopping after this step; once more to leave at once\n")
