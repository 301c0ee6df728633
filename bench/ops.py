"""How fast is each op, beside eager PyTorch, torch.compile and other packages, and how near to what the GPU can do?

    python bench/ops.py                                   # every op, B in {1, 8, 64}, T in {1, 128, 512}, bfloat16
    python bench/ops.py --ops rms_norm swiglu --batch 64 --tokens 512 --save --plot ops.png
    python bench/ops.py --reference                       # two choices in hrm_kernels/reference.py, on the CPU

Each implementation's results and gradients are first held to the reference in float64, at the very size that is timed.
One that is wrong gets no time: its row says WRONG, and the exit status is 1. Those that are right run in turns. Times
are the device's, by CUDA events; inputs rotate among copies that together exceed the L2 cache. An op's share is its
floor, the fewest bytes or the products (bench/ops_cases.py counts them) at the copy bandwidth and matmul speed measured
in the same run, divided by its time. Memory is what a call needs beyond its inputs. Most of a run is torch.compile's
work; `--implementations eager triton` does without it.

Without a GPU nothing is timed. What the compiler makes of the kernels is printed instead, and each op's floor. The last
line is JSON. Exit status: 0; 1 where an implementation is wrong or fails, or a kernel does not fit the GPU it is
compiled for; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import hrm_kernels as ops
from bench.common import environment, event_times, interleaved, large_product, peak_bytes, positive, save
from bench.ops_cases import (
    CASES,
    NAMES,
    TOLERANCE,
    Ceilings,
    Implementation,
    Sizes,
    Work,
    assumed,
    block,
    both,
    changed,
    draw,
    first_line,
    forward,
    largest_error,
    tensors,
    verify,
)
from hrm_kernels import offline, reference, tuning
from hrm_model.training.device import choose_device

MOST_COPIES = 256
"""Of the inputs. Where so many still fit in the L2 cache, the op takes as long as its launch anyway."""


# -- times -------------------------------------------------------------------------------------------------------------


def seconds(work: dict[str, Callable], repeats: int, device: torch.device, after=lambda name: None) -> dict[str, list]:
    """Of each piece of work, by the clock that suits the device."""
    return event_times(work, repeats, after) if device.type == "cuda" else interleaved(work, repeats, device)


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Bandwidth of a large copy, FLOP/s of a large product."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    product, flops = large_product(dtype, device)
    work = {"copy": lambda: target.copy_(source), "product": product}
    medians = {name: statistics.median(t) for name, t in seconds(work, 10, device).items()}
    return Ceilings(2 * source.nbytes / medians["copy"], flops / medians["product"], "measured in this run")


def time_right_ones(
    right: dict[str, Implementation], args: list, d_results: list[Tensor], with_gradient: bool, repeats: int, device
) -> dict[str, tuple[list[float], int | None]]:
    """Name -> (seconds, peak bytes) of each implementation, run in turns."""
    originals = [*tensors(args), *d_results]
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    n = min(MOST_COPIES, max(2, math.ceil(2 * l2_bytes / sum(t.nbytes for t in originals))))
    copies = itertools.cycle([(changed(torch.clone, args), [d.clone() for d in d_results]) for _ in range(n)])
    used: list[Tensor] = []

    def run(call: Callable) -> Any:
        inputs, d = next(copies)
        used[:] = [*tensors(inputs), *d]
        return both(call, inputs, d) if with_gradient else forward(call, inputs)

    def restore(name: str) -> None:
        if right[name].overwrites:
            for t, original in zip(used, originals, strict=True):
                t.detach().copy_(original.detach())

    work = {name: (lambda call=one.call: run(call)) for name, one in right.items()}
    peaks = {}
    for name, call in work.items():
        peaks[name] = peak_bytes(call, device)
        restore(name)
    return {name: (t, peaks[name]) for name, t in seconds(work, repeats, device, restore).items()}


# -- one op at one size ------------------------------------------------------------------------------------------------


def measure(
    op: str, sizes: Sizes, names: list[str], ceilings: Ceilings, repeats: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A record for each implementation of `op`, forward, then with its backward pass."""
    case = CASES[op]
    if "compile" in names:
        torch.compiler.reset()  # torch.compile gives up on a function after eight sizes
    random = draw(sizes, device)
    args = case.inputs(sizes, random)
    results = [r for r in forward(case.implementations["eager"].call, args) if r.is_floating_point()]
    # a loss is differentiated with 1
    d_results = [torch.ones_like(r) if r.dim() == 0 else random(*r.shape, dtype=r.dtype).detach() for r in results]
    wide_args = changed(lambda t: t.double() if t.is_floating_point() else t, args)
    truth = both(case.truth, wide_args, [d.double() for d in d_results])
    implementations = {name: one for name, one in case.implementations.items() if name in names}
    errors, states = verify(implementations, args, d_results, truth)
    forward_work, backward_work = case.work(sizes)

    for direction, work in {"forward": forward_work, "forward+backward": forward_work + backward_work}.items():
        limits = TOLERANCE[sizes.dtype][:1] if direction == "forward" else TOLERANCE[sizes.dtype]
        right = {
            name: implementations[name]
            for name, found in errors.items()
            if all(error <= limit for error, limit in zip(found, limits, strict=False))
        }
        timed = time_right_ones(right, args, d_results, direction != "forward", repeats, device)
        floor, bound = ceilings.floor(work)
        for name in implementations:
            record = {
                "benchmark": "ops",
                "op": op,
                "batch": sizes.B,
                "tokens": sizes.T,
                "dtype": str(sizes.dtype).removeprefix("torch."),
                "direction": direction,
                "implementation": name,
                "state": states.get(name, "right" if name in right else "WRONG"),
                "errors": [error if math.isfinite(error) else None for error in errors.get(name, ())[: len(limits)]],
                "limits": limits,
                "flops": work.flops,
                "bytes": work.bytes,
                "floor_us": floor * 1e6,
                "bound": bound,
            }
            yield record | (figures(name, timed, work, floor, bound) if name in timed else {})


