"""The books of a corpus that is being prepared: what was read, what of it was written where, where to go on."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .corpora import CorpusError
from .documents import Cursor
from .partial import PartialDataset
from .retry import PatientReader
from .sources import PIECE_CHARS, Piece, Report, cut
from .stream_split import StreamSplit
from .tokenise import BATCH_PIECES, Encoded


class Row(NamedTuple):
    """What a piece, or a row without one, means for the books."""

    number: int
    ends: bool = True
    skipped: str | None = None
    """Why there is no piece: "empty" or "unusable" (no text)."""


class Batch(NamedTuple):
    """What stays in this process while a batch's pieces are tokenised."""

    rows: list[Row]
    cursor: Cursor | None
    """Where to go on after it; None where it ends within a document."""


class Books:
    """What has been taken of a corpus so far, and the writing of it."""

    def __init__(self, writer: PartialDataset, state: dict[str, Any], options: dict[str, Any], budget: int):
        self._writer, self._state, self._budget = writer, state, budget
        self.split = StreamSplit(options["val_fraction"], options["seed"], state["split"])
        self.documents: int = state["documents"]
        self.n_bytes: int = state["bytes"]
        self.skipped = dict(state["skipped"])
        self.seconds: float = state["seconds"]
        self.retries: int = state["retries"]
        self._retries_before = self.retries
        self._side: str | None = None
        self._cursor: Cursor | None = None
        self._saved = self._timed = time.perf_counter()

    @property
    def full(self) -> bool:
        """Whether the budget is reached and the document that reached it has ended."""
        return self._side is None and self.split.total >= self._budget

    def enter(self, batch: Batch, found: Encoded) -> None:
        """Write a batch, up to the document that reaches the budget, neighbours on the same side together."""
        run, start, end, ended = None, 0, 0, 0
        pieces = zip(found.counts, found.sizes, strict=True)
        for row in batch.rows:
            if row.skipped:
                self.skipped[row.skipped] += 1
                continue
            count, size = next(pieces)
            side = self._side or self.split.side(row.number)
            if side != run:
                if run:
                    self._writer.append(run, found.ids[start:end], ended)
                run, start, ended = side, end, 0
            end += count
            ended += row.ends
            self.split.add(side, count)
            self.documents += row.ends
            self.n_bytes += size
            self._side = None if row.ends else side
            if self.full:
                break
        if run:
            self._writer.append(run, found.ids[start:end], ended)
        self._cursor = batch.cursor

    def save(self, reader: PatientReader, every_s: float = 0.0) -> None:
        """Save where a batch ends with a document, if the last save is at least `every_s` seconds ago."""
        if self._cursor is None or self.full or time.perf_counter() - self._saved < every_s:
            return
        self.note_time(reader)
        self._state |= {
            "cursor": self._cursor,
            "split": self.split.state(),
            "documents": self.documents,
            "bytes": self.n_bytes,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "retries": self.retries,
        }
        self._writer.save(self._state)
        self._saved = time.perf_counter()

    def note_time(self, reader: PatientReader) -> None:
        """Take seconds and retries of this process into account."""
        now = time.perf_counter()
        self.seconds = round(self.seconds + now - self._timed, 2)
        self._timed = now
        self.retries = self._retries_before + reader.retries


def new_state(identity: dict[str, Any]) -> dict[str, Any]:
    """The books of a corpus of which nothing has been read."""
    return {
        "identity": identity,
        "cursor": {},
        "split": None,
        "documents": 0,
        "bytes": 0,
        "skipped": {"empty": 0, "unusable": 0},
        "seconds": 0.0,
        "retries": 0,
    }


def marked(reader: PatientReader) -> Iterator[tuple[Batch, list[Piece]]]:
    """Batches of pieces with their books. A batch ends with a document, unless that one is long."""
    rows: list[Row] = []
    pieces: list[Piece] = []
    size = 0
    try:
        for number, text in reader:
            if not text:
                rows.append(Row(number, skipped="unusable" if text is None else "empty"))
            for part, ends in _parts(text or ""):
                rows.append(Row(number, ends))
                pieces.append(Piece(part, ends, 0))
                size += len(part)
                if size >= PIECE_CHARS and not ends:
                    yield Batch(rows, None), pieces
                    rows, pieces, size = [], [], 0
            if size >= PIECE_CHARS or len(rows) >= BATCH_PIECES:
                yield Batch(rows, reader.position()), pieces
                rows, pieces, size = [], [], 0
    except CorpusError:  # what came before it is not lost
        yield Batch(rows, reader.stopped()), pieces
        raise
    if rows:
        yield Batch(rows, reader.position()), pieces


def _parts(text: str) -> Iterable[tuple[str, bool]]:
    if len(text) <= PIECE_CHARS:
        return [(text, True)] if text else []
    return cut(io.StringIO(text, newline="").read, Report())
