"""Initial weights of the HRM paper (Wang et al., 2025; LeCun et al., 1998): cut normals that keep a vector's size.

a projection [N, C]    N(0, 1 / C), cut at two standard deviations
the embedding          N(0, 1 / embed_scale^2), so that it comes out of its scale with variance 1
H_init, L_init         N(0, 1)
the halting head       0: nothing is decided before it has learned
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STD_OF_CUT = 0.8796256610342398
"""Standard deviation of a unit normal that is cut at +-2."""


def truncated_normal_(p: Tensor, std: float) -> Tensor:
    """Fill `p` with normal numbers cut at two standard deviations; those that come out have the deviation `std`."""
    return nn.init.trunc_normal_(p, 0.0, std / STD_OF_CUT, -2 * std / STD_OF_CUT, 2 * std / STD_OF_CUT)


@torch.no_grad()
def truncated_init(name: str, p: nn.Parameter, embed_scale: float) -> None:
    """Give a model's parameter of this name its initial value."""
    if "q_head" in name or name.endswith(("bias", "gate_a")):
        nn.init.zeros_(p)
    elif "_init" in name:
        truncated_normal_(p, 1.0)
    elif p.dim() == 1:
        nn.init.ones_(p)
    elif name in ("wte.weight", "wpe.weight"):
        truncated_normal_(p, 1.0 / embed_scale)
    else:
        truncated_normal_(p, p.shape[1] ** -0.5)
