"""A dataset that grows over several processes' lives: it can be killed at any moment and goes on where it last saved.

.NAME.partial/dataset/train-00000.bin ...   shards, possibly longer than what counts
             /state.json                    what counts: tokens and sha256 of each shard, the caller's own state, and
                                            the sha256 of all of that
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

from ..atomic import CheckpointError, read_json, remove_leftovers, sync_directory, write_file
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
        sync_directory(self._temporary)  # a shard may be new in it
        begun = {name: digest.hexdigest() for name, [(_, digest)] in self._open.items()}
        content = {"writer": {"splits": self._splits, "begun": begun, "largest": self._largest}, "state": state}
        content = json.loads(json.dumps(content))  # as it will be read
        content = {"sha256": _digest(content)} | content
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


def read_state(out: str | Path, verify: bool = False) -> dict[str, Any] | None:
    """What save() wrote last for an unfinished dataset, {"writer", "state"}; None without.

    verify: compare the sha256 of what counts of every shard as well (reads all of it).

    Raises ShardError when it is damaged, or a shard is shorter than what counts of it or (with verify) altered.
    """
    path = work_of(out) / STATE
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise damaged(out, str(error)) from error
    if content.pop("sha256", None) != _digest(content):
        raise damaged(out, f"{path} was altered")
    writer = content["writer"]
    for name, part in writer["splits"].items():
        for shard in part["shards"]:
            file, expected = path.parent / "dataset" / shard["file"], shard["tokens"] * TOKEN.itemsize
            found = file.stat().st_size if file.exists() else 0
            if found < expected or ("sha256" in shard and found != expected):
                raise damaged(out, f"{file} has {found:,} bytes of {expected:,}")
            if verify and _sha256_of(file, expected) != (shard.get("sha256") or writer["begun"][name]):
                raise damaged(out, f"{file} was altered")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256_of(path: Path, n_bytes: int) -> str:
    """Of the first bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while n_bytes and (block := file.read(min(_BLOCK, n_bytes))):
            digest.update(block)
            n_bytes -= len(block)
    return digest.hexdigest()


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
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError("the one who had it has finished and removed it")
    except OSError as error:
        file.close()
        raise ShardError(f"another process is preparing {out}; wait for it, or choose another --out") from error
    return file
