"""A text on its way to a model: read and checked, as a dataset on disk, and the samples that are kept of it."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic import atomic_file
from ..keyed import WINDOW_STREAM, keyed_words
from ..text_input import read_text
from ..training.shards import Dataset, DatasetWriter, ShardError, open_dataset
from .tokenizer import CharTokenizer


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    path: str
    content: str

    @property
    def name(self) -> str:
        """Short, and fit for a directory."""
        return re.sub(r"[^\w-]+", "-", Path(self.path).stem).strip("-")[:40] or "text"

    @property
    def sha256(self) -> str:
        """Of the content: what makes it the same text."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()

    @property
    def n_train(self) -> int:
        """Characters to train on, from the start."""
        return len(self.content) * 9 // 10


def read(path: str) -> Text:
    """Read a UTF-8 file; its line ends become "\\n".

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, binary, or not UTF-8 all through.
    """
    content = read_text(path)
    if "\0" in content:
        raise ValueError(
            f"{path} is no text but binary: a zero byte at character {content.index(chr(0)):,}; give a text file"
        )
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if not content.strip():
        raise ValueError(f"{path} is empty: {len(content)} characters, all white space; give a text to learn from")
    return Text(path, content)


def check_length(text: Text, seq_length: int) -> None:
    """Raises ValueError where the text is too short for sequences of `seq_length`."""
    n, least = len(text.content), 10 * (seq_length + 1)
    if min(text.n_train, n - text.n_train) < seq_length + 1:
        raise ValueError(
            f"{text.path} has {n:,} characters; 90 % to train on and 10 % to validate with, each at least one "
            f"sequence of --seq-length {seq_length} and its next character, need {least:,}: give a longer text"
            + (f", or a --seq-length of at most {n // 10 - 1}" if n >= 20 else "")
        )


def store(text: Text, tokenizer: CharTokenizer, out: Path) -> Dataset:
    """The text as a dataset at `out`: the first 90 % to train on, the rest to validate with. One that is there already
    is opened, if it is of this text and whole.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    fingerprint = hashlib.sha256(f"{text.sha256} {tokenizer.sha256}".encode()).hexdigest()
    with suppress(ShardError):
        found = open_dataset(out, verify=True)
        if found.manifest["fingerprint"] == fingerprint:
            return found
    ids = np.array(tokenizer.encode(text.content), dtype=np.int64)
    with DatasetWriter(out, overwrite=True) as writer:
        writer.append("train", ids[: text.n_train], documents=1)
        writer.append("val", ids[text.n_train :], documents=1)
        return writer.commit(
            {
                "tokenizer": tokenizer.describe(),
                "source": {"paths": [text.path], "sha256": text.sha256},
                "options": {},
                "fingerprint": fingerprint,
                "counts": writer.tokens,
            }
        )


def keep_samples(dataset: Dataset, n: int, seq_length: int, seed: int, path: Path) -> None:
    """Write `n` sequences of the training split, uint16 [n, seq_length + 1] at places drawn by (seed, number), to
    `path`: all that replay will know of the text. What is there may be of a text that was never begun."""
    split = dataset.split("train")
    places = len(split) - seq_length
    n = min(n, places)
    starts = (keyed_words(seed, 0, max(n, 1), WINDOW_STREAM)[:n, 0] % np.uint64(places)).astype(np.int64)
    whole = split.read(0, len(split))
    rows = np.lib.stride_tricks.sliding_window_view(whole, seq_length + 1)[starts]
    with atomic_file(path, overwrite=True) as temporary, open(temporary, "wb") as file:
        np.save(file, rows, allow_pickle=False)


def read_samples(path: Path, seq_length: int, n_chars: int) -> np.ndarray:
    """What keep_samples() wrote. Raises ValueError where it is missing, damaged or of another model."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"the samples {path} of an earlier text cannot be read ({error}); put the file back, or use --replay 0 and "
            "--elastic 0, which need none"
        ) from error
    if rows.ndim != 2 or rows.dtype != np.uint16 or not len(rows) or rows.shape[1] != seq_length + 1:
        raise ValueError(
            f"{path} holds no samples of {seq_length + 1} characters but {rows.dtype} of shape {rows.shape}; put the "
            "right file back"
        )
    if rows.max() >= n_chars:
        raise ValueError(f"{path} holds the character id {rows.max()}, outside 0..{n_chars - 1}; put the file back")
    return rows
