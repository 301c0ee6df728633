"""hrm recover: rebuild the tokenizer of a model of characters from its checkpoint, and verify it.

hrm recover models/model            # the old file, if there is one, is kept as tokenizer.json.old-1
"""

from __future__ import annotations

import argparse

from .shared import CKPT_HELP

HELP = "rebuild a lost or damaged tokenizer.json from a model's checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm recover`."""
    parser.add_argument("ckpt", metavar="CKPT", help=CKPT_HELP)


def run(args: argparse.Namespace) -> int:
    """Rebuild and verify.

    Raises:
        ValueError, OSError: no intact checkpoint, or one of another kind.
    """
    from ..continual.store import TOKENIZER, model_directory_of

    directory = model_directory_of(args.ckpt)
    tokenizer, kept = directory.recover()
    print(
        f"{directory.path / TOKENIZER}: {tokenizer.n_vocab} characters of {directory.checkpoint().name}, verified: "
        "each encodes to its id and back" + (f"; the old file is {kept.name}" if kept else "")
    )
    return 0
