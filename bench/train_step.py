"""How long does one training iteration take, and where does its time go?

    python bench/train_step.py                            # base, batches as published, on a GPU; tiny on a CPU
    python bench/train_step.py --recipe small --implementations published eager --depth full
    python bench/train_step.py --save --plot train_step.png

An iteration is what hrm_model/training/loop.py does for an optimizer step, at the recipe's batch size and accumulation,
but for reading the data: forward and backward of each micro-batch, clipping, AdamW, zeroed gradients. That code belongs
to a run with files, so it is written once more here; a test holds both to the same bits. The implementations:

    published   bench/published.py: the published behaviour, the baseline of every ratio
    eager       our model, every op the reference
    compile     the same, its blocks by torch.compile
    fused       our model, kernels where they can run (needs a CUDA device)

All get the same tokens and depths, which depend on the seed alone. The published code knows no depth of a row: it runs
each micro-batch for as long as the slowest row, the last of these steps with gradient. Losses, the gradient and its norm
are first held to eager's: without dropout, whose masks differ, and of the published code on a micro-batch all of whose
rows run equally long. If one differs nothing is timed. Then all take turns; a turn is as many iterations as see 16 rows.
Products are counted for the steps that ran, recomputation is not, and compared with a large matrix product timed in the
same run. The last line is JSON. Exit status: 0; 1 where numbers differ or an implementation fails; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import hrm_kernels as ops
from bench.common import environment, interleaved, matmul_ceiling, peak_bytes, positive, save
from bench.published import PublishedHRM
from bench.shares import draw_shares, print_shares, profile_shares
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.atomic import read_json
from hrm_model.model import PUBLISHED_STEP_PENALTY
from hrm_model.training.device import autocast, choose_device, choose_dtype, compile_blocks
from hrm_model.training.flops import training_flops
from hrm_model.training.loop import DEPTH_STREAM
from hrm_model.training.optim import build_optimizer, clip_gradients, learning_rate
from hrm_model.training.recipes import RECIPES, TrainConfig
from hrm_model.training.sampler import keyed_integers

NAMES = ("published", "eager", "compile", "fused")
ROWS_IN_A_TURN = 16
"""At least: depths of fewer rows say little of the mean."""

QUANTITIES = ("loss", "gradient norm", "worst parameter's gradient")
LIMITS = {torch.float32: (1e-5, 1e-4, 1e-3), torch.bfloat16: (2e-4, 5e-3, 5e-2)}
"""dtype -> relative difference from eager that is allowed in each of QUANTITIES."""
SMALL = 1e-4


class MicroBatch(NamedTuple):
    """Tokens and targets [B, T], and the steps of each row."""

    ids_BT: Tensor
    targets_BT: Tensor
    depths: list[int]


class Implementation:
    """A copy of the model with its own optimizer, and one way to run them."""

    def __init__(self, name: str, start: HRMForCausalLM, run: TrainConfig, dtype: torch.dtype):
        self.name, self.run, self.dtype = name, run, dtype
        self.model = copy.deepcopy(start)
        if name == "compile":
            compile_blocks(self.model)
        self.optimizer = build_optimizer(self.model, run)
        self.backend = "auto" if name == "fused" else "reference"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Any]:
        """(loss, row-steps without and with gradient)."""
        if self.name != "published":
            out = self.model(batch.ids_BT, batch.targets_BT, force_steps=batch.depths, gradient=self.run.gradient)
            return out.loss, out.row_steps
        slowest = max(batch.depths)
        self.model.config = dataclasses.replace(self.model.config, hrm_max_steps=slowest)
        out = PublishedHRM(self.model)(batch.ids_BT, batch.targets_BT)
        n_rows = len(batch.depths)
        return out.loss - PUBLISHED_STEP_PENALTY * slowest, (n_rows * (slowest - 1), n_rows)

    def accumulate(self, batches: list[MicroBatch]) -> tuple[list[Tensor], list]:
        """Fresh gradients of the mean of the micro-batches' losses; returns losses and row-steps of each."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, row_steps = [], []
        with ops.use_backend(self.backend):
            for batch in batches:
                with autocast(batch.ids_BT.device, self.dtype):
                    loss, n = self.forward(batch)
                (loss / len(batches)).backward()
                losses.append(loss.detach())
                row_steps.append(n)
        return losses, row_steps

    def iteration(self, step: int, batches: list[MicroBatch]) -> list:
        """Optimizer step number `step`; returns the row-steps of each micro-batch.

        Raises:
            FloatingPointError: a loss or the gradient is not finite; parameters are those before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.run)
        self.model.train()
        losses, row_steps = self.accumulate(batches)
        norm = clip_gradients(self.model, self.run.grad_clip)
        if not all(map(math.isfinite, torch.stack([*losses, norm]).tolist())):  # where training, too, waits
            raise FloatingPointError(f"a loss or the gradient of iteration {step} is not finite")
        self.optimizer.step()
        return row_steps

    def turn(self, steps: list[list[MicroBatch]]) -> list:
        """Consecutive iterations; row-steps of each micro-batch."""
        return [n for step, batches in enumerate(steps) for n in self.iteration(step, batches)]

    def bytes(self) -> int:
        """What parameters and optimizer hold."""
        held = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *held))


def make_batches(run: TrainConfig, n_tokens: int, config: HRMConfig, device: torch.device) -> list[list[MicroBatch]]:
    """Micro-batches of each iteration of a turn: random tokens, and the depths of a training run's first samples."""
    generator = torch.Generator().manual_seed(run.seed)

    def micro_batch(number: int) -> MicroBatch:
        tokens = torch.randint(0, config.vocab_size, (run.batch_size, n_tokens + 1), generator=generator).to(device)
        samples = range(number * run.batch_size, (number + 1) * run.batch_size)
        depths = keyed_integers(run.seed, samples, 1, config.hrm_max_steps, DEPTH_STREAM).tolist()
        if run.fixed_depth:
            depths = [run.fixed_depth] * run.batch_size
        return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), depths)

    n_steps, n = math.ceil(ROWS_IN_A_TURN / (run.batch_size * run.accumulation)), run.accumulation
    return [[micro_batch(step * n + i) for i in range(n)] for step in range(n_steps)]


