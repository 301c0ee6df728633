"""Loss against steps of bench/halting_tasks.py's records, a panel for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Write the picture to `path`. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r["task"] for r in records))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.2), constrained_layout=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for i, record in enumerate(r for r in records if r["task"] == task):
            _draw_seed(axis, record, {"alpha": 0.75}, first=i == 0)
        axis.set(title=task, xlabel="mean HRM steps a row")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss at the stop, nats")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_seed(axis, record: dict[str, Any], style: dict[str, Any], first: bool) -> None:
    def label(text: str) -> str | None:
        return text if first else None

    losses = record["by_depth"]["loss"]
    axis.plot(range(1, len(losses) + 1), losses, "o-", color="gray", ms=3, label=label("fixed depths"), **style)
    sweeps = {"by_price": ("C0", "policy, other prices"), "by_bias": ("C1", "policy, other biases")}
    for sweep, (colour, text) in sweeps.items():
        points = sorted((f["mean_steps"], f["loss"]) for f in record[sweep].values())
        axis.plot(*zip(*points, strict=True), ".-", color=colour, label=label(text), **style)
    rules = {**record["staged"], "joint": record["joint"]}
    marks = {"policy": "*", "gain": "v", "expected": "s", "q": "D", "settled": "x", "published": "+", "joint": "P"}
    for i, (name, mark) in enumerate(marks.items()):
        figures = rules[name]
        text = "policy, trained jointly" if name == "joint" else name
        size = 110 if mark in "*P" else 40
        axis.scatter(
            figures["mean_steps"], figures["loss"], marker=mark, s=size, color=f"C{i + 2}", label=label(text), zorder=3
        )
