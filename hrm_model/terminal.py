"""What a conversation needs of a terminal: colours, typed messages, Ctrl-C during an answer."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

DIM, BOLD, RED = "2", "1", "31"
# 256-colour codes from few steps to many: blue, green, yellow, red; readable on dark and on light.
_RAMP = (33, 38, 36, 35, 71, 107, 143, 179, 172, 208, 202, 196)
# Control characters but tab and line feed, as their pictures: a model's bytes must not steer a terminal.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)
BLOCK = '"""'


def wants_colour(stream) -> bool:
    """Whether `stream` is a terminal that shows colours and nobody has set NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Screen:
    """Writes text, notices and errors. To a pipe, text alone goes to standard output, notices to standard error."""

    def __init__(self, out=None, err=None):
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self.interactive = self.out.isatty()
        self.colour = wants_colour(self.out)

    def paint(self, text: str, code: str) -> str:
        """`text` fit for this screen, in an SGR code's style where there are colours."""
        if self.interactive:
            text = text.translate(_PICTURES)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def write(self, text: str, code: str = "", end: str = "") -> None:
        """Text of a model or a command, at once."""
        self.out.write(self.paint(text, code) + end)
        self.out.flush()

    def line(self, text: str, code: str = "") -> None:
        """write() and a line's end."""
        self.write(text, code, end="\n")

    def notice(self, text: str) -> None:
        """A dim line about what happened."""
        if self.interactive:
            self.line(text, DIM)
        else:
            print(text, file=self.err, flush=True)

    def error(self, error: Exception | str) -> None:
        """One line that says what was wrong."""
        text = " ".join(describe(error).split())
        colour = wants_colour(self.err)
        print(f"\x1b[{RED}merror: {text}\x1b[0m" if colour else f"error: {text}", file=self.err, flush=True)


def describe(error: Exception | str) -> str:
    """An error in words; of an OSError its file and reason without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


def as_typed(error: ValueError, names: Mapping[str, str]) -> ValueError:
    """The error in a person's words: each of `names` in its message becomes what stands for it, e.g. top_k --top-k."""
    return ValueError(re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error)))


class StepPainter:
    """Shows how many steps each token took: by colour, or without colours by a mark {n} wherever n changes.

    Args:
        screen: where the text goes.
        max_steps: the colours range from 1 to this.
    """

    def __init__(self, screen: Screen, max_steps: int):
        self._screen, self._max_steps = screen, max_steps
        self._last: int | None = None

    def legend(self) -> None:
        """Write a line that explains the colours or marks."""
        if not self._screen.colour:
            self._screen.notice(f"{{n}} stands before text whose tokens took n steps, 1 to {self._max_steps}")
            return
        self._screen.write("steps:", DIM)
        for steps in range(1, self._max_steps + 1):
            self._screen.write(f" {steps}", self._code(steps))
        self._screen.line("")

    def begin(self) -> None:
        """Another text begins: its first token gets a mark."""
        self._last = None

    def write(self, text: str, steps: int) -> None:
        """Text of a token that took `steps` steps."""
        if not text:
            return
        if self._screen.colour:
            self._screen.write(text, self._code(steps))
            return
        self._screen.write(text if steps == self._last else f"{{{steps}}}{text}")
        self._last = steps

    def _code(self, steps: int) -> str:
        place = (min(steps, self._max_steps) - 1) / max(self._max_steps - 1, 1)
        return f"38;5;{_RAMP[round(place * (len(_RAMP) - 1))]}"


@dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    requested: bool = False


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Within this, the first Ctrl-C only sets a flag, to be looked at between tokens; a second is as usual."""
    stop = Stop()

    def handle(number, frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


class Interrupted(Exception):
    """Ctrl-C at the prompt. `empty`: nothing had been typed."""

    def __init__(self, empty: bool):
        self.empty = empty


@dataclass
class Typed:
    """What a person entered."""

    text: str
    block: bool
    """Whether it stood between triple quotes; then it is a message, whatever it begins with."""


class Keyboard:
    """Reads messages: with line editing and history at a terminal (readline, where Python has it), else a pipe's lines.

    A line that ends in a backslash goes on in the next one. A line that begins with triple quotes begins a block, which
    ends with triple quotes at the end of a line. The end of input ends an open block.
    """

    def __init__(self, prompt: str, screen: Screen):
        self.terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt = prompt
        self._readline = None
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            # Bytes that are no UTF-8 arrive as lone surrogates instead of ending the program (PEP 383).
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        if self.terminal:
            try:
                import readline

                self._readline = readline
            except ImportError:  # not on Windows: plain lines do as well
                pass
            if screen.colour and self._readline and "libedit" not in (self._readline.__doc__ or ""):
                # readline counts what is not between these two as columns, and would draw long lines wrongly
                self._prompt = f"\x01\x1b[{BOLD}m\x02{prompt}\x01\x1b[0m\x02"

    def read(self) -> Typed:
        """The next message or command.

        Raises:
            EOFError: the end of input, Ctrl-D.
            Interrupted: Ctrl-C; what had been typed of the message is gone.
        """
        line = self._line(self._prompt)
        started = line.lstrip()
        try:
            if started.startswith(BLOCK):
                return Typed(self._block(started.removeprefix(BLOCK)), True)
            parts = [line]
            while parts[-1].endswith("\\"):
                parts[-1] = parts[-1][:-1]
                parts.append(self._next(""))
        except Interrupted as interrupted:
            interrupted.empty = False
            raise
        return Typed("\n".join(parts), False)

    def _block(self, first: str) -> str:
        lines = [first] if first.strip() else []
        while not (lines and lines[-1].rstrip().endswith(BLOCK)):
            line = self._next(BLOCK)
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines)

    def _next(self, end: str) -> str:
        """Another line of the same message; `end` at the end of input."""
        try:
            return self._line("... ")
        except EOFError:
            if self.terminal:
                print()
            return end

    def _line(self, prompt: str) -> str:
        if sys.stdin is None:
            raise EOFError
        if not self.terminal:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n").removesuffix("\r")
        try:
            return input(prompt)
        except KeyboardInterrupt:
            print()
            typed = self._readline.get_line_buffer() if self._readline else ""
            raise Interrupted(not typed) from None
