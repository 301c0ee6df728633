"""How a kernel is started and how it becomes an op that torch knows; what every kernel file shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("hrm_kernels", "DEF")


class Launch(NamedTuple):
    """One kernel start, as `record` keeps it."""

    kernel: Any
    args: tuple
    options: dict[str, Any]


class Rows(NamedTuple):
    """Which rows of a batch [B, T, ...] a kernel works on, in the order of its arguments. Tensors are on the device, so
    that a kernel queued now can look at what an earlier one decided."""

    lengths: Tensor | None
    """[B] int64: positions from a row's length on are left out. None: none are."""
    active: Tensor | None
    """[B] int32: the first n_active are the rows to work on. None: all are."""
    n_active: Tensor | None
    """[1] int32."""

    @property
    def flags(self) -> dict[str, bool]:
        """A kernel's constants."""
        return {"ACTIVE": self.active is not None, "HAS_LENGTHS": self.lengths is not None}


EVERY_ROW = Rows(None, None, None)

_recording: list[Launch] | None = None


class record:
    """`with record() as launches:` kernels are written down instead of run. For the offline compile check."""

    def __enter__(self) -> list[Launch]:
        global _recording
        _recording = []
        return _recording

    def __exit__(self, *exc) -> None:
        global _recording
        _recording = None


def recording() -> bool:
    """Whether kernels are being written down instead of run."""
    return _recording is not None


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel` on `grid` with positional arguments, constants and options (num_warps, num_stages) by name.

    A product and a sum become one fused multiply-add. Said explicitly because the default differs between Triton
    releases, and results should not.
    """
    options["enable_fp_fusion"] = True
    if _recording is not None:
        _recording.append(Launch(kernel, args, options))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def kernel_op(schema: str) -> Callable[[Callable], Callable]:
    """Register a launcher that writes its results into arguments (`Tensor(a!)`) and returns nothing.

    While torch.compile traces, the call becomes an op of the graph, whose insides it does not look into. Otherwise the
    launcher is called directly, which spares torch's dispatcher and its boxing of every argument.
    """

    def register(launcher: Callable) -> Callable:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hrm_kernels::{name}", _writes_only, lib=LIBRARY)
        traced = getattr(torch.ops.hrm_kernels, name).default

        def call(*args) -> None:
            if torch.compiler.is_compiling():
                traced(*args)
            else:
                launcher(*args)

        return call

    return register


def _writes_only(*args) -> None:
    """Shapes and types of the results are those of the arguments they are written into."""


def rows(x: Tensor) -> Tensor:
    """[..., C] as [M, C] with unit stride along C; copied only where the layout has no such view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels, is slower than a launcher wants."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous: copied only where they are not."""
    return [t if t is None else t.contiguous() for t in tensors]


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as three tf32 products (about 2^-21 relative, on tensor cores), unless torch was
    told that one will do. Narrower types are multiplied exactly and accumulated in float32 whatever this says."""
    told = torch.backends.cuda.matmul.fp32_precision
    if told == "none":  # nothing said of products alone: what was said of everything
        told = torch.backends.fp32_precision
    return "tf32" if dtype != torch.float32 or told == "tf32" else "tf32x3"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to know: one of these wants a gradient, or forward-mode differentiation is on, which our
    functions do not have and must refuse rather than ignore."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
