"""Optimizers over all parameters, and the gradient norm."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipes import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float, embedding_apart: bool = False) -> list[dict]:
    """Groups that hold every parameter once: matrices of the blocks with decay; embeddings, norms, biases and vectors
    without; the halting head without, at a rate of its own: it has few numbers and must keep up with a model that
    changes; and the embedding table, if it has a rate of its own, too."""
    decayed, plain, head, embedding = [], [], [], []
    for name, p in model.named_parameters():
        is_matrix = p.dim() >= 2 and "wte" not in name and "wpe" not in name and "lm_head" not in name
        apart = embedding_apart and name == "wte.weight"
        (head if "q_head" in name else embedding if apart else decayed if is_matrix else plain).append(p)
    groups = {"decayed": (decayed, weight_decay), "plain": (plain, 0.0), "head": (head, 0.0)}
    if embedding_apart:
        groups["embedding"] = embedding, 0.0
    return [{"name": name, "params": parameters, "weight_decay": decay} for name, (parameters, decay) in groups.items()]


def build_optimizer(model: nn.Module, run: TrainConfig) -> torch.optim.Optimizer:
    """--optimizer: AdamW (Loshchilov & Hutter, 2019), as one fused update where torch has it, or AdamAtan2."""
    groups = [g for g in parameter_groups(model, run.weight_decay, run.embed_lr > 0) if g["params"]]
    betas = run.beta1, run.beta2
    if run.optimizer == "atan2":
        return AdamAtan2(groups, lr=run.lr, betas=betas)
    device = next(model.parameters()).device.type
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    fused = device == "cuda" or (device == "cpu" and not sharded)
    return torch.optim.AdamW(groups, lr=run.lr, betas=betas, fused=fused)


class AdamAtan2(torch.optim.Optimizer):
    """Adam whose quotient is an arc tangent: no epsilon, no division, and updates of at most 2 lr whatever the scale.

        p <- p - lr wd p - lr (4 / pi) atan2(m, sqrt(v)),   m, v the bias-corrected moments

    4 / pi makes the update lr where m = sqrt(v), as Adam's is. The optimizer of the HRM paper.

    Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers", 2024, section 4.3.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                n = state["step"].item()
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                # atan2(a m, b s) = atan2(m, s b / a): both corrections go to the second argument
                scale = (1 - beta1**n) / math.sqrt(1 - beta2**n)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.atan2(m, v.sqrt().mul_(scale)), alpha=-lr * 4 / math.pi)


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale all gradients but the halting head's, which has a loss and a norm of its own, so that their joint norm is
    at most `largest` (0: leave them); returns the norm before."""
    parameters = [p for name, p in model.named_parameters() if "q_head" not in name and p.grad is not None]
    if parameters and parameters[0].device.type == "cpu":
        # torch's float32 norm on the CPU is off by 2e-4 for 400,000 values, and shards of them by less
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters])
        )
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
    if largest > 0:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
