"""A dataset that grows over several processes' lives: it can be killed at any moment and goes on where it last saved.

.NAME.partial/dataset/train-00000.bin ...   shards, possibly longer than what counts
             /state.json                    what counts: bytes of each shard, and the caller's own state
             /lock                          held by the process that writes
NAME/                                       appears when it is complete
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..atomic import CheckpointError, read_json, remove_leftovers, write_file
from .shards import TOKEN, Dataset, DatasetWriter, ShardError, check_output

STATE = "state.json"
_BLOCK = 1 << 20


class PartialDataset(DatasetWriter):
    """Writes a dataset as DatasetWriter does, but keeps what was saved when it is left without commit().

        with PartialDataset(out) as writer:
            state = writer.state or {...}           # what save() was last given
            writer.append("train", ids, documents=1)
            writer.save(state)
            writer.commit({"source": ..., ...})

    What was appended after the last save() is cut off when the directory is next opened.

    Raises ShardError when `out` cannot be replaced, another process is writing it, or the work is damaged.
    """

    def __init__(self, out: str | Path, shard_tokens: int, overwrite: bool = False):
        super().__init__(out, shard_tokens, overwrite)
        self.work = work_of(self.out)
        self._temporary = self.work / "dataset"
        self.scratch = self._temporary / "scratch"
        self.state: dict[str, Any] | None = None
        self._lock: Any = None

    def __enter__(self) -> PartialDataset:
        check_output(self.out, self._overwrite)
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.work / "lock", self.out)
        try:
            remove_leftovers(self.out.parent, self.out.name)
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._restore()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        if self._lock is not None:
            self._lock.close()

    def save(self, state: dict[str, Any]) -> None:
        """Make all that was appended count, and with it `state`, a JSON object. Raises OSError."""
        for file, _ in self._opened():
            file.flush()
            os.fsync(file.fileno())
        content = {"writer": {"splits": self._splits, "largest": self._largest}, "state": state}
        write_file(self.work / STATE, (json.dumps(content) + "\n").encode(), overwrite=True)

    def commit(self, about: dict[str, Any]) -> Dataset:
        """Write the manifest, `about` and what was counted, and put the dataset in its place; opens it."""
        dataset = super().commit(about)
        shutil.rmtree(self.work, ignore_errors=True)
        return dataset

    def _restore(self) -> None:
        remove_leftovers(self.work, STATE)
        if (content := read_state(self.out)) is not None:
            self.state = content["state"]
            self._splits = content["writer"]["splits"]
            self._largest = content["writer"]["largest"]
        known = set()
        for name, part in self._splits.items():
            for shard in part["shards"]:
                known.add(shard["file"])
                self._reopen(name, shard)
        for entry in self._temporary.iterdir():
            if entry.is_file() and entry.name not in known:
                entry.unlink()

    def _reopen(self, split: str, shard: dict[str, Any]) -> None:
        if "sha256" in shard:  # it is full
            return
        file, digest = open(self._temporary / shard["file"], "r+b"), hashlib.sha256()  # noqa: SIM115
        self._open[split] = [(file, digest)]
        file.truncate(shard["tokens"] * TOKEN.itemsize)
        while block := file.read(_BLOCK):
            digest.update(block)


def work_of(out: str | Path) -> Path:
    """Where an unfinished dataset is kept."""
    out = Path(os.path.realpath(out))
    return out.with_name(f".{out.name}.partial")


def read_state(out: str | Path) -> dict[str, Any] | None:
    """What save() wrote last for an unfinished dataset, {"writer", "state"}; None without.

    Raises ShardError when it is damaged, or a shard is shorter than what counts of it.
    """
    path = work_of(out) / STATE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        _ = content["state"], content["writer"]["largest"]
        for part in content["writer"]["splits"].values():
            for shard in part["shards"]:
                file, expected = path.parent / "dataset" / shard["file"], shard["tokens"] * TOKEN.itemsize
                found = file.stat().st_size if file.exists() else 0
                if found < expected or ("sha256" in shard and found != expected):
                    raise damaged(out, f"{file} has {found:,} bytes of {expected:,}")
    except (CheckpointError, KeyError, TypeError) as error:
        raise damaged(out, f"{path}: {error}") from error
    return content


def discard(out: str | Path) -> None:
    """Remove an unfinished dataset. Raises ShardError while another process is writing it."""
    work = work_of(out)
    if work.exists():
        with _locked(work / "lock", Path(out)):
            shutil.rmtree(work, ignore_errors=True)


def damaged(out: str | Path, why: str) -> ShardError:
    """What is raised when unfinished work cannot be gone on with."""
    return ShardError(f"the unfinished work for {out} is damaged ({why}); pass --overwrite to start it anew")


def _locked(path: Path, out: Path) -> Any:
    file = open(path, "w")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # Windows: two processes at once are the user's own care
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ShardError(f"another process is preparing {out}; wait for it, or choose another --out") from error
    return file
