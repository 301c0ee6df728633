"""A run's directory: whether it may be written to, what to resume in it, what of it may be deleted."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from pathlib import Path

from ..checkpoint import latest_checkpoint
from .provenance import RUN_FILE

try:
    import fcntl
except ImportError:
    fcntl = None

LOCK_FILE = "run.lock"
# What runs write. Anything else in a directory is somebody's, and never deleted.
_OURS = ("run.*", "metrics.jsonl*", "dashboard.png*", "eval.csv*", "checkpoints", "tensorboard", "wandb")


def find_checkpoint(out: Path, resume: str, overwrite: bool) -> Path | None:
    """The checkpoint that a run in `out` goes on from, None for a new run. Changes nothing but dead saves' leftovers.

    Raises:
        ValueError: `out` is taken, is no run, or its checkpoints are all broken; the message names the way out.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a directory")
    # a run killed in its first moments may have got no further than these
    early = (RUN_FILE + ".tmp", LOCK_FILE)
    entries = [e for e in out.iterdir() if e.name not in early] if out.is_dir() else []
    if not entries:
        return None
    foreign = sorted(e.name for e in entries if not any(e.match(pattern) for pattern in _OURS))
    if foreign:
        names = ", ".join(foreign[:5])
        raise ValueError(f"--out {out} holds files that are no training run's ({names}); choose another directory")
    if overwrite:
        return None
    if resume == "never":
        raise ValueError(
            f"--out {out} holds a run already; continue it with --resume auto, "
            f"start anew with --overwrite, or choose another --out"
        )
    found = latest_checkpoint(out)
    if found is None and any((out / "checkpoints").glob("step-*")):
        raise ValueError(f"no checkpoint in {out} is intact; start anew with --overwrite or another --out")
    return found


def contents(out: Path) -> set[str]:
    """What runs have left in `out`, their lock and what is being written aside."""
    found = {path.name for folder in (out, out / "checkpoints") if folder.is_dir() for path in folder.iterdir()}
    return {name for name in found if name != LOCK_FILE and not name.startswith(".")}


def make_directory(out: Path, overwrite: bool) -> None:
    """Make a new run's directory, emptied of the run that find_checkpoint() allowed to replace, but for its lock."""
    out.mkdir(parents=True, exist_ok=True)
    for entry in out.iterdir() if overwrite else ():
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class RunLock:
    """Keeps a second process out of a run's directory. The system gives the lock back when its process ends, however.

    Args:
        flag: what names the directory on the command line.

    Raises:
        ValueError: another process holds it; names its id.
    """

    def __init__(self, out: Path, flag: str = "--out"):
        out.mkdir(parents=True, exist_ok=True)
        self._file = open(out / LOCK_FILE, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        if fcntl is None:  # no such locks on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "of an unknown id"
            self._file.close()
            raise ValueError(
                f"{flag} {out} is in use: process {holder} trains there; wait for it, stop it, or choose another {flag}"
            ) from None
        except OSError as error:  # a file system without locks
            warnings.warn(f"{out} cannot be locked ({error}); start no second run in it", RuntimeWarning, stacklevel=2)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {platform.node()}")
        self._file.flush()

    def close(self) -> None:
        """Give it back."""
        self._file.close()
