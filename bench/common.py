"""What every benchmark shares: machine and versions behind a number, interleaved timing, results as JSON lines."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def large_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], float]:
    """(a square matrix product that fills the device, its FLOPs). Of random numbers: zeros can run faster."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product), 2.0 * side**3


def held_bytes(device: torch.device) -> int:
    """Memory that tensors hold; 0 where it cannot be read."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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


class Activity(NamedTuple):
    """What a call makes the device do."""

    kernels: int
    """Kernels that the profiler saw running."""
    waits: int
    """Times that the host waits for the device between the call's first launch and its last."""


def device_activity(call: Callable[[], Any], device: torch.device) -> Activity | None:
    """Kernels and waits of a call, by torch.profiler; None but on a CUDA device whose profiler sees launches."""
    if device.type != "cuda":
        return None
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profiler:
        call()
        wait(device)
    on_host, on_device = [], []
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        where = on_device if event.device_type == torch.autograd.DeviceType.CUDA else on_host
        if not event.is_user_annotation:
            where.append(event.name)
    if not any(map(_LAUNCH.match, on_host)):
        return None
    return Activity(sum(not _NO_KERNEL.match(name) for name in on_device), waits_between_launches(on_host))


_LAUNCH = re.compile(r"cu(da)?(Graph)?Launch")
_WAIT = re.compile(r"cu(da)?((Stream|Event|Device|Ctx)Synchronize|Memcpy(?!\w*Async))")
_NO_KERNEL = re.compile(r"Mem(cpy|set)\b|.* Sync\b")


def waits_between_launches(calls: Sequence[str]) -> int:
    """Of a host's calls in their order, how many wait for the device and have launches before and after them.

    Those are waiting calls of CUDA's runtime and driver; copies count where they are not asynchronous.
    """
    launches = [i for i, name in enumerate(calls) if _LAUNCH.match(name)]
    return sum(bool(_WAIT.match(name)) for name in calls[launches[0] : launches[-1]]) if launches else 0


def print_table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: Iterable[dict[str, Any]]) -> None:
    """A line for each row under the columns' names; a column says what it shows of a row. The first is set left."""
    lines = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    first, *others = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    for head, *cells in lines:
        print(f"{head:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True)))


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
