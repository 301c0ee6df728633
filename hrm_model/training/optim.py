"""AdamW over all parameters, the learning rate, and the gradient norm."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipes import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Three groups that hold every parameter once: matrices of the blocks with decay; embeddings, norms, biases and
    vectors without; the halting head without, at a rate of its own: it has few numbers and must keep up with a model
    that changes."""
    decayed, plain, head = [], [], []
    for name, p in model.named_parameters():
        is_matrix = p.dim() >= 2 and "wte" not in name and "wpe" not in name and "lm_head" not in name
        (head if "q_head" in name else decayed if is_matrix else plain).append(p)
    groups = {"decayed": (decayed, weight_decay), "plain": (plain, 0.0), "head": (head, 0.0)}
    return [{"name": name, "params": parameters, "weight_decay": decay} for name, (parameters, decay) in groups.items()]


def build_optimizer(model: nn.Module, run: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), as one fused update where torch has it."""
    groups = [g for g in parameter_groups(model, run.weight_decay) if g["params"]]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=run.lr, betas=(run.beta1, run.beta2), fused=fused)


def learning_rate(step: int, run: TrainConfig) -> float:
    """Rate of optimizer step `step` (counted from 0): linear warm-up, then a cosine from lr to min_lr."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = min(1.0, (step - run.warmup) / max(1, run.steps - run.warmup))
    return run.min_lr + (run.lr - run.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, run: TrainConfig) -> None:
    """The rates of the next step: `lr`, and for the halting head its own, on the same schedule."""
    for group in optimizer.param_groups:
        group["lr"] = run.head_lr * (lr / run.lr if run.lr else 1.0) if group["name"] == "head" else lr


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale all gradients but the halting head's, which has a loss and a norm of its own, so that their joint norm is
    at most `largest` (0: leave them); returns the norm before."""
    parameters = [p for name, p in model.named_parameters() if "q_head" not in name]
    return nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf)