# -- numbers -----------------------------------------------------------------------------------------------------------


def numbers(implementation: Implementation, batches: list[MicroBatch]) -> tuple[list[float], list[Tensor]]:
    """(losses, the gradient of each parameter) without dropout."""
    model = implementation.model.train(implementation.run.dropout == 0)
    losses, _ = implementation.accumulate(batches)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    implementation.optimizer.zero_grad(set_to_none=True)
    return [loss.item() for loss in losses], gradients


def differences(found: tuple, expected: tuple) -> tuple[float, float, float]:
    """Of QUANTITIES, relative; a parameter's gradient counts as at least SMALL of the whole."""
    loss = max(abs(a - b) / abs(b) for a, b in zip(found[0], expected[0], strict=True))
    own, norms = ([g.norm().item() for g in gradients] for gradients in (found[1], expected[1]))
    norm = math.hypot(*norms)
    apart = [(a - b).norm().item() for a, b in zip(found[1], expected[1], strict=True)]
    worst = float(np.max([d / max(n, SMALL * norm) for d, n in zip(apart, norms, strict=True)]))  # keeps a nan
    return loss, abs(math.hypot(*own) - norm) / norm, worst


def check(eager: Implementation, other: Implementation, batches: list[MicroBatch]) -> dict[str, Any]:
    """How far `other` is from eager, beside the limits; prints it."""
    name = other.name
    if name == "published":  # where its rows and ours run equally long
        batches = [batches[0]._replace(depths=[max(batches[0].depths)] * len(batches[0].depths))]
    found = differences(numbers(other, batches), numbers(eager, batches))
    limits = LIMITS[eager.dtype]
    right = all(difference <= limit for difference, limit in zip(found, limits, strict=True))
    where = f"one micro-batch, all rows {batches[0].depths[0]} steps" if name == "published" else "a whole iteration"
    parts = (f"{q} {d:.1e} (limit {limit:.0e})" for q, d, limit in zip(QUANTITIES, found, limits, strict=True))
    print(f"{name:<10}{where}: {', '.join(parts)}{'' if right else '  WRONG'}", flush=True)
    finite = [d if math.isfinite(d) else None for d in found]
    return {"right": right, "differences": dict(zip(QUANTITIES, finite, strict=True)), "where": where}


