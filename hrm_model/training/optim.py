"""AdamW over all parameters, the learning rate, and the gradient norm."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipes import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups that hold every parameter once: matrices of the blocks with decay; embeddings, norms, biases, vectors
    and the halting head without. (A head that had no explorers has gradient 0 and must stay what it is: no decay.)"""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        is_matrix = p.dim() >= 2 and "wte" not in name and "wpe" not in name and "lm_head" not in name
        (decayed if is_matrix and "q_head" not in name else plain).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


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


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale all gradients but the halting head's, which has a loss and a norm of its own, so that their joint norm is
    at most `largest` (0: leave them); returns the norm before."""
    parameters = [p for name, p in model.named_parameters() if "q_head" not in name]
    return nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf)
