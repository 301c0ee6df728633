"""Turn text into a dataset to train on: python train/prepare.py [--source PATH ...] [--out DIRECTORY].

Without arguments it needs nothing but Python: its language reference and standard library become data/stdlib.
With --mixture published it prepares the corpora of the published model, from the hub or from files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from hrm_model.training import mixture_command
from hrm_model.training.prepare import prepare
from hrm_model.training.shards import SHARD_TOKENS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        default=["stdlib"],
        metavar="PATH",
        help="text files, .jsonl, .jsonl.gz, folders of these; default: stdlib, what Python brings along",
    )
    add("--out", help="dataset directory; default: data/stdlib, or data/ and the name of the first source")
    add("--val-fraction", type=float, help="validation share; default 0.05, at most a million tokens")
    add("--val-tokens", type=int, help="validation tokens, instead of a share")
    add(
        "--workers",
        type=int,
        help="processes that tokenise; default: a core each, at most 8, fewer for little text",
    )
    add("--seed", type=int, default=0, help="which documents validate; default 0")
    add("--text-key", default="text", help="key of the text in a line of JSON; default: text")
    add(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        help=f"most tokens in a file; default {SHARD_TOKENS}",
    )
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    mixture_command.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done or up to date, 1 an error (one line says which), 130 interrupted."""
    options = vars(_parser().parse_args(argv))
    try:
        mixture = mixture_command.take_flags(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if mixture["mixture"]:
        return mixture_command.run(mixture, options)
    sources = options.pop("source")
    out = options.pop("out") or Path("data", Path(sources[0]).resolve().name.split(".")[0])
    try:
        summary = prepare(out, sources, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {out} is as it was", file=sys.stderr)
        return 130
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
