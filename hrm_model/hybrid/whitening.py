"""A linear map set by a sample: what all vectors have in common goes, what tells them apart comes to one scale, or near
it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEAKEST = 1e-3
"""Directions that vary by less than this share of the strongest are noise."""


@torch.no_grad()
def whiten(linear: nn.Linear, sample: Tensor, power: float = 1.0) -> None:
    """Set y = W v + b by a sample, whose centred form is U S V^T:

        W = c R S^-power V^T,  b = -W mean,  c so that y has mean square 1

    with R drawn at random, orthonormal columns, one for each of the strongest n <= n_out directions.

    What hidden states have in common is most of them, and what tells them apart a small part, in few directions: with a
    random matrix a norm or a softmax behind it would see the former and hardly the latter.

    Args:
        linear: [n_out, n_in], with a bias. sample: [N, n_in]; where all rows are equal, nothing is set.
        power: 1 makes y white: each direction counts as much as any other. Less leaves the stronger ones ahead, for
            where the weak ones are mostly what single rows have to themselves.
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
    weight = (r * s[:n] ** -power) @ v[:n]
    weight *= (len(sample) * n_out / s[:n].pow(2 - 2 * power).sum()) ** 0.5
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ centre)
