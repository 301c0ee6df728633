"""Where a run computes: device, autocast precision, kernels, compilation, determinism."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

import hrm_kernels

from ..blocks import Block, ReasoningBlock


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        ValueError: the device is not to be had here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda, mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name!r} is not to be had here ({reason}); use auto or cpu") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Autocast precision: "auto" is bfloat16 on a CUDA device that computes in it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """The region that forward passes run in."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def choose_kernels(fused: str, device: torch.device) -> str:
    """Set the backend for --fused off | auto | require; returns the line that tells the user what runs.

    Without --fused ("off") the environment variable HRM_KERNELS counts, its "triton" like require.

    Raises:
        ValueError: require, and an op has no kernel that can run here; names the op and the reason.
    """
    asked = "--fused=require"
    if fused == "off" and "HRM_KERNELS" in os.environ:
        fused = {"auto": "auto", "reference": "off", "triton": "require"}[hrm_kernels.current_backend()]
        asked = "HRM_KERNELS=triton"
    missing = {op: why for op in hrm_kernels.describe(device) if (why := hrm_kernels.why_no_kernel(op, device))}
    if fused == "require":
        if missing:
            op, why = next(iter(missing.items()))
            raise ValueError(f"{asked}: no kernel can run for {op}: {why}; use --fused for what there is")
        hrm_kernels.use_backend("triton")
    else:
        hrm_kernels.use_backend("reference" if fused == "off" else "auto")
    chosen = hrm_kernels.describe(device)
    if set(chosen.values()) == {"reference"}:
        if fused == "off":
            return "reference for every op (--fused takes kernels where there are any)"
        return f"--fused: {next(iter(missing.values()), f'auto takes none on {device.type}')}; the reference runs"
    how = "without --fused" if fused == "off" else "--fused"
    return f"{how}: {', '.join(f'{op}={name}' for op, name in chosen.items())}"


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block in place (state-dict keys stay). Batch size is dynamic: rows leave the host's loop."""
    for module in model.modules():
        if isinstance(module, (Block, ReasoningBlock)):
            module.compile(dynamic=True)


def make_deterministic() -> None:
    """Bitwise reproducible GPU arithmetic (a CPU run is so at an equal thread count anyway)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    torch.use_deterministic_algorithms(True)
