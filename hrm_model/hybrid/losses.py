"""Cross-entropy of answers, by softmax or by stablemax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..output_head import log_stablemax_weight


def token_losses(logits: Tensor, targets: Tensor, kind: str = "softmax") -> Tensor:
    """-log p(target) of each row, nats.

    stablemax: p_i = s(l_i) / sum_j s(l_j) with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below: it grows linearly where
    softmax grows exponentially, so that a logit that is far ahead keeps a gradient.

    Args:
        logits: [N, V], any float dtype. targets: [N] int64. kind: softmax or stablemax.
    Returns:
        [N] float32 (float64 of float64).
    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", 2025, section 4.1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "softmax":
        return F.cross_entropy(logits, targets, reduction="none")
    log_s = log_stablemax_weight(logits)
    return log_s.logsumexp(-1) - log_s.gather(-1, targets[:, None])[:, 0]
