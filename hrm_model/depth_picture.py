"""The same as a picture: the text in the colours of its depths, the histogram, the margin after each step."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass

from .depth_cells import cells, colours, next_cell, steps, summary, visible
from .prefixes import Reading
from .tokenizer import Tokenizer

COLUMNS = 124  # lines of code of 120 characters stay whole
MAX_ROWS = 150  # of text; beyond, a picture is too tall to be looked at

_FONT, _SIZE = "DejaVu Sans Mono", 10.0  # matplotlib ships it
_ADVANCE = 0.602 * _SIZE / 72  # inches; the width of every character of this font
_ROW = 0.21  # inches
_INK, _SOFT, _LINE = "#1b1d21", "#5c626b", "#0b6e99"


@dataclass(frozen=True)
class Piece:
    """A token, or the part of it that is on one row."""

    row: int
    column: int
    width: int
    characters: list[tuple[str, int]]
    """Each with its width in columns."""
    depth: int
    """0: given."""


def check_matplotlib() -> None:
    """Raise ValueError, with the way to install it, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'hrm-kernels[plot]', or pass --no-png") from error


def picture(reading: Reading, tokenizer: Tokenizer, *, title: str, facts: str) -> bytes:
    """The picture, as the bytes of a PNG file. A long text is cut after MAX_ROWS rows, and the picture says so.

    Args:
        reading: what to show. tokenizer: which its ids are of.
        title: heading. facts: one line on the model.

    Raises:
        ValueError: matplotlib is missing; says how to install it.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    pieces, seams, n_rows, left_out = _layout(reading, tokenizer)
    head, foot, margin = 1.25, 3.3, 0.4
    width, height = COLUMNS * _ADVANCE + 2 * margin, head + n_rows * _ROW + foot
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")

    def axes(left: float, top: float, right: float, bottom: float):
        """In inches from the figure's left and upper edge."""
        return figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))

    title = _cut(_drawable(title), 90)
    figure.text(margin / width, 1 - 0.38 / height, title, fontsize=14, color=_INK, weight="bold", parse_math=False)
    lines = [facts, " · ".join(f"{name}: {value}" for name, value in summary(reading))]
    for i, line in enumerate(lines):
        y = 1 - (0.62 + 0.2 * i) / height
        figure.text(margin / width, y, _cut(_drawable(line), 150), fontsize=9, color=_SOFT, parse_math=False)
    _draw_legend(axes(margin, 0.92, width - margin, 1.13), reading)
    body = axes(margin, head, width - margin, head + n_rows * _ROW)
    _draw_text(body, pieces, seams, n_rows, reading.max_steps)
    after, ranked = next_cell(reading, tokenizer)
    likely = "   ".join(f"{text} {p:.1%}" for text, _, p in ranked)
    said = f"next: {steps(after.depth)}; likeliest: {_drawable(likely)}"
    if left_out:
        said = f"... and {left_out:,} more tokens, which the page has.   {said}"
    figure.text(
        margin / width, 1 - (head + n_rows * _ROW + 0.22) / height, said,
        fontsize=9, family=_FONT, color=_INK, parse_math=False,
    )  # fmt: skip
    top, bottom, middle = height - foot + 0.75, height - 0.55, width / 2
    _draw_histogram(axes(margin + 0.45, top, middle - 0.15, bottom), reading)
    _draw_margins(axes(middle + 0.6, top, width - margin, bottom), reading)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _layout(reading: Reading, tokenizer: Tokenizer) -> tuple[list[Piece], list[tuple[int, str]], int, int]:
    """Wrap the text: (pieces, seams as (row, what to say), rows, tokens left out)."""
    pieces, seams, row, column, placed, seen = [], [], 0, 0, 0, 0
    for number, window in enumerate(reading.windows, 1):
        if len(reading.windows) > 1:
            row, column = row + (column > 0), 0
            first, seen = seen + 1, seen + len(window.ids)
            seams.append((row, f"window {number} of {len(reading.windows)}: from token {first:,}, read afresh"))
            row += 1
        for cell in cells(window, tokenizer):
            for characters, ends_row in _lines(cell.text):
                width = sum(w for _, w in characters)
                if column and column + width > COLUMNS:
                    row, column = row + 1, 0
                if row >= MAX_ROWS:
                    seams = [seam for seam in seams if seam[0] < MAX_ROWS]
                    return pieces, seams, MAX_ROWS, reading.n_tokens() - placed
                pieces.append(Piece(row, column, width, characters, cell.depth))
                column += width
                if ends_row:
                    row, column = row + 1, 0
            placed += len(cell.tokens)
    return pieces, seams, row + (column > 0), 0


