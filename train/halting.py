"""Fit the halting head of any checkpoint, and nothing else of it, to text: 2 C + 2 numbers, in seconds to minutes.

    python train/halting.py runs/tiny                          # on the standard library's text, into runs/tiny-halting
    python train/halting.py published.pt --data data/corpus --step-price 0.02 --out models/cosmicfish-halting
    python train/halting.py runs/tiny --target-steps 2         # the price that leads to two steps, found by itself

It first prints the loss at every depth, and whether depth can pay at all for this model: a head can only choose between
exits that are usable, and a model that was always run to one depth may have no other. Then it fits the head, and says
what its depths are worth against fixed depths and shuffled ones on text that it was not fitted to, by the causal
protocol. The model at --out has that head, halt_bias 0, and every other tensor as it was. The last line is JSON. Exit
status: 0 written, 1 an error named on the last line, 2 an unknown flag.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

DEFAULT_DATA = "data/stdlib"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="a model's directory, a training run, or a published .pt")
    add("--data", nargs="+", default=[], metavar="DIR", help=f"prepared datasets; default: {DEFAULT_DATA}")
    add("--out", default="", metavar="DIR", help="where the model goes; default: the checkpoint's path and -halting")
    add("--overwrite", action="store_true", help="replace a model that is at --out")
    add("--halting", default="policy", metavar="NAME", help="objective: policy, gain, expected or q; default: policy")
    add("--step-price", type=float, default=0.01, metavar="X", help="what a step costs, nats; default: 0.01")
    add("--target-steps", type=float, metavar="X", help="mean depth that the price is steered to; default: none")
    add("--decisions", default="prefix", metavar="NAME", help="prefix, as in generation, or row, as published")
    add("--windows", type=int, default=128, metavar="N", help="windows of training text to fit to; default: 128")
    add("--eval-windows", type=int, default=64, metavar="N", help="windows of validation text; default: 64")
    add("--iterations", type=int, default=600, metavar="N", help="of the fit; default: 600")
    add("--batch-size", type=int, default=8, metavar="N", help="windows unrolled together; default: 8")
    add("--seed", type=int, default=1337, metavar="N", help="which windows; default: 1337")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="autocast precision")
    add(
        "--fused", nargs="?", const="auto", default="off", choices=("off", "auto", "require"),
        help="kernels of hrm_kernels, as in train/pretrain.py",
    )  # fmt: skip
    add("--force", action="store_true", help="fit even where fewer than two exits are usable")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fit, report and write; returns what the last line holds.

    Raises:
        ValueError, OSError: the options, the data or the checkpoint are wrong, or its exits are unusable.
    """
    from hrm_kernels import BackendError
    from hrm_model.training.fitting import HeadFitting

    try:
        return HeadFitting(options, DEFAULT_DATA)()
    except BackendError as error:  # of HRM_KERNELS: as wrong as a flag
        raise ValueError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    try:
        result = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
