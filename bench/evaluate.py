"""How much faster are benchmarks in batches, with contexts shared, than one row at a time, at equal scores?

    python bench/evaluate.py                              # every task, a model like the tiny recipe's
    python bench/evaluate.py --model base --tasks hellaswag,mmlu --limit 2
    python bench/evaluate.py --checkpoint runs/tiny --data folder    # a checkpoint on real rows

The same examples go through HRMScorer twice in one run: batched (hrm_model/evaluation/shared_context.py; generation
over the cache), and one by one: each choice a forward pass over its whole row with logits of every position, each new
token a forward pass over the whole window, as the published evaluation does it. Answers, step counts and generated
tokens must be the same, log-probabilities within 1e-3 nats a row; if they are not, no time is shown and the exit status
is 1. Times are the process's own on the CPU, which other processes hardly change; the record has the clock's too.

Without --data the rows are made up: words that are one token, in the tasks' layouts, with the sizes of SIZES (tokens of
context, choices, tokens of each). Those are typical of the benchmarks, chosen by hand. Without --checkpoint the weights
are random, and the halting head is turned to what tells rows apart, so that they stop at different steps.

One JSON line is appended to bench/results/evaluate.jsonl with --save, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import environment, positive, print_table, save
from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer, load_model
from hrm_model.config import PRESETS
from hrm_model.evaluation.data import examples, places_of
from hrm_model.evaluation.hrm_scorer import HRMScorer
from hrm_model.evaluation.results import requests_of
from hrm_model.evaluation.tasks import TASKS
from hrm_model.evaluation.tasks.task import Choices, Question

SIZES = {
    "hellaswag": (60, 4, 27),
    "piqa": (9, 2, 25),
    "winogrande": (15, 2, 8),
    "nq": (14, 0, 0),
    "arc_easy": (28, 4, 5),
    "arc_challenge": (32, 4, 7),
    "mmlu": (115, 4, 1),
    "gsm8k": (62, 0, 0),
}
LIMIT = {"gsm8k": 1}
"""Examples of tasks that generate, where they cost as much as many others."""
TARGET = 10.0
"""Times as many examples a second."""
CLOSE = 1e-3


def made_up(task: str, n: int, seed: int = 0) -> list[Choices | Question]:
    """Examples of words that are one token each, of sizes from half to one and a half times those of SIZES."""
    draw, words = np.random.default_rng(seed), _words()

    def text(size: int) -> str:
        return "".join(draw.choice(words, max(1, round(size * draw.uniform(0.5, 1.5))))).strip()

    context, n_choices, size = SIZES[task]
    if not n_choices:
        return [Question(f"Question: {text(context)}\nAnswer:", ["42"]) for _ in range(n)]
    if size == 1:
        return [Choices(text(context), ("A", "B", "C", "D")[:n_choices], i % n_choices) for i in range(n)]
    return [Choices(text(context), [text(size) for _ in range(n_choices)], i % n_choices) for i in range(n)]


def _words() -> list[str]:
    tokenizer = get_tokenizer()
    texts = (tokenizer.decode([token]) for token in range(300, 5000))
    return [text for text in texts if text[:1] == " " and text[1:].isalpha() and text[1:].isascii()]


@torch.no_grad()
def random_model(preset: str) -> HRMForCausalLM:
    """Random weights; the head looks at what differs between rows, away from what all have in common after a step."""
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig.preset(preset, block_size=512)).eval()
    core, found = model.hrm_core, []
    x = model.embed(torch.randint(0, 50257, (8, 24)))
    rotary = model.rotary(24)
    for block in model.input_blocks:
        x = block.apply_to(x, rotary, None)
    found = [z_H.mean(1) for z_H in core.unroll(x, rotary, None, model.config.hrm_max_steps)]
    common, _ = torch.linalg.qr(torch.stack([mean.mean(0) for mean in found], 1))
    weight = torch.randn_like(core.q_head.weight)
    core.q_head.weight.copy_(weight - weight @ common @ common.T)
    core.q_head.bias.zero_()
    return model


def compare(model: HRMForCausalLM, task: str, rows: list) -> dict[str, Any]:
    """Times of both ways, and how far their numbers are apart."""
    batched, single = (HRMScorer(model, get_tokenizer(), batched=way) for way in (True, False))
    found, seconds, clock = [], [], []
    for scorer in (batched, single):
        begin = time.process_time(), time.perf_counter()
        if isinstance(rows[0], Choices):
            found.append(scorer.score(requests_of(scorer, rows)))
        else:
            prompts = [scorer.encode(row.prompt, is_context=True) for row in rows]
            found.append(scorer.generate(prompts, TASKS[task].max_new_tokens, TASKS[task].stop))
        seconds.append(time.process_time() - begin[0])
        clock.append(time.perf_counter() - begin[1])
    if isinstance(rows[0], Choices):
        pairs = [pair for a, b in zip(*found, strict=True) for pair in zip(a, b, strict=True)]
        apart = max(abs(a.logprob - b.logprob) for a, b in pairs)
        answers = [[max(range(len(row)), key=lambda i: row[i].mean_logprob) for row in rows] for rows in found]
        same = answers[0] == answers[1] and all(a.steps == b.steps for a, b in pairs)
        steps = [a.steps for a, _ in pairs]
    else:
        pairs = list(zip(*found, strict=True))
        apart = max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=False))
        same = all(list(a.tokens) == list(b.tokens) and list(a.steps) == list(b.steps) for a, b in pairs)
        steps = [step for a, _ in pairs for step in a.steps]
    return {
        "task": task,
        "examples": len(rows),
        "mean_steps": float(np.mean(steps)),
        "sd_steps": float(np.std(steps)),
        "same": bool(same),
        "apart": apart,
        "batched_s": seconds[0],
        "one_by_one_s": seconds[1],
        "speedup": seconds[1] / seconds[0],
        "clock_s": clock,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the tasks asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="tiny", help="of random weights (default: tiny)")
    parser.add_argument("--checkpoint", metavar="CKPT", help="a trained model instead")
    parser.add_argument("--tasks", default=",".join(SIZES), help="default: all")
    parser.add_argument("--limit", type=positive, help="examples of each task (default: 16; 1 of gsm8k)")
    parser.add_argument("--data", nargs="+", metavar="WHERE", help="as of hrm eval (default: made up)")
    parser.add_argument("--save", action="store_true", help="append to bench/results/evaluate.jsonl")
    args = parser.parse_args(argv)
    names = args.tasks.split(",")
    unknown = [name for name in names if name not in SIZES]
    if unknown:
        parser.error(f"--tasks {unknown[0]!r} is none of {', '.join(SIZES)}")
    try:
        places = places_of(args.data, names) if args.data else {}
        model = load_model(args.checkpoint)[0].eval() if args.checkpoint else random_model(args.model)
        cells = []
        for name in names:
            limit = args.limit or LIMIT.get(name, 16)
            rows = examples(TASKS[name], places[name], limit)[0] if places else made_up(name, limit)
            cells.append(compare(model, name, rows))
            print(f"{name}: done", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    right = all(cell["same"] and cell["apart"] < CLOSE for cell in cells)
    whole = {"task": "all", "examples": sum(cell["examples"] for cell in cells)}
    whole |= {key: sum(cell[key] for cell in cells) for key in ("batched_s", "one_by_one_s")}
    whole["speedup"] = whole["one_by_one_s"] / whole["batched_s"]
    if not right:
        for cell in (*cells, whole):
            for key in ("batched_s", "one_by_one_s", "speedup", "clock_s"):
                cell.pop(key, None)
    shown = lambda key, form: lambda cell: format(cell[key], form) if key in cell else "-"  # noqa: E731
    rate = lambda key: lambda cell: f"{cell['examples'] / cell[key]:.2f}" if key in cell else "-"  # noqa: E731
    columns = {
        "task": lambda cell: cell["task"],
        "n": shown("examples", "d"),
        "steps": shown("mean_steps", ".2f"),
        "same": lambda cell: {True: "yes", False: "NO"}.get(cell.get("same"), "-"),
        "nats apart": shown("apart", ".1e"),
        "one by one ex/s": rate("one_by_one_s"),
        "batched ex/s": rate("batched_s"),
        "times": shown("speedup", ".1f"),
    }
    print_table(columns, [*cells, whole])
    if right:
        reached = [cell["task"] for cell in (*cells, whole) if cell["speedup"] >= TARGET]
        print(f"at least {TARGET:g} times as fast: {', '.join(reached) or 'none'}")
    else:
        print("numbers differ: no times are shown")
    record = {
        "bench": "evaluate", "model": args.checkpoint or args.model, "parameters": model.num_parameters(),
        "rows": "real" if places else "made up", "all": whole, "tasks": cells, **environment(torch.device("cpu")),
    }  # fmt: skip
    if args.save and right:
        save("evaluate.jsonl", record)
    print(json.dumps(record))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