def _lines(text: str) -> list[tuple[list[tuple[str, int]], bool]]:
    """Parts of a token for one row each: (characters with their widths, whether a newline ends the row)."""
    parts, part, used = [], [], 0
    for character in text:
        shown = "↵" if character == "\n" else "→   " if character == "\t" else _drawable(visible(character))
        for c in shown:
            width = _columns(c)
            if used + width > COLUMNS:
                parts.append((part, False))
                part, used = [], 0
            part.append((c, width))
            used += width
        if character == "\n":
            parts.append((part, True))
            part, used = [], 0
    return [*parts, (part, False)] if part else parts


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _drawable(text: str) -> str:
    """The text, with a box for what the font has no glyph of, or nothing where it has no width."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    return "".join(c if font.get_char_index(ord(c)) else "□"[: _columns(c)] for c in text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _draw_legend(axis, reading: Reading) -> None:
    scale = colours(reading.max_steps)
    axis.set(xlim=(0, COLUMNS), ylim=(1, 0))
    axis.axis("off")
    said = "HRM steps taken to predict the token:"
    axis.text(0, 0.72, said, fontsize=9, color=_INK)
    start, each = 32, min(4.0, (COLUMNS - 44) / len(scale))
    for n, (ground, text) in enumerate(scale, 1):
        axis.add_patch(_box(start + (n - 1) * each, 0, each, 1, facecolor=ground))
        if len(scale) <= 24 or n in (1, len(scale)):
            axis.text(start + (n - 0.5) * each, 0.72, str(n), fontsize=9, color=text, ha="center")
    end = start + len(scale) * each + 2
    axis.add_patch(_box(end, 0, 7, 1, **_GIVEN))
    axis.text(end + 3.5, 0.72, "given", fontsize=9, color=_SOFT, ha="center")


_GIVEN = dict(facecolor="#f0f1f2", edgecolor="#c3c7cd", hatch="////", linewidth=0)


def _box(x: float, y: float, width: float, height: float, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **{"linewidth": 0, **style})


def _draw_text(axis, pieces: list[Piece], seams: list[tuple[int, str]], n_rows: int, max_steps: int) -> None:
    scale = colours(max_steps)
    axis.set(xlim=(0, COLUMNS), ylim=(n_rows, 0))
    axis.axis("off")
    dots = []
    for piece in pieces:
        ground, ink = scale[piece.depth - 1] if piece.depth else ("", _SOFT)
        style = _GIVEN if piece.depth == 0 else dict(facecolor=ground)
        # a hair narrower than its characters, so that neighbours of one colour can be told apart
        axis.add_patch(_box(piece.column + 0.06, piece.row + 0.06, max(piece.width - 0.12, 0), 0.88, **style))
        column = piece.column
        for is_plain, text, width in _runs(piece.characters):
            if text == " " * len(text):
                dots += [(column + i + 0.5, piece.row + 0.5, ink) for i in range(len(text))]
            else:
                place = dict(ha="left") if is_plain else dict(ha="center")
                x = column if is_plain else column + width / 2
                axis.text(
                    x, piece.row + 0.72, text, fontsize=_SIZE, family=_FONT, color=ink, parse_math=False,
                    alpha=0.5 if text == "↵" else None, **place,
                )  # fmt: skip
            column += width
    if dots:
        x, y, inks = zip(*dots, strict=True)
        axis.scatter(x, y, s=0.9, c=inks, alpha=0.4, linewidths=0)
    for row, said in seams:
        axis.plot((0, COLUMNS), (row + 0.15, row + 0.15), color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.text(0, row + 0.78, said, fontsize=8, color=_SOFT)


def _runs(characters: list[tuple[str, int]]) -> list[tuple[bool, str, int]]:
    """Runs that can be drawn at once: (whether all are one column wide, text, columns). Spaces are runs of their own,
    and so is a character of two columns, whose glyph is drawn in their middle."""
    runs: list[tuple[bool, str, int]] = []
    kind = None
    for character, width in characters:
        now = "space" if character == " " else "wide" if width == 2 else "plain"
        if runs and (width == 0 or (now == kind and now != "wide")):
            is_plain, text, columns = runs[-1]
            runs[-1] = (is_plain, text + character, columns + width)
        else:
            runs.append((now != "wide", character, width))
            kind = now
    return runs


def _draw_histogram(axis, reading: Reading) -> None:
    counts = reading.histogram()
    places = range(1, reading.max_steps + 1)
    axis.bar(places, counts, color=[ground for ground, _ in colours(reading.max_steps)], edgecolor=_SOFT, linewidth=0.5)
    if reading.max_steps <= 20:
        for n, count in zip(places, counts, strict=True):
            if count:
                axis.text(n, count, f"{count:,}\n{count / counts.sum():.0%}", ha="center", va="bottom", fontsize=8)
    axis.set_ylim(0, 1.25 * counts.max())
    _finish(axis, "how many tokens took how many steps", reading.max_steps)


def _draw_margins(axis, reading: Reading) -> None:
    band = reading.margin_band()
    if band is None:
        axis.text(0.5, 0.5, "the halt bias is infinite: no margin", ha="center", transform=axis.transAxes, color=_SOFT)
    else:
        mean, low, high = band
        places = range(1, reading.max_steps + 1)
        axis.fill_between(places, low, high, color=_LINE, alpha=0.2, linewidth=0, label="10-90 %")
        axis.plot(places, mean, color=_LINE, marker="o", markersize=4, label="mean")
        axis.axhline(0, color=_SOFT, linestyle="--", linewidth=0.8)
        axis.legend(fontsize=8, frameon=False)
    _finish(axis, "halting margin after each step (above 0: halt)", reading.max_steps)


def _finish(axis, title: str, max_steps: int) -> None:
    axis.set_title(title, fontsize=10, color=_INK)
    axis.set_xlabel("steps", fontsize=9)
    axis.set_xlim(0.4, max_steps + 0.6)
    axis.set_xticks(range(1, max_steps + 1, -(-max_steps // 16)))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
