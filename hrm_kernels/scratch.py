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

    def has_room(self, sizes: Sizes, device: torch.device) -> bool:
        """Whether `sizes` can be carved without growing."""
        return self._bytes is not None and self._bytes.device == device and self.nbytes >= _needed(sizes)

    def grow(self, sizes: Sizes, device: torch.device) -> None:
        """Make room for `sizes` on `device`. What was handed out before is to be dropped beforehand: it would keep the
        old memory beside the new. From the second time on it grows by half at least: a text that gets longer token by
        token would else move it with every token."""
        needed = max(_needed(sizes), self.nbytes * 3 // 2)
        self._bytes = None
        self._bytes = torch.empty(needed, dtype=torch.uint8, device=device)

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


def _needed(sizes: Sizes) -> int:
    return sum(_padded(*size) for size in sizes.values())


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
