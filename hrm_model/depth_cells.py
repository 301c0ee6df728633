"""How a text is shown by depth, in a page or in a picture: what a token looks like, and which colour a depth has."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from .prefixes import Reading, Window
from .tokenizer import Tokenizer

# OKLab lightness (Ottosson 2020) 0.97 to 0.28 in equal parts, hue from yellow over green to blue: lightness alone puts
# the colours in order, so they read the same with any colour vision and in grey.
ANCHORS = "fbf8ca cae4a1 88d28e 1ebd8f 069c93 037d8a 045f7c 014071 182354".split()

# Invisible characters that belong to what they stand between: emoji and Indic scripts are spelled with them.
_JOINERS = "\u200c\u200d"


def colours(max_steps: int, dark: bool = False) -> list[tuple[str, str]]:
    """(ground, text) as "#rrggbb" for 1..max_steps. The more steps, the further from the page: darker on a light one,
    lighter on a `dark` one. The contrast of text on ground is at least 4.5 (WCAG 2.1, 1.4.3)."""
    scale = [[int(anchor[i : i + 2], 16) for i in (0, 2, 4)] for anchor in ANCHORS]
    found = []
    for step in range(max_steps):
        place = step / max(max_steps - 1, 1)
        place = (1 - place if dark else place) * (len(scale) - 1)
        low = min(int(place), len(scale) - 2)
        rgb = [round(a + (place - low) * (b - a)) for a, b in zip(scale[low], scale[low + 1], strict=True)]
        # of black and white, one always has a contrast of 4.58 = sqrt(21) or more: 0.179 = sqrt(1.05 x 0.05) - 0.05
        text = "#000000" if luminance(rgb) > 0.179 else "#ffffff"
        found.append(("#" + bytes(rgb).hex(), text))
    return found


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour of 0..255 (WCAG 2.1): 0 black, 1 white."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@dataclass(frozen=True)
class Token:
    """A token as it is shown."""

    id: int
    text: str
    """Its characters as in a string literal; its bytes if it begins or ends inside a character."""
    depth: int
    """Steps taken to predict it; 0: it was given."""
    halted: bool
    """Whether the head stopped them; else it was the limit."""
    nats: float | None
    """Surprisal; None if it was given."""
    margins: list[float] | None
    """After each step, of the prefix that predicts it; None if it was given."""


@dataclass(frozen=True)
class Cell:
    """Whole characters, and the tokens that they are made of: mostly one."""

    text: str
    tokens: list[Token]

    @property
    def depth(self) -> int:
        """The deepest of its tokens; 0: all were given."""
        return max(t.depth for t in self.tokens)


def cells(window: Window, tokenizer: Tokenizer) -> list[Cell]:
    """The tokens of a window as cells. A token that begins inside a character joins the one before it; a character
    that the window's edge cuts is shown as its bytes."""
    groups: list[list[int]] = []
    for t, token_id in enumerate(window.ids):
        if groups and tokenizer.decode_bytes([token_id])[0] & 0xC0 == 0x80:
            groups[-1].append(t)
        else:
            groups.append([t])
    found = []
    for group in groups:
        text = tokenizer.decode_bytes(window.ids[t] for t in group).decode("utf-8", errors="backslashreplace")
        found.append(Cell(text, [_token(window, t, tokenizer) for t in group]))
    return found


def next_cell(reading: Reading, tokenizer: Tokenizer) -> tuple[Token, list[tuple[str, int, float]]]:
    """What would follow the text: (its depth and margins, the likeliest three as (text, id, probability))."""
    last = reading.windows[-1].prefixes
    best = last.next_log_probs.topk(min(3, len(last.next_log_probs)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ranked = [(quoted(tokenizer.decode_bytes([i])), i, math.exp(logp)) for i, logp in found]
    token = Token(-1, "", int(last.executed[-1]), bool(last.halted[-1]), None, last.margins[-1].tolist())
    return token, ranked


def _token(window: Window, t: int, tokenizer: Tokenizer) -> Token:
    known, text = window.prefixes, quoted(tokenizer.decode_bytes([window.ids[t]]))
    if t == 0:
        return Token(window.ids[t], text, 0, False, None, None)
    depth, halted = int(known.executed[t - 1]), bool(known.halted[t - 1])
    return Token(window.ids[t], text, depth, halted, float(known.nll[t - 1]), known.margins[t - 1].tolist())


def quoted(raw: bytes) -> str:
    """A token as a string literal; one that is not whole characters as its bytes in hexadecimal."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"bytes {raw.hex(' ')}"
    return "".join(map(visible, json.dumps(text, ensure_ascii=False)))


def visible(character: str) -> str:
    """A character, or its name where it would be invisible or reorder its neighbours."""
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS:
        return f"<U+{ord(character):04X}>"
    return character


def steps(n: int) -> str:
    """ "1 step", "2 steps"."""
    return f"{n} step" if n == 1 else f"{n} steps"


def summary(reading: Reading) -> list[tuple[str, str]]:
    """(name, value) of what one wants to know first."""
    surprisal, correlation = reading.surprisal(), reading.rank_correlation()
    mean = f"{surprisal.mean():.2f} nats" if len(surprisal) else "none predicted"
    windows = f" in {len(reading.windows)} windows" if len(reading.windows) > 1 else ""
    return [
        ("mean steps", f"{reading.depths().mean():.2f} of {reading.max_steps}"),
        ("tokens", f"{reading.n_tokens():,}{windows}"),
        ("mean surprisal", mean),
        ("surprisal and depth", "constant" if correlation is None else f"{correlation:+.2f} rank correlation"),
    ]
