"""The learning rate, and the gradient window, as functions of the optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from .recipes import TrainConfig


def learning_rate(step: int, run: TrainConfig) -> float:
    """Rate of optimizer step `step` (counted from 0): linear warm-up, then from lr to min_lr by --schedule.

    cosine and linear fall all the way; wsd (warm-up, stable, decay: Hu et al., "MiniCPM", 2024, section 4) stays at lr
    and falls linearly over the last `decay` of the steps, so that a run can be prolonged from a checkpoint before.
    """
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    start = run.decay_start
    if step < start:
        return run.lr
    progress = min(1.0, (step - start) / max(1, run.steps - start))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if run.schedule == "cosine" else 1.0 - progress
    return run.min_lr + (run.lr - run.min_lr) * left


def set_learning_rates(optimizer: Optimizer, lr: float, run: TrainConfig) -> None:
    """The rates of the next step: `lr`, and for the halting head and perhaps the embedding their own, on the same
    schedule."""
    peaks = {"head": run.head_lr, "embedding": run.embed_lr}
    for group in optimizer.param_groups:
        peak = peaks.get(group["name"])
        group["lr"] = lr if peak is None else peak * (lr / run.lr if run.lr else 1.0)


def gradient_window(step: int, run: TrainConfig, applications: int) -> int | None:
    """How many of the replayed step's `applications` of a level have a gradient at optimizer step `step`; None for all.

    Over the first `window_warmup` of the steps the window grows linearly from 2 (the last of each level, the one-step
    gradient of Wang et al., "Hierarchical Reasoning Model", 2025, section 2) to its full size.
    """
    full = min(run.gradient_window or applications, applications)
    growing = round(run.window_warmup * run.steps)
    if step < growing:
        full = 2 + (full - 2) * step // growing
    return None if full >= applications else full
