"""`train/prepare.py --mixture`: its flags, and what it says and returns."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .corpora import MIXTURES
from .mixture import VAL_FRACTION, prepare_mixture

OUT = "data/published"
_FLAGS = ("max_tokens", "only", "start_from", "local", "revision")
_NOT_OURS = {"source": ["stdlib"], "text_key": "text", "val_tokens": None, "format": "text"}
_NOT_OURS |= {"block_size": None, "drop": None, "drop_words": None, "no_filter": False}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that go with --mixture."""
    group = parser.add_argument_group(
        "the published corpora", f"a dataset each, in --out (default {OUT}); --val-fraction is {VAL_FRACTION} here"
    )
    add = group.add_argument
    add("--mixture", choices=sorted(MIXTURES), help="prepare these corpora instead of --source; see docs/data.md")
    add("--max-tokens", type=int, metavar="N", help="size of the whole mixture; default 10,000,000,000")
    add("--only", metavar="NAME,...", help="these corpora of it alone")
    add("--start-from", metavar="NAME", help="this corpus of it and those after it")
    add("--local", action="append", metavar="NAME=PATH", help="read a corpus from a file or folder; repeatable")
    add("--revision", action="append", metavar="NAME=REV", help="pin a corpus to a commit or tag; repeatable")


def take_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of add_flags() out of parsed options. Raises ValueError where one is given without --mixture."""
    taken = {name: options.pop(name) for name in ("mixture", *_FLAGS)}
    given = [name for name in _FLAGS if taken[name] is not None]
    if given and not taken["mixture"]:
        raise ValueError(f"--{given[0].replace('_', '-')} goes with --mixture {'|'.join(sorted(MIXTURES))}")
    return taken


def run(flags: dict[str, Any], options: dict[str, Any]) -> int:
    """Prepare; `options` are the other ones of train/prepare.py. Exit code: 0 done, 1 an error, 130 interrupted."""
    try:
        for name, default in _NOT_OURS.items():
            if options[name] != default:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --mixture; see docs/data.md")
        fraction = options["val_fraction"]
        summary = prepare_mixture(
            options["out"] or OUT,
            flags["mixture"],
            max_tokens=flags["max_tokens"],
            only=[name.strip() for name in flags["only"].split(",")] if flags["only"] else None,
            start_from=flags["start_from"],
            local=_pairs("--local", flags["local"]),
            revisions={name: values[-1] for name, values in _pairs("--revision", flags["revision"]).items()},
            val_fraction=VAL_FRACTION if fraction is None else fraction,
            **{name: options[name] for name in ("seed", "workers", "shard_tokens", "overwrite")},
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        return 130
    print(json.dumps(summary))
    return 0


def _pairs(option: str, given: list[str] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} {pair!r} is not NAME=VALUE, as in {option} fineweb=...")
        found.setdefault(name, []).append(value)
    return found
