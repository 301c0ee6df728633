"""Everything that waits for a GPU, in parts of at most eight minutes.

    python bench/gpu.py --list                      # what would run
    python bench/gpu.py --only A --out results      # parity of every kernel and of the loop, then each op's time
    python bench/gpu.py                             # all parts, the most valuable first

A  kernels against float64, the loop on all three drivers, the GPU tests; bench/ops.py
B  bench/train_step.py, bench/hrm_step.py, bench/generate.py
C  200 steps of the base recipe on the local corpus at random depths (a head's decisions would turn with the last bit),
   with kernels and without: losses and times, one plot
D  compute-sanitizer, memcheck and racecheck, on the loop and on each op at small sizes

Each command's result is a line of OUT/gpu.jsonl as soon as it is there, its output is in OUT/gpu.log, and what the
benchmarks record is copied to OUT. A command that fails or runs out of time is recorded, and the next one runs. Exit
status 1 if one failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import RESULTS, environment

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 480
"""Seconds of a part."""
SMALL = "test_one_row_of_one_token or test_rows_end_by_decision or test_every_step_gives"
STEPS = 200


class Command(NamedTuple):
    """One thing to run."""

    name: str
    words: list[str]


def parts(out: Path) -> dict[str, list[Command]]:
    """Part -> its commands."""
    python = sys.executable
    loop = [python, "bench/hrm_step.py", "--save"]
    pytest = [python, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider"]

    def train(name: str, *words: str) -> Command:
        run = [python, "train/pretrain.py", "--recipe", "base", "--steps", str(STEPS), "--batch-size", "16"]
        run += f"--accumulation 1 --eval-every {STEPS} --overwrite --out runs/gpu-{name}".split()
        return Command(f"train {name}", [*run, *words])

    def sanitize(tool: str) -> Command:
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        return Command(tool, [*check, *pytest, "tests/test_hrm_loop.py", "tests/test_parity.py", "-k", SMALL])

    return {
        "A": [
            Command("while graph", [python, "-m", "hrm_kernels.while_graph"]),
            Command("loop", [*pytest, "tests/test_while_graph.py", "tests/test_hrm_loop.py"]),
            Command("parity", [*pytest, "tests/test_parity.py", "tests/test_kernels.py"]),
            Command("ops", [python, "bench/ops.py", "--save"]),
        ],
        "B": [
            Command("train_step", [python, "bench/train_step.py", "--save"]),
            Command("hrm_step", [*loop, "--batch-sizes", "64", "--tokens", "512", "--plot", str(out / "hrm_step.png")]),
            Command("generate", [python, "bench/generate.py", "--seconds", "1", "--plot", str(out / "generate.png")]),
            Command("hrm_step small", [*loop, "--batch-sizes", "1", "8", "64", "--tokens", "1", "64"]),
        ],
        # Two curves are compared without a head: its decisions may turn on a last bit. The third run has one.
        "C": [
            train("eager", "--halting", "none"),
            train("fused", "--fused=require", "--halting", "none"),
            train("halting", "--fused=require"),
        ],
        "D": [sanitize("memcheck"), sanitize("racecheck")],
    }


def run(command: Command, seconds: float, log) -> dict:
    """What became of a command that may take so many seconds."""
    log.write(f"\n=== {command.name}: {' '.join(command.words)}\n")
    log.flush()
    begin = time.perf_counter()
    try:
        done = subprocess.run(command.words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(1.0, seconds))
        outcome = "passed" if done.returncode == 0 else f"status {done.returncode}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {seconds:.0f} s"
    except OSError as error:
        outcome = f"not run: {error.strerror}: {command.words[0]}"
    return {"name": command.name, "outcome": outcome, "seconds": time.perf_counter() - begin}


def curves(out: Path) -> dict:
    """Losses and times of part C's two runs, and their plot."""
    found = {}
    for name in ("eager", "fused"):
        file = ROOT / "runs" / f"gpu-{name}" / "metrics.jsonl"
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
        found[name] = [line for line in lines if line["kind"] == "train"]
    if not all(found.values()):
        return {"name": "curves", "outcome": "not made: a run left no metrics", "seconds": 0.0}
    pairs = list(zip(*([line["loss"] for line in lines] for lines in found.values()), strict=False))
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        for name, lines in found.items():
            plt.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name)
        plt.xlabel("step"), plt.ylabel("loss, nats"), plt.legend()
        plt.savefig(out / "curves.png")
    except ImportError:
        pass
    return {
        "name": "curves",
        "outcome": "passed",
        "seconds": 0.0,
        "largest_difference": max(abs(a - b) / a for a, b in pairs),
        "last": {name: lines[-1] for name, lines in found.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["A", "B", "C", "D"], choices=["A", "B", "C", "D"], metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results (default runs/gpu)")
    parser.add_argument("--list", action="store_true", help="print the commands and end")
    options = parser.parse_args(argv)
    chosen = {part: commands for part, commands in parts(options.out.absolute()).items() if part in options.only}
    if options.list:
        for part, commands in chosen.items():
            for command in commands:
                print(f"{part}  {command.name:<16}{' '.join(command.words)}")
        return 0
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; --list shows what would run on one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with (options.out / "gpu.jsonl").open("a") as results, (options.out / "gpu.log").open("a") as log:

        def record(part: str, result: dict) -> None:
            print(f"{part}  {result['name']:<16}{result['outcome']:<24}{result['seconds']:8.1f} s", flush=True)
            results.write(json.dumps({"part": part, **result, "environment": environment(torch.device("cuda"))}) + "\n")
            results.flush()

        for part, commands in chosen.items():
            end = time.perf_counter() + BUDGET
            for i, command in enumerate(commands):
                left = end - time.perf_counter()
                if part in ("C", "D"):  # two that are worth as much as each other
                    left /= len(commands) - i
                result = run(command, left, log)
                failed |= result["outcome"] != "passed"
                record(part, result)
                for file in RESULTS.glob("*.jsonl"):
                    shutil.copy(file, options.out)
            if part == "C":
                record(part, curves(options.out))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
