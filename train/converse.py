"""Teach a pretrained model to answer in conversations: the second stage.

    python train/converse.py                      # goes on from runs/tiny, on conversations about the standard library
    python train/converse.py --init-from runs/base --data data/oasst1 data/lima --recipe base --fused
    python train/converse.py --resume auto        # the same command after a kill

Without --data the standard library's conversations of several turns are made (data/stdlib-turns); other conversations
are prepared by `train/prepare.py --format chat`. Only answers have a loss. One conversation is a row, rows of similar
length share a micro-batch of --tokens-per-batch.

Flags that are not given have the recipe's values. Exit status as of train/pretrain.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train.common import run_stage


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_stage("converse", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
