"""hrm eval: benchmarks, perplexity of a text, and how deep the model thinks about them.

hrm eval CKPT --tasks hellaswag,piqa,winogrande,nq,arc_easy,arc_challenge,mmlu,gsm8k
hrm eval CKPT --tasks piqa --data piqa=valid.jsonl --compare gpt2,facebook/opt-125m --chart piqa.png
hrm eval CKPT --tasks hellaswag,piqa --data folder --halt-bias -2:2:0.5 --chart sweep.png
hrm eval CKPT --text README.md

--protocol published decides a row's depth from the whole row, as the published scores were made; causal decides it for
each prediction from what precedes it; lm-eval leaves prompts and arithmetic to lm-evaluation-harness. docs/evaluate.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .shared import add_model_arguments, load

HELP = "benchmarks and perplexity, in batches, with the steps that they take"
PROTOCOLS = ("published", "causal", "lm-eval")
MOST_BIASES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hrm eval`."""
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tasks", metavar="A,B",
        help="hellaswag, piqa, winogrande, nq, arc_easy, arc_challenge, mmlu, gsm8k, card (the model card's prompts)",
    )  # fmt: skip
    what.add_argument("--text", metavar="FILE", help="perplexity of a UTF-8 file; - is standard input")
    parser.add_argument(
        "--data", metavar="WHERE", nargs="+", default=[],
        help="folders with the tasks' files, or TASK=FILE (default: the Hugging Face hub)",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="published",
        help="who decides depth, and whose prompts (default: published); --text is always causal",
    )  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=int, help="the first N examples of each task (default: all)")
    parser.add_argument(
        "--compare", metavar="A,B", help="models of the Hugging Face hub, or folders, through the same protocol"
    )
    parser.add_argument(
        "--halt-bias", metavar="X|A:B:STEP",
        help="added to q_halt; higher halts earlier; a range is a sweep (default: the model's own)",
    )  # fmt: skip
    parser.add_argument("--max-steps", metavar="N", type=int, help="most steps of a row (default: the model's own)")
    parser.add_argument(
        "--stride", metavar="N", type=int, help="of --text, new tokens in each window (default: as many as it holds)"
    )
    parser.add_argument("--batch-tokens", metavar="N", type=int, help="tokens computed at a time (default: by device)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--chart", metavar="FILE.png", help="draw scores, steps and, of a sweep, one against the other")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --json and --chart")


def run(args: argparse.Namespace) -> int:
    """Evaluate; prints a table, and last a line of JSON.

    Raises:
        ValueError, OSError: one line that names what is wrong and the remedy, before anything is computed where it can
            be known by then.
    """
    biases = biases_of(args.halt_bias)
    _check(args, biases)
    report = _text(args, biases) if args.text is not None else _tasks(args, biases)
    line = json.dumps(report, allow_nan=False)
    if args.json:  # before the chart, which is drawn again more easily than this is computed
        _write(args.json, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(), args.overwrite)
    if args.chart:
        from ..evaluation.chart import chart

        title = f"{report['checkpoint']}: {', '.join(_names(args.tasks, '--tasks'))}, {args.protocol} protocol"
        _write(args.chart, chart(report["results"], title), args.overwrite)
        print(f"wrote {args.chart}")
    print(line)
    return 0


