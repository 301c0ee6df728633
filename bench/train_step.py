"""How long does one training iteration take, and where does its time go?

    python bench/train_step.py                            # base, batches as published, on a GPU; tiny on a CPU
    python bench/train_step.py --recipe small --implementations published eager --depth full
    python bench/train_step.py --save --plot train_step.png

An iteration is what hrm_model/training/loop.py does for an optimizer step, at the recipe's batch size and accumulation,
but for reading the data: forward and backward of each micro-batch, clipping, AdamW, zeroed gradients. That code belongs
to a run with files, so it is written once more here; a test holds both to the same bits. It is an iteration with
--halting none --depth random: the published code knows no objective for its halting head, and no explorers that are
unrolled for it, so with either there would be nothing to compare. The implementations:

    published   bench/published.py: the published behaviour, the baseline of every ratio
    eager       our model, every op the reference
    compile     the same, its blocks by torch.compile
    fused       our model, kernels where they can run (needs a CUDA device)

All get the same tokens and depths, which depend on the seed alone. The published code knows no depth of a row: it runs
each micro-batch for as long as the slowest row, the last of these steps with gradient. Losses and gradients are first
held to eager's: without dropout, whose masks differ; the published ones on a micro-batch all of whose rows run equally
long. If one differs nothing is timed. Then all take turns, a turn being as many iterations as see 16 rows. FLOPs are
those of the steps that ran, without recomputation; the ceiling is a large matrix product that takes its turn with them.
The last line is JSON. Exit status: 0; 1 where numbers differ or an implementation fails; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import hrm_kernels as ops
from bench.common import (
    environment,
    held_bytes,
    interleaved,
    large_product,
    peak_bytes,
    positive,
    print_table,
    save,
)
from bench.shares import draw_shares, print_shares
from bench.train_step_cases import (
    LIMITS,
    NAMES,
    QUANTITIES,
    Implementation,
    MicroBatch,
    check,
    make_batches,
)
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.atomic import read_json
from hrm_model.training.device import choose_device, choose_dtype
from hrm_model.training.flops import training_flops
from hrm_model.training.recipes import RECIPES, TrainConfig

PRODUCTS = 10
"""Large matrix products in their turn."""
BUSY = 1.5
"""Slowest over fastest turn from which the machine was not ours alone."""

# -- times -------------------------------------------------------------------------------------------------------------


def work_of(one: Implementation, steps: list[list[MicroBatch]]) -> dict[str, Any]:
    """Of an iteration; the turn that is run for it compiles and allocates what the next ones find."""
    batches = [batch for step in steps for batch in step]
    row_steps = [torch.as_tensor(n).tolist() for n in one.turn(steps)]
    flops = [
        training_flops(one.model.config, batch.ids_BT.shape[1], len(batch.depths), n)
        for batch, n in zip(batches, row_steps, strict=True)
    ]
    one.optimizer.zero_grad(set_to_none=True)
    return {"row_steps": sum(map(sum, row_steps)) / len(steps), "flops": sum(flops) / len(steps), "peak_bytes": None}


def figures(seconds: list[float], work: dict[str, Any], n_tokens: int, ceiling: float) -> dict[str, Any]:
    """What follows from the seconds of iterations of `n_tokens` tokens."""
    median = statistics.median(seconds)
    return work | {
        "ms": median * 1e3,
        "ms_least": min(seconds) * 1e3,
        "ms_most": max(seconds) * 1e3,
        "tokens_per_s": n_tokens / median,
        "row_steps_per_s": work["row_steps"] / median,
        "share_of_matmul_ceiling": work["flops"] / median / ceiling,
    }


class Attempts:
    """Runs of implementations that may fail: what failed, and the memory and the time that each implementation took."""

    def __init__(self, device: torch.device):
        self.device = device
        self.failed: dict[str, str] = {}
        self.held: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """What the call returns; None if it, or one before it of the same name, failed."""
        if name in self.failed:
            return None
        before, begin = held_bytes(self.device), time.perf_counter()
        try:
            return call()
        except Exception as error:  # the others are still worth having
            self.failed[name] = f"FAILED: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            print(f"{name:<11}{self.failed[name]}", flush=True)
            return None
        finally:
            self.seconds[name] = time.perf_counter() - begin
            self.held[name] += held_bytes(self.device) - before


def measure(names: list[str], start: HRMForCausalLM, run: TrainConfig, dtype, steps: list, repeats: int) -> dict:
    """Check, then time, then profile; prints what it finds and returns it."""
    device, built, checks, works, timed = start.device, {}, {}, {}, {}
    attempt = Attempts(device)
    result = {"timed": False, "checks": checks, "failed": attempt.failed, "implementations": timed}

    print(f"\n{'numbers against eager' + ', no dropout' * (run.dropout > 0):<44}", end="")
    print("".join(f"{quantity:>16}" for quantity in QUANTITIES))
    print(f"{'limits':<44}" + "".join(f"{limit:>16.0e}" for limit in LIMITS[dtype]), flush=True)
    for name in dict.fromkeys(("eager", *names)):  # eager's own second run shows how far chance takes it
        if one := attempt(name, partial(Implementation, name, start, run, dtype)):
            built[name] = one
            checks[name] = attempt(name, partial(check, built["eager"], one, steps[0]))
        if "eager" in attempt.failed:
            return result
    wrong = [name for name, found in checks.items() if found and not found["right"]]
    if wrong:
        print(f"error: {', '.join(wrong)} differs from eager: nothing was timed", flush=True)
        return result

    for name in names:
        if name in attempt.failed or (work := attempt(name, partial(work_of, built[name], steps))) is None:
            built.pop(name, None)
        else:
            works[name] = work
    if not works:
        return result
    left = (repeats + 2) * sum(attempt.seconds[name] for name in works)
    print(f"\n{repeats} turns of each are timed and one is profiled: at most some {left:.0f} seconds", flush=True)
    turns = {name: partial(built[name].turn, steps) for name in works}
    for name, turn in turns.items() if device.type == "cuda" else ():
        built[name].optimizer.zero_grad(set_to_none=True)
        works[name]["peak_bytes"] = peak_bytes(turn, device) + attempt.held[name]
    product, flops = large_product(dtype, device)
    times = interleaved(turns | {"": lambda: [product() for _ in range(PRODUCTS)]}, repeats, device)
    ceiling = result["matmul_ceiling_flops_per_s"] = PRODUCTS * flops / statistics.median(times.pop(""))
    n_tokens = sum(batch.ids_BT.numel() for batch in steps[0])
    for name, of_turns in times.items():
        timed[name] = figures([turn / len(steps) for turn in of_turns], works[name], n_tokens, ceiling)
    for name, record in timed.items():
        record["speedup_vs_published"] = timed["published"]["ms"] / record["ms"] if "published" in timed else None
        record["profile"] = found = attempt(name, partial(built[name].profile, steps))
        busy = found["seconds"] / len(steps) / record["ms"] * 1e3 if found and device.type == "cuda" else None
        record["device_busy"] = busy
    return result | {"timed": True}


# -- the command -------------------------------------------------------------------------------------------------------


def depth(text: str) -> str:
    """--depth."""
    kind, _, number = text.partition(":")
    if text not in ("random", "full") and not (kind == "fixed" and number.isdecimal() and int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of random, full, fixed:N (N at least 1)")
    return text


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, TrainConfig, HRMConfig]:
    """What was asked for; one line and exit status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, help="default: base with a GPU, tiny without")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json that replaces the recipe's model")
    parser.add_argument("--implementations", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="rows of a micro-batch; default the recipe's")
    parser.add_argument("--accumulation", type=positive, metavar="N", help="micro-batches; default the recipe's")
    parser.add_argument("--tokens", type=positive, metavar="T", help="tokens a row; default the model's block_size")
    parser.add_argument("--depth", type=depth, default="random", help="random (as training draws them), full, fixed:N")
    parser.add_argument("--repeats", type=positive, default=5, help="turns that are timed")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="autocast precision")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--save", action="store_true", help="append to bench/results/train_step.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw times and shares (.png, .svg, .pdf)")
    options = parser.parse_args(argv)
    try:
        device = choose_device(options.device)
        recipe = options.recipe or ("base" if device.type == "cuda" else "tiny")
        # what the baseline can do: no objective of the head, depths that are known in advance
        given: dict[str, Any] = {"halting": "none", "depth": "random"}
        given |= {key: getattr(options, key) for key in ("batch_size", "accumulation") if getattr(options, key)}
        run = TrainConfig.of_recipe(recipe, **given)
        config = run.model_config(read_json(options.config) if options.config else None)
        run = dataclasses.replace(run, depth=options.depth.replace("full", f"fixed:{config.hrm_max_steps}"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.tokens = options.tokens or config.block_size
    if options.tokens > config.block_size:
        parser.error(f"--tokens {options.tokens} is over block_size {config.block_size} of the model; give fewer")
    if run.fixed_depth > config.hrm_max_steps:
        parser.error(f"--depth {run.depth} is over hrm_max_steps {config.hrm_max_steps} of the model; give less")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: on {device.type} nothing can be timed; use cpu or cuda")
    if options.implementations == ["fused"] and (reason := why_not_fused(device)):
        parser.error(f"--implementations fused: {reason}")
    if options.plot and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no directory {options.plot.absolute().parent}; make it first")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib: pip install matplotlib")
    return options, device, run, config


def why_not_fused(device: torch.device) -> str | None:
    """None where kernels can run at their own speed, else the reason."""
    if device.type != "cuda":
        return f"needs a CUDA device; on {device.type} only Triton's interpreter runs kernels, whose time means nothing"
    return next(filter(None, (ops.why_no_kernel(op, device) for op in ops.OPS)), None)


def print_times(summary: dict[str, Any], device: torch.device) -> None:
    """A line for each implementation that was asked for."""

    def show(key: str, form: str, scale: float = 1.0, unit: str = "") -> Callable[[dict[str, Any]], str]:
        return lambda record: "not measured" if record[key] is None else format(record[key] * scale, form) + unit

    share = "MFU" if device.type == "cuda" else "share of ceiling"
    columns = {"": itemgetter("name")}
    columns |= {head: show(key, ".1f") for head, key in (("ms", "ms"), ("least", "ms_least"), ("most", "ms_most"))}
    columns |= {"tokens/s": show("tokens_per_s", ",.0f"), "row-steps": show("row_steps", ".1f")}
    columns |= {"row-steps/s": show("row_steps_per_s", ",.1f"), share: show("share_of_matmul_ceiling", ".1%")}
    columns |= {"peak GB": show("peak_bytes", ".2f", 1e-9), "device busy": show("device_busy", ".0%")}
    columns |= {"vs published": show("speedup_vs_published", ".2f", unit="x")}
    print_table(columns, [{"name": name} | record for name, record in summary["implementations"].items()])
    for name, why in {**summary["skipped"], **summary["failed"]}.items():
        print(f"{name}: {'' if name in summary['implementations'] else 'not measured: '}{why}")
    scatter = max(record["ms_most"] / record["ms_least"] for record in summary["implementations"].values())
    if scatter > BUSY:
        print(
            f"The slowest turn took {scatter:.1f} times the fastest: something else was running, do not trust ratios."
        )
    print(f"{share}: of {summary['matmul_ceiling_flops_per_s'] / 1e12:.3g} TFLOP/s, ", end="")
    print(f"a large {summary['dtype']} matrix product's in the same turns")


def plot(timed: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Times, and where they go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    figure.suptitle(title)
    left.bar(list(timed), [record["ms"] for record in timed.values()], color="gray")
    left.set_ylabel("ms an iteration")
    draw_shares(right, {name: record["profile"] for name, record in timed.items()})
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options, device, run, config = arguments(argv)
    dtype = choose_dtype(options.dtype, device)
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(run.seed)
    start = HRMForCausalLM(config).to(device)
    with torch.no_grad():  # the published loop shall run as many steps as it may
        start.hrm_core.q_head.weight.zero_()
        start.hrm_core.q_head.bias.copy_(torch.tensor([-5.0, 5.0]))
    steps = make_batches(run, options.tokens, config, device)
    depths = [batch.depths for batches in steps for batch in batches]
    deep, deepest = statistics.mean(map(statistics.mean, depths)), statistics.mean(map(max, depths))
    names = [name for name in NAMES if name in options.implementations]
    skipped = {"fused": reason} if "fused" in names and (reason := why_not_fused(device)) else {}
    with ops.use_backend("auto"):
        kernels = ops.describe(device)
    summary: dict[str, Any] = {
        "benchmark": "train_step",
        "environment": environment(device),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "run": dataclasses.asdict(run),
        "model": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels,
        "iterations_in_a_turn": len(steps),
        "mean_depth": deep,
        "mean_slowest_depth": deepest,
        "skipped": skipped,
    }
    title = (
        f"{summary['environment']['device']}, {summary['dtype']}, {run.recipe}: {start.num_parameters():,} parameters, "
        f"{run.accumulation} x {run.batch_size} rows x {options.tokens} tokens, depth {run.depth}"
    )
    print(
        f"{title}\nsteps of a row: mean {deep:.2f} of at most {config.hrm_max_steps}, of the slowest row of a", end=" "
    )
    print(f"micro-batch {deepest:.2f}; {len(steps)} iterations a turn", flush=True)
    summary |= measure([name for name in names if name not in skipped], start, run, dtype, steps, options.repeats)
    if summary["timed"]:
        print_times(summary, device)
        print_shares({name: record["profile"] for name, record in summary["implementations"].items()}, device)
        if options.plot:
            plot(summary["implementations"], options.plot, title)
        if options.save:
            print(f"appended to {save('train_step.jsonl', summary)}")
    print(json.dumps(summary))
    return int(not summary["timed"] or bool(summary["failed"]))


if __name__ == "__main__":
    sys.exit(main())
