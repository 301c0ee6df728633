"""Weights in the layout that a CPU multiplies fastest, for passes that use them many times and do not change them.

A token's worth of products reads each weight once, so its layout is what counts: with oneDNN's own, the products of a
block of the base model take about 0.6 of the time for one token and 0.4 for two to sixteen (two shared CPU cores). The
copies take as much memory as the weights.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH = 3
"""Uses after which a weight is packed: packing reads and writes it once, and fewer uses would not win that back."""

SMALLEST = 1 << 17
"""Numbers of a matrix from which on packing pays: a call takes about 13 us more, which smaller ones do not win back."""

_local = threading.local()


class PackedWeights:
    """Packed copies of matrices, each made when it is used for the third time, and again when it was changed in place.
    (Changes through `.data` go unnoticed, as they do by autograd.)"""

    def __init__(self):
        self._copies: dict[int, tuple[Tensor, tuple[int, int], Tensor]] = {}
        self._uses: Counter[int] = Counter()

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(weight.nbytes for weight, _, _ in self._copies.values())

    def of(self, weight: Tensor) -> Tensor | None:
        """The packed copy; None where there is no packing."""
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < SMALLEST:
            return None
        if (
            type(weight) not in (Tensor, torch.nn.Parameter)
            or weight.is_inference()
            or torch.is_autocast_enabled("cpu")
            or not _available()
        ):
            return None
        state = weight._version, weight.data_ptr()
        known = self._copies.get(id(weight))  # the weight is kept too, so that its id stays its own
        if known is None or known[1] != state:
            self._uses[id(weight)] += 1
            if self._uses[id(weight)] < WORTH:
                return None
            known = weight, state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self._copies[id(weight)] = known
        return known[2]


@contextlib.contextmanager
def packed_weights(packed: PackedWeights) -> Iterator[None]:
    """Within this block, products without gradient take weights from `packed`."""
    before = getattr(_local, "packed", None)
    _local.packed = packed
    try:
        yield
    finally:
        _local.packed = before


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w^T + b, [..., C] -> [..., N]."""
    packed = None if torch.compiler.is_compiling() else getattr(_local, "packed", None)
    if packed is not None and x.dtype == w.dtype and not torch.is_grad_enabled():
        copy = packed.of(w)
        if copy is not None:
            return torch.ops.mkldnn._linear_pointwise(x, copy, b, "none", [], "")
    return F.linear(x, w, b)


@functools.cache
def _available() -> bool:
    """Whether this torch has the two functions, which it does not promise to keep, and they are right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, w = torch.linspace(-1, 1, 32).view(2, 16), torch.linspace(1, 2, 128).view(8, 16)
    try:
        product = torch.ops.mkldnn._linear_pointwise(
            x, torch.ops.mkldnn._reorder_linear_weight(w, None), None, "none", [], ""
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(product, x @ w.t(), rtol=1e-5, atol=1e-5)
