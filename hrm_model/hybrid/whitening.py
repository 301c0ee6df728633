"""A linear map set by a sample: what all vectors have in common goes, what tells them apart comes to one scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEAKEST = 1e-3
"""Directions that vary by less than this share of the strongest are noise."""


@torch.no_grad()
def whiten(linear: nn.Linear, sample: Tensor) -> None:
    """Set y = W v + b so that y is white over the sample: W = R S^-1 V^T, b = -W mean, with U S V^T the centred sample
    and R orthonormal columns, drawn. y has mean square 1.

    What hidden states have in common is most of them, and what tells them apart a small part, in few directions: with a
    random matrix a norm or a softmax behind it would see the former and hardly the latter.

    Args:
        linear: [n_out, n_in], with a bias. sample: [N, n_in]; where all rows are equal, nothing is set.
    """
    sample = sample.double()
    centre = sample.mean(0)
    _, s, v = torch.linalg.svd(sample - centre, full_matrices=False)
    n_out = len(linear.bias)
    least = max(WEAKEST * s[0], 1e-6 * sample.norm())  # float32 rounds what is common
    n = int((s > least).sum().clamp(max=min(n_out, len(sample) // 2)))
    if n == 0:
        return
    r = torch.linalg.qr(torch.randn(n_out, n))[0].to(v)
    scale = (len(sample) * n_out / n) ** 0.5
    weight = scale * (r / s[:n]) @ v[:n]
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ centre)
