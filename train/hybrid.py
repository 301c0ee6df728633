"""Train the HRM controller over a frozen language model, or a baseline, on tasks that a program can check.

    python train/hybrid.py --model-name DIR --tasks toy_addition --injector cab --segments 3
    python train/hybrid.py --config hybrid.yaml --steps 1000        # flags in a file; those given here win
    python train/hybrid.py --model-name DIR --system lm --lora-rank 8   # baselines: lm with adapters, hrm alone
    python train/hybrid.py --config hybrid.yaml --resume auto       # the same command after a kill

Flags may be written with underscores. Exit status: 0 finished, 75 saved and stopped on Ctrl-C or SIGTERM, 76 the loss
or gradient was not finite, 130 stopped before training began, 1 an error named on the last line, 2 an unknown flag.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from train import common


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if not common.usable():
        return 1
    from hrm_model.hybrid.training import command

    return command.run(command.parse(__doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
