"""hrm demo: how the two states of a model move through N cycles x T steps, and what it would say at each moment.

hrm demo models/model --text "Alice was"
hrm demo models/model --text "Alice was" --modes fast normal 4x2 --out demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .shared import add_model_arguments, load, tell_unknown

HELP = "how the states of a model of characters move through its reasoning cycles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm demo`."""
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="TEXT", default="The ", help="what it reads (default: 'The ')")
    parser.add_argument(
        "--modes", metavar="NAME", nargs="+", default=["fast", "normal", "deep"],
        help="configurations side by side: fast, normal, deep, extreme, or NxT (default: fast normal deep)",
    )  # fmt: skip
    parser.add_argument("--steps", metavar="N", type=int, default=1, help="HRM steps of each (default: 1)")
    parser.add_argument("--out", metavar="FILE", help="also a picture, PNG")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the moments and draw them.

    Raises:
        ValueError, OSError: what is wrong with the options or the checkpoint, and the remedy.
    """
    from ..continual.modes import cycles
    from ..continual.trace import draw, lines, records, trace
    from ..text_input import checked_text

    pairs = {mode: cycles(mode) for mode in args.modes}
    text = checked_text(args.text, "--text")
    if not text:
        raise ValueError("--text is empty; give some characters to read")
    model, tokenizer = load(args)
    if model.config.n_chars is None:
        raise ValueError(f"{args.ckpt} is no model of characters; hrm demo takes one of train/continual.py")
    ids = tokenizer.encode(text)[-model.config.block_size :]
    tell_unknown(tokenizer, "--text")
    traces = {f"{name} {n}x{t}": trace(model.with_cycles(n, t), ids, args.steps) for name, (n, t) in pairs.items()}
    if args.json:
        print(json.dumps({name: records(found, tokenizer) for name, found in traces.items()}, ensure_ascii=False))
    else:
        for name, found in traces.items():
            print(f"{name}\n  " + "\n  ".join(lines(found, tokenizer)))
    if args.out:
        try:
            draw(traces, Path(args.out))
        except ImportError as error:
            raise ValueError(f"a picture needs matplotlib ({error}): pip install 'hrm-kernels[plot]'") from error
        if not args.json:
            print(f"picture {args.out}")
    return 0
