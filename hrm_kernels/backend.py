"""Which implementation of an op runs: auto, reference or triton.

`auto` (the default) takes a Triton kernel where the tensor is on a CUDA device and a kernel covers the case, else the
reference. `reference` never takes a kernel. `triton` always does, and is an error where it cannot: a kernel that was
asked for by name is never replaced silently. The environment variable HRM_KERNELS sets the mode for a process;
`use_backend` sets it from code.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from . import reference

MODES = ("auto", "reference", "triton")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "swiglu_mul",
    "qkv_rope",
    "attention",
    "linear_cross_entropy",
    "halting",
)

# op name -> Triton launcher with the reference's signature. A new kernel is entered here and nowhere else.
TRITON_KERNELS: dict[str, Callable] = {}


class BackendError(RuntimeError):
    """A kernel was asked for by name and cannot run here."""


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}; it must be one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("HRM_KERNELS", "auto"), "the environment variable HRM_KERNELS")


class use_backend:
    """Choose the implementation of every op: a plain call sets it, a `with` block restores it afterwards.

    Args:
        mode: "auto", "reference" or "triton".

    Raises:
        ValueError: the mode is none of these.
    """

    def __init__(self, mode: str):
        global _mode
        mode = _checked(mode, "backend")
        self._previous, _mode = _mode, mode

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _mode
        _mode = self._previous


def current_backend() -> str:
    """The mode in force: "auto", "reference" or "triton"."""
    return _mode


def why_no_kernel(op: str, device: torch.device) -> str | None:
    """None if the Triton kernel of `op` can run on `device`, else the reason in words."""
    if op not in TRITON_KERNELS:
        return f"this version has no Triton kernel for {op}"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, Triton kernels need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'triton>=3.6')"
    return None


def implementation(op: str, device: torch.device) -> Callable:
    """The function that `op` runs for tensors on `device` in the current mode.

    Raises:
        BackendError: mode "triton" and no kernel can run; the message says why.
    """
    if _mode == "reference" or (_mode == "auto" and device.type != "cuda"):
        return getattr(reference, op)
    reason = why_no_kernel(op, device)
    if reason is None:
        return TRITON_KERNELS[op]
    if _mode == "triton":
        raise BackendError(f"backend 'triton' was asked for, but {reason}; use 'auto' or 'reference'")
    return getattr(reference, op)


def describe(device: torch.device) -> dict[str, str]:
    """Op name -> "triton" or "reference", as `auto` would choose on `device`. For run headers and bug reports."""
    return {op: "reference" if why_no_kernel(op, device) else "triton" for op in OPS}
