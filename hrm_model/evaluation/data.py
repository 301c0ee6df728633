"""Where a benchmark's rows come from: files that are here, in the hub's layout or the authors', or the hub itself."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.chat_sources import EXTRA, SUFFIXES, rows_of
from .tasks import TASKS
from .tasks.task import Choices, Question, Task

KINDS = (*SUFFIXES, ".csv")
SHOWN_CHARS = 120


def places_of(given: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """Of the arguments of --data, where each of `tasks` is: FOLDER that has it under one of its names, or TASK=PATH.

    Raises:
        ValueError: a task or a path that does not exist, or a task that no argument has.
    """
    named: dict[str, Path] = {}
    folders: list[Path] = []
    for argument in given:
        task, equals, path = argument.partition("=")
        if equals and task in TASKS:
            named[task] = Path(path)
        elif equals and not Path(argument).exists():
            raise ValueError(f"--data {argument}: there is no task {task!r}; known are {', '.join(TASKS)}")
        else:
            folders.append(Path(argument))
    for path in (*named.values(), *folders):
        if not path.exists():
            raise ValueError(f"--data: {path} does not exist; give a folder, or TASK=FILE")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--data {folder} is a file, and of which task is not said; write TASK={folder}")
    for name in tasks:
        task = TASKS[name]
        if name in named or task.hub is None:
            continue
        candidates = [f"{name}{suffix}" for suffix in SUFFIXES] + list(task.files) + [name]
        found = next((folder / file for folder in folders for file in candidates if (folder / file).exists()), None)
        if found is None:
            where = " ".join(map(str, folders)) or "the files given"
            raise ValueError(
                f"{where} has no {name}.jsonl (nor {', '.join(candidates[1:])}); it is {task.source}, or on the hub "
                f"{task.hub}; name another file with --data {name}=FILE"
            )
        named[name] = found
    return named


def examples(task: Task, place: Path | None, limit: int | None = None) -> tuple[list[Choices | Question], int]:
    """(a task's first examples, how many rows had none and were left out).

    Args:
        place: a file or folder; None for the hub.

    Raises:
        ValueError: no such data, or a row that is malformed; names it and what helps.
    """
    found: list[Choices | Question] = []
    left_out = 0
    for where, row in _rows(task, place):
        if limit is not None and len(found) >= limit:
            break
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"it is a {type(row).__name__}, not an object")
            example = task.example(row)
        except (ValueError, KeyError, TypeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{task.name}: {where} is malformed: {why[:SHOWN_CHARS]}; a row is {task.layout}; mend it or drop it"
            ) from error
        if example is None:
            left_out += 1
        else:
            found.append(example)
    if not found:
        raise ValueError(f"{task.name}: {place or task.hub} has no example; a row is {task.layout}")
    return found, left_out


def _rows(task: Task, place: Path | None) -> Iterator[tuple[str, Any]]:
    if task.hub is None:
        yield from ((f"{task.name}, entry {number}", row) for number, row in enumerate(task.rows, 1))
    elif place is None:
        yield from _hub_rows(task)
    else:
        for file in _files(task, place):
            rows = _csv_rows(file) if file.suffix.lower() == ".csv" else rows_of(file, _Damaged(task))
            yield from _labelled(task, file, rows)


def _files(task: Task, place: Path) -> list[Path]:
    if place.is_file():
        if not place.name.lower().endswith(KINDS):
            raise ValueError(f"{task.name}: {place} is of no known kind; known are {' '.join(KINDS)}")
        return [place]
    found = sorted(path for path in place.iterdir() if path.name.lower().endswith(KINDS) and path.is_file())
    if not found:
        raise ValueError(f"{task.name}: the folder {place} has no file of a known kind: {' '.join(KINDS)}")
    return found


class _Damaged:
    """Takes the place of a report of what is left out: nothing is."""

    def __init__(self, task: Task):
        self._task = task

    def drop(self, reason: str, where: str, text: str) -> None:
        raise ValueError(f"{self._task.name}: {where} is {reason}: {text[:SHOWN_CHARS]}; fetch the file again")


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """MMLU as its authors have it: question, four choices and a letter; a file is a subject."""
    subject = file.stem.removesuffix("_test")
    number = 0
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines)
        while True:
            number, where = number + 1, f"{file}, row {number + 1}"
            try:
                cells = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{where} is unreadable: {error}; fetch the file again") from error
            if cells is None:
                return
            if len(cells) != 6:
                raise ValueError(
                    f"{where} is malformed: it has {len(cells)} cells; a row is question, A, B, C, D, answer"
                )
            yield where, {"question": cells[0], "choices": cells[1:5], "answer": cells[5], "subject": subject}


def _labelled(task: Task, file: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Rows with the labels of a file beside theirs, as PIQA's authors have them."""
    beside = file.with_name(f"{file.stem}-labels.lst")
    if not beside.is_file():
        yield from rows
        return
    try:
        labels = beside.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{task.name}: {beside} is no text in UTF-8 ({error}); fetch it again") from error
    number = 0
    for number, (where, row) in enumerate(rows, 1):
        if number > len(labels):
            raise ValueError(f"{task.name}: {beside} has {len(labels)} labels, {file} more rows; fetch both again")
        yield where, row | {"label": labels[number - 1]} if isinstance(row, dict) else row
    if number < len(labels):
        raise ValueError(f"{task.name}: {beside} has {len(labels)} labels, {file} {number} rows; fetch both again")


def _hub_rows(task: Task) -> Iterator[tuple[str, Any]]:
    hub = task.hub
    remedy = (
        f"give files that are here, --data {task.name}=FILE: {task.source}, or {hub} of the hub as .jsonl or .parquet"
    )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{task.name} comes from the Hugging Face hub, which needs {EXTRA}; or {remedy}") from error
    try:
        if hub.files:
            files = f"hf://datasets/{hub.repository}@{(hub.revision or 'main').replace('/', '%2F')}/{hub.files}"
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            rows = datasets.load_dataset(hub.repository, hub.config, split=hub.split)
    except Exception as error:  # theirs are of many kinds: network, permission, format
        reason = " ".join(str(error).split())[:SHOWN_CHARS]
        raise ValueError(f"{task.name}: cannot read {hub} from the hub ({reason}); {remedy}") from error
    yield from ((f"{hub.repository}, row {number}", row) for number, row in enumerate(rows, 1))
