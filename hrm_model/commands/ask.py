"""hrm ask: let a hybrid answer, a controller of train/hybrid.py over its frozen language model.

    hrm ask runs/sums -p "47+35=" -p "12+34="
    hrm ask runs/sums --file prompts.txt --segments 4 --json > answers.jsonl     # one prompt a line; think longer

Answers go to standard output, a line each, and how many segments were run to standard error. The language model is read
from where it was in training, or from --language-model; another one is refused.
"""

from __future__ import annotations

import argparse
import json
import sys

from .generate import read_prompts
from .shared import add_sampling_arguments, sampling_of

HELP = "let a hybrid (train/hybrid.py) answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm ask`."""
    parser.add_argument("run_dir", metavar="RUN", help="a run of train/hybrid.py, or one of its checkpoints")
    parser.add_argument(
        "-p", "--prompt", metavar="TEXT", action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--file", metavar="FILE", help="UTF-8, one prompt a line; - is standard input")
    parser.add_argument("--language-model", metavar="DIR", default="", help="where it is now, if it was moved")
    parser.add_argument("--segments", metavar="N", type=int, help="think for so many at most (default: as in training)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="longest answer (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add_sampling_arguments(parser, temperature=0.0, top_k=None, top_p=1.0)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed draws the same (default: 0)")
    parser.add_argument("--json", action="store_true", help="an object a line: prompt, answer, segments")


def run(args: argparse.Namespace) -> int:
    """Print the answers in the order of the prompts.

    Raises:
        ValueError, OSError: what is wrong with the options, the prompts, the run or its language model.
    """
    for name, least in (("segments", 1), ("max_new_tokens", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    prompts, sampling = read_prompts(args), sampling_of(args)

    from ..conversion import check_installed

    check_installed()

    from ..hybrid.build import load_run
    from ..training.device import choose_device

    built = load_run(args.run_dir, choose_device(args.device), language_model=args.language_model)
    if built.run.system == "hrm" and sampling.temperature:
        raise ValueError(
            f"--temperature {sampling.temperature} draws, and a baseline without a language model does not"
        )
    answers, segments = built.model.answers(
        built.collator, prompts, args.max_new_tokens or built.run.max_new_tokens, sampling,
        args.segments or built.run.segments, seed=args.seed,
    )  # fmt: skip
    for prompt, answer, n in zip(prompts, answers, segments, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer, "segments": n}) if args.json else answer)
    print(f"{len(prompts)} answers, {sum(segments) / len(segments):.2f} segments each on average", file=sys.stderr)
    return 0
