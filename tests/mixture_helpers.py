"""Corpora for tests of train/prepare.py --mixture: small, in files or in memory, and what became of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from hrm_model.tokenizer import get_tokenizer
from hrm_model.training.corpora import Corpus
from hrm_model.training.mixture import prepare_mixture
from hrm_model.training.retry import Backoff
from hrm_model.training.shards import open_dataset

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = ["alpha", " beta", "\n", "\n\n    ", "42", " é", "漢字", "😀", "\t", "don't", " gamma", "  \r\n"]
CORPORA = (
    Corpus("prose", "somebody/prose", None, "text", 3000, revision=COMMIT),
    Corpus("code", "somebody/code", "python", "content", 1000, revision=COMMIT),
)


def some_texts(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """Texts of 1 to `words` words, white space and other scripts among them."""
    draw = np.random.default_rng(seed)
    return [f"{i}: " + "".join(draw.choice(WORDS, draw.integers(1, words))) for i in range(n)]


def jsonl(texts, key="text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def write(path: Path, texts, key: str = "text") -> Path:
    """The texts as a file in the layout that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = jsonl(texts, key)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(texts))), key: list(texts)})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        import zstandard

        middle = len(data) // 2  # two frames, as parallel compressors write
        data = b"".join(map(zstandard.ZstdCompressor().compress, (data[:middle], data[middle:])))
    path.write_bytes(data)
    return path


class Memory:
    """Documents in memory, as a hub that fails where a test says: at these document numbers, with these errors."""

    def __init__(self, texts, failures=()):
        self.texts = texts
        self.failures = list(failures)
        self.starts: list[int] = []
        self._next = 0

    def read(self, cursor):
        self._next = cursor.get("next", 0)
        self.starts.append(self._next)
        while True:
            if self.failures and self.failures[0][0] <= self._next:
                raise self.failures.pop(0)[1]
            if self._next == len(self.texts):
                return
            self._next += 1
            yield self._next - 1, self.texts[self._next - 1]

    def position(self):
        return {"next": self._next}


def hub_of(sources):
    """What opens corpora of `sources`, Memory by name, as the hub would."""
    return lambda corpus, revision: sources[corpus.name]


def impatient(slept: list[float]) -> Backoff:
    """The usual patience, but seconds are noted instead of slept."""
    return Backoff(sleep=slept.append, draw=lambda: 0.5)


def prepare(out, sources, corpora=CORPORA, **options):
    """prepare_mixture() over Memory sources, in this process, saving after every batch."""
    options = {"workers": 1, "save_every_s": 0.0, "backoff": impatient([])} | options
    return prepare_mixture(out, corpora, open_hub=hub_of(sources), **options)


def ids_of(path: Path, split: str) -> np.ndarray:
    part = open_dataset(path, verify=True).split(split)
    return part.read(0, len(part))


def documents(path: Path, split: str) -> list[str]:
    """The texts of a split, cut at its end-of-text ids."""
    tokenizer = get_tokenizer()
    ids = ids_of(path, split)
    assert not len(ids) or ids[-1] == tokenizer.eot
    return [tokenizer.decode(p[:-1]) for p in np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
