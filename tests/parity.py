"""What the parity tests share: tolerances, the comparison with float64, and tiles small enough for the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from golden_files import relative_error
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels.tuning import Tile, use_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    import interpreter

    interpreter.correct()

COMPILING = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
"""Environment of a process in which kernels are compiled, not interpreted."""

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3)}
"""dtype -> relative error ||found - truth|| / ||truth|| allowed forward and in gradients."""

SMALL = {
    "rms_norm": Tile(32, 0, 0, 4, 1),
    "rms_norm_backward": Tile(32, 0, 0, 4, 1),
    "swiglu": Tile(16, 32, 32, 4, 1),
    "qkv": Tile(16, 32, 32, 4, 1),
    "linear": Tile(16, 32, 32, 4, 1),
    "attention": Tile(32, 16, 0, 4, 1),
    "cached_attention": Tile(0, 16, 0, 4, 1),
    "attention_dq": Tile(16, 32, 0, 4, 1),
    "attention_dkv": Tile(32, 16, 0, 4, 1),
    "attention_wide": Tile(16, 16, 0, 4, 1),
    "attention_dq_wide": Tile(16, 32, 0, 4, 1),
    "attention_dkv_wide": Tile(32, 16, 0, 4, 1),
    "cross_entropy": Tile(0, 128, 0, 4, 1),
}

WHOLE = SMALL | {
    "rms_norm": Tile(64, 0, 0, 4, 1),
    "rms_norm_backward": Tile(64, 0, 0, 4, 1),
    "swiglu": Tile(64, 128, 32, 4, 1),
    "qkv": Tile(64, 64, 32, 4, 1),
    "linear": Tile(64, 64, 32, 4, 1),
    "attention": Tile(32, 32, 0, 4, 1),
    "attention_dq": Tile(32, 32, 0, 4, 1),
    "attention_dkv": Tile(32, 32, 0, 4, 1),
}
"""The interpreter takes milliseconds a program, however small: whole models want few."""


def small_tiles():
    """Tiles that small inputs do not fill, for the interpreter; on a GPU the table's own."""
    return use_tiles(**SMALL) if DEVICE.type == "cpu" else nullcontext()


@contextmanager
def model_tiles() -> Iterator[None]:
    """Tiles that small models fill, likewise."""
    if DEVICE.type == "cpu":
        with interpreter.without_overflow_checks(), use_tiles(**WHOLE):
            yield
    else:
        yield


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE)


def run(
    mode: str, call: Callable, inputs: dict[str, Tensor], gradient: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Name -> result or gradient of `call(**inputs)` under backend `mode`."""
    inputs = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    with ops.use_backend(mode):
        results = call(**inputs)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
        floats = [r for r in results if r.requires_grad]
        torch.autograd.backward(floats, [gradient(r) for r in floats])
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    return found | {f"d {name}": t.grad for name, t in inputs.items() if t.grad is not None}


def random_gradient(result: Tensor) -> Tensor:
    """Normal numbers that depend on the shape alone, rounded as bfloat16 so that every dtype gets the same."""
    return random(*result.shape, seed=result.numel() + 7).bfloat16().to(result.dtype)


def ones_of_stride_0(result: Tensor) -> Tensor:
    """What .sum().backward() sends."""
    return torch.ones((), dtype=result.dtype, device=result.device).expand(result.shape)


def compare(
    call: Callable,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    float32: tuple[str, ...] = (),
    but_not: tuple[str, ...] = (),
    gradient: Callable[[Tensor], Tensor] = random_gradient,
) -> dict[str, float]:
    """Hold the Triton kernel to the reference in float64, forward and backward; returns the errors.

    Results named in `but_not` are not looked at. Every float input is rounded to `dtype` (those named in `float32` to
    that); the truth starts from the rounded ones.
    """
    given = {
        name: (t.to(torch.float32 if name in float32 else dtype) if t.is_floating_point() else t)
        for name, t in inputs.items()
    }
    truth = run("reference", call, {k: t.double() if t.is_floating_point() else t for k, t in given.items()}, gradient)
    found = run("triton", call, given, gradient)
    assert found.keys() == truth.keys()
    errors = {}
    for name, expected in truth.items():
        if name in but_not:
            continue
        result = found[name]
        assert result.shape == expected.shape, name
        if expected.dtype == torch.bool:
            assert torch.equal(result, expected), name
            continue
        assert result.isfinite().all(), f"{name} has numbers that are not finite"
        limit = TOLERANCE[dtype][name.startswith("d ")]
        error = (result.double() - expected).norm().item()
        size = expected.norm().item()
        assert error <= limit * size + 1e-8, f"{name}: relative error {error / max(size, 1e-30):.1e}, limit {limit:.0e}"
        errors[name] = relative_error(result, expected) if size else 0.0
    return errors
