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

if TYPE_CHECKING:
    from hrm_model.training.loop import Pretraining

DEFAULT_DATA = "data/stdlib"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given; those that were not are absent."""
    from hrm_model.training.flags import add_flags
    from hrm_model.training.recipes import TrainConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fused = {"nargs": "?", "const": "auto", "metavar": "auto|require"}
    add_flags(parser, TrainConfig, special={"fused": fused})
    return parser.parse_args(argv)


def build(given: dict[str, Any]) -> Pretraining:
    """The run that the flags ask for, its default data prepared if none is named.

    Raises:
        ValueError, OSError: something about the options, the data or the directory is wrong.
    """
    import torch

    from hrm_model.atomic import read_json
    from hrm_model.training.loop import Pretraining
    from hrm_model.training.prepare import ensure_default_dataset
    from hrm_model.training.recipes import TrainConfig

    recipe = given.pop("recipe", None) or ("base" if torch.cuda.is_available() else "tiny")
    options = TrainConfig.of_recipe(recipe, **given)
    shape = read_json(Path(options.config)) if options.config else None
    if not options.data:
        ensure_default_dataset(DEFAULT_DATA)
        options.data = [DEFAULT_DATA]
    return Pretraining(options, shape)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sampled character that the terminal lacks must not end a run
    try:
        training = build(vars(parse(argv)))
    except (ValueError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("\nstopped before training began; nothing was lost", file=sys.stderr)
        return 130
    from hrm_kernels import BackendError
    from hrm_model.checkpoint import CheckpointError

    try:
        return training()
    except (CheckpointError, BackendError, OSError) as error:  # any other is a fault of ours and keeps its traceback
        return _fail(error)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
