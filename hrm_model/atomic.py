"""Directories that are on disk whole or not at all, and proof that they still are.

    write files into .tmp-NAME...  ->  fsync each  ->  manifest.json (size and sha256 of each) last  ->
    rename to NAME

A process killed anywhere in between leaves NAME as it was. The order (file, its directory, rename, parent
directory) is what survives a power cut on the common file systems: Pillai et al., "All File Systems Are
Not Created Equal", OSDI 2014, section 4.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
_OUR_FILES = re.compile(r"(manifest|config|state)\.json|(model|optimizer|ema)(-\d{5}-of-\d{5})?\.safetensors")
_STALE_AFTER_S = 3600
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_TEMPORARY = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.(?P<space>[A-Za-z0-9-]*)")
_in_use: set[Path] = set()


def _process_space() -> str:
    """Where a process id means the same process: this host and, for containers, this pid namespace."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40] + f"-{namespace:x}"


_SPACE = _process_space()


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or trusted: which file, what is wrong and what to do about it."""


@contextmanager
def atomic_directory(target: str | Path, overwrite: bool = False, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty directory beside `target`; on leaving, seal it with a manifest and rename it.

    Args:
        target: final path of the directory. Missing parents are made.
        overwrite: replace a directory that is there. It may hold only files that one of these saves wrote.
        needed_bytes: what the content will need, for the message when the disk is full.

    Raises:
        CheckpointError: `target` exists and may not be replaced, the disk is full, or the path cannot be
            written. Nothing is left behind, and what stood at `target` still stands.
    """
    target = Path(os.path.realpath(target))
    temporary = beside(target, "tmp")
    _in_use.add(temporary)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        check_target(target, overwrite)
        temporary.mkdir()
        yield temporary
        _seal(temporary)
        put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before the message counts free bytes
        raise write_error(error, target, needed_bytes) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _in_use.discard(temporary)


