"""Teach a model to follow instructions: the third stage, like the second on instructions with their answers.

    python train/instruct.py                      # goes on from runs/tiny-converse
    python train/instruct.py --init-from runs/base-converse --data data/alpaca data/dolly --recipe base --fused
    python train/instruct.py --resume auto        # the same command after a kill

Without --data the standard library's single questions and answers are made (data/stdlib-pairs); others come from
`train/prepare.py --format chat`. Published hyper-parameters are those of --recipe base.

Flags that are not given have the recipe's values. Exit status as of train/pretrain.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train.common import run_stage


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_stage("instruct", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
