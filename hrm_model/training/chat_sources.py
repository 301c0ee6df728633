"""Where conversations come from: the standard library, known sets of the Hugging Face hub, files.

stdlib                       questions and answers made of what every Python brings along; stdlib-turns are those of
                             several turns, stdlib-pairs the others
alpaca lima oasst1 ...       a known set, fetched from the hub; mixed is all of them
alpaca=PATH                  the same set from files that are here
PATH                         .jsonl, .jsonl.gz, .json (a list), .parquet, folders of these: any form of chat_forms.py
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import platform
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..atomic import file_sha256
from .chat_forms import Messages, messages_of, oasst_conversations
from .chat_report import ChatReport
from .chat_stdlib import stdlib_conversations

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
EXTRA = 'pip install "hrm-kernels[data]"'


class HubSet(NamedTuple):
    """A set of the hub: what is read of it. Its columns are of a form that chat_forms.py knows."""

    repository: str
    split: str = "train"
    file: str | None = None
    """Read instead of what the hub's library would choose, where that is a program."""
    trees: bool = False
    """Whether rows are single messages of OpenAssistant's trees."""


HUB = {
    "alpaca": HubSet("tatsu-lab/alpaca"),
    "alpaca-gpt4": HubSet("vicgalle/alpaca-gpt4"),
    "dolly": HubSet("databricks/databricks-dolly-15k"),
    "lima": HubSet("GAIR/lima", file="train.jsonl"),
    "oasst1": HubSet("OpenAssistant/oasst1", trees=True),
}
MIXED = "mixed"
STDLIB = "stdlib"
STDLIB_PARTS = {STDLIB: (1, 99), f"{STDLIB}-pairs": (1, 1), f"{STDLIB}-turns": (2, 99)}
"""Turns of a conversation, from and to, of the standard library's source and its two parts."""


class Item(NamedTuple):
    """A conversation of a source."""

    messages: Messages
    where: str
    """File and line, or name and number, for reports."""
    subject: str
    """Conversations of one subject validate together, or train together."""


class Source(Protocol):
    """name, description (for the manifest) and fingerprint (the same for the same conversations)."""

    name: str
    description: dict[str, Any]
    fingerprint: str

    def items(self, report: ChatReport) -> Iterator[Item]:
        """The conversations; the report is told of what is none."""


def open_sources(names: Sequence[str | Source]) -> list[Source]:
    """A source for each name or path (`mixed` becomes several), in order; what is one already stays.

    Raises ValueError for one that does not exist or cannot be reached.
    """
    sources: list[Source] = []
    for name in names:
        if not isinstance(name, str):
            sources.append(name)
            continue
        known, equals, path = name.partition("=")
        if name in STDLIB_PARTS:
            sources.append(StdlibChat(name))
        elif name == MIXED:
            sources += [HubChat(part) for part in HUB]
        elif name in HUB:
            sources.append(HubChat(name))
        elif equals and known == MIXED:
            sources += [FileChat(_part_of(Path(path), part), part) for part in HUB]
        elif equals and known in HUB:
            sources.append(FileChat(Path(path), known))
        else:
            sources.append(FileChat(Path(name)))
    return sources


