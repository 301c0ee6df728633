"""hrm generate: continue prompts.

    hrm generate runs/tiny -p "def main(" --max-new-tokens 40
    hrm generate runs/tiny --file prompts.txt --json > completions.jsonl     # one prompt a line
    git log -1 | hrm generate runs/tiny --file - --whole --keep-last

Completions go to standard output, counts to standard error. "<|endoftext|>" in a prompt is text like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing

from .shared import (
    add_depth_arguments,
    add_model_arguments,
    add_sampling_arguments,
    check_depth,
    load,
    named_as_typed,
    sampling_of,
    tell_unknown,
)

HELP = "continue prompts, one or a file of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm generate`."""
    add_model_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "-p", "--prompt", metavar="TEXT", action="append", default=[], help="may be given several times"
    )
    prompts.add_argument("--file", metavar="FILE", help="UTF-8, one prompt a line; - is standard input")
    prompts.add_argument("--whole", action="store_true", help="the whole file is one prompt")
    prompts.add_argument(
        "--keep-last", action="store_true", help="cut a prompt that is longer than the window from the left"
    )
    prompts.add_argument(
        "--num-samples", metavar="N", type=int, default=1, help="completions of each prompt (default: 1)"
    )
    prompts.add_argument(
        "--batch-size", metavar="N", type=int, help="rows at a time (default: as many as fit into memory)"
    )
    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-new-tokens", "--max-tokens", "--max-length", metavar="N", type=int, default=100, help="(default: 100)"
    )
    length.add_argument("--min-new-tokens", "--min-tokens", metavar="N", type=int, default=0, help="(default: 0)")
    length.add_argument(
        "--stop", metavar="STR", action="append", default=[], help="end before this text; may be given several times"
    )
    draws = parser.add_argument_group("sampling")
    add_sampling_arguments(draws, temperature=1.0, top_k=None, top_p=1.0)
    draws.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed draws the same (default: 0)")
    add_depth_arguments(parser.add_argument_group("depth"))
    parser.add_argument("--no-cache", action="store_true", help="compute every window whole: the same text, slowly")
    parser.add_argument(
        "--json", action="store_true", help="a JSON object a completion: prompt, text, finish, tokens, logprobs, steps"
    )


def run(args: argparse.Namespace) -> int:
    """Print the completions in the order of the prompts.

    Raises:
        ValueError, OSError: what is wrong with the options, the prompts or the checkpoint, and the remedy.
    """
    _check(args)
    prompts = read_prompts(args)
    sampling = sampling_of(args)
    model, tokenizer = load(args)
    check_depth(args, model.config)
    ids = [_ids(text, number, args, tokenizer, model.config) for number, text in enumerate(prompts, 1)]
    tell_unknown(tokenizer, "the prompts")

    from ..config import END_OF_TEXT
    from ..generate import stream
    from ..tally import Tally

    tally = Tally()
    with named_as_typed(args):
        events = stream(
            model,
            [prompt for prompt in ids for _ in range(args.num_samples)],
            args.max_new_tokens,
            sampling=sampling,
            min_new_tokens=args.min_new_tokens,
            stop=tuple(args.stop),
            stop_tokens=(END_OF_TEXT,),
            seed=args.seed,
            max_steps=args.max_steps,
            force_steps=args.force_steps,
            halt_bias=args.halt_bias,
            depth_update=args.depth_update,
            use_cache=not args.no_cache,
            batch_size=args.batch_size,
            tokenizer=tokenizer,
        )
    writer = _Writer(args, prompts, args.max_steps or model.config.hrm_max_steps)
    try:
        with closing(writer):
            for event in tally.counted(events):
                writer.take(event)
    except KeyboardInterrupt:
        print(f"stopped; {tally.line()}", file=sys.stderr)
        return 130
    sys.stdout.flush()
    print(tally.line(), file=sys.stderr)
    return 0


