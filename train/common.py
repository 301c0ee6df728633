"""What the scripts of this folder do alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def stage_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """A parser with the stage's flags."""
    from hrm_model.training import command

    return command.stage_parser(stage, description)


def parse(stage: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent."""
    return stage_parser(stage, description).parse_args(argv)


def run_stage(stage: str, description: str, argv: list[str] | None) -> int:
    """Run a stage; returns its exit status."""
    if not usable():
        return 1
    return run_command(vars(parse(stage, description, argv)), stage)


def usable() -> bool:
    """Whether HRM_KERNELS is a choice that exists; if not, an error is printed."""
    try:
        import hrm_kernels  # noqa: F401
    except ValueError as error:  # as wrong as a flag
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def run_command(given: dict[str, Any], stage: str, make_data: Callable[[], list[str]] | None = None) -> int:
    """Run a stage with these flags; returns its exit status. See hrm_model/training/command.py."""
    from hrm_model.training import command

    return command.run(given, stage, make_data)