# -- times -------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Of a turn."""

    row_steps: int
    flops: float
    peak_bytes: int | None
    """With what the model and the optimizer hold; None where it cannot be read."""
    seconds: float
    """Of an untimed turn."""


def warm_up(one: Implementation, steps: list[list[MicroBatch]]) -> Work:
    """Run a turn for what compiles and allocates, and another for its memory; count the work."""
    batches = [batch for step in steps for batch in step]
    row_steps = [torch.as_tensor(n).tolist() for n in one.turn(steps)]
    flops = sum(
        training_flops(one.model.config, batch.ids_BT.shape[1], len(batch.depths), tuple(n))
        for batch, n in zip(batches, row_steps, strict=True)
    )
    one.optimizer.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    peak = peak_bytes(lambda: one.turn(steps), one.model.device)
    seconds = time.perf_counter() - begin
    return Work(sum(map(sum, row_steps)), flops, None if peak is None else peak + one.bytes(), seconds)


def figures(times: list[float], work: Work, n_steps: int, n_tokens: int, ceiling: float) -> dict[str, Any]:
    """What follows from the seconds of turns, each of `n_steps` iterations and `n_tokens` tokens."""
    median = statistics.median(times)
    return {
        "ms": median / n_steps * 1e3,
        "ms_least": min(times) / n_steps * 1e3,
        "ms_most": max(times) / n_steps * 1e3,
        "tokens_per_s": n_tokens / median,
        "row_steps": work.row_steps / n_steps,
        "row_steps_per_s": work.row_steps / median,
        "flops": work.flops / n_steps,
        "share_of_matmul_ceiling": work.flops / median / ceiling,
        "peak_bytes": work.peak_bytes,
    }


def measure(names: list[str], start: HRMForCausalLM, run: TrainConfig, dtype, steps: list, repeats: int) -> dict:
    """Check, then time, then profile; prints what it finds and returns it."""
    device, failed = start.device, {}
    built = {name: Implementation(name, start, run, dtype) for name in dict.fromkeys(("eager", *names))}

    def attempt(name: str, call: Callable[[Implementation], Any]) -> Any:
        if name not in failed:
            try:
                return call(built[name])
            except Exception as error:  # the others are still worth having
                failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                print(f"{name:<10}FAILED: {failed[name]}", flush=True)
            for one in built.values():
                one.optimizer.zero_grad(set_to_none=True)
        return None

    print("\nnumbers against eager's" + (", without dropout" if run.dropout else ""))
    attempt("eager", lambda eager: numbers(eager, steps[0]))
    checks = {}
    for name in names if "eager" not in failed else ():
        if name != "eager" and (found := attempt(name, lambda other: check(built["eager"], other, steps[0]))):
            checks[name] = found
    result = {"timed": False, "checks": checks, "failed": failed, "implementations": {}}
    wrong = [name for name, found in checks.items() if not found["right"]]
    if wrong or "eager" in failed:
        print(f"error: {', '.join(wrong) or 'eager'} {'differs' if wrong else 'failed'}: nothing was timed", flush=True)
        return result

    works = {name: work for name in names if (work := attempt(name, lambda one: warm_up(one, steps)))}
    left = (repeats + 2) * sum(work.seconds for work in works.values())
    print(f"\n{repeats} turns of each are timed and one is profiled: some {left:.0f} seconds", flush=True)
    ceiling = result["matmul_ceiling_flops_per_s"] = matmul_ceiling(dtype, device)
    n_tokens = sum(batch.ids_BT.numel() for step in steps for batch in step)
    turns = {name: (lambda one=built[name]: one.turn(steps)) for name in works}
    timed = {
        name: figures(times, works[name], len(steps), n_tokens, ceiling)
        for name, times in interleaved(turns, repeats, device).items()
    }
    for name, record in timed.items():
        record["speedup_vs_published"] = timed["published"]["ms"] / record["ms"] if "published" in timed else None
        record["profile"] = profile_shares(turns[name], device)
    return result | {"timed": bool(timed), "implementations": timed}


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
        given = {key: getattr(options, key) for key in ("batch_size", "accumulation") if getattr(options, key)}
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


