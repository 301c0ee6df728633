"""What the documents of a training corpus are: the user's files, or what every Python brings along."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import importlib.util
import io
import json
import os
import platform
import re
import sys
import sysconfig
import tokenize
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, ExtensionFileLoader
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .html .htm .css .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go "
    ".java .js .ts .jl .lua .rb .sh .sql".split()
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PIECE_CHARS = 1_000_000
_SHOWN_PROBLEMS = 20

_SKIPPED_FOLDERS = re.compile(r"test|tests|idle_test|site-packages|dist-packages|__pycache__|config-.*")
# topics.py is what is taken as topics; encodings/ has 1.4 MB of generated character tables, neither English nor code;
# the others are of the machine: its paths, its owner's settings.
_SKIPPED_FILES = re.compile(
    r"pydoc_data/topics\.py|encodings/(cp|iso8859_|koi8_|mac_|kz1048|ptcp154|tis_620|hp_roman8|palmos).*\.py|"
    r"_sysconfigdata.*\.py|(site|user)customize\.py"
)
# Importing readline may write to the terminal; _tkinter loads the window system.
_SKIPPED_MODULES = frozenset({"readline", "_tkinter"})
_SELF = re.compile(r"\$(module|type)(, /)?(, )?|\$")  # how a C signature marks what the caller does not pass
_DOCUMENTED = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    staticmethod,
    classmethod,
)


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool
    """Whether the document ends here."""
    size: int
    """Bytes of the source that were read for it, for the progress bar."""


@dataclass
class Report:
    """What of a source could not be used."""

    problems: int = 0
    empty: int = 0

    def problem(self, where: str, what: str) -> None:
        """Count it, and print it unless there were many."""
        self.problems += 1
        if self.problems <= _SHOWN_PROBLEMS:
            tqdm.write(f"skipped {where}: {what}", file=sys.stderr)
        elif self.problems == _SHOWN_PROBLEMS + 1:
            tqdm.write("further problems are only counted", file=sys.stderr)


class FileSource:
    """Text files (a document each), .jsonl and .jsonl.gz (a document a line), folders of them, sorted.

    Args:
        paths: files and folders. A file named here is read whatever its suffix; in folders those with one of
            TEXT_SUFFIXES and JSONL_SUFFIXES are, except hidden ones.
        text_key: where the text is in a line of JSON.
        report: told what is skipped: files and lines that are not UTF-8, not JSON or have no text.

    Attributes: size (bytes), fingerprint (sha256 over the contents), description (for the manifest).

    Raises ValueError for a path that does not exist or a folder without such files.
    """

    def __init__(self, paths: list[str | Path], text_key: str, report: Report):
        self._text_key = text_key
        self._files: list[Path] = []
        self.size = 0
        self.description = {"kind": "files", "paths": [str(path) for path in paths]}
        digest = hashlib.sha256()
        files = list(dict.fromkeys(file for path in paths for file in _files_under(Path(path))))
        total = sum(file.stat().st_size for file in files if file.exists())  # a link may lead nowhere
        with tqdm(total=total, desc="checking", unit="B", unit_scale=True, delay=2) as bar:
            for file in files:
                sha256, usable = _scan(file, report, bar.update)
                digest.update(f"{'jsonl' if _is_jsonl(file) else 'text'} {sha256}\n".encode())
                if usable:
                    self._files.append(file)
                    self.size += file.stat().st_size
        self.fingerprint = digest.hexdigest()

    def pieces(self, report: Report) -> Iterator[Piece]:
        """The documents, one after the other, in pieces of about PIECE_CHARS characters."""
        for file in self._files:
            with open(file, "rb") as raw:
                documents = self._lines(file, raw, report) if _is_jsonl(file) else [_reader(raw)]
                position = 0
                for read in documents:
                    for text, ends in cut(read, report):
                        yield Piece(text, ends, raw.tell() - position)
                        position = raw.tell()

    def _lines(self, file: Path, raw: io.BufferedReader, report: Report) -> Iterator[Callable[[int], str]]:
        number = 0
        try:
            lines = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
            if lines is not raw and not file.stat().st_size:
                raise EOFError("it is empty")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = self._text_of(line)
                except (ValueError, RecursionError) as error:
                    report.problem(f"{file}:{number}", str(error))
                else:
                    yield io.StringIO(text, newline="").read
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            report.problem(f"{file}:{number + 1}", f"and what follows: {error}")

    def _text_of(self, line: bytes) -> str:
        value = json.loads(line.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__} is no object with a key {self._text_key!r}")
        if self._text_key not in value:
            raise ValueError(f"no key {self._text_key!r}, only {list(value)}; see --text-key")
        if not isinstance(value[self._text_key], str):
            raise ValueError(f"{self._text_key!r} is a {type(value[self._text_key]).__name__}, not a string")
        return value[self._text_key]


class StdlibSource:
    """About 12 MB of prose and code that every CPython has at hand.

    The topics of the language reference, the sources of the standard library without its tests, and the
    docstrings of its modules written in C. The same interpreter always gives the same documents. Attributes
    as of FileSource.
    """

    def __init__(self, report: Report):
        python = f"{platform.python_implementation()} {platform.python_version()}"
        self.description = {"kind": "stdlib", "python": python, "platform": sys.platform}
        self._texts = [*_topics(report), *(text for _, text in library_sources(report)), *_c_docstrings()]
        digest = hashlib.sha256()
        for text in self._texts:
            data = text.encode("utf-8", "replace")
            digest.update(f"{len(data)}\n".encode() + data)
        self.fingerprint = digest.hexdigest()
        self.size = sum(map(len, self._texts))

    def pieces(self, report: Report) -> Iterator[Piece]:
        """The documents, one after the other, in pieces of about PIECE_CHARS characters."""
        for document in self._texts:
            for text, ends in cut(io.StringIO(document, newline="").read, report):
                yield Piece(text, ends, len(text))


def cut(read: Callable[[int], str], report: Report) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the last) of what `read` gives, cut where the tokenizer's pattern cuts as well.

    That is before a white space character between two others. Without one for long, the cut is made anywhere.
    """
    text = read(PIECE_CHARS)
    if not text:
        report.empty += 1
        return
    while more := read(PIECE_CHARS):
        match = re.match(r".*\S(?=[^\S\x1c-\x1f]\S)", text, re.DOTALL)
        if match or len(text) >= 8 * PIECE_CHARS:
            end = match.end() if match else len(text)
            yield text[:end], False
            text = text[end:]
        text += more
    yield text, True


