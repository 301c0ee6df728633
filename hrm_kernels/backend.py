"""Which implementation of an op runs.

`auto` (the default) takes a Triton kernel where the tensor is on a CUDA device and a kernel covers the case, else the
reference. `reference` never takes a kernel. `triton` always does, and is an error where it cannot: a kernel that was
asked for by name is never replaced silently. Single ops can be given an implementation of their own, and attention has
two more, by libraries: `sdpa` and `flash`. The loop over HRM steps is chosen likewise, and so is who starts its steps:
`hrm_loop` may be `host`, `graph` or `while`.

`use_backend("auto", attention="flash")` sets this from code, the environment variable HRM_KERNELS for a process:
`HRM_KERNELS=auto,attention=flash`. With TRITON_INTERPRET=1, Triton's interpreter runs the kernels on a CPU, slowly,
where `triton` asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library_attention, reference, tuning
from .autocast import compute_dtype
from .drivers import DRIVERS
from .quantized import is_narrow

if TYPE_CHECKING:
    from .loop import LoopWeights

MODES = ("auto", "reference", "triton")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "swiglu_mul",
    "qkv_rope",
    "attention",
    "cached_attention",
    "linear_cross_entropy",
    "halting",
)
PRODUCTS = ("swiglu", "qkv_rope", "linear_cross_entropy")
"""Ops that have a weight matrix among their arguments."""
LOOP = "hrm_loop"
"""The loop over steps is chosen like an op. Its reference is the model's own loop."""
_IN_LOOP = ("add_rms_norm", "swiglu", "qkv_rope", "attention", "halting")

LIBRARIES = {"attention": {"sdpa": library_attention.sdpa, "flash": library_attention.flash}}
NAMES = {"attention": tuple(LIBRARIES["attention"]), LOOP: DRIVERS}
"""Op -> what else than a mode can be asked for by name."""

OLDEST = (8, 0)
"""Compute capability from which Triton has matrix instructions for bfloat16."""

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class BackendError(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


def _checked(mode: str, overrides: dict[str, str], source: str) -> tuple[str, dict[str, str]]:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}; it must be one of {', '.join(MODES)}")
    for op, name in overrides.items():
        if op not in (*OPS, LOOP):
            raise ValueError(f"{source} names the op {op!r}; there are {', '.join((*OPS, LOOP))}")
        known = (*MODES, *NAMES.get(op, ()))
        if name not in known:
            raise ValueError(f"{source} wants {op}={name!r}; it must be one of {', '.join(known)}")
    return mode, overrides


def _from_environment() -> tuple[str, dict[str, str]]:
    mode, *rest = (os.environ.get("HRM_KERNELS") or "auto").split(",")
    pairs = [part.partition("=") for part in rest]
    return _checked(mode, {op: name for op, _, name in pairs}, "the environment variable HRM_KERNELS")


_mode, _overrides = _from_environment()


class use_backend:
    """Choose the implementation of every op: a plain call sets it, a `with` block restores it afterwards.

    Args:
        mode: "auto", "reference" or "triton".
        overrides: op=name for single ops, e.g. attention="sdpa". An op not named keeps the one it has, but the mode
            "reference" takes all of these back.

    Raises:
        ValueError: an unknown mode, op or implementation.
    """

    def __init__(self, mode: str, **overrides: str):
        global _mode, _overrides
        mode, overrides = _checked(mode, overrides, "backend")
        self._previous = _mode, _overrides
        _mode, _overrides = mode, overrides if mode == "reference" else {**_overrides, **overrides}

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
        global _mode, _overrides
        _mode, _overrides = self._previous


def as_now() -> contextlib.AbstractContextManager:
    """A context in which the choices in force now are in force again, whatever they are by then."""
    mode, overrides = _mode, _overrides

    @contextlib.contextmanager
    def again():
        global _mode, _overrides
        before = _mode, _overrides
        _mode, _overrides = mode, overrides
        try:
            yield
        finally:
            _mode, _overrides = before

    return again()


def choices() -> tuple[str, frozenset[tuple[str, str]]]:
    """All that use_backend has set, to notice when it changes."""
    return _mode, frozenset(_overrides.items())


def current_backend() -> str:
    """The mode in force: "auto", "reference" or "triton"."""
    return _mode


def _kernels() -> dict:
    from .kernels import KERNELS

    return KERNELS