def row(name: str, record: dict[str, Any]) -> str:
    """One line of the table."""
    peak, speedup = record["peak_bytes"], record["speedup_vs_published"]
    return (
        f"{name:<11}{record['ms']:>9.1f}{record['ms_least']:>9.1f}{record['ms_most']:>9.1f}"
        f"{record['tokens_per_s']:>11,.0f}{record['row_steps']:>11.1f}{record['row_steps_per_s']:>10,.1f}"
        f"{record['share_of_matmul_ceiling']:>9.1%}{'not measured' if peak is None else f'{peak / 1e9:.2f} GB':>14}"
        f"{'not measured' if speedup is None else f'{speedup:.2f}x':>14}"
    )


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


HEADING = f"{'':<11}{'ms':>9}{'least':>9}{'most':>9}{'tokens/s':>11}{'row-steps':>11}{'a second':>10}"


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
    names = [name for name in NAMES if name in options.implementations]
    skipped = {"fused": reason} if "fused" in names and (reason := why_not_fused(device)) else {}
    summary: dict[str, Any] = {
        "benchmark": "train_step",
        "environment": environment(device),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "run": {key: getattr(run, key) for key in ("recipe", "batch_size", "accumulation", "depth", "dropout")},
        "model": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "iterations_in_a_turn": len(steps),
        "mean_depth": float(np.mean(depths)),
        "mean_slowest_depth": float(np.mean([max(rows) for rows in depths])),
        "skipped": skipped,
    }
    title = f"{summary['environment']['device']}, {summary['dtype']}, {run.recipe}"
    title += f", {start.num_parameters():,} parameters, {run.accumulation} x {run.batch_size} x {options.tokens} tokens"
    print(
        f"{title}\ndepths {run.depth}: mean {summary['mean_depth']:.2f} of at most {config.hrm_max_steps}, of the",
        end=" ",
    )
    print(f"slowest row {summary['mean_slowest_depth']:.2f}; {len(steps)} iterations a turn", flush=True)
    summary |= measure([name for name in names if name not in skipped], start, run, dtype, steps, options.repeats)

    timed = summary["implementations"]
    if timed:
        share = "MFU" if device.type == "cuda" else "ceiling"
        print(f"{HEADING}{share:>9}{'peak memory':>14}{'published':>14}")
        for name, record in timed.items():
            print(row(name, record))
    for name, reason in {**skipped, **{name: f"FAILED: {why}" for name, why in summary["failed"].items()}}.items():
        print(f"{name:<11}not measured: {reason}")
    if timed:
        ceiling = summary["matmul_ceiling_flops_per_s"] / 1e12
        print(f"{share}: of a large matrix product's {ceiling:.3g} TFLOP/s, measured in this run")
        print_shares({name: record["profile"] for name, record in timed.items()}, device)
        if options.plot:
            plot(timed, options.plot, title)
        if options.save:
            print(f"appended to {save('train_step.jsonl', summary)}")
    print(json.dumps(summary))
    return int(not timed or bool(summary["failed"]))


if __name__ == "__main__":
    sys.exit(main())
