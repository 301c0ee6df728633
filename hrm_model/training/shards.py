"""Prepared datasets on disk: token ids in flat files, described by a manifest.

    DIRECTORY/train-00000.bin ...   token ids, little-endian uint16, nothing else
              val-00000.bin ...
              manifest.json         written last: format version, tokenizer, largest id, source, options,
                                    fingerprint of the inputs and, for each split, tokens, documents and the
                                    files with their tokens and sha256

A split is the concatenation of its files. Documents are each followed by the end-of-text id.

Conversations ("format": "chat" in the manifest) have two kinds of files more and still read as text:

    DIRECTORY/train-00000.mask      a byte for each id of train-00000.bin: 1 where a loss looks at it, else 0
              train-lengths.bin     ids of each conversation, little-endian uint32
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import weakref
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import beside, file_sha256, put_in_place, remove_leftovers, sync_directory
from .conversations import Conversations

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
TOKEN = np.dtype("<u2")
LENGTH = np.dtype("<u4")
_SHARD_FILE = re.compile(r"(train|val)-\d{5,}\.bin")
_OUR_FILE = re.compile(r"manifest\.json|(train|val)-(\d{5,}\.(bin|mask)|lengths\.bin)")


class ShardError(ValueError):
    """A dataset on disk is missing, damaged or in the way: which file, what is wrong, what to do about it."""


class Split:
    """The files of one split as a single read-only array of token ids. len() is its number of tokens.

    With another dtype it is the array of something else that each token has, such as its mask. Files are read, not
    mapped: where a mapped one is cut short, or its disk fails, the process dies of SIGBUS.
    """

    def __init__(self, name: str, directory: Path, shards: list[dict[str, Any]], dtype: np.dtype = TOKEN):
        self.name = name
        self._dtype = dtype
        self._files = [directory / shard["file"] for shard in shards]
        self._starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        binary = getattr(os, "O_BINARY", 0)
        self._handles = [os.open(file, os.O_RDONLY | binary) for file in self._files]
        weakref.finalize(self, _close, self._handles)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start..start+n-1, uint16 [n] or of the dtype given.

        Raises:
            ValueError: beyond the ends. ShardError: a file has become shorter. OSError: it cannot be read.
        """
        if n < 0 or start < 0 or start + n > len(self):
            raise ValueError(f"{n} tokens from {start} on are outside {self.name!r} of {len(self)} tokens")
        out = np.empty(n, dtype=self._dtype.newbyteorder("="))
        done = 0
        while done < n:
            which = self._shard_of(start + done)
            part = self._read_shard(which, start + done - self._starts[which], n - done)
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _read_shard(self, which: int, first: int, n: int) -> np.ndarray:
        """Up to n tokens of a file."""
        n, size = min(n, self._starts[which + 1] - self._starts[which] - first), self._dtype.itemsize
        data = bytearray()
        while len(data) < n * size:  # a call gives 2 GiB at most
            more = _read_at(self._handles[which], n * size - len(data), first * size + len(data))
            if not more:
                raise ShardError(
                    f"shard {self._files[which]} was cut short while it was in use: {n:,} tokens from {first:,} on are "
                    "not all there; prepare the dataset again"
                )
            data += more
        return np.frombuffer(data, dtype=self._dtype)

    def file_of(self, position: int) -> Path:
        """The file that holds the token at this position."""
        return self._files[self._shard_of(position)]

    def _shard_of(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1


def _read_at(handle: int, n: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, n, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, n)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


class Dataset:
    """A prepared dataset, open for reading. Attributes: path, manifest (a dict as in manifest.json), format ("text" or
    "chat")."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.format = manifest.get("format", "text")
        self._splits = {name: Split(name, path, part["shards"]) for name, part in manifest["splits"].items()}

    def split(self, name: str) -> Split:
        """The split "train" or "val", which may be empty. Raises ValueError for another name."""
        if name not in self._splits:
            raise ValueError(f"{self.path} has no split {name!r}; it has {', '.join(self._splits)}")
        return self._splits[name]

    def conversations(self, name: str) -> Conversations:
        """The split "train" or "val" row by row. Raises ShardError where the dataset is text, or damaged."""
        split = self.split(name)
        if self.format != "chat":
            raise ShardError(
                f"{self.path} is a dataset of {self.format}, without a mask of answers; "
                "make one of conversations with python train/prepare.py --format chat"
            )
        masks = [shard | {"file": _mask_name(shard["file"])} for shard in self.manifest["splits"][name]["shards"]]
        lengths = np.fromfile(self.path / f"{name}-lengths.bin", dtype=LENGTH).astype(np.int64)
        if lengths.sum() != len(split) or (len(lengths) and lengths.min() < 2):
            raise ShardError(
                f"the conversations of {self.path / f'{name}-lengths.bin'} have {lengths.sum():,} ids, the split "
                f"{len(split):,}; run python train/prepare.py {_arguments(self.path, self.manifest)} --overwrite"
            )
        return Conversations(self.path, split, Split(name, self.path, masks, np.dtype("u1")), lengths)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ShardError when the dataset has an id that a model of this vocab_size does not."""
        largest = self.manifest["max_token_id"]
        if largest >= vocab_size:
            raise ShardError(
                f"{self.path} has token ids up to {largest}, vocab_size {vocab_size} allows up to "
                f"{vocab_size - 1}; use a model with vocab_size of at least {largest + 1}, or another dataset"
            )


def open_dataset(path: str | Path, verify: bool = False) -> Dataset:
    """Open what train/prepare.py wrote, after comparing the size of every file with the manifest.

    verify: compare the sha256 of every file as well (reads all of it).

    Raises:
        ShardError: nothing there, an unreadable manifest, or a file that is missing, empty, truncated, too
            long or (with verify) altered.
    """
    path = Path(path)
    remedy = f"run python train/prepare.py {_arguments(path)}"
    if not path.is_dir():
        raise ShardError(f"no dataset at {path}: not a directory; {remedy}")
    if not (path / MANIFEST).is_file():
        raise ShardError(f"no dataset at {path}: it has no {MANIFEST}; {remedy}, or give another path")
    manifest = _read_manifest(path / MANIFEST, f"{remedy} --overwrite")
    remedy = f"run python train/prepare.py {_arguments(path, manifest)} --overwrite"
    for name, part in manifest["splits"].items():
        for shard in part["shards"]:
            file, tokens = path / shard["file"], shard["tokens"]
            _check_file(file, f"shard {file}", tokens, "tokens", TOKEN.itemsize, shard["sha256"], verify, remedy)
            if manifest.get("format") == "chat":
                file = path / _mask_name(shard["file"])
                _check_file(file, f"mask {file}", tokens, "tokens", 1, shard["mask_sha256"], verify, remedy)
        if manifest.get("format") == "chat":
            file, n, sha256 = path / f"{name}-lengths.bin", part["documents"], part["lengths_sha256"]
            _check_file(file, f"file {file}", n, "conversations", LENGTH.itemsize, sha256, verify, remedy)
    return Dataset(path, manifest)


def _mask_name(shard: str) -> str:
    return shard.removesuffix(".bin") + ".mask"


def _arguments(path: Path, manifest: dict[str, Any] | None = None) -> str:
    source = {} if manifest is None else manifest["source"]
    if "mixture" in source:
        return f"--mixture {source['mixture']} --only {source['name']} --out {shlex.quote(str(path.parent))}"
    sources = "..." if manifest is None else shlex.join(source.get("paths", ["stdlib"]))
    chat = "--format chat " if manifest and manifest.get("format") == "chat" else ""
    return f"{chat}--source {sources} --out {shlex.quote(str(path))}"


def _read_manifest(file: Path, remedy: str) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format_version"]
    except OSError as error:
        raise ShardError(f"cannot read {file}: {error.strerror}; check its permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{file} is no manifest of a dataset ({error!r}); {remedy}") from error
    if version != FORMAT_VERSION:
        raise ShardError(f"{file} is of version {version!r}, this code reads {FORMAT_VERSION}; {remedy}")
    try:
        for name in SPLITS:
            part = manifest["splits"][name]
            # Names of our own making only: a manifest must not make us read files elsewhere.
            if not all(_SHARD_FILE.fullmatch(s["file"]) and s["sha256"] for s in part["shards"]):
                raise ValueError(f"a shard of {name} has a name that is none, or no sha256")
            if manifest.get("format") == "chat":
                _ = part["documents"] + 0, part["lengths_sha256"], [s["mask_sha256"] for s in part["shards"]]
            if sum(s["tokens"] for s in part["shards"]) != part["tokens"]:
                raise ValueError(f"the shards of {name} do not add up to {part['tokens']} tokens")
        _ = manifest["max_token_id"] + 0, manifest["tokenizer"]["vocab_size"] + 0
        _ = manifest["fingerprint"], manifest["source"].get("paths")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{file} is damaged ({error!r}); {remedy}") from error
    return manifest


def _check_file(
    file: Path, what: str, n: int, unit: str, itemsize: int, sha256: str, verify: bool, remedy: str
) -> None:
    """Raises ShardError unless the file holds n items and, with verify, the bytes of that sha256."""
    expected = n * itemsize
    try:
        found = file.stat().st_size
    except OSError as error:
        reason = f"{what} is missing: expected {expected:,} bytes, found {error.strerror}"
        raise ShardError(f"{reason}; {remedy}") from None
    if found != expected:
        kind = "empty" if not found else "odd-sized" if found % itemsize else "truncated"
        raise ShardError(
            f"{what} is {'too long' if found > expected else kind}: expected {expected:,} bytes "
            f"({n:,} {unit}), found {found:,}; {remedy}"
        )
    if verify and (digest := file_sha256(file)) != sha256:
        raise ShardError(f"{what} was altered: expected sha256 {sha256}, found {digest}; {remedy}")


def is_up_to_date(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The counts of the dataset at `out`, if there is one, of inputs and options with this fingerprint; says so.

    Raises ShardError when there is one of others, or a damaged one.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = open_dataset(out).manifest
    if manifest["fingerprint"] != fingerprint:
        raise ShardError(
            f"{out} was made from other inputs or with other options than these; "
            "pass --overwrite to replace it, or choose another --out"
        )
    print(f"{out} is up to date: the same inputs and options", flush=True)
    return manifest["counts"]


def check_output(out: str | Path, overwrite: bool) -> None:
    """Raises ShardError when a dataset cannot be written to `out` because of what is there.

    Overwriting deletes, so even then a directory is only replaced if every file in it has a name of ours.
    """
    out = Path(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise ShardError(f"{out} is a file and a dataset is a directory; choose another --out")
    foreign = sorted(entry.name for entry in out.iterdir() if not _OUR_FILE.fullmatch(entry.name))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ShardError(
            f"{out} is in the way: it holds {', '.join(foreign[:3])}{more}, which is no part of a dataset; "
            "choose another --out or remove it by hand"
        )
    if any(out.iterdir()) and not overwrite:
        raise ShardError(f"{out} already has files of a dataset; pass --overwrite or choose another --out")


class DatasetWriter:
    """Writes a dataset beside its final place and renames it there, whole, in commit().

        with DatasetWriter(out) as writer:
            writer.append("train", ids, documents=1)
            writer.commit({"source": ..., ...})

    Left without commit(), by a kill as well, it leaves what stood at `out` as it was; what a killed one left
    behind is removed by the next. `scratch` is a directory for files that commit() does not keep. With chat=True
    it takes append_conversations() instead of append().

    Raises ShardError when `out` cannot be replaced (see check_output), OSError when writing fails.
    """

    def __init__(self, out: str | Path, shard_tokens: int = SHARD_TOKENS, overwrite: bool = False, chat: bool = False):
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens {shard_tokens} is below 1; the default is {SHARD_TOKENS:,}")
        self.out = Path(os.path.realpath(out))  # through a link, so that the rename stays on one file system
        self._overwrite = overwrite
        self._shard_tokens = shard_tokens
        self._temporary = beside(self.out, "tmp")
        self.scratch = self._temporary / "scratch"
        self._splits = {name: {"tokens": 0, "documents": 0, "shards": []} for name in SPLITS}
        self._largest = 0
        self._chat = chat
        self._lengths: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
        # Of each split the shard that is being written and, in a dataset of conversations, its mask.
        self._open: dict[str, list[tuple[Any, Any]]] = {}

    def __enter__(self) -> DatasetWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.out.parent, self.out.name)
        check_output(self.out, self._overwrite)
        self.scratch.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self) -> None:
        for file, _ in self._opened():
            with suppress(OSError):  # a full disk has been reported already
                file.close()
        self._open.clear()

    def _opened(self) -> list[tuple[Any, Any]]:
        """(file, digest) of everything that is being written."""
        return list(chain.from_iterable(self._open.values()))

    def append(self, split: str, ids: np.ndarray, documents: int = 0) -> None:
        """Add ids, an integer array [n], to a split; `documents` of them end here.

        Raises ValueError for an id outside 0..65535.
        """
        assert not self._chat, "a dataset of conversations takes append_conversations()"
        self._append(split, documents, ids)

    def append_conversations(self, split: str, ids: np.ndarray, is_answer: np.ndarray, lengths: np.ndarray) -> None:
        """Add whole conversations to a split: their ids [n], which of them a loss looks at (bool [n]), and how many
        ids each has, integers [conversations] of at least 2, whose sum is n. Nothing predicts the first id of one, so a
        loss cannot look at it. Raises as append()."""
        lengths = np.asarray(lengths)
        assert self._chat and len(ids) == len(is_answer) == lengths.sum() and (not len(ids) or lengths.min() > 1)
        assert not np.asarray(is_answer)[np.cumsum(lengths) - lengths].any()
        self._lengths[split].append(lengths.astype(LENGTH))
        self._append(split, len(lengths), ids, np.asarray(is_answer, dtype=np.uint8))

    def _append(self, split: str, documents: int, ids: np.ndarray, *masks: np.ndarray) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() > 65535):
            raise ValueError(f"ids {ids.min()}..{ids.max()} do not fit into uint16, 0..65535")
        part = self._splits[split]
        part["documents"] += documents
        while len(ids):
            if split not in self._open:
                name = f"{split}-{len(part['shards']):05d}.bin"
                part["shards"].append({"file": name, "tokens": 0})
                files = [name, _mask_name(name)][: 1 + len(masks)]
                self._open[split] = [(open(self._temporary / file, "wb"), hashlib.sha256()) for file in files]  # noqa: SIM115
            shard = part["shards"][-1]
            n = min(self._shard_tokens - shard["tokens"], len(ids))
            block = np.ascontiguousarray(ids[:n], dtype=TOKEN)
            for (file, digest), data in zip(self._open[split], [block, *(mask[:n] for mask in masks)], strict=True):
                file.write(data)
                digest.update(data)
            shard["tokens"] += n
            part["tokens"] += n
            self._largest = max(self._largest, int(block.max()))
            ids, masks = ids[n:], tuple(mask[n:] for mask in masks)
            if shard["tokens"] == self._shard_tokens:
                self._end_shard(split)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens appended to each split so far."""
        return {name: part["tokens"] for name, part in self._splits.items()}

    def _end_shard(self, split: str) -> None:
        for (file, digest), key in zip(self._open.pop(split), ("sha256", "mask_sha256"), strict=False):
            with file:
                file.flush()
                os.fsync(file.fileno())
            self._splits[split]["shards"][-1][key] = digest.hexdigest()

    def _write_lengths(self, split: str) -> None:
        data = np.concatenate([np.array([], dtype=LENGTH), *self._lengths[split]]).tobytes()
        with open(self._temporary / f"{split}-lengths.bin", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._splits[split]["lengths_sha256"] = hashlib.sha256(data).hexdigest()

    def commit(self, about: dict[str, Any]) -> Dataset:
        """Write the manifest, `about` and what was counted, and put the dataset in its place; opens it."""
        for split in list(self._open):
            self._end_shard(split)
        for split in SPLITS if self._chat else ():
            self._write_lengths(split)
        shutil.rmtree(self.scratch)
        manifest = {
            "format_version": FORMAT_VERSION,
            **({"format": "chat"} if self._chat else {}),
            **about,
            "max_token_id": self._largest,
            "splits": self._splits,
        }
        with open(self._temporary / MANIFEST, "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._temporary)
        check_output(self.out, self._overwrite)  # again: it may have appeared in the meantime
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
        put_in_place(self._temporary, self.out)
        return open_dataset(self.out)
