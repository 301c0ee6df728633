"""What a run measures: metrics.jsonl always, trackers where asked for."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any


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
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that JSON cannot hold (nan, inf) become null."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing it
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Trackers:
    """TensorBoard and Weights & Biases, each optional. One that fails warns and is left out; training goes on.

    Args:
        names: "tensorboard" and/or "wandb". directory: where they write. config: the run's resolved configuration.
    """

    def __init__(self, names: list[str], directory: Path, config: dict[str, Any]):
        self._open: dict[str, Any] = {}
        for name in names:
            start = {"tensorboard": _TensorBoard, "wandb": _WandB}[name]
            self._guard(name, lambda name=name, start=start: self._open.update({name: start(directory, config)}))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers among `values` to every tracker still in use."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Finish every tracker still in use."""
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)

    def _guard(self, name: str, action) -> None:
        # A tracker is a network service in somebody else's package: whatever it raises must not cost a training run.
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            remedy = f"; pip install 'hrm-kernels[log]' or {name}" if isinstance(error, ImportError) else ""
            warnings.warn(
                f"tracker {name} is left out: {type(error).__name__}: {error}{remedy}",
                RuntimeWarning,
                stacklevel=3,
            )


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
