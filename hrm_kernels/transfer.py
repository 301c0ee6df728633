"""Host to device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`. From host memory to a GPU by way of pinned memory, which the host need not wait for; torch keeps
    that memory until the copy is done."""
    if device.type == "cuda" and t.device.type == "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)
