"""The documents of a corpus from local files, in the layouts that the hub serves: parquet and lines of JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from .corpora import Corpus, CorpusError

Cursor = dict[str, Any]
"""Where reading goes on, as JSON; {"next": number of the next document, ...}. {} is the beginning."""

SUFFIXES = (".parquet", *(f".{kind}{packed}" for kind in ("jsonl", "json") for packed in ("", ".gz", ".zst")))
_NOT_TEXT = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
_READ_BYTES = 1 << 16
_END_BYTES = 1 << 16
_ZST_BYTES = 1 << 9  # four bytes may stand for a block of 128 KiB: 16 MiB at most come of these
_PARQUET_ROWS = 256
_PARQUET_BYTES = 16_000_000


class Documents(Protocol):
    """A corpus that can be read from any document on."""

    def read(self, cursor: Cursor) -> Iterator[tuple[int, str | None]]:
        """(document number, text) from `cursor` on; None where a row has no text. Numbers are those of rows."""

    def position(self) -> Cursor:
        """Where to go on after the last document that read() gave."""


class LocalDocuments:
    """A corpus in files: .parquet, and lines of JSON in .jsonl or .json, plain, .gz or .zst.

    Args:
        corpus: what it is; its text_key is where the text is.
        paths: files and folders. Folders are searched, hidden files left out, and their files sorted by name.

    Attributes: fingerprint (of names, sizes and both ends of the files), paths.

    Raises CorpusError for a path that does not exist or has no such file. Reading raises it for a damaged file and
    for rows without the key.
    """

    def __init__(self, corpus: Corpus, paths: list[str | Path]):
        self._corpus = corpus
        self.paths = [str(path) for path in paths]
        self._files: list[Path] = []
        digest = hashlib.sha256()
        for path in map(Path, paths):
            for file in _files_under(corpus.name, path):
                self._files.append(file)
                name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                digest.update(f"{name} {file.stat().st_size} {_ends(file)}\n".encode())
        self.fingerprint = digest.hexdigest()
        self._position: Cursor = {"next": 0, "file": 0, "row": 0}

    def read(self, cursor: Cursor) -> Iterator[tuple[int, str | None]]:
        """(document number, text) from `cursor` on; None where a row has no text."""
        self._position = position = {"next": 0, "file": 0, "row": 0} | cursor
        while position["file"] < len(self._files):
            file = self._files[position["file"]]
            rows = self._parquet if file.suffix.lower() == ".parquet" else self._json
            with closing(rows(file, position["row"])) as texts:
                for text in texts:
                    number = position["next"]
                    position["next"] += 1
                    position["row"] += 1
                    yield number, text
            position["file"] += 1
            position["row"] = 0

    def position(self) -> Cursor:
        """Where to go on after the last document that read() gave."""
        return dict(self._position)

    def _json(self, file: Path, skip: int) -> Iterator[str | None]:
        number = 0
        with open(file, "rb") as raw:
            try:
                for number, line in enumerate(_lines(_blocks(file, raw)), 1):
                    if number > skip:
                        yield self._text(json.loads(line), f"{file}:{number}") if line.strip() else None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise self._damaged(f"{file}:{number + 1}", error) from error
            except (ValueError, RecursionError) as error:
                if isinstance(error, CorpusError):
                    raise
                raise self._damaged(f"{file}:{number}", error) from error

    def _parquet(self, file: Path, skip: int) -> Iterator[str | None]:
        parquet = _package("pyarrow.parquet", "pyarrow", file)
        import pyarrow

        try:
            # A row group can be large; buffered, and not pre-buffered, its column is read in parts.
            with parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
                if self._corpus.text_key not in opened.schema_arrow.names:
                    raise self._no_key(str(file), opened.schema_arrow.names)
                for group in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(group).num_rows
                    if skip >= rows:
                        skip -= rows
                        continue
                    columns = {"row_groups": [group], "columns": [self._corpus.text_key], "use_threads": False}
                    size = _rows_at_a_time(opened.metadata.row_group(group), self._corpus.text_key)
                    for batch in opened.iter_batches(batch_size=size, **columns):
                        values = batch.column(0).slice(skip).to_pylist()
                        skip = max(0, skip - batch.num_rows)
                        for value in values:
                            yield value if isinstance(value, str) else None
        except (pyarrow.ArrowInvalid, UnicodeDecodeError, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the operating system; without one, of damaged pages
                raise
            raise self._damaged(str(file), error) from error

    def _text(self, row: Any, where: str) -> str | None:
        if not isinstance(row, dict):
            raise self._damaged(where, f"a JSON {type(row).__name__}, where an object a line is expected")
        if self._corpus.text_key not in row:
            raise self._no_key(where, row)
        text = row[self._corpus.text_key]
        return text if isinstance(text, str) else None

    def _no_key(self, where: str, keys: Any) -> CorpusError:
        return missing_key(self._corpus, where, list(keys))

    def _damaged(self, where: str, why: object) -> CorpusError:
        return CorpusError(f"{self._corpus.name}: {where} is damaged ({why}); fetch the file again or leave it out")


def missing_key(corpus: Corpus, where: str, keys: list[str]) -> CorpusError:
    """What is raised when rows do not have the text where the catalogue says."""
    return CorpusError(
        f"{corpus.name} ({corpus.repository}): {where} has no {corpus.text_key!r}, only {', '.join(map(str, keys))}; "
        f"pin a revision that has it (--revision {corpus.name}=...) or read other files (--local {corpus.name}=PATH)"
    )


def _files_under(name: str, path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise CorpusError(f"--local {name}={path} is of no known kind; known are {' '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise CorpusError(f"--local {name}={path} does not exist; give a file or a folder")
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        found += [
            Path(folder, file)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".") and file not in _NOT_TEXT
        ]
    if not found:
        raise CorpusError(f"--local {name}={path} has no file of a known kind: {' '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _ends(file: Path) -> str:
    with open(file, "rb") as stream:
        digest = hashlib.sha256(stream.read(_END_BYTES))
        stream.seek(max(0, file.stat().st_size - _END_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()


def _rows_at_a_time(group: Any, key: str) -> int:
    """As many rows of a group as have some _PARQUET_BYTES of the column `key` on average."""
    columns = map(group.column, range(group.num_columns))
    n_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == key)
    return max(1, min(_PARQUET_ROWS, _PARQUET_BYTES * group.num_rows // max(1, n_bytes)))


def _blocks(file: Path, raw: Any) -> Iterator[bytes]:
    suffix = file.suffix.lower()
    if suffix in (".gz", ".zst") and not file.stat().st_size:  # of no text there would be some bytes
        raise EOFError("it is empty")
    if suffix == ".zst":
        yield from _zst_blocks(file, raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
    while block := stream.read(_READ_BYTES):
        yield block


def _zst_blocks(file: Path, raw: Any) -> Iterator[bytes]:
    zstandard = _package("zstandard", "zstandard", file)
    # The stream reader of zstandard ends without a word where a file is cut; this notices. Frames may follow
    # one another, and long-distance matching needs windows of up to 2 GiB to be allowed.
    unpack, rest = None, b""
    try:
        while block := rest or raw.read(_ZST_BYTES):
            if unpack is None:
                unpack = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield unpack.decompress(block)
            rest = b""
            if unpack.eof:
                rest, unpack = unpack.unused_data, None
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if unpack is not None:
        raise EOFError("it ends within a frame")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    if any(parts):
        yield b"".join(parts)


def _package(module: str, package: str, file: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(f"{file} needs the package {package}: pip install 'hrm-kernels[data]'") from error
