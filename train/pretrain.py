"""Pretrain a hierarchical-reasoning language model.

    python train/pretrain.py                      # tiny on a CPU, base on a GPU, on the standard library's text
    python train/pretrain.py --fused --recipe base --data data/corpus --out runs/mine
    python train/pretrain.py --resume auto        # the same command after a kill

Flags that are not given have the recipe's values. Exit status: 0 finished, 75 saved and stopped on Ctrl-C or SIGTERM,
76 the loss or gradient was not finite, 130 stopped before training began, 1 an error named on the last line, 2 an
unknown flag.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train import common

if TYPE_CHECKING:
    from hrm_model.training.loop import Training


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent."""
    return common.parse("pretrain", __doc__, argv)


def build(given: dict[str, Any]) -> Training:
    """The run that the flags ask for. Raises ValueError or OSError where something about them is wrong."""
    from hrm_model.training import command

    return command.build(given)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return common.run_stage("pretrain", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
