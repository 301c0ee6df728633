"""From a prompt's hidden states to the controller's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEAKEST = 1e-3
"""Directions that vary by less than this share of the strongest are noise."""


class PromptPooling(nn.Module):
    """x = W_mean mean(h_t) + W_last h_last over the prompt's tokens: mix and projection are one matrix [d_h, 2 D], as
    two linear maps in a row would be one.

    Args:
        width: D, channels of the language model. d_h: channels of the controller.
    """

    def __init__(self, width: int, d_h: int):
        super().__init__()
        self.mix = nn.Linear(2 * width, d_h)

    @torch.no_grad()
    def fit(self, pooled: Tensor) -> None:
        """Set the matrix so that x is white over these prompts: W = R S^-1 V^T, b = -W mean, with U S V^T the centred
        sample and R orthonormal columns, drawn.

        What prompts have in common is most of a hidden state, and what tells them apart a small part of it, in few
        directions: with a random matrix the levels' norms would keep the former and hide the latter.

        Args:
            pooled: [N, 2 D] of `mean_and_last`, concatenated; at least 2 different rows.
        """
        centre = pooled.mean(0)
        _, s, v = torch.linalg.svd(pooled - centre, full_matrices=False)
        n = int((s > WEAKEST * s[0]).sum().clamp(max=min(len(self.mix.bias), len(pooled) // 2)))
        if n == 0:
            return
        r = torch.linalg.qr(torch.randn(len(self.mix.bias), n))[0].to(v)
        scale = (len(pooled) * len(self.mix.bias) / n) ** 0.5  # so that x has mean square 1
        self.mix.weight.copy_(scale * (r / s[:n]) @ v[:n])
        self.mix.bias.copy_(-self.mix.weight @ centre.to(self.mix.weight.dtype))

    def forward(self, h_BTD: Tensor, prompt_BT: Tensor) -> Tensor:
        """[B, T, D] hidden states and [B, T] bool, true on each row's prompt -> [B, 1, d_h].

        Padding may be on either side; states outside the prompt count for nothing, whatever they are.
        """
        pooled = torch.cat(mean_and_last(h_BTD, prompt_BT), -1)
        return self.mix(pooled.to(self.mix.weight.dtype))[:, None]


def mean_and_last(h_BTD: Tensor, prompt_BT: Tensor) -> tuple[Tensor, Tensor]:
    """([B, D] mean over each row's prompt, [B, D] state of its last token), float32 where h is narrower.

    Raises:
        ValueError: a row without a prompt.
    """
    counts = prompt_BT.sum(1)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0])
        raise ValueError(f"row {row} has an empty prompt; a prompt needs at least one token")
    h_BTD = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32))
    mean = h_BTD.masked_fill(~prompt_BT[..., None], 0).sum(1) / counts[:, None]
    positions = torch.arange(prompt_BT.shape[1], device=prompt_BT.device)
    last = torch.where(prompt_BT, positions, -1).amax(1)
    return mean, h_BTD[torch.arange(len(h_BTD), device=h_BTD.device), last]