def _is_jsonl(file: Path) -> bool:
    return file.name.lower().endswith(JSONL_SUFFIXES)


def _reader(raw: io.BufferedReader) -> Callable[[int], str]:
    # White space stays as it is (newline=""); a byte order mark is no part of the text.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="").read


def _files_under(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"source {path} does not exist; give a file, a folder or the word stdlib")
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES or _is_jsonl(file)]
    if not found:
        known = " ".join(sorted(TEXT_SUFFIXES.union(JSONL_SUFFIXES)))
        raise ValueError(f"folder {path} has no file of a known kind ({known}); name the files themselves")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _scan(file: Path, report: Report, progress: Callable[[int], object]) -> tuple[str, bool]:
    """sha256 of a file's bytes, and whether it can be used.

    A text file has to be UTF-8 throughout: that is found out here, before any of it is in the dataset.
    """
    digest = hashlib.sha256()
    decoder = None if _is_jsonl(file) else codecs.getincrementaldecoder("utf-8")()
    lines = 1
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                progress(len(block))
                if decoder:
                    decoder.decode(block)
                    lines += block.count(b"\n")
            if decoder:
                decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].count(b"\n")
        report.problem(f"{file}:{line}", f"not UTF-8 ({error.reason})")
        return digest.hexdigest(), False
    except OSError as error:
        report.problem(str(file), f"cannot be read ({error.strerror})")
        return "unreadable", False
    return digest.hexdigest(), True


def _topics(report: Report) -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        report.problem("the language reference", "this Python has no pydoc_data.topics; going on without")
        return []
    return [topics[name] for name in sorted(topics)]


def library_sources(report: Report) -> Iterator[tuple[str, str]]:
    """(path such as "json/decoder.py", text) of each source file of the standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _SKIPPED_FOLDERS.fullmatch(name)]
        files += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    for name in sorted(files):
        if _SKIPPED_FILES.fullmatch(name):
            continue
        try:
            data = (root / name).read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            yield name, data.decode(encoding)
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            report.problem(name, str(error))


def _c_docstrings() -> Iterator[str]:
    """A document for each module of the standard library written in C: what its functions and classes do."""
    for _, entries in groupby(c_docstrings(), key=lambda entry: entry[0]):
        yield "\n\n".join(f"{path}{signature}\n\n{doc}" for _, path, signature, doc in entries) + "\n"


def c_docstrings() -> Iterator[tuple[str, str, str, str]]:
    """(module, path such as "math.cos", signature such as "(x, /)" or "", docstring) of what is written in C.

    Only docstrings and signatures that are part of the binary are taken, never a repr, which may hold an
    address. One that was seen before is left out: classes share many.
    """
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        module = _c_module(name)
        if module is not None:
            yield from ((name, *entry) for entry in _entries(name, module, seen))


def _c_module(name: str) -> types.ModuleType | None:
    try:
        spec = importlib.util.find_spec(name)
        loader = spec and spec.loader
        if loader is not BuiltinImporter and not isinstance(loader, ExtensionFileLoader):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated modules have docstrings too
            return importlib.import_module(name)
    except (ImportError, ValueError, OSError):  # a library it needs is not installed
        return None


def _entries(path: str, owner: types.ModuleType | type, seen: set[str]) -> Iterator[tuple[str, str, str]]:
    doc = vars(owner).get("__doc__")
    if isinstance(doc, str) and doc.strip() and doc not in seen:
        seen.add(doc)
        yield path, "", doc.strip()
    for name, member in sorted(vars(owner).items()):
        if isinstance(member, type) and isinstance(owner, types.ModuleType):
            yield from _entries(f"{path}.{name}", member, seen)
        elif isinstance(member, _DOCUMENTED):
            doc = getattr(member, "__doc__", None)
            if isinstance(doc, str) and doc.strip() and doc not in seen:
                seen.add(doc)
                signature = getattr(member, "__text_signature__", None) or ""
                yield f"{path}.{name}", _SELF.sub("", signature), doc.strip()
