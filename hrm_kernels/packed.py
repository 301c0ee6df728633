"""Weights in the layout that a CPU multiplies fastest, for passes that use them many times and do not change them.

A token's worth of products reads each weight once, so its layout is what counts: with oneDNN's own, a token of the base
model takes 0.78 of the time in a batch of one and 0.57 in one of eight (two shared CPU cores; bench/generate.py prints
it). The copies take as much memory as float32 weights. Weights that are stored narrower
(quantized.py) are made plain for them, so once, and not at every token.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import is_narrow, is_quantized, multiplies_itself, plain, product, rounded

WORTH = 3
"""Uses after which a weight is packed: packing reads and writes it once, and fewer uses would not win that back."""

SMALLEST = 80_000
"""Numbers of a matrix from which on packing may pay: a call costs more than torch's own, and a small matrix, which the
processor's caches hold anyway, does not win that back. Chosen by trial: no script prints it."""

_WIDENED = (torch.float32, torch.bfloat16, torch.float16)
_local = threading.local()


class PackedWeights:
    """Packed copies of matrices, each made when it is used for the third time, and again when it was changed in place.
    (Changes through `.data` go unnoticed, as they do by autograd.)

    Args:
        always: pack every matrix, small ones too, at its first use. With torch's own product a row's last bits depend
            on how many rows there are (F.linear differs at 1, 2, 3, 5, .. rows), with packed weights they do not.
    """

    def __init__(self, always: bool = False):
        self._worth, self._smallest = (1, 1) if always else (WORTH, SMALLEST)
        self._copies: dict[tuple[int, ...], tuple[tuple[Tensor, ...], tuple, Tensor]] = {}
        self._uses: Counter[tuple[int, ...]] = Counter()

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(4 * weight.numel() for weights, _, _ in self._copies.values() for weight in weights)

    def of(self, *weights: Tensor) -> Tensor | None:
        """The packed copy of [N, K] matrices of one K, one below the other, or of small narrow ones a plain copy; None
        where there is neither."""
        if not all(map(_packs, weights)):
            return None
        small = sum(weight.numel() for weight in weights) < self._smallest or not _available()
        if small and not is_narrow(weights[0], torch.float32):
            return None
        state = tuple(map(_state, weights))
        key = tuple(map(id, weights))
        known = self._copies.get(key)  # the weights are kept too, so that their ids stay their own
        if known is None or known[1] != state:
            self._uses[key] += 1
            if self._uses[key] < self._worth:
                return None
            wide = [plain(weight, torch.float32).detach() for weight in weights]
            whole = wide[0] if len(wide) == 1 else torch.cat(wide)
            known = weights, state, whole if small else torch.ops.mkldnn._reorder_linear_weight(whole, None)
            self._copies[key] = known
        return known[2]


def _packs(weight: Tensor) -> bool:
    held = weight.qdata if is_quantized(weight) else weight
    if held.device.type != "cpu" or weight.dtype not in _WIDENED or held.is_inference() or multiplies_itself(weight):
        return False
    return type(held) in (Tensor, torch.nn.Parameter) and not torch.is_autocast_enabled("cpu")


def _state(weight: Tensor) -> tuple[int, int]:
    held = weight.qdata if is_quantized(weight) else weight
    return held._version, held.data_ptr()


@contextlib.contextmanager
def packed_weights(packed: PackedWeights) -> Iterator[None]:
    """Within this block, products without gradient take weights from `packed`."""
    before = getattr(_local, "packed", None)
    _local.packed = packed
    try:
        yield
    finally:
        _local.packed = before


def packed_product(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """x w^T + b of each weight, side by side: [..., K] -> [..., sum of N]. None where no packed copy is in use."""
    packed = None if torch.compiler.is_compiling() else getattr(_local, "packed", None)
    if packed is None or x.dtype != torch.float32 or torch.is_grad_enabled():
        return None
    copy = packed.of(*weights)
    if copy is None:
        return None
    bias = None
    if biases[0] is not None:
        bias = biases[0] if len(biases) == 1 else torch.cat(list(biases))
    if not copy.is_mkldnn:
        return F.linear(x, copy, bias)
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x w^T + b, [..., K] -> [..., N]; x rounded first where a quantised w wants it."""
    x = rounded(x, w)
    found = packed_product(x, (w,), (b,))
    return product(x, w, b) if found is None else found


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
