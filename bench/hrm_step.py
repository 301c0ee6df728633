"""What does the loop over HRM steps cost, for batches whose rows stop at different steps?

    python bench/hrm_step.py                                  # base on a GPU; small on a CPU, a minute or two
    python bench/hrm_step.py --batch-sizes 64 --tokens 512 --depths all-1 bimodal all-S --save --plot hrm_step.png

Timed is the loop alone, without gradient, weights and activations in one type: from the input blocks' output to each
row's final z_H. Times are of the clock, so they have what Python and the waiting for the device cost. Implementations:

    published     bench/published.py: every row runs until the slowest is done, so cases that share the slowest depth
                  share a time; the baseline of every ratio
    reference     our loop on the host, eager
    compile       the same, its blocks by torch.compile (on a CPU only where it is named)
    fused-host, fused-graph, fused-while
                  our loop on kernels, its steps started by that driver (hrm_kernels/drivers.py; need a CUDA device)

Depths, of at most S steps: all rows 1 or S, one row deep and the others at 1, half of them deep or three quarters,
uniform from 1 to S, and "bimodal", 19 % deep, as the published model halts on HellaSwag (bench/hrm_step_cases.py). Rows
stop where they shall because the head decides so everywhere or nowhere: a bias of +inf ends every row after one step,
and with -inf a row runs to its limit; as it could have decided otherwise, after every step it has to be found out which
rows go on. In "all-S-given" nothing can be decided, and nobody has to ask.

All get the same rows. Before anything is timed, each row's z_H and its steps are held to the reference's; if one
differs nothing is timed. Executed row-steps are what an implementation really ran. Per size and implementation

    time = a + b x (executed row-steps)

is fitted. Where a row that is done costs nothing and nothing is paid once a batch, a is 0. Its limit is 5 % of the time
of all rows at full depth; the limit of graph and while is 0 waits of the host between the first launch and the last.
The last line is JSON. Exit status: 0; 1 where numbers differ, an implementation fails, or with --strict a limit is not
kept; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import hrm_kernels as ops
from bench.common import (
    device_activity,
    environment,
    interleaved,
    large_product,
    peak_bytes,
    positive,
    print_table,
    save,
)
from bench.hrm_step_cases import DEPTHS, NAMES, Bench, Case, Loop, Start, kernels_of_a_step
from hrm_model import HRMConfig
from hrm_model.config import PRESETS
from hrm_model.training.device import choose_device, choose_dtype
from hrm_model.training.flops import block_flops

A_LIMIT = 0.05
"""Of the time of all rows at full depth: the most that a batch may cost beyond its steps."""


# -- times -------------------------------------------------------------------------------------------------------------


def measure(loops: list[Loop], config: HRMConfig, start: Start, todo: list[Case], repeats: int) -> list[dict[str, Any]]:
    """A record for each case and implementation at one size, all run in turns."""
    x = start.xs[0]
    n_rows, n_tokens, device = *x.shape[:2], x.device
    for loop in loops:
        loop.prepare(n_tokens)
    works = {loop.work(case): loop for case in todo for loop in loops}
    calls = {work: (lambda work=work, loop=loop: loop.run(x, start, work)) for work, loop in works.items()}
    peaks, active = {}, {}
    if device.type == "cuda":
        for work, call in calls.items():
            works[work].release()
            peaks[work] = peak_bytes(call, device)  # with scratch memory and graphs
            active[work] = device_activity(call, device)
    product, product_flops = large_product(x.dtype, device)
    times = interleaved({**calls, "product": product}, repeats, device)
    ceiling = product_flops / statistics.median(times.pop("product"))

    row_step_flops = n_tokens * block_flops(config, n_tokens) * config.blocks_per_step
    records = []
    for case in todo:
        for loop in loops:
            work = loop.work(case)
            seconds, row_steps = statistics.median(times[work]), sum(work.executed)
            activity = active.get(work)
            records.append({
                "batch": n_rows, "tokens": n_tokens, "depths": case.name, "given": case.given,
                "implementation": loop.name,
                "mean_depth": statistics.mean(case.depths), "row_steps": row_steps,
                "ms": seconds * 1e3, "ms_least": min(times[work]) * 1e3, "ms_most": max(times[work]) * 1e3,
                "us_per_row_step": seconds / row_steps * 1e6,
                "kernels": activity and activity.kernels, "host_waits": activity and activity.waits,
                "tflops": row_steps * row_step_flops / seconds / 1e12,
                "matmul_ceiling_tflops": ceiling / 1e12,
                "share_of_matmul_ceiling": row_steps * row_step_flops / seconds / ceiling,
                "peak_bytes": peaks.get(work),
            })  # fmt: skip
    published = {record["depths"]: record["ms"] for record in records if record["implementation"] == "published"}
    for record in records:
        theirs = published.get(record["depths"])
        record["speedup_vs_published"] = theirs and theirs / record["ms"]
    return records


def fit(row_steps: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """(a, b, largest |residual| / measured) of the line seconds = a + b * row_steps with the least squares of residuals
    relative to what was measured.

    Relative, because noise is: a machine's clock and neighbours change a time by so many per cent. The short batches
    say most about a, and in plain squares the noise of the long ones drowns them: with times that are off by 3 % a
    scatters more than twice as much (tests/test_bench_hrm_step.py), and its limit is small beside the longest time.
    """
    design = np.stack([np.ones(len(row_steps)), row_steps], axis=1)
    weights = 1 / np.asarray(seconds)
    (a, b), *_ = np.linalg.lstsq(design * weights[:, None], np.ones(len(seconds)), rcond=None)
    return float(a), float(b), float(np.abs((design @ [a, b]) * weights - 1).max())


def fits(records: list[dict[str, Any]], max_steps: int) -> Iterator[dict[str, Any]]:
    """A line for each size and implementation, of the cases whose depths are not given."""
    for batch, tokens, name in dict.fromkeys((r["batch"], r["tokens"], r["implementation"]) for r in records):
        own = [r for r in records if (r["batch"], r["tokens"], r["implementation"]) == (batch, tokens, name)]
        points = sorted({(r["row_steps"], r["ms"] / 1e3) for r in own if not r["given"]})
        row_steps, seconds = zip(*points, strict=True) if points else ((), ())
        if len(set(row_steps)) < 2:
            continue
        a, b, residual = fit(list(row_steps), list(seconds))
        yield {
            "batch": batch, "tokens": tokens, "implementation": name, "points": len(points),
            "a_ms": a * 1e3, "b_us_per_row_step": b * 1e6, "largest_residual": residual,
            "a_of_full_depth": a / (a + b * batch * max_steps),
        }  # fmt: skip


def not_kept(records: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """Limits that ours do not keep, in words."""
    found = []
    for line in lines:
        if line["implementation"] != "published" and not line["a_of_full_depth"] <= A_LIMIT:
            share = f"{line['a_of_full_depth']:.1%} of the time at full depth, limit {A_LIMIT:.0%}"
            found.append(f"{_where(line)}: a is {share}")
    for record in records:
        if record["implementation"] in ("fused-graph", "fused-while") and record["host_waits"] != 0:
            waits = "not measured" if record["host_waits"] is None else record["host_waits"]
            found.append(f"{_where(record)}, {record['depths']}: waits of the host {waits}, limit 0")
    return found


def _where(record: dict[str, Any]) -> str:
    return f"{record['batch']} x {record['tokens']} {record['implementation']}"


# -- what is printed ---------------------------------------------------------------------------------------------------


def _shown(key: str, form: str, scale: float = 1.0, unit: str = ""):
    return lambda record: "-" if record[key] is None else format(record[key] * scale, form) + unit


TIMES = {
    "depths, implementation": lambda record: f"{record['depths']:<13}{record['implementation']}",
    "mean depth": _shown("mean_depth", ".2f"),
    "row-steps": _shown("row_steps", ".0f"),
    "ms": _shown("ms", ".3f"),
    "us/row-step": _shown("us_per_row_step", ".2f"),
    "kernels": _shown("kernels", ".0f"),
    "waits": _shown("host_waits", ".0f"),
    "TFLOP/s": _shown("tflops", ".4g"),
    "of matmul": _shown("share_of_matmul_ceiling", ".1%"),
    "peak MB": _shown("peak_bytes", ".1f", 1e-6),
    "vs published": _shown("speedup_vs_published", ".2f", unit="x"),
}
FITS = {
    "B x T, implementation": _where,
    "points": _shown("points", ".0f"),
    "a ms": _shown("a_ms", ".3f"),
    "b us/row-step": _shown("b_us_per_row_step", ".2f"),
    "largest residual": _shown("largest_residual", ".1%"),
    "a of full depth": _shown("a_of_full_depth", ".1%"),
}


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time against mean depth, a panel for each size. Dashed is what each implementation would take if its time at the
    largest depth were its steps' alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [sorted({record[key] for record in records}) for key in ("batch", "tokens")]
    rows, columns = map(len, sizes)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 4.5 * columns, 0.5 + 3.5 * rows), squeeze=False, constrained_layout=True
    )
    figure.suptitle(title)
    for axis, (batch, tokens) in zip(axes.flat, itertools.product(*sizes), strict=True):
        here = [r for r in records if (r["batch"], r["tokens"]) == (batch, tokens) and not r["given"]]
        for i, name in enumerate(NAMES):
            points = sorted((r["mean_depth"], r["ms"]) for r in here if r["implementation"] == name)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name, markersize=4)
                axis.plot([0, points[-1][0]], [0, points[-1][1]], "--", color=f"C{i}", linewidth=0.8)
        axis.set(title=f"{batch} rows x {tokens} tokens", xlim=(0, None), ylim=(0, None))
        axis.set(xlabel="mean depth of a row, steps", ylabel="ms")
    axes.flat[0].plot([], [], "--", color="gray", linewidth=0.8, label="steps alone")
    axes.flat[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# -- the command -------------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, HRMConfig]:
    """What was asked for, where, and the model; one line and exit status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), help="default: base on a GPU, small on a CPU")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", metavar="B", help="default: 1 8 64 256 on a GPU, 8 on a CPU"
    )
    parser.add_argument("--tokens", type=positive, nargs="+", metavar="T", help="a row; default: 1 64 512, 32 on a CPU")
    parser.add_argument(
        "--depths", nargs="+", choices=DEPTHS, default=DEPTHS, metavar="NAME",
        help=f"{', '.join(DEPTHS)}; default: all, but of those that are equal in a small batch one",
    )  # fmt: skip
    parser.add_argument("--implementations", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on a GPU"
    )
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a limit is not kept")
    parser.add_argument("--save", action="store_true", help="append to bench/results/hrm_step.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against mean depth (.png, .svg, .pdf)")
    options = parser.parse_args(argv)
    try:
        device = choose_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    gpu = device.type == "cuda"
    options.preset = options.preset or ("base" if gpu else "small")
    config = HRMConfig.preset(options.preset)
    options.batch_sizes = options.batch_sizes or ([1, 8, 64, 256] if gpu else [8])
    options.tokens = options.tokens or [n for n in ([1, 64, 512] if gpu else [32]) if n <= config.block_size]
    if max(options.tokens) > config.block_size:
        parser.error(f"--tokens {max(options.tokens)} is over the {config.block_size} of --preset {options.preset}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib: pip install matplotlib")
    if options.plot and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no directory {options.plot.absolute().parent}; make it first")
    return options, device, config


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options, device, config = arguments(argv)
    if device.index is not None:
        torch.cuda.set_device(device)
    dtype = choose_dtype(options.dtype, device)
    bench = Bench(config, dtype, device, options.implementations, options.depths)
    record: dict[str, Any] = {
        "benchmark": "hrm_step",
        "environment": environment(device),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "model": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    title = f"{record['environment']['device']}, {record['dtype']}, {options.preset}"
    print(f"{title}, at most {config.hrm_max_steps} steps, median of {options.repeats}")
    print("\nnumbers, at equal depths, against the reference" + ("" if dtype == torch.float32 else " in float32"))
    sizes = list(itertools.product(options.batch_sizes, options.tokens))
    took = {}
    for size in sizes:
        begin = time.perf_counter()
        bench.check(size)
        took[size] = time.perf_counter() - begin
    rows: list[dict[str, Any]] = []
    if bench.wrong:
        print(f"error: {', '.join(bench.wrong)}: wrong, so nothing was timed")
    else:
        for i, size in enumerate(sizes):
            left = sum(took[other] for other in sizes[i:]) * (options.repeats + 1) / 60
            progress = f"{i + 1} of {len(sizes)}, some {left:.1f} minutes left"
            print(f"\n{size[0]} x {size[1]} tokens ({progress})", flush=True)
            todo = bench.cases(size)
            found = bench.at(size, lambda start, todo=todo: measure(bench.loops, config, start, todo, options.repeats))
            print_table(TIMES, found or [])
            rows += found or []
    lines = list(fits(rows, config.hrm_max_steps))
    broken = not_kept(rows, lines)
    if lines:
        print("\ntime = a + b x (executed row-steps)")
        print_table(FITS, lines)
    if rows:
        print("\n".join(f"LIMIT NOT KEPT: {words}" for words in broken) or "limits kept")

    missing = {**bench.skipped, **bench.failed}
    if device.type != "cuda":
        missing = {"kernels, waits, peak memory": "no CUDA device"} | missing
    print("\nnot measured" + ("" if missing else ": nothing is missing"))
    print("".join(f"{what}: {why}\n" for what, why in missing.items()), end="")
    if (reason := ops.why_no_kernel("hrm_loop", torch.device("meta"))) is None:
        n = record["kernels_of_a_fused_step"] = kernels_of_a_step(config, dtype, *sizes[-1])
        print(f"a step of the fused loop starts {n} kernels, counted without running them")
    else:
        print(f"kernels of a step of the fused loop: {reason}")
    if options.plot and rows:
        plot(rows, options.plot, title)
        print(f"drawn: {options.plot}")
    summary = {"timed": bool(rows), "wrong": bench.wrong, "failed": bench.failed, "skipped": bench.skipped}
    summary |= {"limits_not_kept": broken, "rows": len(rows), "fits": lines}
    if options.save and rows:
        print(f"appended to {save('hrm_step.jsonl', record | summary | {'rows': rows})}")
    print(json.dumps(record | summary))
    return int(bool(bench.wrong or bench.failed or (options.strict and broken)))


if __name__ == "__main__":
    sys.exit(main())
