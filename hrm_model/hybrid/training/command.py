"""Flags of train/hybrid.py, and the file of flags that --config names."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...training.command import run_built
from ...training.values_file import read_values


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the run's flags; those that are not given leave no trace."""
    from ...training.flags import add_flags
    from .options import HybridRun

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fused = {"nargs": "?", "const": "auto", "metavar": "auto|require"}
    add_flags(parser, HybridRun, special={"fused": fused}, without=HybridRun.HIDDEN)
    parser.add_argument("--max-steps", dest="steps", type=int, default=argparse.SUPPRESS, help="the same as --steps")
    return parser


def parse(description: str, argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by field. Their names may have underscores for dashes."""
    argv = sys.argv[1:] if argv is None else argv
    given = [
        f"{name.replace('_', '-')}{equals}{value}" if a.startswith("--") else a
        for a in argv
        for name, equals, value in [a.partition("=")]
    ]
    return vars(make_parser(description).parse_args(given))


def options(given: dict[str, Any]):
    """The run that the flags and their --config ask for.

    Raises:
        ValueError, OSError: the file or a value in it is wrong.
    """
    from .options import HybridRun

    if given.get("config"):
        given = read_flags(Path(given["config"])) | given
    resume = given.get("resume", "never")
    if resume not in ("never", "auto"):
        given = given | _named_run(Path(resume), given.get("out"))
    return HybridRun(**given)


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a .json or .yaml file. Raises ValueError: unreadable, an unknown flag, a value of another type."""
    from .options import HybridRun

    values = read_values(path, "config")
    if not isinstance(values, dict):
        raise ValueError(f"config {path} holds a {type(values).__name__}, not flags by their names")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {f.name: f for f in fields(HybridRun) if f.name not in HybridRun.HIDDEN | {"config"}}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"config {path} has unknown flags: {', '.join(unknown)}; python train/hybrid.py --help lists them"
        )
    found = {}
    for name, value in values.items():
        default = getattr(HybridRun, name, None)
        if isinstance(value, list) and name == "tasks":
            value = ",".join(map(str, value))
        if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                value = float(value)  # YAML takes 1e-4 for a text
            except ValueError:
                raise ValueError(f"config {path}: {name} is {value!r}, expected a number") from None
        if default is not None and type(value) is not type(default):
            raise ValueError(f"config {path}: {name} is {value!r}, expected a {type(default).__name__}")
        found[name] = value
    return found


def _named_run(path: Path, out: str | None) -> dict[str, Any]:
    """--resume DIR, a run or its newest checkpoint, as --out and --resume auto."""
    from ...checkpoint import latest_checkpoint

    run = path.parent.parent if path.parent.name == "checkpoints" else path
    newest = latest_checkpoint(run) if run.is_dir() else None
    if newest is None:
        raise ValueError(f"--resume {path} is neither auto, never, nor a run with a checkpoint")
    if run != path and newest != path:
        raise ValueError(
            f"--resume {path} is not the newest checkpoint of its run, {newest}; to begin from it use --init-from"
        )
    if out is not None and Path(out) != run:
        raise ValueError(f"--resume {path} goes on in {run}, and --out says {out}; leave one of them out")
    return {"resume": "auto", "out": str(run)}


def run(given: dict[str, Any]) -> int:
    """Build the run and train; returns the process's exit status, an error being one line."""

    def build():
        from .loop import HybridTraining

        return HybridTraining(options(given))

    return run_built(build, "hybrid")
