"""Fitting the halting head to a checkpoint, start to finish: what exits are worth, the fit, the verdict, the model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import check_target
from ..checkpoint import CheckpointError, load_model, save_model
from ..config import HRMConfig
from ..depth_statistics import Costs
from ..exits import DECISIONS
from ..halting import OBJECTIVES, Price, price_faults, target_fault
from ..model import HRMForCausalLM
from ..quantization import check_trainable
from .device import autocast, choose_device, choose_dtype, choose_kernels
from .head_fit import FIT_BYTES, PRICE_RATE, Fit, collect, fit
from .ngram import ngram_losses
from .prepare import ensure_default_dataset
from .reports import NEAR_TARGET
from .sampler import Sampler, validation_windows
from .shards import open_dataset
from .validation import Reading, read_windows

FREE = 1e-3
"""Nats: a step at less costs next to nothing, 1/10 of the usual price."""


class UnusableExits(ValueError):
    """Fewer than two exits say more than token frequencies do."""


class HeadFitting:
    """One run of train/halting.py. Everything that can be wrong with its inputs is raised by the constructor.

    Args:
        options: train/halting.py's.
        default_data: the dataset where none is named; it is made if it is not there.

    Raises:
        ValueError, OSError: the message names the option, what was found and the remedy.
    """

    def __init__(self, options: argparse.Namespace, default_data: str):
        self.options = options
        faults = list(_faults(options))
        if faults:
            raise ValueError("impossible options:\n  " + "\n  ".join(faults))
        self.out = Path(options.out) if options.out else _default_out(Path(options.checkpoint))
        if self.out.exists() and not options.overwrite:
            raise CheckpointError(f"{self.out} already exists; choose another --out or pass --overwrite")
        check_target(self.out, options.overwrite)  # now, not when the work is done
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.device)
        choose_kernels(options.fused, self.device)
        self.model, self.config = load_model(options.checkpoint, self.device)
        check_trainable(self.model, options.checkpoint)
        self._check_model()
        if not options.data:
            ensure_default_dataset(default_data)
        datasets = [open_dataset(path) for path in options.data or [default_data]]
        size, vocab = self.config.block_size, self.config.vocab_size
        self.sampler = Sampler(datasets, size, options.seed, vocab_size=vocab)
        self.inputs, self.targets = validation_windows(datasets, size, options.eval_windows, vocab)
        self.ngrams = ngram_losses([d.split("train") for d in datasets], self.targets, self.inputs, vocab)

    def _check_model(self) -> None:
        steps = self.config.hrm_max_steps
        if steps < 2:
            raise ValueError(
                f"{self.options.checkpoint} has hrm_max_steps {steps}: with one step there is nothing to decide; "
                "fit a model that has at least 2"
            )
        if fault := target_fault(self.options.target_steps, steps):
            raise ValueError(fault)

    def __call__(self) -> dict[str, Any]:
        """Report, fit, report, write.

        Raises:
            UnusableExits: the table of losses by depth has been printed; nothing is written.
        """
        options = self.options
        reading = self._read(self.model)
        usable = self._report_exits(reading)
        if len(usable) < 2 and not options.force:
            raise UnusableExits(
                f"{len(usable)} of {reading.max_steps} exits of {options.checkpoint} say more than token frequencies "
                "do, so there is nothing to choose between. Train on at random depths first (python train/pretrain.py "
                f"--init-from {options.checkpoint} --depth random --halting none), give text it was trained for "
                "with --data, or fit all the same with --force"
            )
        price = Price(options.step_price, options.target_steps, PRICE_RATE)
        decisions = collect(self.model, self._training_batches(), options.decisions, self._most(), self._autocast)
        print(
            f"fitting {options.halting} to {len(decisions.losses):,} decisions of {options.windows} windows", flush=True
        )
        found = fit(decisions, options.halting, price, options.iterations, _progress(options.iterations))
        if options.target_steps is not None:
            self._report_target(found)
        model = with_head(self.model, found.weight, found.bias, options.halting)
        result = self._report_depths(model, found.price, usable)
        save_model(model, self.out, overwrite=options.overwrite)
        print(f"wrote {self.out}")
        return result

    def _autocast(self):
        return autocast(self.device, self.dtype)

    def _read(self, model: HRMForCausalLM) -> Reading:
        return read_windows(model, self.inputs, self.targets, self.options.batch_size, self._autocast)

    def _training_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, self.options.windows, self.options.batch_size):
            n = min(self.options.batch_size, self.options.windows - first)
            inputs, targets, _ = self.sampler.batch(first, n)
            yield torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def _most(self) -> int:
        """Decisions kept of a window, so that all fit in memory."""
        of_one = self.config.hrm_max_steps * self.config.n_embd * 4
        return max(1, FIT_BYTES // of_one // self.options.windows)

    def _report_exits(self, reading: Reading) -> list[int]:
        """Print the loss by depth and what it says; returns the depths whose exits are usable."""
        by_depth, price = reading.by_depth(), self.options.step_price
        print(f"loss by depth, nats per token ({self.targets.size:,} tokens; unigram {self.ngrams['unigram']:.4f})")
        gains = (reading.losses[..., :1] - reading.losses).astype(np.float64).mean(1)
        for s, loss in enumerate(by_depth, 1):
            low, high = reading.interval(lambda windows, s=s: gains[windows, s - 1].mean())
            gain = "" if s == 1 else f"   {by_depth[0] - loss:+.4f} against 1 step ({low:+.4f} to {high:+.4f})"
            print(f"  {s:>2}  {loss:.4f}{gain}")
        usable = [s for s, loss in enumerate(by_depth.tolist(), 1) if loss < self.ngrams["unigram"]]
        best = int(by_depth.argmin()) + 1
        worth = max((by_depth[0] - by_depth[s]) / s for s in range(1, len(by_depth)))
        print(f"best fixed depth {best}; usable exits (below unigram): {', '.join(map(str, usable)) or 'none'}")
        if worth <= 0:
            print(
                "depth does not pay on average: no depth is better than 1. "
                "Only texts that differ from the mean could gain"
            )
        elif self.options.target_steps is not None:
            print(f"depth can pay: a step gains up to {worth:.4f} nats on average; its price is yet to be found")
        elif worth < price:
            print(
                f"a step gains at most {worth:.4f} nats on average, less than its price {price:g}: only texts that "
                f"differ from the mean can pay for depth; at --step-price {worth / 2:.2g} it pays on average"
            )
        else:
            print(f"depth can pay: a step gains up to {worth:.4f} nats on average, its price is {price:g}")
        return usable

    def _report_target(self, found: Fit) -> None:
        """Print what became of --target-steps on the text that the price was steered on."""
        target = self.options.target_steps
        print(f"target {target:g} steps: mean {found.mean_steps:.2f} on the text fitted to, at price {found.price:.4g}")
        if abs(found.mean_steps - target) > NEAR_TARGET:
            remedy = (
                "a price near 0 leads to no more, as further steps gain nothing there; give a lower --target-steps"
                if found.mean_steps < target and found.price < FREE
                else f"start at --step-price {found.price:.2g}, or give more --iterations"
            )
            print(f"the target was not reached: {remedy}")

    def _report_depths(self, model: HRMForCausalLM, price: float, usable: list[int]) -> dict[str, Any]:
        """Print what the fitted head decides on validation text and what that is worth; returns the numbers."""
        reading, costs = self._read(model), Costs.of(self.config)
        executed = reading.executed()
        depths = reading.statistics(executed)
        learned, rivals = reading.loss(executed), reading.rivals(executed, costs)
        applications = float(costs.applications(executed).mean())
        correlation = reading.gain_correlation(executed)
        print(
            f"price {price:.4g} nats a step; executed steps: {depths}; {_histogram(depths.histogram)}; generated over "
            f"the cache {applications:.1f} block applications a token"
        )
        print(f"loss at the decided depths {learned:.4f}, by the causal protocol; learned minus")
        for name, (value, difference, (low, high)) in rivals.items():
            print(f"  {name.replace('_', ' '):<22} {value:.4f}: {difference:+.4f} ({low:+.4f} to {high:+.4f})")
        pays = all(rival.is_beaten() for rival in rivals.values())
        print(
            "learned depth pays: better than every rival, intervals included"
            if pays
            else "learned depth does not beat its rivals beyond doubt on this text"
        )
        return {
            "checkpoint": str(self.options.checkpoint),
            "out": str(self.out),
            "objective": self.options.halting,
            "price": price,
            "target_steps": self.options.target_steps,
            "usable_exits": usable,
            "loss_by_depth": reading.by_depth().tolist(),
            "mean_steps": depths.mean,
            "dispersion": depths.dispersion,
            "histogram": depths.histogram,
            "loss": learned,
            "applications": applications,
            "gain_correlation": correlation,
            "rivals": {name: {"loss": r.loss, "difference_interval": list(r.interval)} for name, r in rivals.items()},
            "pays": pays,
        }


def _default_out(checkpoint: Path) -> Path:
    """Beside the checkpoint: runs/tiny-halting of runs/tiny, best-halting of best.pt."""
    path = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    if path.parent.name == "checkpoints":  # of a run: beside the run, which may delete what is in it
        path = path.parent.parent
    return path.with_name((path.name if path.is_dir() else path.stem) + "-halting")


def with_head(model: HRMForCausalLM, weight: Tensor, bias: Tensor, objective: str) -> HRMForCausalLM:
    """A copy of `model` with another halting head, weight [2, C] and bias [2], and halt_bias 0; all else as it was."""
    config: HRMConfig = dataclasses.replace(model.config, halting=objective, halt_bias=0.0)
    with torch.random.fork_rng(devices=[]):
        copy = HRMForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.hrm_core.q_head.weight.copy_(weight)
        copy.hrm_core.q_head.bias.copy_(bias)
    return copy.to(model.device).train(model.training)


def _histogram(counts: list[int]) -> str:
    return " ".join(f"{s}:{n}" for s, n in enumerate(counts, 1) if n)


def _progress(iterations: int):
    from tqdm import tqdm

    bar = tqdm(total=iterations, unit=" iterations", leave=False, disable=None)  # a log is no terminal

    def update(bar, i: int, loss: float) -> None:
        bar.update(1)
        bar.set_postfix_str(f"L_q {loss:.4f}", refresh=False)
        if i == iterations:
            bar.close()

    return partial(update, bar)


def _faults(options: argparse.Namespace):
    if options.halting not in OBJECTIVES:
        yield f"--halting {options.halting!r} is none of {', '.join(OBJECTIVES)}, which train a head"
    if options.decisions not in DECISIONS:
        yield f"--decisions {options.decisions!r} is none of {', '.join(DECISIONS)}"
    for name, least in (("windows", 4), ("eval_windows", 2), ("iterations", 1), ("batch_size", 1)):
        if getattr(options, name) < least:
            yield f"--{name.replace('_', '-')} {getattr(options, name)} is below its minimum {least}"
    if not 0 <= options.seed < 2**63:
        yield f"--seed {options.seed} is outside 0..2^63 - 1"
    yield from price_faults(options.step_price, options.target_steps)
