"""Pretrain a hierarchical-reasoning language model.

    python train/pretrain.py                      # tiny on a CPU, base on a GPU, on the standard library's text
    python train/pretrain.py --fused --recipe base --data data/corpus --out runs/mine
    python train/pretrain.py --resume auto        # the same command after a kill

Exit status: 0 finished, 75 saved and stopped on Ctrl-C or SIGTERM, 76 the loss or gradient was not finite, 1 an error
named on the last line, 2 an unknown flag.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

DEFAULT_DATA = "data/stdlib"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent."""
    from hrm_model.training.flags import add_flags
    from hrm_model.training.recipes import TrainConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fused = {"nargs": "?", "const": "auto", "metavar": "auto|require"}
    add_flags(parser, TrainConfig, special={"fused": fused})
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = vars(parse(argv))
    import torch

    from hrm_model.checkpoint import CheckpointError
    from hrm_model.training.loop import Pretraining
    from hrm_model.training.prepare import ensure_default_dataset
    from hrm_model.training.recipes import TrainConfig

    try:
        recipe = given.pop("recipe", None) or ("base" if torch.cuda.is_available() else "tiny")
        run = TrainConfig.of_recipe(recipe, **given)
        shape = json.loads(Path(run.config).read_text(encoding="utf-8")) if run.config else None
        if not run.data:
            ensure_default_dataset(DEFAULT_DATA)
            run.data = [DEFAULT_DATA]
        training = Pretraining(run, shape)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        return training()
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
