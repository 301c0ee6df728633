"""Text of a growing row, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import IncrementalDecoder, Tokenizer


class StoppedText:
    """Turns tokens into the text that is certain: whole characters, and nothing that a stop string may begin with.

    Args:
        stop: strings that end the text, and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder, self._stop, self._held = IncrementalDecoder(tokenizer), tuple(stop), ""

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string has come)."""
        self._held += self._decoder.push(token)
        if may_stop:
            found = [at for at in map(self._held.find, self._stop) if at >= 0]
            if found:
                text, self._held = self._held[: min(found)], ""
                return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def finish(self) -> str:
        """What was held back, when no more tokens come; an unfinished character is U+FFFD."""
        text, self._held = self._held + self._decoder.finish(), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, the whole of it left out."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
