"""Does a long run stay as it began? Trains the tiny recipe for half an hour, stopped and resumed every few minutes.

    python bench/soak.py                          # 30 minutes, a SIGTERM and --resume auto every 5
    python bench/soak.py --minutes 2 --every 0.5  # a look at it
    python bench/soak.py --save

Twice a second it looks at the training process: resident memory, open files, threads. The process gives back what it
frees at once (glibc's MALLOC_MMAP_THRESHOLD_), so that memory is what is held, not what the allocator keeps for later.
Of each of its lives all up to the third evaluation is setting up: the first picture opens fonts, which stay open. After
that all three must stay where they are, evaluations, pictures and checkpoints included, and each life must go on at the
step at which the one before stopped. The last line is JSON; exit status 1 where something grew or a step was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.common import environment, positive, print_table, save

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "pretrain.py"
FLAGS = "--recipe tiny --steps 1000000 --eval-every 20 --save-every 20 --log-every 5 --ema 0.999 --resume auto"
STOPPED = 75
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
GROWTH = 0.05
"""Share of its memory by which a life's last quarter may be above its first."""
PAUSE_S = 0.5
SETTING_UP, EVALUATIONS = 3, 9
"""Evaluations until a life is judged; those that it sees at least, however slow the machine is."""


def look(pid: int) -> dict[str, float] | None:
    """What Linux says of a process: memory in MB, open files, threads; None where it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return {"mb": int(status["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(status["Threads"])}
    except (OSError, KeyError):
        return None


def live(out: Path, data: list[str], seconds: float) -> dict[str, Any]:
    """One life of the run: start it, look at it, stop it; returns what was seen."""
    command = [sys.executable, str(SCRIPT), *FLAGS.split(), "--out", str(out), *(["--data", *data] if data else [])]
    log = open(out.parent / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
    begin, seen, before = time.monotonic(), [], len(steps_of(out, "eval"))
    with log, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ALLOCATOR) as process:
        evaluations = 0
        while process.poll() is None and (time.monotonic() - begin < seconds or evaluations < EVALUATIONS):
            time.sleep(PAUSE_S)
            evaluations = len(steps_of(out, "eval")) - before
            if evaluations >= SETTING_UP and (found := look(process.pid)):
                seen.append(found)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        status = process.wait()
    return {"status": status, "seen": seen, "last": max(steps_of(out, "train"), default=0)}


def steps_of(out: Path, kind: str) -> list[int]:
    """Steps of a run's records of a kind, as they were written."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [r["step"] for r in (json.loads(line) for line in lines if line.endswith("\n")) if r["kind"] == kind]


def judge(life: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a life's first and last quarter after setting up: the least memory, which is what is held between two
    steps (a step takes up to a sixth more, and looks fall anywhere in it), medians of files and threads."""
    seen = life["seen"]
    quarter = max(1, len(seen) // 4)
    found = {"last_step": life["last"], "status": life["status"]}
    for name, which in (("mb", np.min), ("files", np.median), ("threads", np.median)):
        early = float(which([s[name] for s in seen[:quarter]]))
        late = float(which([s[name] for s in seen[-quarter:]]))
        found |= {name: early, f"{name}_late": late}
    found["grew"] = found["mb_late"] > found["mb"] * (1 + GROWTH)
    found["grew"] |= any(found[f"{name}_late"] > found[name] for name in ("files", "threads"))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, metavar="N", help="of it all; default: 30")
    add(
        "--every",
        type=float,
        default=5.0,
        metavar="N",
        help=f"minutes of a life, or {EVALUATIONS} evaluations if those take longer; default: 5",
    )
    add("--data", nargs="+", default=[], metavar="DIR", help="prepared datasets; default: data/stdlib")
    add("--save", action="store_true", help="append the record to bench/results/soak.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    if not Path("/proc/self/status").exists():
        print("error: bench/soak.py reads /proc, which only Linux has", file=sys.stderr)
        return 1
    lives = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for _ in range(positive(str(round(options.minutes / options.every)))):
            life = live(out, options.data, 60 * options.every)
            if life["status"] != STOPPED or len(life["seen"]) < 10:
                print((out.parent / "log.txt").read_text()[-2000:])
                raise SystemExit(f"error: a life ended with status {life['status']} after {len(life['seen'])} looks")
            lives.append(life)
            print(f"life {len(lives)}: up to step {life['last']}", flush=True)
        steps, evaluations = steps_of(out, "train"), len(steps_of(out, "eval"))
    rows = [{"life": i, **judge(life)} for i, life in enumerate(lives, 1)]
    unbroken = all(0 < b - a <= 5 for a, b in pairwise(steps))
    print_table(
        {
            "life": lambda r: str(r["life"]),
            "last step": lambda r: str(r["last_step"]),
            "MB": lambda r: f"{r['mb']:.0f}",
            "MB late": lambda r: f"{r['mb_late']:.0f}",
            "files": lambda r: f"{r['files']:.0f} {r['files_late']:.0f}",
            "threads": lambda r: f"{r['threads']:.0f} {r['threads_late']:.0f}",
            "": lambda r: "GREW" if r["grew"] else "flat",
        },
        rows,
    )
    record = {
        "environment": environment(torch.device("cpu")),
        "minutes": options.minutes,
        "every": options.every,
        "lives": rows,
        "evaluations": evaluations,
        "unbroken": unbroken,
        "flat": not any(r["grew"] for r in rows),
    }
    if options.save:
        save("soak.jsonl", record)
    print(json.dumps(record))
    return 0 if record["flat"] and unbroken else 1


if __name__ == "__main__":
    sys.exit(main())
