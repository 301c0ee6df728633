"""What does the next token cost: over the cache, and by computing the whole window again?

    python bench/generate.py --quick                  # small model, 64 tokens, half a minute on two CPU cores
    python bench/generate.py                          # base, contexts of 64, 256 and 512 tokens, batches of 1 and 8
    python bench/generate.py --contexts 512 --batches 1 --depths 4 --varying '1-7,1|16,1-16' --plot generate.png

Rows of random tokens are extended by one token each until the context is full, which is never over the window. How
many steps a token takes is given beforehand, so that all sides do the same: --depths for all tokens, and --varying
drawn for every row, "1-7" uniformly, "1|16" one of them; draws are a function of the seed, the row and the token. They
are shown for both kinds of depth_update: by token (a draw for every token, so that earlier tokens have to be run deeper
when the row goes deeper) and by turn (a row's first draw is kept). Implementations, run in turns:

    cached      extend() over an HRMCache (hrm_model/incremental.py)
    recompute   our forward pass over the whole row, logits of every position as it gives them; the baseline
    published   bench/published.py over the whole row, where all tokens take the same depth: it knows no other
    compile     recompute, its blocks by torch.compile; only with --compile

At every size, before the tokens are timed, the cache's logits and steps are held to the recomputed ones, at several
tokens of each schedule, those where depth jumps most among them; then once more at each token that is recomputed for
its time. If one differs, no time is shown. Tokens per second are rows over the mean time of a token: over the cache of
all that count, recomputed of those that --seconds allows, chosen to have the same mean depth. Nobody samples.

The steady state: what a schedule costs once for the prompt is done before, and shown apart: running it deeper
(backfill), and the output blocks at another depth (refill). The tokens that follow, up to four for each depth of the
schedule, do not count yet. All backfill and refill that the schedule causes from token to token is in those that count.
Applications are those of a block to a token, as the cache counts them, for each token of each row.

One JSON line is appended to bench/results/generate.jsonl, and the last line is JSON. Exit status: 0; 1 where numbers
differ, an implementation fails, or with --strict a target is missed; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hrm_kernels as ops
from bench.common import environment, positive, print_table, save
from bench.generate_cases import Bench, Schedule, applications, mean_depth, within
from bench.train_step import why_not_fused
from hrm_model import HRMConfig, HRMForCausalLM, load_model
from hrm_model.cache import HRMCache
from hrm_model.checkpoint import CheckpointError
from hrm_model.config import PRESETS
from hrm_model.incremental import extend
from hrm_model.training.device import choose_device, choose_dtype

TARGETS = {1: 15.0, 8: 40.0}
"""Batch -> times as many tokens a second as recomputed: base model, 512 tokens, the first --varying by token."""
PREFILL_TARGET = 1.0
"""Time of a forward pass over that of a prefill."""
TARGET_CONTEXT = 512
SCHEDULES = ("1-7", "1|16", "1-16")
COUNTED_ROWS = {"fixed": 1, "token": 2, "turn": 64}
"""Rows of a text whose applications are counted: one with a depth of its own for all tokens says little of the mean."""

# -- whole texts ------------------------------------------------------------------------------------------------------


def whole_text(config: HRMConfig, schedule: Schedule, n_tokens: int, n_rows: int, seed: int = 0) -> dict[str, Any]:
    """Mean depth, and block applications for each token, of rows generated from their first token to their n-th.

    Run, not reckoned: over a cache of a model that is as deep, with one narrow block in the place of the input blocks,
    of a step and of the output blocks. Each application of it counts for as many as it stands for.
    """
    one = {"n_input_layers": 1, "n_output_layers": 1, "hrm_H_layers": 1, "hrm_L_layers": 0}
    one |= {"hrm_H_cycles": 1, "hrm_L_cycles": 1, "hrm_max_steps": config.hrm_max_steps}
    narrow = HRMConfig(vocab_size=1, n_embd=2, mlp_hidden=2, n_head=1, n_kv_head=1, block_size=n_tokens, **one)
    model = HRMForCausalLM(narrow).eval()
    cache = HRMCache(model, n_rows, n_tokens, max(schedule.choices))
    depths = schedule.depths(n_rows, n_tokens, seed)
    size = 1 if schedule.mode == "token" else n_tokens  # with one depth a row, however many come at once
    for t in range(0, n_tokens, size):
        extend(model, cache, {row: [0] * size for row in range(n_rows)}, force_steps=depths[t])
    work, n = cache.work, n_rows * n_tokens
    counts = {
        "input": work.input * config.n_input_layers / n,
        "core": work.core * config.blocks_per_step / n,
        "output": work.output * config.n_output_layers / n,
    }
    return {"mean_depth": mean_depth(depths, range(n_tokens)), "applications": sum(counts.values()), "of": counts}


def counts(config: HRMConfig, varying: list[Schedule], n_tokens: int) -> list[dict[str, Any]]:
    """Applications of whole texts, at every fixed depth and for schedules, the standard ones among them."""
    todo = [Schedule((depth,)) for depth in range(1, config.hrm_max_steps + 1)]
    for schedule in dict.fromkeys([*(within(Schedule.parse(text), config) for text in SCHEDULES), *varying]):
        todo += [schedule._replace(update=update) for update in ("token", "turn")] if schedule.choices[1:] else []
    found = []
    for schedule in todo:
        result = whole_text(config, schedule, n_tokens, COUNTED_ROWS[schedule.mode])
        record = {"depth": schedule.name, "depth_update": schedule.mode, "tokens": n_tokens} | result
        record["applications_of_mean_depth"] = applications(config, result["mean_depth"])
        record["applications_of_deepest"] = applications(config, max(schedule.choices))
        found.append(record)
    return found


# -- targets -----------------------------------------------------------------------------------------------------------


def targets(bench: Bench) -> list[tuple[str, float, float]]:
    """(what, measured, at least) of the base model at 512 tokens."""
    if bench.config != HRMConfig.preset("base"):
        return []
    aimed = bench.options.varying[0].name, "token"
    cells = [cell for cell in bench.cells if (cell["depth"], cell["depth_update"]) == aimed]
    found = [(cell, f"{aimed[0]} by token", cell["speedup"], TARGETS.get(cell["batch"])) for cell in cells]
    found += [(once, "prefill", once["prefill"]["speedup"], PREFILL_TARGET) for once in bench.once]
    return [
        (f"batch {where['batch']}, {what}", measured, least)
        for where, what, measured, least in found
        if where["context"] == TARGET_CONTEXT and least
    ]


# -- what is printed ---------------------------------------------------------------------------------------------------


def _shown(key: str, form: str, unit: str = ""):
    return lambda record: "-" if record.get(key) is None else format(record[key], form) + unit


def _depth(record: dict[str, Any]) -> str:
    return record["depth"] if record["depth_update"] == "fixed" else f"{record['depth']} by {record['depth_update']}"


COUNTS = {
    "mean depth": _shown("mean_depth", ".2f"),
    "applications": _shown("applications", ".1f"),
    "of mean depth": _shown("applications_of_mean_depth", ".1f"),
    "of deepest": _shown("applications_of_deepest", ".1f"),
}
SIZE = {"context": _shown("context", "d"), "batch": _shown("batch", "d")}
CELLS = {
    **SIZE,
    "depth": _depth,
    "recompute tok/s": _shown("recompute_tokens_per_s", ".3g"),
    "published tok/s": _shown("published_tokens_per_s", ".3g"),
    "compile tok/s": _shown("compile_tokens_per_s", ".3g"),
    "cached tok/s": _shown("cached_tokens_per_s", ".3g"),
    "ratio": _shown("speedup", ".1f", "x"),
    **COUNTS,
    "tokens timed": lambda cell: f"{cell['tokens_counted']}, {cell['tokens_recomputed']}",
}


def _of(part: str, show: Callable[[dict[str, Any]], str]):
    return lambda once: show(once.get(part, {}))


ONCE = {
    **SIZE,
    "cache MB": lambda once: f"{once['cache_bytes'] / 1e6:.0f}",
    "prefill: depth": _of("prefill", _shown("depth", "d")),
    "cached ms": _of("prefill", _shown("cached_ms", ".0f")),
    "forward ms": _of("prefill", _shown("recompute_ms", ".0f")),
    "ratio": _of("prefill", _shown("speedup", ".2f", "x")),
    "prompt": _shown("prompt", "d"),
    "at 1 step, ms": lambda once: f"{once['first_uses'][0]['ms']:.0f}",
    "then deeper": lambda once: f"1 to {once['first_uses'][-1]['to']}",
    "in all, ms": lambda once: f"{sum(use['ms'] for use in once['first_uses'][1:]):.0f}",
    "a token, packed ms": _of("weights", _shown("packed_ms", ".1f")),
    "not packed ms": _of("weights", _shown("plain_ms", ".1f")),
}
DEVICE = {
    **SIZE,
    "us a step": _of("device", lambda found: _shown("us", ".1f")({"us": found["step_ms"] and found["step_ms"] * 1e3})),
    "depth": _of("device", _shown("depth", "d")),
    "cached: kernels": _of("device", _shown("cached_kernels", "d")),
    "waits": _of("device", _shown("cached_host_waits", "d")),
    "recompute: kernels": _of("device", _shown("recompute_kernels", "d")),
    "its waits": _of("device", _shown("recompute_host_waits", "d")),
}


def report(bench: Bench, texts: list[dict[str, Any]], aims: list[tuple[str, float, float]]) -> None:
    """Everything that was measured."""
    print(
        "\nsteady state; tokens timed: over the cache, recomputed; applications of a block for each token of each row,"
    )
    print("beside those of a token that is run once, at the mean depth or at the deepest")
    hidden = {name for name in ("published", "compile") if not any(cell[f"{name}_ms"] for cell in bench.cells)}
    print_table({head: show for head, show in CELLS.items() if head.split()[0] not in hidden}, bench.cells)
    print("\nonce: a prompt as long as the context against a forward pass over it; the prompt of the table above, and")
    print("running it deeper, with its output blocks at every depth that the table needs")
    hidden = set() if any("weights" in once for once in bench.once) else {"a token, packed ms", "not packed ms"}
    print_table({head: show for head, show in ONCE.items() if head not in hidden}, bench.once)
    if bench.device.type == "cuda":
        print("\nof the device, for the last token of every row")
        print_table(DEVICE, bench.once)
    if texts:
        print(f"\napplications for each token of whole texts of {texts[0]['tokens']} tokens, from the first on")
        print_table({"depth": _depth} | COUNTS, texts)
    print()
    for what, measured, least in aims:
        verdict = "met" if measured >= least else "MISSED"
        print(f"target, context {TARGET_CONTEXT}, {what}: {measured:.2f}x, at least {least:g}x: {verdict}")
    if not aims:
        print(f"targets: not measured, they are the base model's at a context of {TARGET_CONTEXT}")


MARKS = {"fixed": "o", "token": "x", "turn": "+"}


def plot(cells: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratio against context, and tokens a second against mean depth at the longest context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    figure.suptitle(title)
    for i, batch in enumerate(dict.fromkeys(cell["batch"] for cell in cells)):
        mine = [cell for cell in cells if cell["batch"] == batch]
        kinds = dict.fromkeys(map(_depth, mine))
        for kind, mark in zip(kinds, itertools.cycle("osvD^x*P"), strict=False):
            points = [(cell["context"], cell["speedup"]) for cell in mine if _depth(cell) == kind]
            label = f"{kind}, batch {batch}"
            left.plot(*zip(*points, strict=True), f"{mark}-", color=f"C{i}", label=label, markersize=4)
        longest = max(cell["context"] for cell in mine)
        for name, line in (("cached", "-"), ("recompute", "--")):
            points = sorted(
                (cell["mean_depth"], cell[f"{name}_tokens_per_s"], cell["depth_update"])
                for cell in mine
                if cell["context"] == longest
            )
            fixed = [(depth, speed) for depth, speed, update in points if update == "fixed"]
            right.plot(*zip(*fixed, strict=True), f"o{line}", color=f"C{i}", label=f"{name}, batch {batch}")
            for depth, speed, update in points:
                right.plot(depth, speed, MARKS[update], color=f"C{i}", markersize=8)
    for update in ("token", "turn"):
        right.plot([], [], MARKS[update], color="gray", label=f"drawn by {update}")
    left.set(xlabel="context, tokens", ylabel="cached over recomputed", xlim=(0, None), ylim=(0, None))
    right.set(xlabel=f"mean depth, context {longest}", ylabel="tokens/s", yscale="log", xlim=(0, None))
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# -- the command -------------------------------------------------------------------------------------------------------

DEFAULTS = {"model": "base", "contexts": [64, 256, 512], "batches": [1, 8], "depths": [1, 4, 16]}
DEFAULTS |= {"varying": [Schedule.parse("1-7")], "tokens": 64, "seconds": 20.0}
QUICK = {"model": "small", "contexts": [64], "batches": [1, 4], "depths": [1, 4]}
QUICK |= {"varying": [Schedule.parse("1-4")], "tokens": 6, "seconds": 0.3}


def seconds(text: str) -> float:
    """--seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; give 0 or more")
    return value