class _Writer:
    """Prints rows in order: the first that is not finished as it comes, later ones when it is their turn."""

    def __init__(self, args: argparse.Namespace, prompts: list[str], max_steps: int):
        from ..terminal import Screen, StepPainter

        self._args, self._prompts = args, prompts
        self._screen = Screen()
        self._painter = StepPainter(self._screen, max_steps) if args.show_steps and not args.json else None
        if self._painter:
            self._painter.legend()
        self._rows = [[] for _ in range(len(prompts) * args.num_samples)]
        self._shown = 0
        self._at_line_start = True
        self._begin_row()

    def take(self, event) -> None:
        """One more token of one row."""
        self._rows[event.row].append(event)
        if event.row != self._shown:
            return
        if not self._args.json:
            self._write(event)
        while self._shown < len(self._rows) and self._is_finished():
            self._end_row()
            self._shown += 1
            if self._shown < len(self._rows):
                self._begin_row()

    def close(self) -> None:
        """Leave the row that is not finished, and print the finished ones that waited for it."""
        self._end_line()
        while self._shown < len(self._rows) - 1:
            self._shown += 1
            if self._is_finished():
                self._begin_row()
                self._end_row()

    def _is_finished(self) -> bool:
        events = self._rows[self._shown]
        return bool(events) and events[-1].finish is not None

    def _begin_row(self) -> None:
        if not self._args.json:
            self._header()
            for event in self._rows[self._shown]:
                self._write(event)

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._screen.write("\n")
            self._at_line_start = True

    def _end_row(self) -> None:
        if self._args.json:
            self._screen.write(json.dumps(self._record()) + "\n")
        self._end_line()
        self._rows[self._shown] = []

    def _record(self) -> dict:
        events, sample = self._rows[self._shown], self._shown % self._args.num_samples
        return {
            "prompt": self._prompts[self._shown // self._args.num_samples],
            "sample": sample,
            "text": "".join(e.text for e in events),
            "finish": events[-1].finish,
            "tokens": [e.token for e in events],
            "logprobs": [e.logprob for e in events],
            "steps": [e.steps for e in events],
        }

    def _header(self) -> None:
        if len(self._rows) == 1:
            return
        if self._painter:
            self._painter.begin()
        prompt = self._prompts[self._shown // self._args.num_samples]
        prompt = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        sample = f", sample {self._shown % self._args.num_samples + 1}" if self._args.num_samples > 1 else ""
        self._screen.line(f"--- {self._shown + 1} of {len(self._rows)}: {prompt!r}{sample}", "1")

    def _write(self, event) -> None:
        if not event.text:
            return
        if self._painter:
            self._painter.write(event.text, event.steps)
        else:
            self._screen.write(event.text)
        self._at_line_start = event.text.endswith("\n")


def _check(args: argparse.Namespace) -> None:
    """What can be said before torch is imported and the weights are read."""
    from ..text_input import checked_text

    for name in ("max_new_tokens", "num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= args.min_new_tokens <= args.max_new_tokens:
        raise ValueError(
            f"--min-new-tokens {args.min_new_tokens} must be in 0..{args.max_new_tokens} (--max-new-tokens)"
        )
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    if "" in args.stop:
        raise ValueError("--stop '' would end every completion at once; give some text or leave it out")
    for text in args.stop:
        checked_text(text, "--stop")
    if args.whole and args.file is None:
        raise ValueError("--whole is about a file; give --file too")
    check_depth(args)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Of -p and --file; with --whole the file is one. Raises ValueError where there is none, or an empty one."""
    from ..text_input import checked_text, read_lines, read_text

    prompts = [checked_text(text, f"prompt {number}") for number, text in enumerate(args.prompt, 1)]
    if args.file is not None:
        prompts += [read_text(args.file)] if getattr(args, "whole", False) else read_lines(args.file)
    if not prompts:
        raise ValueError("there is no prompt; give -p TEXT, or --file FILE with one prompt a line")
    for number, text in enumerate(prompts, 1):
        if not text:
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; give at least one character")
    return prompts


def _ids(text: str, number: int, args: argparse.Namespace, tokenizer, config) -> list[int]:
    ids, window = tokenizer.encode(text), config.block_size
    if len(ids) <= window:
        return ids
    if args.keep_last:
        return ids[-window:]
    raise ValueError(
        f"prompt {number} has {len(ids):,} tokens and the model's window holds {window:,}; shorten it, or pass "
        f"--keep-last to continue its last {window:,}"
    )