def figures(name: str, timed: dict[str, tuple[list[float], int | None]], work: Work, floor: float, bound: str) -> dict:
    """What follows from the times."""
    low, median, high = map(float, np.percentile(timed[name][0], [20, 50, 80]))
    peak = timed[name][1]
    amount, unit = (work.bytes / 1e9, "GB/s") if bound == "bytes" else (work.flops / 1e12, "TFLOP/s")
    result = {"us": median * 1e6, "us_p20": low * 1e6, "us_p80": high * 1e6, "rate": amount / median, "rate_unit": unit}
    result |= {"share_of_ceiling": floor / median, "peak_bytes": peak}
    for other in ("eager", "compile"):
        if other in timed:
            result[f"speedup_vs_{other}"] = float(np.median(timed[other][0])) / median
    if peak is not None and "eager" in timed and timed["eager"][1]:
        result["peak_vs_eager"] = peak / timed["eager"][1]
    return result


# -- what is printed ---------------------------------------------------------------------------------------------------

HEADING = f"{'':<31}{'us':>10}{'p20':>10}{'p80':>10}{'rate':>18}{'ceiling':>9}{'peak MB':>10}{'of eager':>10}"
HEADING += f"{'vs eager':>10}{'vs compile':>12}"


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"  {record['direction']:<18}{record['implementation']:<11}"
    if record["state"] == "WRONG":
        found = ["not finite" if error is None else f"{error:.1e}" for error in record["errors"]]
        parts = zip(("results", "gradients"), found, record["limits"], strict=False)
        return f"{name} WRONG: relative error " + ", ".join(f"of {p} {e} (limit {limit:.0e})" for p, e, limit in parts)
    if "us" not in record:
        return f"{name} {record['state']}"

    def show(key: str, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "-" if record.get(key) is None else format(record[key] * scale, form) + unit

    return (
        f"{name}{record['us']:>10.1f}{record['us_p20']:>10.1f}{record['us_p80']:>10.1f}"
        f" {record['rate']:>9.4g} {record['rate_unit']:<7}{record['share_of_ceiling']:>9.0%}"
        f"{show('peak_bytes', '.1f', 1e-6):>10}{show('peak_vs_eager', '.2f', unit='x'):>10}"
        f"{show('speedup_vs_eager', '.2f', unit='x'):>10}{show('speedup_vs_compile', '.2f', unit='x'):>12}"
    )


def print_work(op_names: list[str], all_sizes: list[Sizes], ceilings: Ceilings) -> None:
    """FLOPs, bytes and floor of each op, and of a block at the largest size."""
    print(f"\nleast work, and least time at ceilings that are {ceilings.source}")
    print(f"{'op':<22}{'B x T':>10}{'':>10}{'GFLOP':>10}{'MB':>10}{'floor us':>10}  bound")

    def line(name: str, s: Sizes, direction: str, work: Work) -> float:
        floor, bound = ceilings.floor(work)
        print(f"{name:<22}{f'{s.B} x {s.T}':>10}{direction:>10}{work.flops / 1e9:>10.4g}", end="")
        print(f"{work.bytes / 1e6:>10.4g}{floor * 1e6:>10.4g}  {bound}")
        return floor

    for op, s in itertools.product(op_names, all_sizes):
        forward_work, backward_work = CASES[op].work(s)
        line(op, s, "forward", forward_work)
        line(op, s, "+backward", forward_work + backward_work)
    print("the products of one block, each written out")
    largest = max(all_sizes, key=lambda s: s.M)
    floors = [line(name, largest, "forward", work) for name, work in block(largest).items()]
    print(f"{'all of them':<62}{sum(floors) * 1e6:>10.4g}")


def compile_table(arches: list[int], sizes: Sizes) -> int:
    """hrm_kernels.offline's table; its exit status, 0 where it cannot be made."""
    print(f"\nwhat the compiler makes of the kernels, {sizes.B} x {sizes.T} tokens of the base model")
    reason = ops.why_no_kernel("rms_norm", torch.device("meta"))
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        reason = "TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it"
    if reason or not arches:
        print(f"left out: {reason or '--arch names no GPU'}")
        return 0
    dtype = str(sizes.dtype).removeprefix("torch.")
    numbers = ["--rows", str(sizes.B), "--tokens", str(sizes.T), "--arch", *map(str, arches)]
    return offline.main(["--dtype", dtype, *numbers])


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Share of the ceiling of each op and implementation at the largest size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = max(record["batch"] * record["tokens"] for record in records)
    records = [r for r in records if r["batch"] * r["tokens"] == size and "us" in r]
    op_names = list(dict.fromkeys(r["op"] for r in records))
    names = [name for name in NAMES if any(r["implementation"] == name for r in records)]
    figure, axes = plt.subplots(2, 1, figsize=(12, 8), constrained_layout=True, sharex=True)
    figure.suptitle(title)
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        for i, name in enumerate(names):
            bars = [r for r in records if r["implementation"] == name and r["direction"] == direction]
            place = [op_names.index(r["op"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for r in bars]
            heights = [100 * r["share_of_ceiling"] for r in bars]
            axis.bar(place, heights, 0.8 / len(names), label=name, color=f"C{i}")
        axis.set(title=direction, ylabel="% of ceiling", xticks=range(len(op_names)), xticklabels=op_names)
        axis.axhline(100, color="gray", linewidth=0.5)
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# -- the reference on a CPU --------------------------------------------------------------------------------------------


def rope_of_reals(x: Tensor, table: Tensor) -> Tensor:
    """reference.rope by (a cos - b sin, a sin + b cos), as it computes under torch.compile."""
    cos, sin = table.unsqueeze(-3).unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def reference_facts(repeats: int) -> dict[str, Any]:
    """Milliseconds behind two comments in hrm_kernels/reference.py, on this machine's CPU."""
    cpu = torch.device("cpu")
    random = draw(Sizes(8, 128, 128, 4, 4, 512, 50304, torch.float32), cpu)
    x, table = random(8, 128, 4, 32).detach(), ops.rope_table(torch.arange(128), 32)
    assert largest_error((rope_of_reals(x, table),), (reference.rope(x, table),)) <= 1e-6
    calls = 20  # a clock's tick and the wait for a thread are small beside as many
    work = {
        "complex": lambda: [reference.rope(x, table) for _ in range(calls)],
        "real": lambda: [rope_of_reals(x, table) for _ in range(calls)],
    }
    rope_ms = {name: statistics.median(t) / calls * 1e3 for name, t in interleaved(work, repeats, cpu).items()}
    print(f"rope of 8 x 128 x 4 x 32 float32: one complex product {rope_ms['complex']:.3f} ms, four real ones", end=" ")
    print(f"{rope_ms['real']:.3f} ms, {rope_ms['real'] / rope_ms['complex']:.2f}x")

    x, w = random(1024, 64), random(50304, 64, scale=0.02)
    targets = torch.arange(1024)

    def cross_entropy(chunk: int) -> None:
        before, reference.CROSS_ENTROPY_CHUNK = reference.CROSS_ENTROPY_CHUNK, chunk
        try:
            both(reference.linear_cross_entropy, [x, w, targets], [torch.ones(())])
        finally:
            reference.CROSS_ENTROPY_CHUNK = before

    work = {chunk: (lambda chunk=chunk: cross_entropy(chunk)) for chunk in (64, 256, 512)}
    chunk_ms = {chunk: statistics.median(t) * 1e3 for chunk, t in interleaved(work, repeats, cpu).items()}
    print("linear_cross_entropy of 1024 x 64 x 50304 float32, forward and backward, chunks of", end=" ")
    print(", ".join(f"{chunk} rows {ms:.0f} ms ({ms / chunk_ms[256]:.2f}x)" for chunk, ms in chunk_ms.items()))
    return {"rope_ms": rope_ms, "cross_entropy_ms": {str(chunk): ms for chunk, ms in chunk_ms.items()}}


# -- the command -------------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """What was asked for and the device it runs on; one line and exit status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(CASES), choices=CASES, metavar="OP", help=", ".join(CASES))
    parser.add_argument(
        "--implementations", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 64], metavar="B", help="rows of tokens")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 128, 512], metavar="T", help="tokens a row")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=positive, default=30)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1; cpu: nothing is timed")
    parser.add_argument("--save", action="store_true", help="append a line for each row to bench/results/ops.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append them to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw each op's share of the ceiling (.png, .svg, .pdf)"
    )
    parser.add_argument(
        "--arch", type=int, nargs="*", default=[90], choices=sorted(tuning.SHARED_KB), metavar="N",
        help="without a GPU: compute capabilities to compile for (default 90), no number for none",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="time two choices in the reference, on the CPU; no op")
    parser.add_argument(
        "--time-anyway", action="store_true",
        help="with --device cpu, for testing this script (TRITON_INTERPRET=1 runs kernels in an interpreter): "
        "such times mean nothing",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for flag, path in (("--out", options.out), ("--plot", options.plot)):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: there is no directory {path.absolute().parent}; make it first")
    try:
        device = choose_device("cpu" if options.reference else options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.plot and device.type != "cuda" and not options.time_anyway:
        parser.error(f"--plot {options.plot} draws times, and without a GPU nothing is timed; leave it out")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib: pip install matplotlib")
    return options, device


def _versions(device: torch.device) -> dict[str, Any]:
    found = environment(device)
    for package in ("triton", "liger-kernel", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main(argv: list[str] | None = None, shape: dict[str, int] = offline.BASE) -> int:
    """Run the benchmark at the model size `shape`."""
    options, device = arguments(argv)
    dtype = getattr(torch, options.dtype)
    all_sizes = [Sizes.of(shape, b, t, dtype) for b, t in itertools.product(options.batch, options.tokens)]
    files = ["ops.jsonl"] * options.save + ([str(options.out.resolve())] if options.out else [])
    summary: dict[str, Any] = {"benchmark": "ops", "timed": False, "environment": _versions(device)}
    if options.reference:
        summary |= {"benchmark": "ops --reference", "timed": True, **reference_facts(options.repeats)}
        for file in files:
            save(file, summary)
        print(json.dumps(summary))
        return 0
    if device.type != "cuda" and not options.time_anyway:
        print("No GPU: nothing was timed. Below is what can be said of the kernels without one.")
        print_work(options.ops, all_sizes, assumed(dtype))
        status = compile_table(options.arch, max(all_sizes, key=lambda s: s.M))
        print(f"\nNothing was timed, because there is no GPU here (the device is {device.type}).")
        print(json.dumps(summary))
        return status

    if device.index is not None:
        torch.cuda.set_device(device)
    ceilings = measure_ceilings(dtype, device)
    machine = summary["environment"]["device"]
    print(f"{machine}, {options.dtype}, median of {options.repeats}; ceilings {ceilings.source}:", end=" ")
    print(f"{ceilings.bytes_per_s / 1e12:.2f} TB/s copy, {ceilings.flops_per_s / 1e12:.1f} TFLOP/s matmul")
    if device.type != "cuda":
        print("These times are of a CPU, of kernels those of Triton's interpreter: they mean nothing.")
    elif dtype == torch.float32:
        print("Kernels multiply float32 as three tf32 products, so they can be faster than torch's float32 matmul.")
    context = {"repeats": options.repeats, "ceilings": ceilings._asdict(), "environment": summary["environment"]}
    records = []
    cases = list(itertools.product(options.ops, all_sizes))
    begin = time.perf_counter()
    for number, (op, sizes) in enumerate(cases):
        left = (time.perf_counter() - begin) / max(number, 1) * (len(cases) - number) / 60
        progress = f"{number + 1} of {len(cases)}" + (f", {left:.1f} minutes left" if number else "")
        print(f"\n{op}, {sizes.B} x {sizes.T} ({progress})\n{HEADING}", flush=True)
        try:
            for record in measure(op, sizes, options.implementations, ceilings, options.repeats, device):
                print(row(record), flush=True)
                records.append(record)
                for file in files:
                    save(file, record | context)
        except torch.OutOfMemoryError as error:
            raise SystemExit(f"error: {first_line(error)} Ask for smaller --batch or --tokens") from error
    if options.plot:
        plot(records, options.plot, f"{machine}, {options.dtype}")
    bad = [r for r in records if r["state"].startswith(("WRONG", "FAILED"))]
    summary |= {
        "timed": True,
        "ceilings": ceilings._asdict(),
        "rows": len(records),
        "wrong_or_failed": [[r[key] for key in ("op", "batch", "tokens", "direction", "implementation")] for r in bad],
        "triton_speedup_vs_eager": {
            f"{r['op']} {r['batch']}x{r['tokens']} {r['direction']}": round(r["speedup_vs_eager"], 2)
            for r in records
            if r["implementation"] == "triton" and "speedup_vs_eager" in r
        },
    }
    print(json.dumps(summary))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