def why_no_kernel(op: str, device: torch.device) -> str | None:
    """None if the Triton kernel of `op` can run on `device`, else the reason in words."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed (pip install 'triton>=3.6')"
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type not in ("cuda", "meta"):
        hint = ", or a CPU with TRITON_INTERPRET=1" if device.type == "cpu" else ""
        return f"the tensors are on {device.type}, Triton kernels need a CUDA device{hint}"
    if device.type == "cuda" and _capability(device.index) < OLDEST:
        found, least = (".".join(map(str, c)) for c in (_capability(device.index), OLDEST))
        return f"the GPU has compute capability {found}, Triton kernels need {least} or later"
    return None


@functools.lru_cache(maxsize=64)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _setting(op: str) -> str:
    return _overrides.get(op, _mode)


def _kernel(op: str, setting: str, args: tuple) -> tuple[Callable | None, str]:
    """The Triton kernel of `op` if it may and can run for these arguments, else None and the reason."""
    device = args[0].device
    if setting == "auto" and device.type != "cuda":
        return None, "auto takes kernels on CUDA devices"
    reason = why_no_kernel(op, device)
    if reason is None and op in PRODUCTS:
        dtype = compute_dtype(args[0])  # under autocast to bfloat16, weights of bfloat16 are what kernels take
        if any(isinstance(t, Tensor) and t.dim() == 2 and is_narrow(t, dtype) for t in args):
            reason = "a weight is quantised, and kernels read plain ones"
    if reason is None:
        kernel = _kernels()[op]
        reason = kernel.why_not(*args)
        if reason is None:
            return kernel.run, ""
    return None, reason


def chosen(op: str, *args) -> tuple[str, Callable]:
    """(name, function) of the implementation that `op` runs for these arguments, the first of them a tensor.

    Raises:
        BackendError: an implementation was asked for by name and cannot run; the message says why.
    """
    setting = _setting(op)
    if op == "attention" and setting == "auto":
        setting = _fastest_attention(*args)
    if setting in LIBRARIES.get(op, ()):
        if setting == "flash" and (reason := library_attention.why_not_flash(*args[:3])):
            raise BackendError(f"{op}={setting} was asked for, but {reason}; use 'auto' or 'sdpa'")
        return setting, LIBRARIES[op][setting]
    if setting != "reference":
        kernel, reason = _kernel(op, setting, args)
        if kernel is not None:
            return "triton", kernel
        if setting == "triton":
            raise BackendError(_asked_for(op, setting, reason))
    return "reference", getattr(reference, op)


def runs_kernel(op: str, x: Tensor) -> bool:
    """Whether `op` would be given to its Triton kernel for tensors like x, as far as device and settings go."""
    setting = _setting(op)
    return setting == "triton" or (setting == "auto" and x.is_cuda and why_no_kernel(op, x.device) is None)


def _asked_for(op: str, setting: str, reason: str, remedy: str = "'auto' or 'reference'") -> str:
    what = f"backend {setting!r} was asked for, but {op}:" if setting in MODES else f"{op}={setting} was asked for, but"
    return f"{what} {reason}; use {remedy}"


def _fastest_attention(qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None, dropout_p: float) -> str:
    """What tuning.py's table says, of what can run."""
    if qkv.device.type != "cuda":
        return "auto"
    name = tuning.fastest_attention(compute_dtype(qkv), qkv.shape[1])
    if name == "flash" and library_attention.why_not_flash(qkv, n_head, n_kv_head):
        return "auto"
    return "auto" if name == "triton" else name


def run(op: str, *args):
    """Call the chosen implementation of `op`."""
    return chosen(op, *args)[1](*args)


def run_rope_gqa_attention(x: Tensor, w_q, w_k, w_v, biases, rotary, n_head, n_kv_head, lengths, dropout_p) -> Tensor:
    """qkv_rope and attention: as one kernel op where both are to be Triton's, else one after the other."""
    setting = _setting("attention")
    fused = setting == "triton" or (
        setting == "auto" and tuning.fastest_attention(compute_dtype(x), x.shape[1]) == "triton"
    )
    if fused and setting == _setting("qkv_rope"):
        args = x, w_q, w_k, w_v, biases, rotary, n_head, n_kv_head, lengths, dropout_p
        kernel, _ = _kernel("rope_gqa_attention", setting, args)
        if kernel is not None:
            return kernel(*args)
    qkv = run("qkv_rope", x, w_q, w_k, w_v, biases, rotary)
    return run("attention", qkv, n_head, n_kv_head, lengths, dropout_p)


def loop_driver(x: Tensor, weights: LoopWeights, n_head: int, n_kv_head: int, why_not: str | None = None) -> str | None:
    """Who starts the steps of the loop over x on kernels, a name of drivers.py; None where the model's own loop runs.

    The loop's kernels are Triton's: where another implementation was chosen for one of the ops that a step is made of,
    and nothing for the loop itself, the model's own loop runs, with that. `why_not` is a reason of the model's.

    Raises:
        BackendError: kernels, or a driver, were asked for by name and cannot run; the message says why.
    """
    setting = _setting(LOOP)
    others = LOOP not in _overrides and any(_overrides.get(op, _mode) not in ("auto", "triton") for op in _IN_LOOP)
    if setting == "reference" or others or forward_ad._current_level >= 0:
        return None
    kernel, reason = None, why_not
    if reason is None:
        mode = "triton" if setting in DRIVERS else setting
        kernel, reason = _kernel(LOOP, mode, (x, weights, n_head, n_kv_head))
    if kernel is None:
        if setting == "auto":
            return None
        raise BackendError(_asked_for(LOOP, setting, reason, f"{LOOP}=reference, the model's own loop"))
    return _driver(setting, x.device)


def _driver(setting: str, device: torch.device) -> str:
    """Who starts the steps on `device`; the device itself, unless that cannot be or another was asked for."""
    by_name, reason = setting in DRIVERS, None
    if setting != "host" and device.type != "cuda":
        reason = f"x is on {device.type}, and CUDA graphs need a CUDA device"
    elif setting in ("auto", "triton", "while"):
        from . import while_graph

        reason = while_graph.why_not(device)
    if reason is None:
        return setting if by_name else "while"
    if by_name:
        raise BackendError(_asked_for(LOOP, setting, reason, f"{LOOP}=host"))
    if device.type == "cuda":
        _say_once(f"the host starts the steps of the HRM loop, not the device: {reason}")
    return "host"


@functools.lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def describe(device: torch.device) -> dict[str, str]:
    """Op name -> implementation, as it would be chosen on `device` for inputs that the kernels cover; of the loop, who
    starts its steps (to know which, the first time on a GPU csrc/ is compiled). For run headers and bug reports."""
    names = {}
    for op in (*OPS, LOOP):
        name = _setting(op)
        if name == "auto":
            name = "triton" if device.type == "cuda" and why_no_kernel(op, device) is None else "reference"
        if op == LOOP and name == "triton":
            name = _driver(name, device)
        names[op] = name
    return names
