"""What a run measures: metrics.jsonl always, trackers where asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic import named_errors

WAITING_RECORDS = 256
"""What a tracker that is slow may fall behind by; later records are dropped."""
PATIENCE_S = 5.0
"""How long the end of a run waits for trackers."""


class MetricsLog:
    """metrics.jsonl of a run: one JSON object a line, {"kind": "train" | "eval", "step": N, ...}.

    Opened after a kill, it forgets a line that was cut off and everything after the checkpoint's step, which the
    resumed run measures again.

    Args:
        path: the file. resume_step: step that the run continues after; 0 starts an empty log.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.records: list[dict[str, Any]] = []
        if resume_step and path.exists():
            self.records = [r for r in _complete_lines(path) if r["step"] <= resume_step]
        temporary = path.with_name(path.name + ".tmp")
        self._path = path
        with named_errors(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write("".join(json.dumps(r) + "\n" for r in self.records))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that JSON cannot hold (nan, inf) become null. Raises CheckpointError."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        with named_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what a full disk did not take was reported by write()
            self._file.close()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by a kill, or damaged
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record.get("kind") in ("train", "eval"):
            records.append(record)
    return records


class Trackers:
    """TensorBoard and Weights & Biases, each optional, each in a thread of its own: one that fails or hangs costs
    a warning, and training goes on.

    Args:
        names: "tensorboard" and/or "wandb". directory: where they write. config: the run's resolved configuration.
    """

    def __init__(self, names: list[str], directory: Path, config: dict[str, Any]):
        starts = {"tensorboard": _TensorBoard, "wandb": _WandB}
        self._open = [_Feed(name, lambda name=name: starts[name](directory, config)) for name in names]

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Hand the numbers among `values` to every tracker still in use; nothing is waited for."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        for feed in self._open:
            feed.put(step, numbers)
        self._report()

    def close(self) -> None:
        """Finish every tracker still in use, waiting PATIENCE_S at most."""
        end = time.monotonic() + PATIENCE_S
        for feed in self._open:
            feed.finish(end)
        self._report()

    def _report(self) -> None:
        """Warn of what went wrong since the last time, once of each."""
        for feed in self._open:
            for problem in feed.problems():
                warnings.warn(f"tracker {feed.name} {problem}", RuntimeWarning, stacklevel=3)
        self._open = [feed for feed in self._open if not feed.ended]


class _Feed:
    """A tracker's thread, and the records that wait for it. A tracker is a network service in somebody else's package:
    whatever it raises, and however long it takes, must not cost a training run."""

    def __init__(self, name: str, start: Callable[[], Any]):
        self.name, self.ended = name, False
        self._error: Exception | None = None
        self._problems: list[str] = []
        self._behind = False
        self._records: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING_RECORDS)
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self, start: Callable[[], Any]) -> None:
        try:
            tracker = start()
            while (record := self._records.get()) is not None:
                tracker.log(*record)
            tracker.close()
        except Exception as error:
            self._error = error

    def put(self, step: int, numbers: dict[str, float]) -> None:
        try:
            self._records.put_nowait((step, numbers))
        except queue.Full:
            if not self._behind and self._thread.is_alive():
                self._problems.append(f"does not keep up: records from step {step} on are dropped while it is behind")
            self._behind = True

    def finish(self, end: float) -> None:
        """Let it take what waits, until time.monotonic() is `end`."""
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._problems.append(f"did not finish within {PATIENCE_S:g} s; its last records are lost")
        self.ended = self._error is None

    def problems(self) -> list[str]:
        """What is to be said, once."""
        if self._error is not None and not self.ended:
            error, self.ended = self._error, True
            remedy = f"; pip install 'hrm-kernels[log]' or {self.name}" if isinstance(error, ImportError) else ""
            self._problems.append(f"is left out: {type(error).__name__}: {error}{remedy}")
        said, self._problems = self._problems, []
        return said


class _TensorBoard:
    def __init__(self, directory: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"))
        self._writer.add_text("config", "```json\n" + json.dumps(config, indent=2) + "\n```")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, directory: Path, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(project="hrm-kernels", dir=str(directory), config=config, resume="allow")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