@contextmanager
def atomic_file(target: str | Path, overwrite: bool = False, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a path beside `target` to write one file at; on leaving, flush it to disk and rename it.

    Raises:
        CheckpointError: `target` is a directory, or is there and overwrite is false, the disk is full, or the path
            cannot be written. Nothing is left behind.
    """
    target = Path(os.path.realpath(target))
    temporary = beside(target, "tmp")
    _in_use.add(temporary)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        if target.is_dir():
            raise CheckpointError(f"{target} is a directory and a .pt a file; choose another name")
        if target.exists() and not overwrite:
            raise CheckpointError(f"{target} already exists; choose another name or --overwrite (overwrite=True)")
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, target, needed_bytes) from error
    finally:
        temporary.unlink(missing_ok=True)
        _in_use.discard(temporary)


def remove_directory(path: Path) -> None:
    """Delete a directory so that a kill half-way leaves nothing that bears its name."""
    doomed = beside(path, "tmp")
    try:
        path.rename(doomed)
    except OSError as error:
        raise CheckpointError(f"cannot remove {path}: {error.strerror}; remove it by hand") from error
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: str | Path, name: str | None = None) -> None:
    """Clear what dead processes left in `parent`: unfinished saves go, a directory half replaced returns.

    Only leftovers of `name`, if it is given. A process on this host counts as dead when its id is gone, one
    elsewhere (another container, Windows) when its files are unchanged for an hour. Never raises: a leftover
    that cannot be cleared stays.
    """
    parent = Path(parent)
    for entry in _entries(parent):
        match = _TEMPORARY.fullmatch(entry.name)
        if not match or (name is not None and match["name"] != name) or not _is_abandoned(entry, match):
            continue
        original = parent / match["name"]
        if match["kind"] == "old" and not original.exists():
            try:
                entry.rename(original)
            except OSError:
                continue
        elif entry.is_file():
            with suppress(OSError):
                entry.unlink()
        else:
            shutil.rmtree(entry, ignore_errors=True)


def interrupted_replacement(target: str | Path) -> Path | None:
    """Where a missing `target` is if replacing it was killed between the two renames; else None."""
    target = Path(os.path.realpath(target))
    for entry in _entries(target.parent):
        match = _TEMPORARY.fullmatch(entry.name)
        if match and match["kind"] == "old" and match["name"] == target.name:
            return entry
    return None


def verify(directory: str | Path, required: Iterable[str] = (), only: Iterable[str] | None = None) -> None:
    """Hold a directory's files against its manifest: there, of the recorded size, of the recorded sha256.

    Args:
        directory: what atomic_directory() wrote.
        required: file names that the manifest has to list.
        only: check these files alone (the manifest has to list them too).

    Raises:
        CheckpointError: the first thing that is wrong, with the file, what was expected and what was found.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    only = None if only is None else list(only)
    for name in [*required, *(only or ())]:
        if name not in manifest:
            raise CheckpointError(f"{directory / MANIFEST} lists no {name}; the checkpoint is not whole, use another")
    for name, expected in manifest.items():
        if only is not None and name not in only:
            continue
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(
                    f"{path} is {size:,} bytes, its manifest says {expected['size']:,}; "
                    "the file is truncated or was changed: use another checkpoint"
                )
            digest = file_sha256(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, but the manifest lists it; use another checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; the disk may be failing") from error
        if digest != expected["sha256"]:
            raise CheckpointError(
                f"{path} has sha256 {digest[:16]}..., its manifest says {str(expected['sha256'])[:16]}...; "
                "its bytes were changed since it was written: use another checkpoint"
            )
        if name.endswith(".json"):
            read_json(path)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """manifest.json of `directory`: file name -> {"size": bytes, "sha256": hex}.

    Raises:
        CheckpointError: there is none (the save never ended), or it is no such mapping.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint is a directory with a {MANIFEST}")
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{directory} has no {MANIFEST}: its save was interrupted; use another checkpoint")
    manifest = read_json(path)
    for name, entry in manifest.items():
        # A plain name only: a manifest must not make us read files elsewhere.
        plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        sound = isinstance(entry, dict) and isinstance(entry.get("size"), int) and "sha256" in entry
        if not plain or not sound:
            raise CheckpointError(f"{path} has a bad entry for {name!r}; the checkpoint is damaged, use another")
    return manifest


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; the file is not ours")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, indented, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_file(path: Path, data: bytes, overwrite: bool) -> None:
    """Put `data` at `path`, whole or not at all; however it ends, no other file stays behind.

    Raises:
        FileExistsError: without `overwrite`, something is there, looked for once the data are on disk.
        OSError: it cannot be written.
    """
    temporary = beside(path, "tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def beside(target: Path, kind: str) -> Path:
    """A new name next to `target` that says whose it is: kind "tmp" is being written, "old" is being replaced."""
    return target.with_name(f".{kind}-{target.name}.{os.getpid()}.{secrets.token_hex(4)}.{_SPACE}")


def check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError where atomic_directory() would refuse `target` for what is there."""
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} already exists; choose another name or --overwrite (overwrite=True)")
    # Replacing means deleting: never delete a directory that holds anything but a save of ours.
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file and a save is a directory; choose another name")
    if foreign := _foreign_files(target):
        raise CheckpointError(
            f"{target} would be replaced, but holds {', '.join(foreign[:8])}, which no save wrote; "
            "choose another name or remove it by hand"
        )


def _foreign_files(directory: Path) -> list[str]:
    names = {entry.name for entry in directory.iterdir() if not _OUR_FILES.fullmatch(entry.name)}
    try:
        return sorted(names - read_manifest(directory).keys())
    except CheckpointError:  # a damaged save may be replaced too
        return sorted(names)


def _seal(directory: Path) -> None:
    manifest = {}
    names = sorted(entry.name for entry in directory.iterdir())
    for name in names:
        path = directory / name
        manifest[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(directory / MANIFEST, manifest)
    for name in [*names, MANIFEST]:
        # safetensors creates its files readable by their owner alone; the manifest has the user's usual mode.
        shutil.copymode(directory / MANIFEST, directory / name)
        with open(directory / name, "r+b") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete directory to its final name; one that is there is moved aside first and then deleted."""
    if not target.exists():
        temporary.rename(target)
        sync_directory(target.parent)
        return
    # Two renames, as no portable call swaps two directories. Killed between them, the former content is
    # found under its .old- name: remove_leftovers() puts it back, interrupted_replacement() names it.
    former = beside(target, "old")
    _in_use.add(former)
    try:
        target.rename(former)
        temporary.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        if former.exists() and not target.exists():
            former.rename(target)
        _in_use.discard(former)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power cut."""
    if os.name != "posix":  # Windows cannot open a directory for this
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_abandoned(entry: Path, match: re.Match) -> bool:
    pid = int(match["pid"])
    if entry in _in_use:
        return False
    # On Windows os.kill(pid, 0) is a signal, not a question.
    if match["space"] == _SPACE and os.name == "posix":
        if pid == os.getpid():
            return True  # the id of an earlier life: containers restart with the same ids
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
    try:
        newest = max(item.stat().st_mtime for item in (entry, *entry.iterdir()))
    except OSError:
        return False
    return time.time() - newest > _STALE_AFTER_S


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Where writing `path` fails within this context, the error names it and the remedy; the system's does not."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path, None) from error


def is_disk_full(error: OSError) -> bool:
    """Whether writing failed for want of space: a full disk, a quota, a limit on file size."""
    return error.errno in _DISK_FULL


def write_error(error: Exception, target: Path, needed_bytes: int | None) -> CheckpointError:
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
        if os.name == "nt" and number == 112:  # safetensors passes on Windows' own number for a full disk
            number = errno.ENOSPC
    if number not in _DISK_FULL:
        return CheckpointError(f"cannot write {target}: {error}; check the path and its permissions")
    needed = "" if needed_bytes is None else f"it needs {needed_bytes:,} bytes, "
    existing = next(parent for parent in target.parents if parent.exists())
    free = f"{shutil.disk_usage(existing).free:,} bytes are free there"
    remedy = (
        "raise the file size limit (ulimit -f), or the file system's own"
        if number == errno.EFBIG
        else "free some space or save elsewhere"
    )
    return CheckpointError(
        f"cannot write {target}: {os.strerror(number).lower()}; {needed}{free}; {remedy}. "
        "Earlier checkpoints are untouched"
    )
