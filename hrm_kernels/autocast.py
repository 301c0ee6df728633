"""Low-precision copies of weights under autocast, made once a forward pass instead of once a use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_local = threading.local()


@contextlib.contextmanager
def shared_casts() -> Iterator[None]:
    """Within this block (or a function decorated with it) a weight is cast once, however often it is used.

    A model's forward pass is such a block: nothing changes weights while it lasts, and autograd adds up the gradients
    of all uses. Copies that carry gradient history are kept apart from copies that do not. While torch.compile traces,
    every use casts: the compiler removes repetitions itself.
    """
    before = getattr(_local, "copies", None)
    _local.copies = {} if before is None else before
    try:
        yield
    finally:
        _local.copies = before


_assumed: torch.dtype | None = None


@contextlib.contextmanager
def assume(dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype` for tensors without memory, which torch's does not know. For the offline compile check."""
    global _assumed
    _assumed = dtype
    try:
        yield
    finally:
        _assumed = None


def in_autocast(x: Tensor) -> bool:
    """Whether an autocast region is in force for x's device."""
    return _assumed is not None if x.device.type == "meta" else torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x computes in: autocast's type inside its region, else x's own."""
    if in_autocast(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type) if _assumed is None else _assumed
    return x.dtype


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, dequantised if it is one of torchao's."""
    quantized = hasattr(weight, "tensor_data_names")
    if weight.dtype == dtype and not quantized:
        return weight
    copies = None if torch.compiler.is_compiling() else getattr(_local, "copies", None)
    if copies is None:
        return _made(weight, dtype, quantized)
    key = id(weight), dtype, torch.is_grad_enabled()
    if key not in copies:
        copies[key] = weight, _made(weight, dtype, quantized)  # the weight too, so that its id stays its own
    return copies[key][1]


def _made(weight: Tensor, dtype: torch.dtype, quantized: bool) -> Tensor:
    return (weight.dequantize() if quantized else weight).to(dtype)
