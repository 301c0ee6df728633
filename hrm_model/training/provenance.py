"""Where a run came from: resolved configuration, command, versions, commit and uncommitted changes."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hrm_kernels import __version__


def write_provenance(directory: Path, run: dict[str, Any], model: dict[str, Any], data: list[dict[str, Any]]) -> None:
    """Write run.json (and run.diff, when the checkout has uncommitted changes) into a run's directory."""
    root = Path(__file__).resolve().parents[2]
    commit, diff = _git(root, "rev-parse", "HEAD"), _git(root, "diff", "HEAD")
    info = {
        "command": sys.argv,
        "run": run,
        "model": model,
        "data": data,
        "commit": commit,
        "uncommitted_changes": bool(diff),
        "versions": {
            "hrm-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    (directory / "run.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if diff:
        (directory / "run.diff").write_text(diff + "\n", encoding="utf-8")


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None outside a checkout of this package or without git."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
