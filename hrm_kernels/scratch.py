"""One piece of memory that batches of different shapes use in turn."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; what torch's own allocator keeps to, and more than any load of a kernel wants."""

Sizes = Mapping[Hashable, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, type)."""


class Scratch:
    """Memory that grows to the largest need and is then only carved up anew."""

    def __init__(self):
        self._bytes: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._bytes is None else self._bytes.numel()

    def grow(self, sizes: Sizes, device: torch.device) -> bool:
        """Make room for `sizes` on `device`. True if that moved the memory: addresses handed out before are void."""
        needed = sum(_padded(*size) for size in sizes.values())
        if self._bytes is not None and self._bytes.device == device and self.nbytes >= needed:
            return False
        self._bytes = None  # before the new one is asked for, so that they never exist together
        self._bytes = torch.empty(needed, dtype=torch.uint8, device=device)
        return True

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tell torch that `stream` works on this memory: it is not given to others before that work is done."""
        if self._bytes is not None:
            self._bytes.record_stream(stream)

    def carve(self, sizes: Sizes) -> dict[Hashable, Tensor]:
        """Uninitialised tensors of `sizes`, one behind the other. They overlap those of the call before."""
        found, begin = {}, 0
        for name, (shape, dtype) in sizes.items():
            n = math.prod(shape) * dtype.itemsize
            found[name] = self._bytes[begin : begin + n].view(dtype).view(shape)
            begin += _padded(shape, dtype)
        return found


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
