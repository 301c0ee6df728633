"""The output head of a character-level model: a vocabulary that grows by blocks of rows, and stablemax.

    logits = h W^T       block by block of 64 rows
    rows from n_chars on are spare: -inf, so that nobody draws them and no loss counts them

A block is a product of its own, so the logits of old rows do not change by one bit when the table grows: a product
of another shape may sum in another order.

    stablemax   p_i = s(l_i) / sum_j s(l_j),   s(l) = 1 + l for l >= 0, 1 / (1 - l) below

log s(l) = sign(l) log(1 + |l|), so the head gives that as its logits, and softmax of them is stablemax of l:
sampling, loss and analysis need to know nothing of it. Source: Prieto et al., "Grokking at the Edge of Numerical
Stability", 2025.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VOCAB_BLOCK, HRMConfig


class CharacterHead(nn.Linear):
    """[..., C] -> [..., V] logits, -inf from n_chars on."""

    def __init__(self, config: HRMConfig):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.n_chars, self.stable = config.n_chars, config.loss == "stablemax"

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.cat([F.linear(x, rows) for rows in self.weight.split(VOCAB_BLOCK)], -1)
        if self.stable:
            logits = log_stablemax_weight(logits)
        spare = torch.arange(logits.shape[-1], device=logits.device) >= self.n_chars
        return logits.masked_fill(spare, -math.inf)

    def loss(self, h_MC: Tensor, targets: Tensor, ignore: int, reduction: str, z_loss: float) -> Tensor:
        """Cross-entropy in nats of hidden states [M, C] against targets [M], as hrm_kernels.linear_cross_entropy has
        it. A few hundred characters fit into memory: the logits are simply made."""
        logits = self(h_MC).float()
        losses = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="none")
        counted = targets != ignore
        if z_loss:
            losses = losses + z_loss * logits.logsumexp(-1).square() * counted
        if reduction == "none":
            return losses
        return losses.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)


def log_stablemax_weight(logits: Tensor) -> Tensor:
    """log s(l) = sign(l) log(1 + |l|)."""
    return logits.sign() * logits.abs().log1p()
