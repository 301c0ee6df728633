"""Learn one text after another on characters, with a model that grows and does not forget.

    python train/continual.py --text alice.txt --recipe tiny    # a first model; the same command goes on after a kill
    python train/continual.py --text glass.txt --recipe tiny    # the same model, another text: new characters, replay
    python train/continual.py --text other.txt --fresh             # a new model beside it
    python train/continual.py --list                               # models, and what they have seen
    python train/continual.py --text big.txt --dry-run             # characters and layers that would be added
    python train/continual.py --gui                                # a window for text and settings

Ctrl-C asks: pause (the same command goes on to the same bits) or stop; --on-interrupt answers beforehand. Exit status 0
finished, 75 paused, 76 the loss was not finite, 130 stopped before or after training, 1 an error.
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
    from hrm_model.continual import command

    return command.run(vars(command.parser(__doc__).parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