def schedules(text: str) -> list[Schedule]:
    """--varying."""
    try:
        return [Schedule.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, HRMForCausalLM]:
    """What was asked for, and the model; one line and exit status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", choices=list(PRESETS), help="of random weights; default base")
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a trained model")
    parser.add_argument("--contexts", type=positive, nargs="+", metavar="T", help="default 64 256 512, in the window")
    parser.add_argument("--batches", type=positive, nargs="+", metavar="B", help="default 1 8")
    parser.add_argument("--depths", type=positive, nargs="+", metavar="N", help="for all tokens; default 1 4 16")
    parser.add_argument("--varying", type=schedules, metavar="A-B,A|B", help="drawn; default 1-7")
    parser.add_argument("--tokens", type=positive, metavar="N", help="that count where depth varies; default 64")
    parser.add_argument("--seconds", type=seconds, metavar="S", help="for the recomputed tokens of a cell; default 20")
    parser.add_argument("--quick", action="store_true", help="small, 64 tokens of context, depths 1 and 4, few tokens")
    parser.add_argument("--compile", action="store_true", help="recompute by torch.compile too")
    parser.add_argument("--fused", action="store_true", help="kernels where they can run (needs a CUDA device)")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and states"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--no-save", action="store_true", help="append nothing to bench/results/generate.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios and tokens/s (.png, .svg, .pdf)")
    options = parser.parse_args(argv)
    usual = QUICK if options.quick else DEFAULTS
    try:
        device = choose_device(options.device)
        if options.checkpoint:
            model, config = load_model(options.checkpoint, device)
        else:
            options.model = options.model or usual["model"]
            config = HRMConfig.preset(options.model)
    except (ValueError, OSError, CheckpointError) as error:
        parser.error(str(error))
    most = config.hrm_max_steps
    usual = usual | {"contexts": sorted({min(n, config.block_size) for n in usual["contexts"]})}
    usual |= {"depths": [min(n, most) for n in usual["depths"]]}
    usual |= {"varying": [within(schedule, config) for schedule in usual["varying"]], "model": None}
    for key, value in usual.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    options.depths = sorted(set(options.depths))
    if max(options.contexts) > config.block_size:
        parser.error(f"--contexts {max(options.contexts)} is over block_size {config.block_size} of the model")
    if min(options.contexts) < 8:
        parser.error(
            f"--contexts {min(options.contexts)}: at least 8 tokens are needed for a prompt and what follows it"
        )
    deepest = max(*options.depths, *(max(schedule.choices) for schedule in options.varying))
    if deepest > most:
        parser.error(f"depth {deepest} is over hrm_max_steps {most} of the model; give less")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: on {device.type} nothing can be timed; use cpu or cuda")
    if options.fused and (reason := why_not_fused(device)):
        parser.error(f"--fused: {reason}")
    if options.plot and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no directory {options.plot.absolute().parent}; make it first")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib: pip install matplotlib")
    if device.index is not None:
        torch.cuda.set_device(device)
    if not options.checkpoint:
        torch.manual_seed(0)
        model = HRMForCausalLM(config)
    return options, model.to(device, choose_dtype(options.dtype, device)).eval()


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options, model = arguments(argv)
    config, device = model.config, model.device
    named = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record: dict[str, Any] = {
        "benchmark": "generate",
        "environment": environment(device),
        "options": named | {"varying": [schedule.name for schedule in options.varying]},
        "model": config.to_dict(),
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    with ops.use_backend("auto" if options.fused else "reference"):
        record["kernels"] = ops.describe(device)
        bench = Bench(model, options)
        name = options.model or options.checkpoint
        title = f"{record['environment']['device']}, {record['dtype']}, {name}: {model.num_parameters():,} parameters"
        print(f"{title}, at most {config.hrm_max_steps} steps")
        sizes = list(itertools.product(options.contexts, options.batches))
        begin, done = time.perf_counter(), 0
        for i, (context, batch) in enumerate(sizes):
            left = sum(t * b for t, b in sizes[i:]) * (time.perf_counter() - begin) / done / 60 if done else 0
            progress = f"{i + 1} of {len(sizes)}" + (f", some {left:.1f} minutes left" if done else "")
            print(f"\ncontext {context}, batch {batch} ({progress})", flush=True)
            bench.size(context, batch)
            done += context * batch
            if bench.wrong:
                break
    shown = bool(bench.cells) and not bench.wrong
    texts = counts(config, options.varying, max(options.contexts)) if shown else []
    aims = targets(bench) if shown else []
    missed = [
        f"{what}: {measured:.2f}x, at least {least:g}x" for what, measured, least in aims if not measured >= least
    ]
    if shown:
        report(bench, texts, aims)
    else:
        print(f"error: {'; '.join(f'{what}: wrong' for what in bench.wrong) or 'nothing could be measured'}")
    if options.plot and shown:
        plot(bench.cells, options.plot, title)
        print(f"drawn: {options.plot}")
    for what, why in {**bench.skipped, **bench.failed}.items():
        print(f"not measured: {what}: {why}")
    found = {"cells": bench.cells, "once": bench.once} if shown else {"cells": [], "once": []}
    record |= {"timed": shown, "wrong": bench.wrong, "failed": bench.failed, "skipped": bench.skipped}
    record |= found | {"texts": texts, "targets_missed": missed}
    if shown and not options.no_save:
        print(f"appended to {save('generate.jsonl', record)}")
    print(json.dumps(record))
    return int(not shown or bool(bench.failed) or (options.strict and bool(missed)))


if __name__ == "__main__":
    sys.exit(main())