class StdlibChat:
    """See chat_stdlib.py."""

    def __init__(self, name: str = STDLIB):
        self.name = name
        fewest, most = STDLIB_PARTS[name]
        python = f"{platform.python_implementation()} {platform.python_version()}"
        self._conversations = [c for c in stdlib_conversations() if fewest <= len(c[1]) // 2 <= most]
        self.fingerprint = hashlib.sha256(json.dumps(self._conversations).encode()).hexdigest()
        self.description = {"name": name, "python": python, "platform": sys.platform, "sha256": self.fingerprint}

    def items(self, report: ChatReport) -> Iterator[Item]:
        for number, (subject, messages) in enumerate(self._conversations, 1):
            yield Item(messages, f"{self.name}:{number}", f"{STDLIB} {subject}")


class FileChat:
    """Files, as one of the known sets or line by line in any form.

    Raises ValueError for a path that does not exist, a folder without such files, a file of another kind.
    """

    def __init__(self, path: Path, known: str | None = None):
        self.name = known or str(path)
        self._trees = known is not None and HUB[known].trees
        self._files = _files_under(path)
        digests = [file_sha256(file) for file in self._files]
        self.fingerprint = f"{known} {' '.join(digests)}"
        self.description = {"name": self.name, "path": str(path), "sha256": digests}

    def items(self, report: ChatReport) -> Iterator[Item]:
        rows = ((where, row) for file in self._files for where, row in rows_of(file, report))
        yield from _items(rows, self._trees, self.name, report)


class HubChat:
    """A known set from the Hugging Face hub, at the revision that is there now.

    Raises ValueError where the libraries are not installed or the hub cannot be reached.
    """

    def __init__(self, name: str):
        self.name = name
        self._set = HUB[name]
        self._revision = _reach(name, lambda hub, _: hub.HfApi().dataset_info(self._set.repository).sha)
        self.fingerprint = f"{name} {self._set.repository} {self._revision}"
        self.description = {"name": name, "repository": self._set.repository, "revision": self._revision}

    def items(self, report: ChatReport) -> Iterator[Item]:
        rows = _reach(self.name, lambda _, datasets: self._load(datasets))
        numbered = ((f"{self.name}:{number}", row) for number, row in enumerate(rows, 1))
        yield from _items(numbered, self._set.trees, self.name, report)

    def _load(self, datasets: Any) -> Any:
        repository, split, file, _ = self._set
        if file:
            files = f"hf://datasets/{repository}@{self._revision}/{file}"
            return datasets.load_dataset("json", data_files=files, split="train")
        return datasets.load_dataset(repository, split=split, revision=self._revision)


def _reach(name: str, call: Any) -> Any:
    """What call(huggingface_hub, datasets) returns."""
    locally = f"or give files that are here, as --source {name}=PATH"
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"source {name} comes from the Hugging Face hub, which needs {EXTRA}; {locally}") from error
    try:
        return call(huggingface_hub, datasets)
    except Exception as error:  # theirs are of many kinds: network, permission, format
        reason = " ".join(str(error).split())[:200]
        remedy = f"check the network and, where the set asks for consent, `hf auth login`; {locally}"
        raise ValueError(f"cannot read {HUB[name].repository} from the hub ({reason}); {remedy}") from error


def _items(rows: Iterator[tuple[str, Any]], trees: bool, name: str, report: ChatReport) -> Iterator[Item]:
    if trees:
        found = oasst_conversations(
            _tree_rows(rows, report), lambda problem: report.drop("no conversation", name, problem)
        )
        for number, messages in enumerate(found, 1):
            yield Item(messages, f"{name}, conversation {number}", f"{name} {number}")
        return
    for where, row in rows:
        try:
            yield Item(messages_of(row), where, where)
        except ValueError as error:
            report.drop("no conversation", where, str(error))


def _tree_rows(rows: Iterator[tuple[str, Any]], report: ChatReport) -> Iterator[dict[str, Any]]:
    for where, row in rows:
        if fault := _tree_fault(row):
            report.drop("no conversation", where, f"no message of a tree: {fault}")
        else:
            yield row


def _tree_fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__} is no object"
    if lacking := {"message_id", "parent_id", "text", "role", "lang"} - row.keys():
        return f"it lacks {sorted(lacking)}"
    kinds = {"message_id": str, "parent_id": str | None, "rank": float | int | None}
    wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
    return f"{wrong[0]} is a {type(row[wrong[0]]).__name__}" if wrong else None


def _part_of(folder: Path, name: str) -> Path:
    for candidate in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        if candidate.exists():
            return candidate
    raise ValueError(f"{MIXED}={folder} has no {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}, or a folder {name})")


def _files_under(path: Path) -> list[Path]:
    kinds = " ".join(SUFFIXES)
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{path} is of no kind that holds conversations; give one of {kinds}")
        return [path]
    if not path.is_dir():
        known = ", ".join([*STDLIB_PARTS, *HUB, MIXED])
        raise ValueError(f"source {path} does not exist; give a file, a folder or one of {known}")
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not files:
        raise ValueError(f"folder {path} has no file that holds conversations ({kinds})")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def rows_of(file: Path, report: ChatReport) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line, entry or row of a file."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(file)
    elif name.endswith(".json"):
        try:
            entries = json.loads(file.read_bytes().decode("utf-8-sig"))
            if not isinstance(entries, list):
                raise ValueError(f"it is a JSON {type(entries).__name__}, not a list; an object a line is .jsonl")
        except (ValueError, RecursionError) as error:
            report.drop("unreadable", str(file), str(error))
        else:
            yield from ((f"{file}, entry {number}", entry) for number, entry in enumerate(entries, 1))
    else:
        yield from _lines_of(file, report)


def _lines_of(file: Path, report: ChatReport) -> Iterator[tuple[str, Any]]:
    number = 0
    with open(file, "rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw
        try:
            if lines is not raw and not file.stat().st_size:
                raise EOFError("it is empty")
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    report.drop("unreadable", f"{file}:{number}", str(error))
                else:
                    yield f"{file}:{number}", value
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            report.drop("unreadable", f"{file}:{number + 1}", f"and what follows: {error}")


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"reading {file} needs {EXTRA}; or convert it to .jsonl") from error
    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except ArrowException as error:
        raise ValueError(f"{file} is no Parquet file that can be read ({error}); download it again") from error
