"""Settle an identity without unlearning conversation: the last stage, at a small learning rate, on both at once.

    python train/calibrate.py                     # goes on from runs/tiny-identity; 40 % identity, 60 % conversation
    python train/calibrate.py --data data/identity data/alpaca --data-weights 0.5 0.5 --init-from runs/base-identity
    python train/calibrate.py --resume auto       # the same command after a kill

--data names first the identity's conversations, then the others; --data-weights are their shares of the rows. Both are
evaluated, the best checkpoint is that of the mix that is trained on, and the run ends once the conversational
validation loss has risen by --max-rise over its start.

Flags that are not given have the recipe's values. Exit status as of train/pretrain.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train.common import run_stage


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_stage("calibrate", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
