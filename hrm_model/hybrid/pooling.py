"""From a prompt's hidden states to the controller's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PromptPooling(nn.Module):
    """x = W_mean mean(h_t) + W_last h_last over the prompt's tokens: mix and projection are one matrix [d_h, 2 D], as
    two linear maps in a row would be one.

    Args:
        width: D, channels of the language model. d_h: channels of the controller.
    """

    def __init__(self, width: int, d_h: int):
        super().__init__()
        self.mix = nn.Linear(2 * width, d_h)

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
