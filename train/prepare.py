"""Turn text into a dataset to train on: python train/prepare.py [--source PATH ...] [--out DIRECTORY].

Without arguments it needs nothing but Python: its language reference and standard library become data/stdlib. With
--format chat sources are conversations, by default questions and answers about the standard library (data/stdlib-chat).
With --mixture published it prepares the corpora of the published model, from the hub or from files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from hrm_model.training import mixture_command
from hrm_model.training.chat_prepare import BLOCK_SIZE, SMALLEST_BLOCK, prepare_chat
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
        help="text files, .jsonl, .jsonl.gz, folders of these; default: stdlib, what Python brings along. With "
        "--format chat: alpaca, alpaca-gpt4, dolly, lima, oasst1, mixed (of the Hugging Face hub, or as NAME=PATH of "
        "files), stdlib, stdlib-turns, stdlib-pairs, files of messages: .jsonl, .jsonl.gz, .json, .parquet",
    )
    add("--format", choices=["text", "chat"], default="text", help="what the sources are; default: text")
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
    chat = parser.add_argument_group("with --format chat")
    chat.add_argument(
        "--block-size",
        type=int,
        help=f"longer conversations are split at turns; default {BLOCK_SIZE}, of stdlib {SMALLEST_BLOCK}",
    )
    chat.add_argument("--drop", nargs="+", metavar="WORD", help="drop conversations with one of these whole words")
    chat.add_argument("--drop-words", metavar="FILE", help="the same for the words or phrases of a file, one a line")
    chat.add_argument("--no-filter", action="store_true", help="keep duplicates and answers of other assistants")
    mixture_command.add_flags(parser)
    return parser


def _default_out(source: str, chat: bool) -> Path:
    name = Path(source.partition("=")[0] if chat else source).resolve().name.split(".")[0]
    return Path("data", "stdlib-chat" if chat and source == "stdlib" else name)


def _chat_options(options: dict[str, Any], of_chat: dict[str, Any]) -> dict[str, Any]:
    """Arguments of prepare_chat(). Raises ValueError for an option of text."""
    text_key = options.pop("text_key")
    of_text = {"text_key": None if text_key == "text" else text_key}
    of_text |= {name: options.pop(name) for name in ("val_tokens", "workers")}
    _refuse(of_text, "--format text")
    options |= {"filters": not of_chat.pop("no_filter")} | of_chat
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], where: str) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is an option of {where}; leave one of them out")


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
    of_chat = {name: options.pop(name) for name in ("block_size", "drop", "drop_words", "no_filter")}
    chat = options.pop("format") == "chat"
    out = options.pop("out") or _default_out(sources[0], chat)
    try:
        if chat:
            summary = prepare_chat(out, sources, **_chat_options(options, of_chat))
        else:
            _refuse(of_chat, "--format chat")
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