def biases_of(given: str | None) -> list[float | None]:
    """The biases that --halt-bias asks for: none, a number, or from A to B in steps, both ends included.

    Raises:
        ValueError: no numbers, a step of 0 or in the wrong direction, or more than MOST_BIASES.
    """
    if given is None:
        return [None]
    try:
        numbers = [float(part) for part in given.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or any(map(math.isnan, numbers)):
        raise ValueError(f"--halt-bias {given} is neither a number nor a range like -2:2:0.5")
    if len(numbers) == 1:
        return [numbers[0]]
    begin, end, step = numbers
    if not all(map(math.isfinite, numbers)) or step == 0 or (end - begin) / step < 0:
        raise ValueError(f"--halt-bias {given} goes nowhere: a range is FROM:TO:STEP with a finite step towards TO")
    n = math.floor((end - begin) / step + 1e-9) + 1
    if n > MOST_BIASES:
        raise ValueError(f"--halt-bias {given} has {n} values, at most {MOST_BIASES} are taken; take a larger step")
    return [round(begin + i * step, 10) for i in range(n)]


def _check(args: argparse.Namespace, biases: list[float | None]) -> None:
    for name in ("limit", "max_steps", "stride", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.text is not None:
        for flag in ("data", "limit", "chart"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} is of --tasks, and --text was given; leave one of them out")
        if args.protocol != "published":
            raise ValueError(f"--protocol {args.protocol} is of --tasks; --text is always causal")
    elif args.stride is not None:
        raise ValueError("--stride is of --text, and --tasks was given; leave one of them out")
    if args.protocol == "lm-eval":
        if args.compare:
            raise ValueError("--compare goes with --protocol published and causal; lm-eval runs other models itself")
        if args.chart or len(biases) > 1:
            raise ValueError("--chart and a sweep go with --protocol published and causal; leave them out with lm-eval")
    for flag, path in (("--json", args.json), ("--chart", args.chart)):
        if path is None:
            continue
        if not Path(path).parent.is_dir():
            raise ValueError(f"{flag} {path}: {Path(path).parent} is no directory; make it first")
        if os.path.isdir(path):
            raise ValueError(f"{flag} {path} is a directory; name a file in it")
        if os.path.lexists(path) and not args.overwrite:
            raise ValueError(f"{flag} {path} already exists; choose another name or pass --overwrite")
    if args.chart and args.json and os.path.realpath(args.chart) == os.path.realpath(args.json):
        raise ValueError(f"--json and --chart are both {args.chart}; give each a file of its own")
    if args.chart:
        from ..evaluation.chart import check_matplotlib

        if not args.chart.lower().endswith(".png"):
            raise ValueError(f"--chart {args.chart} must end in .png")
        check_matplotlib()


def _names(given: str, what: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise ValueError(f"{what} names nothing; give names with commas between them")
    return names


def _scorers(args: argparse.Namespace, rule: str, bias: float | None) -> tuple[Any, list[Any], str]:
    """(our scorer at a bias, those to compare with, our name)."""
    from ..evaluation.hrm_scorer import HRMScorer

    model, tokenizer = load(args)
    name = Path(os.path.abspath(args.ckpt)).name
    options = {"max_steps": args.max_steps, "halt_bias": bias, "batch_tokens": args.batch_tokens}
    own = HRMScorer(model, tokenizer, name, rule=rule, **options)
    others = []
    if args.compare:
        import torch

        from ..evaluation.hf_scorer import HFScorer

        size = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
        others = [
            HFScorer(n, model.device, getattr(torch, args.dtype), **size) for n in _names(args.compare, "--compare")
        ]
    return own, others, name


def _tasks(args: argparse.Namespace, biases: list[float | None]) -> dict[str, Any]:
    from ..evaluation.data import places_of
    from ..evaluation.tasks import TASKS

    names = _names(args.tasks, "--tasks")
    unknown = [name for name in names if name not in TASKS]
    if unknown and args.protocol != "lm-eval":
        import difflib

        near = difflib.get_close_matches(unknown[0], TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no task {unknown[0]!r}; known are {', '.join(TASKS)}{hint}")
    known = [name for name in names if name in TASKS]
    places = places_of(args.data, known) if args.data else {}
    if args.protocol == "lm-eval":
        return _harness(args, names, places, biases[0])
    from ..evaluation.data import examples
    from ..evaluation.report import table
    from ..evaluation.results import evaluate, sweep

    own, others, name = _scorers(args, "row" if args.protocol == "published" else "prefix", biases[0])
    found = {task: examples(TASKS[task], places.get(task), args.limit) for task in names}
    results = []
    for scorer in (own, *others):
        swept = biases if scorer is own and len(biases) > 1 else [scorer.halt_bias]
        for task, (rows, left_out) in found.items():
            with _progress(len(rows), f"{scorer.name} {task}", " examples") as progress:
                asked = TASKS[task], rows, left_out, progress.update
                of_task = sweep(own, swept, *asked) if len(swept) > 1 else [evaluate(scorer, *asked)]
            results += [one.to_dict() | {"halt_bias": bias} for one, bias in zip(of_task, swept, strict=True)]
    for line in table(results):
        print(line)
    for task, (_, left_out) in found.items():
        if left_out:
            print(f"{task}: {left_out} rows without an example were left out, as published")
    return {
        "checkpoint": name, "protocol": args.protocol, "max_steps": own.max_steps, "limit": args.limit,
        "results": [_finite(result) for result in results],
    }  # fmt: skip


def _harness(args: argparse.Namespace, names: Sequence[str], places: dict, bias: float | None) -> dict[str, Any]:
    from ..evaluation.harness_command import check_installed

    check_installed()
    from ..evaluation import harness

    own, _, name = _scorers(args, "prefix", bias)
    begin = time.perf_counter()
    rows = harness.evaluate(own, names, places, args.limit)
    for row in rows:
        stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        print(f"{row['task']:<20} {row['metric']:<28} {row['value']:.4f}{stderr}")
    return {"checkpoint": name, "protocol": "lm-eval", "seconds": time.perf_counter() - begin, "results": rows}


def _text(args: argparse.Namespace, biases: list[float | None]) -> dict[str, Any]:
    from ..evaluation.perplexity import report
    from ..text_input import read_text

    try:
        text = read_text(args.text)
    except OSError as error:
        raise OSError(f"cannot read --text {args.text}: {error.strerror or error}; give a UTF-8 file") from error
    if not text:
        raise ValueError(f"--text {args.text} is empty; give at least one character")
    own, others, name = _scorers(args, "prefix", biases[0])
    swept = [own.with_bias(bias) for bias in biases] if len(biases) > 1 else [own]
    results = []
    for scorer in (*swept, *others):
        ids = scorer.encode(text)
        begin = time.perf_counter()
        with _progress(len(ids), scorer.name, " tokens") as progress:
            rolled = scorer.rolling(ids, args.stride, progress.update)
        seconds = time.perf_counter() - begin
        found = report(scorer.name, rolled, len(text.encode("utf-8")), scorer.max_steps, seconds)
        results.append(_finite(found | {"halt_bias": scorer.halt_bias}))
        print(_text_line(results[-1]))
    return {"checkpoint": name, "text": "-" if args.text == "-" else Path(args.text).name, "results": results}


def _text_line(found: dict[str, Any]) -> str:
    stderr = "" if found["nats_stderr"] is None else f" ± {found['nats_stderr']:.4f}"
    line = (
        f"{found['model']}: perplexity {found['perplexity']:.3f}, {found['nats_per_token']:.4f} nats a token"
        f"{stderr}, "
        f"{found['bits_per_byte']:.4f} bits a byte, {found['tokens']:,} tokens"
    )
    steps = found.get("steps")
    if steps is None:
        return line
    from ..evaluation.report import sparkline

    rho = steps["rank_correlation_with_loss"]
    return (
        f"{line}; halt bias {found['halt_bias']}, steps {steps['mean']:.3f} (sd {steps['sd']:.3f}), "
        f"rank correlation with the loss {'undefined: constant' if rho is None else f'{rho:+.3f}'}, "
        f"1..{len(steps['histogram'])} {sparkline(steps['histogram'])}"
    )


def _progress(total: int, what: str, unit: str):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None, file=sys.stderr)


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    """Infinite biases as text, which JSON has no number for."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in found.items()
    }


def _write(path: str, content: bytes, overwrite: bool) -> None:
    from ..atomic import write_file

    try:
        write_file(Path(path), content, overwrite)
    except FileExistsError as error:
        raise ValueError(f"{path} has come into being meanwhile; choose another name") from error
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; check the disk and its permissions") from error
