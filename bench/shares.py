"""Where the time of a call goes: torch.profiler's ops and kernels in a few rows that a reader knows by name."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench.common import wait

CALL = "the call itself"
"""In a profile of the CPU: time of the call that is in no op."""

GROUPS = (
    ("optimizer and clipping", r"adam|optimizer|_foreach|vector_norm|multi_tensor"),
    (
        "cross-entropy",
        r"cross_entropy|_TotalLoss|nll_loss|log_softmax|aten::(exp_|amax|log|sub_|scatter_add_|gather)\b",
    ),
    ("attention", r"attention|flash|fmha"),
    ("SwiGLU gate", r"swiglu|silu|sigmoid"),
    ("rotary; QKV where fused", r"_rope|complex|view_as_real|polar"),
    ("norms", r"rms_?norm|add_norm|rsqrt|_mean_|_pow_|aten::(mean|pow|square)\b"),
    ("matrix products", r"gemm|cutlass|nvjet|splitk|linear|aten::(mm|addmm|addmm_|bmm|matmul)\b"),
    ("dropout", r"dropout|bernoulli"),
    ("embedding", r"embedding"),
    ("halting and loop", r"halting|hrm_step|index|_local_scalar|nonzero|aten::(item|where|gt|all|bitwise_and)\b"),
    ("copies and casts", r"copy|memcpy|memset|aten::(cat|clone|contiguous|to|fill_|zero_|empty\w*|zeros\w*)\b"),
    ("elementwise arithmetic", r"elementwise|triton_(poi|per|red)|aten::(add|mul|sub|div|neg|sum)_?\b"),
    ("compiled, not told apart", r"compiled|dynamo|aotdispatcher"),
    ("autograd itself", r"autograd|backward"),
    (
        "views",
        r"aten::(view|_unsafe_view|reshape|transpose|t|permute|expand|slice|split\w*|narrow|select|(un)?flatten"
        r"|(un)?squeeze|as_strided|detach\w*|unbind|alias)\b|^detach",
    ),
    ("Python between ops", f"^{CALL}$"),
)
"""(label, pattern): a name is in the first row whose pattern is found in it, whatever the case, else in "other"."""


def label_of(name: str) -> str:
    """The row of an op's name, followed by its kernel's if there is one."""
    return next((label for label, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_shares(call: Callable[[], Any], device: torch.device) -> dict[str, Any] | None:
    """What torch.profiler sees of a call: kernels on CUDA, else what each op takes itself on the CPU's main thread.

    Returns:
        "seconds" of all that was seen; "shares" by label of GROUPS and "other", which add up to 1; "other", the three
        largest names in that row. None if nothing was seen.
    """
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    with _named_kernels(), torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(CALL):
            call()
        wait(device)
    if device.type == "cuda":
        found = _kernel_seconds(profiler.events())
    else:
        found = Counter({event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()})
    total = sum(found.values())
    if total <= 0:
        return None
    shares = dict.fromkeys((*dict(GROUPS), "other"), 0.0)
    for name, seconds in found.items():
        shares[label_of(name)] += seconds / total
    other = [(name, seconds / total) for name, seconds in found.most_common() if label_of(name) == "other"]
    return {"seconds": total, "shares": shares, "other": dict(other[:3])}


def print_shares(profiles: dict[str, dict[str, Any] | None], device: torch.device) -> None:
    """A table of what `profile_shares` found of several implementations, largest rows first."""
    print(f"\nwhere the time goes: {'kernels on the GPU' if device.type == 'cuda' else 'self time of ops on the CPU'}")
    profiles = {name: profile for name, profile in profiles.items() if profile}
    if not profiles:
        print("not measured: the profiler saw nothing")
        return
    print(f"{'':<26}" + "".join(f"{name:>12}" for name in profiles))
    rows = {label: [profile["shares"][label] for profile in profiles.values()] for label in (*dict(GROUPS), "other")}
    for label, shares in sorted(rows.items(), key=lambda row: (row[0] == "other", -sum(row[1]))):
        if max(shares) >= 5e-4:
            print(f"{label:<26}" + "".join(f"{share:>12.1%}" for share in shares))
    for name, profile in profiles.items():
        largest = ", ".join(f"{op[:60]} {share:.1%}" for op, share in profile["other"].items())
        print(f"largest in other, {name}: {largest or 'nothing'}")
    print("By names: a fused kernel is in the row of its op as a whole, its matrix product too.")


def draw_shares(axis: Any, profiles: dict[str, dict[str, Any] | None]) -> None:
    """The same as stacked bars on a matplotlib axis."""
    shares = {name: profile["shares"] for name, profile in profiles.items() if profile}
    below = [0.0] * len(shares)
    for i, label in enumerate((*dict(GROUPS), "other")):
        heights = [100 * one[label] for one in shares.values()]
        axis.bar(list(shares), heights, bottom=below, label=label, color=f"C{i}", alpha=1.0 if i < 10 else 0.5)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_ylabel("% of the time")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _kernel_seconds(events: Iterable) -> Counter[str]:
    """Names of op and kernel -> seconds on the device; a kernel that the profiler knows no op of stands alone."""
    by_op: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            alone[event.name] += event.time_range.elapsed_us() / 1e6
        for kernel in event.kernels:
            by_op[f"{event.name} {kernel.name}"] += kernel.duration / 1e6
            alone[kernel.name] -= kernel.duration / 1e6
    return by_op + alone  # of both only what is positive


@contextlib.contextmanager
def _named_kernels() -> Iterator[None]:
    """In a profile our kernels have the name of their file too: "swiglu._forward" where Triton says "_forward"."""

    def named(launch: Callable) -> Callable:
        def call(kernel, *args, **options):
            file = kernel.fn.__module__.rpartition(".")[2]
            with torch._C._profiler._RecordFunctionFast(f"{file}.{kernel.fn.__name__}"):
                return launch(kernel, *args, **options)

        return call

    files = [module for name, module in sys.modules.items() if name.startswith("hrm_kernels.kernels.")]
    before = [(file, file.launch) for file in files if callable(getattr(file, "launch", None))]
    try:
        for file, launch in before:
            file.launch = named(launch)
        yield
    finally:
        for file, launch in before:
            file.launch = launch
