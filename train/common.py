"""What the scripts of this folder do alike."""

from __future__ import annotations

import argparse
import sys


def parse(stage: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent."""
    from hrm_model.training.command import stage_parser

    return stage_parser(stage, description).parse_args(argv)


def run_stage(stage: str, description: str, argv: list[str] | None) -> int:
    """Run a stage; returns its exit status."""
    try:
        from hrm_model.training import command
    except ValueError as error:  # of HRM_KERNELS: as wrong as a flag
        print(f"error: {error}", file=sys.stderr)
        return 1
    return command.run(vars(parse(stage, description, argv)), stage)
