"""A run's directory: whether it may be written to, what to resume in it, what of it may be deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checkpoint import latest_checkpoint
from .provenance import RUN_FILE

# What runs write. Anything else in a directory is somebody's, and never deleted.
_OURS = ("run.*", "metrics.jsonl*", "dashboard.png*", "checkpoints", "tensorboard", "wandb")


def find_checkpoint(out: Path, resume: str, overwrite: bool) -> Path | None:
    """The checkpoint that a run in `out` goes on from, None for a new run. Changes nothing but dead saves' leftovers.

    Raises:
        ValueError: `out` is taken, is no run, or its checkpoints are all broken; the message names the way out.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a directory")
    # a run killed in its first moments may have got no further than this
    entries = [e for e in out.iterdir() if e.name != RUN_FILE + ".tmp"] if out.is_dir() else []
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


def make_directory(out: Path, overwrite: bool) -> None:
    """Make a new run's directory, emptied of the run that find_checkpoint() allowed to replace."""
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
