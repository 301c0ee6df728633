"""Where a run came from: resolved configuration, command, versions, commit and uncommitted changes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from hrm_kernels import __version__

from ..atomic import CheckpointError, named_errors, read_json

RUN_FILE = "run.json"


def write_provenance(directory: Path, run: dict[str, Any], model: dict[str, Any], data: list[dict[str, Any]]) -> None:
    """Write run.json (and run.diff, when the checkout has uncommitted changes) into a new run's directory."""
    origin = {"run": run, "model": model, "data": data, **_here(directory, "run.diff"), "resumed": []}
    _write(directory, origin)


def has_provenance(directory: Path) -> bool:
    """Whether there is a run.json to add to; a damaged one is nothing to give up a run for, but warned of."""
    if not (directory / RUN_FILE).exists():
        return False
    try:
        if isinstance(read_json(directory / RUN_FILE).get("resumed", []), list):
            return True
        problem = f"{directory / RUN_FILE} is damaged"
    except CheckpointError as error:
        problem = str(error)
    warnings.warn(f"{problem}; it is written anew", RuntimeWarning, stacklevel=3)
    return False


def add_resume(directory: Path, step: int) -> None:
    """Add to run.json by which command and code a run goes on from `step`; how it began stays."""
    origin = read_json(directory / RUN_FILE)
    origin.setdefault("resumed", []).append({"step": step, **_here(directory, f"run.{step}.diff")})
    _write(directory, origin)


def _here(directory: Path, diff_name: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    diff = _git(root, "diff", "HEAD")
    if diff:
        (directory / diff_name).write_text(diff + "\n", encoding="utf-8")
    return {
        "command": sys.argv,
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": diff_name if diff else None,
        "versions": {"hrm-kernels": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def _write(directory: Path, origin: dict[str, Any]) -> None:
    temporary = directory / (RUN_FILE + ".tmp")
    with named_errors(directory / RUN_FILE):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(origin, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename leaves an empty file
        temporary.replace(directory / RUN_FILE)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None outside a checkout of this package or without git."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
