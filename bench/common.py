"""What every benchmark shares: machine and versions behind a number, interleaved timing, results as JSON lines."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hrm_kernels import __version__

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit that a figure belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hrm_kernels": __version__,
        "commit": _commit(),
    }


def interleaved(work: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, `repeats` times, taken in turns so that a machine's drift meets all alike.

    The first round is thrown away: it pays for memory and caches.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(repeats + 1):
        for name, call in work.items():
            wait(device)
            begin = time.perf_counter()
            call()
            wait(device)
            if round_number:
                times[name].append(time.perf_counter() - begin)
    return times


def event_times(
    work: dict[str, Callable[[], Any]], repeats: int, after: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """As `interleaved`, but by events on the current CUDA device: seconds of the device, not of Python.

    The device is kept waiting for about a millisecond before each call, so that the call's kernels are queued when the
    first of them starts. What `after(name)` does when a call has been queued is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(repeats + 1):
        for name, call in work.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # clock cycles
            begin.record()
            call()
            end.record()
            after(name)
            torch.cuda.synchronize()
            if round_number:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def seconds(
    work: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    after: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Of each piece of work, by the clock that suits the device."""
    return event_times(work, repeats, after) if device.type == "cuda" else interleaved(work, repeats, device)


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, median of ten. Random numbers: zeros can run faster."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    times = seconds({"product": lambda: torch.mm(a, b, out=product)}, 10, device)
    return 2 * side**3 / statistics.median(times["product"])


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call takes at its peak beyond what was there before; None where it cannot be read."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def wait(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1; give one")
    return int(text)


def save(file_name: str, record: dict[str, Any]) -> Path:
    """Append one JSON line to bench/results/`file_name`."""
    path = RESULTS / file_name
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
