"""hrm analyze: how good is what a model of characters writes, beside a Markov chain and beside people.

    hrm analyze models/model --text alice.txt
    hrm analyze models/model --text alice.txt --length 2000 --samples 4 --temperature 1 --json

Each score is 0 to 100; hrm_model/continual/analysis.py defines them. The model and a Markov chain of order 3 each write
as much as is asked for; the last tenth of the text, which nothing was trained on, is scored as people's own.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .shared import add_model_arguments, load, tell_unknown

HELP = "scores of what a model of characters writes, beside a Markov chain and people"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm analyze`."""
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="the text that it was trained on, UTF-8")
    parser.add_argument("--length", metavar="N", type=int, default=1000, help="characters of a sample (default: 1000)")
    parser.add_argument("--samples", metavar="N", type=int, default=4, help="samples (default: 4)")
    parser.add_argument("--temperature", metavar="X", type=float, default=1.0, help="of the model (default: 1)")
    parser.add_argument("--order", metavar="N", type=int, default=3, help="of the Markov chain (default: 3)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    parser.add_argument("--show", action="store_true", help="print the samples too")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the scores.

    Raises:
        ValueError, OSError: what is wrong with the options, the text or the checkpoint, and the remedy.
    """
    from ..continual.analysis import COPY
    from ..continual.text import read

    for name, least in (("length", 100), ("samples", 1), ("order", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is below its minimum {least}")
    text = read(args.text)
    n = len(text.content)
    if n - text.n_train < COPY:
        raise ValueError(
            f"{args.text} has {n:,} characters; its last tenth stands for people and needs {COPY}: give {10 * COPY} up"
        )
    model, tokenizer = load(args)
    if model.config.n_chars is None:
        raise ValueError(f"{args.ckpt} is no model of characters; hrm analyze takes one of train/continual.py")
    found = analysed(model, tokenizer, text.content, args)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    names = list(found["scores"]["model"])
    print("".ljust(12) + "".join(f"{name:>12}" for name in names))
    for who, scores in found["scores"].items():
        print(f"{who:<12}" + "".join(f"{scores[name]:>12.1f}" for name in names))
    if args.show:
        for who in ("model", "markov"):
            print(f"\n--- {who}\n" + "\n---\n".join(found["samples"][who]))
    return 0


def analysed(model, tokenizer, content: str, args: argparse.Namespace) -> dict[str, Any]:
    """Samples and scores, as plain JSON values; `args` as of the command."""
    from ..continual.analysis import Reference
    from ..continual.markov import Markov
    from ..generate import stream
    from ..sampling import Sampling

    cut = len(content) * 9 // 10
    train, held_out = content[:cut], content[cut:]
    reference, chain = Reference(train), Markov(train, args.order)
    window = model.config.block_size
    # Prompts are people's and are not scored: places of the held-out part, spread over it.
    size = min(window // 2, 40)
    starts = [i * max(1, len(held_out) - size) // args.samples for i in range(args.samples)]
    prompts = [held_out[s : s + size] for s in starts]
    tokenizer.encode(content)
    tell_unknown(tokenizer, "the text")
    events = stream(
        model,
        [tokenizer.encode(p) for p in prompts],
        args.length,
        sampling=Sampling(temperature=args.temperature),
        seed=args.seed,
        stop_tokens=(),
        drop_oldest=max(1, window // 4),
        tokenizer=tokenizer,
    )
    written = [""] * args.samples
    for event in events:
        written[event.row] += event.text
    by_chain = [chain.generate(p, args.length, args.seed + i) for i, p in enumerate(prompts)]
    texts = {
        "model": "\n".join(written),
        "markov": "\n".join(by_chain),
        "people": held_out[: args.length * args.samples],
    }
    return {
        "scores": {who: reference.scores(t).to_dict() for who, t in texts.items()},
        "samples": {"model": written, "markov": by_chain},
        "options": {k: getattr(args, k) for k in ("length", "samples", "temperature", "order", "seed")},
        "characters": len(texts["model"]),
    }
