"""What a model would say, and decide, at every depth: one unroll of all S steps, every exit decoded.

Attention is causal, so the state of position t after s steps is the same in every text that begins with tokens ..t. An
unroll therefore holds every prefix's own run:

    l[t, s]      = -log p(token t + 1), all positions decoded after s steps
    mean[t, s]   = mean over u <= t of z_H[u] after s steps, which is what the head sees of prefix ..t
    change[t, s] = |z_H after step s - z_H before| / |z_H before|, norms over the prefix

A decision is that of a prefix (P = T of them in a row; "causal protocol": no look at what follows) or of a row as a
whole (P = 1, its last prefix; "published protocol").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import hrm_kernels as ops

from .incremental import evaluating
from .model import IGNORE

DECISIONS = ("prefix", "row")
HEAD_ROWS = 4096
"""Means that the head scores at once; its kernel holds no more."""


@dataclass(frozen=True)
class Exits:
    """Every exit of B rows with P decisions each. S steps, C channels. On the model's device."""

    losses: Tensor
    """[B, P, S] float32, nats: of the prefix's next token, or the mean over a row's targets; 0 without a target."""
    q: Tensor
    """[B, P, S, 2] float32, [halt, continue] after each step."""
    weights: Tensor
    """[B, P] float32: 1, or 0 where there is no target."""
    change: Tensor | None
    """[B, P, S] float32: relative change of z_H in each step; inf where it was 0 before. None unless kept."""
    means: Tensor | None
    """[B, P, S, C] float32, what the head saw; None unless asked for."""

    def margins(self, halt_bias: float = 0.0) -> Tensor:
        """[B, P, S]: q_halt + bias - q_continue."""
        return ops.halt_margin(self.q, halt_bias)


@torch.no_grad()
@ops.shared_casts()
def exits(
    model,
    ids_BT: Tensor,
    targets: Tensor,
    lengths: Tensor | None = None,
    *,
    decisions: str = "prefix",
    max_steps: int | None = None,
    keep_means: bool = False,
    keep_change: bool = True,
) -> Exits:
    """Unroll rows through all S steps and decode each exit.

    Exits are decoded one after the other and logits in chunks of rows, so that memory does not grow with S, but for
    the result: B P S (4 + C if means are kept) float32 numbers.

    Args:
        model: an HRMForCausalLM; it runs in eval mode and is left as it was.
        ids_BT, targets, lengths: as in HRMForCausalLM.forward; on the model's device.
        decisions: "prefix" or "row". max_steps: S; default the model's. keep_means: keep what the head saw.
        keep_change: measure how far z_H moves, which training has no use for.

    Raises:
        ValueError: unknown decisions.
    """
    n_steps = model.config.hrm_max_steps if max_steps is None else max_steps
    with evaluating(model):
        rotary = model.rotary(ids_BT.shape[1])
        x = model.embed(ids_BT)
        for block in model.input_blocks:
            x = block.apply_to(x, rotary, lengths)
        pick = _Decisions(targets, lengths, decisions)
        before = model.hrm_core.initial_state(x)[0]
        found: dict[str, list[Tensor]] = {"losses": [], "q": [], "change": [], "means": []}
        for z_H in model.hrm_core.unroll(x, rotary, lengths, n_steps):
            means = pick.prefixes(cumulative_mean(z_H))
            found["q"].append(_scores(model, means))
            if keep_means:
                found["means"].append(means)
            if keep_change:
                moved, size = (_prefix_norms(t) for t in (z_H - before, before))
                found["change"].append(pick.prefixes(moved / size).float())
            found["losses"].append(
                pick.losses(model.loss(model.decode(z_H, rotary, lengths), targets, lengths, "none"))
            )
            before = z_H
    stacked = {name: torch.stack(parts, 2) if parts else None for name, parts in found.items()}
    return Exits(weights=pick.weights(), **stacked)


class _Decisions:
    """From numbers of every prefix to those of the decisions asked for."""

    def __init__(self, targets: Tensor, lengths: Tensor | None, decisions: str):
        if decisions not in DECISIONS:
            raise ValueError(f"decisions {decisions!r} is none of {', '.join(DECISIONS)}")
        self.by_row = decisions == "row"
        self.real = targets != IGNORE
        if lengths is not None:
            self.real = self.real & (torch.arange(targets.shape[1], device=targets.device) < lengths[:, None])
        ends = torch.full((len(targets),), targets.shape[1], device=targets.device) if lengths is None else lengths
        self.last = ends - 1

    def prefixes(self, of_all: Tensor) -> Tensor:
        """[B, T, ..] -> [B, P, ..]."""
        if not self.by_row:
            return of_all
        return of_all[torch.arange(len(of_all), device=of_all.device), self.last][:, None]

    def losses(self, of_tokens: Tensor) -> Tensor:
        """[B T] -> [B, P]."""
        losses = of_tokens.view(self.real.shape).float()
        if not self.by_row:
            return losses
        return losses.sum(1, keepdim=True) / self.real.sum(1, keepdim=True).clamp(min=1)

    def weights(self) -> Tensor:
        """[B, P]"""
        return self.real.any(1, keepdim=True).float() if self.by_row else self.real.float()


def cumulative_mean(z: Tensor) -> Tensor:
    """[..., T, C] -> the same: position t has the mean of positions 0..t. A sum of 512 float32 terms would blur it."""
    counts = torch.arange(1, z.shape[-2] + 1, device=z.device)
    means = _cumulative_sum(z) / counts[:, None]
    return means.to(torch.promote_types(z.dtype, torch.float32))


def _prefix_norms(z: Tensor) -> Tensor:
    """[B, T, C] -> [B, T]: the norm of all that a prefix holds."""
    return _cumulative_sum(z.float().square().sum(-1, keepdim=True))[..., 0].sqrt()


def _cumulative_sum(z: Tensor) -> Tensor:
    wide = z.to(z.dtype if z.device.type == "mps" else torch.float64)  # mps has no float64
    if z.is_cuda and torch.are_deterministic_algorithms_enabled():
        # CUDA's scan is not deterministic, and torch's substitute for it needs memory of T^2 C
        return torch.ones(z.shape[-2], z.shape[-2], dtype=wide.dtype, device=z.device).tril() @ wide
    return wide.cumsum(-2)


def _scores(model, means: Tensor) -> Tensor:
    """[B, P, C] -> [B, P, 2]."""
    flat = means.flatten(0, 1)[:, None]
    q = torch.cat([model.hrm_core.q_values(part, 0.0, None)[0] for part in flat.split(HEAD_ROWS)])
    return q.view(*means.shape[:2], 2)
