"""How deep a character model thinks and how it answers: what the chat's commands switch."""

from __future__ import annotations

import re

MODES = {"fast": (1, 1), "normal": (2, 2), "deep": (3, 2), "extreme": (6, 4)}
"""Reasoning mode -> N cycles x T steps of the L level."""
LONG, UNLIMITED = 200, 10_000
"""Characters of an answer: by default, and at most without a limit (Ctrl-C ends one sooner)."""
SHORTEST = 40
"""Characters before a sentence's end ends an answer: an answer is more than "Oh!"."""
SENTENCE_END = re.compile(r"[.!?]['\")\]\u2019\u201d]*\s")


def cycles(mode: str) -> tuple[int, int]:
    """(N, T) of a mode's name, or of a pair such as 4x2.

    Raises:
        ValueError: neither.
    """
    name = mode.strip().lower()
    if name in MODES:
        return MODES[name]
    pair = re.fullmatch(r"(\d{1,2})\s*[x\u00d7]\s*(\d{1,2})", name)
    if pair and min(found := (int(pair[1]), int(pair[2]))) >= 1 and max(found) <= 16:
        return found
    shown = ", ".join(f"{name} ({n}x{t})" for name, (n, t) in MODES.items())
    raise ValueError(f"mode {mode!r:.40} is none of {shown}, nor N x T such as 4x2, each 1 to 16")


def ends_naturally(text: str) -> bool:
    """Whether an answer may end here: the end of a sentence and the white space after it have just come."""
    if len(text) < SHORTEST:
        return False
    return any(end.end() == len(text) for end in SENTENCE_END.finditer(text, len(text) - 8))
