"""What a run would take, from its first steps: memory, FLOPs, hours. Nothing is written."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from ..config import HRMConfig
from .clock import duration
from .flops import peak_flops, training_flops

STEPS = 2
"""Timed after one that warms up."""


def dry_run(training) -> dict[str, Any]:
    """Take a few steps of a built Training and say what all would take; returns the figures. All processes call it.

    Memory is what was used at most by one process: on a GPU what torch allocated, elsewhere the process's resident set.
    """
    run, config, ranks = training.run, training.config, training.ranks
    seconds, tokens, flops, mean_steps = [], 0, 0.0, []
    for step in range(1 + STEPS):
        _wait(training.device)
        begin = time.perf_counter()
        result = training.train_step(min(step, run.steps - 1))
        _wait(training.device)
        if step:
            seconds.append(time.perf_counter() - begin)
            tokens, flops = tokens + result.tokens, flops + result.flops
            mean_steps.append(sum(d * n for d, n in result.depths.items()) / max(1, result.depths.total()))
    per_step = sum(seconds) / STEPS
    peak = peak_flops(training.device, training.dtype)
    found = {
        "parameters": training.model.num_parameters(),
        "bytes_of_state": max(ranks.gather(_state_bytes(training))),
        "peak_bytes": max(ranks.gather(_peak_bytes(training.device))),
        "processes": ranks.size,
        "tokens_per_step": tokens / STEPS,
        "tokens": tokens / STEPS * run.steps,
        "flops_per_token": flops / max(1, tokens),
        "flops_per_token_by_depth": {s: _flops_per_token(config, s) for s in sorted({1, config.hrm_max_steps})},
        "mean_steps": sum(mean_steps) / STEPS,
        "seconds_per_step": per_step,
        "tokens_per_s": tokens / sum(seconds),
        "mfu": flops / sum(seconds) / (peak * ranks.size) if peak else None,
        "hours": per_step * run.steps / 3600,
    }
    if ranks.is_first:
        print(_report(found, run.steps), flush=True)
    return found


def _flops_per_token(config: HRMConfig, depth: int) -> float:
    """Of training a row at a depth: its steps but the last forward alone, the last with gradient."""
    n = config.block_size
    return training_flops(config, n, 1, (depth - 1, 1)) / n


def _state_bytes(training) -> int:
    """Parameters, gradients, optimizer state and average that this process holds."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in training.model.parameters()]
    total = 2 * sum(p.nbytes for p in local)
    for slots in training.optimizer.state.values():
        held = (v.to_local() if hasattr(v, "to_local") else v for v in slots.values() if torch.is_tensor(v))
        total += sum(v.nbytes for v in held)
    if training.average is not None:
        total += 4 * sum(p.numel() for p in local)
    return total


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(found: dict[str, Any], steps: int) -> str:
    depths = ", ".join(f"{n / 1e9:,.3f} at {s} steps" for s, n in found["flops_per_token_by_depth"].items())
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    each = " a process" if found["processes"] > 1 else ""
    return (
        f"memory  {found['bytes_of_state'] / 2**20:,.0f} MiB of parameters, gradients and optimizer state{each}; "
        f"{found['peak_bytes'] / 2**20:,.0f} MiB at the peak\n"
        f"compute {found['flops_per_token'] / 1e9:,.3f} GFLOP a token at {found['mean_steps']:.2f} steps on average, "
        f"explorers included ({depths})\n"
        f"speed   {found['tokens_per_s']:,.0f} tokens/s, {found['seconds_per_step']:.2f} s a step{mfu}\n"
        f"run     {steps:,} steps of {found['tokens_per_step']:,.0f} tokens, {found['tokens']:,.0f} in all: "
        f"{duration(found['hours'] * 3600)} here, without evaluations\n"
        "dry run: nothing was written"
    )
