"""What bench/train_step.py runs: iterations in four ways, and how their numbers are held to one another."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import hrm_kernels as ops
from bench.published import PublishedHRM
from bench.shares import profile_shares
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.keyed import DEPTH_STREAM, keyed_integers
from hrm_model.model import PUBLISHED_STEP_PENALTY
from hrm_model.training.device import autocast, compile_blocks
from hrm_model.training.optim import build_optimizer, clip_gradients
from hrm_model.training.recipes import TrainConfig
from hrm_model.training.schedule import learning_rate, set_learning_rates

NAMES = ("published", "eager", "compile", "fused")
ROWS_IN_A_TURN = 16
"""At least: depths of fewer rows say little of the mean."""

QUANTITIES = ("loss", "gradient norm", "worst gradient")
"""What is compared, relative to eager's: losses, the norm of the gradient, the gradient of each parameter."""
LIMITS = {torch.float32: (1e-5, 1e-4, 1e-3), torch.bfloat16: (2e-4, 5e-3, 5e-2)}
SMALL = 1e-4
"""Of the whole gradient's norm: no parameter's counts as less, as one that is zero but for rounding has no digits."""


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
        if run.recompute and name != "published":
            self.model.recompute_activations()
        if name == "compile":
            compile_blocks(self.model)
        self.optimizer = build_optimizer(self.model, run)
        self.backend = "auto" if name == "fused" else "reference"

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Any]:
        """(sum of the losses of all targets, row-steps without and with gradient)."""
        if self.name != "published":
            out = self.model(
                batch.ids_BT, batch.targets_BT, force_steps=batch.depths, gradient=self.run.gradient, reduction="sum"
            )
            return out.loss, out.row_steps
        slowest = max(batch.depths)
        self.model.config = dataclasses.replace(self.model.config, hrm_max_steps=slowest)
        out = PublishedHRM(self.model)(batch.ids_BT, batch.targets_BT)
        n_rows = len(batch.depths)
        loss = out.loss - PUBLISHED_STEP_PENALTY * slowest
        return loss * batch.targets_BT.numel(), (n_rows * (slowest - 1), n_rows)

    def accumulate(self, batches: list[MicroBatch]) -> tuple[list[Tensor], list]:
        """Fresh gradients of the mean loss of all targets; returns each micro-batch's part of it, and its row-steps."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, row_steps = [], []
        n_targets = sum(batch.targets_BT.numel() for batch in batches)
        with ops.use_backend(self.backend):
            for batch in batches:
                with autocast(batch.ids_BT.device, self.dtype):
                    total, n = self.forward(batch)
                loss = total / n_targets
                loss.backward()
                losses.append(loss.detach())
                row_steps.append(n)
        return losses, row_steps

    def iteration(self, step: int, batches: list[MicroBatch]) -> list:
        """Optimizer step number `step`; returns the row-steps of each micro-batch.

        Raises:
            FloatingPointError: a loss or the gradient is not finite; parameters are those before.
        """
        set_learning_rates(self.optimizer, learning_rate(step, self.run), self.run)
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

    def profile(self, steps: list[list[MicroBatch]]) -> dict[str, Any] | None:
        """Where a turn's time goes."""
        turn = partial(self.turn, steps)
        if self.name == "fused":  # what a CUDA graph starts has no op in a profile; the host starts the same kernels
            with contextlib.suppress(ops.BackendError), ops.use_backend("auto", hrm_loop="host"):
                return profile_shares(turn, self.model.device)
        return profile_shares(turn, self.model.device)


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


def differences(found: tuple, expected: tuple) -> list[float]:
    """Of QUANTITIES; nan where something is not finite."""
    losses = [abs(a - b) / abs(b) for a, b in zip(found[0], expected[0], strict=True)]
    own, norms = ([g.norm().item() for g in gradients] for gradients in (found[1], expected[1]))
    norm = math.hypot(*norms)
    apart = [(a - b).norm().item() for a, b in zip(found[1], expected[1], strict=True)]
    gradients = [d / max(n, SMALL * norm) for d, n in zip(apart, norms, strict=True)]
    return [float(np.max(losses)), abs(math.hypot(*own) - norm) / norm, float(np.max(gradients))]


def check(eager: Implementation, other: Implementation, batches: list[MicroBatch]) -> dict[str, Any]:
    """How far `other` is from eager, and whether within the limits; prints it."""
    where = "one iteration"
    if other.name == "published":  # where its rows and ours run equally long
        slowest = max(batches[0].depths)
        batches = [batches[0]._replace(depths=[slowest] * len(batches[0].depths))]
        where = f"a micro-batch, all rows {slowest} steps"
    found = differences(numbers(other, batches), numbers(eager, batches))
    right = all(difference <= limit for difference, limit in zip(found, LIMITS[eager.dtype], strict=True))
    print(f"{other.name:<11}{where:<33}" + "".join(f"{d:>16.1e}" for d in found) + "  WRONG" * (not right), flush=True)
    finite = [d if math.isfinite(d) else None for d in found]
    return {"right": right, "where": where, **dict(zip(QUANTITIES, finite, strict=True))}
