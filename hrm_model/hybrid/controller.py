"""The controller: HRMCore on one latent token, which stands for the prompt.

    x = pool(h)                                      [B, 1, d_h]
    a segment:  inner_T times  z_L <- L_level(z_L + (z_H + x))       all but the last without gradient
                z_H <- H_level(z_H + z_L)                            ends with RMSNorm, as every block does

Between segments the state is detached: the memory of training does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import HRMConfig
from ..core import CoreOutput, HRMCore
from .config import HybridConfig
from .pooling import PromptPooling

WITH_GRADIENT = 2
"""Level applications at a segment's end that have a gradient: the last of each level."""


class Controller(nn.Module):
    """Pools a prompt and thinks about it.

    Args:
        config: the hybrid's. width: channels of the language model.
    """

    def __init__(self, config: HybridConfig, width: int):
        super().__init__()
        self.config: HRMConfig = config.core_config()  # where HeadTraining looks for the number of segments
        self.decides = config.use_act
        self.pooling = PromptPooling(width, config.d_h)
        self.hrm_core = HRMCore(self.config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices N(0, 1/4 / inputs), L_init and H_init N(0, 1/100), norms 1; biases and the halting head 0.

        With norms after each branch the scale of a matrix is that of its branch against what it is added to, and the
        states that a prompt's x is added to must not drown it. Two-digit sums, by a linear readout of one segment,
        after 600 steps of 64: 26 % right with N(0, 1 / inputs) and states N(0, 1), 30 % with smaller states, 39 % with
        smaller matrices, 51 % with both. 0.02, which suits wide models, leaves branches of narrow ones without effect.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias") or "q_head" in name:
                p.zero_()
            elif "_init" in name:
                p.normal_(0.0, 0.1)
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.5 / math.sqrt(p.shape[1]))

    def segments(self, x: Tensor, n: int) -> Iterator[Tensor]:
        """z_H [B, 1, d_h] after segment 1, 2, .. n, with that segment's gradient alone; every row runs all of them.

        Args:
            x: [B, 1, d_h] of the pooling. To step an optimizer's graph segment by segment, see HybridModel.learn.
        """
        z_H, z_L = self.hrm_core.initial_state(x)
        for _ in range(n):
            z_H, z_L = self.segment(x, z_H, z_L)
            yield z_H
            z_H, z_L = z_H.detach(), z_L.detach()

    def segment(self, x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        """One segment of every row."""
        return self.hrm_core.step(x, z_H, z_L, None, None, window=WITH_GRADIENT)

    @torch.no_grad()
    def think(self, x: Tensor, n: int, decide: bool | None = None) -> CoreOutput:
        """Run each row for n segments, or until the halting head stops it; a row that has stopped never changes again.

        Args:
            x: [B, 1, d_h]. n: the most segments, also more than in training. decide: let the head decide; default where
                it has been trained to.
        """
        decide = self.decides if decide is None else decide
        forced = [0 if decide else n] * len(x)
        return self.hrm_core(x, None, None, forced, n, 0.0)
