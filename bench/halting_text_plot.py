"""Loss against compute of bench/halting_text.py's records: two panels a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Write the picture to `path`. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(records), figsize=(5.2 * len(records), 8), constrained_layout=True, squeeze=False
    )
    for column, record in zip(axes.T, records, strict=True):
        per_step, outer = record["blocks"]["per_step"], sum(record["blocks"]["outer"])
        fixed = record["by_depth"]
        steps = list(range(1, len(fixed) + 1))
        _panel(column[0], record, "mean_steps", steps)
        _panel(column[1], record, "applications", [outer + per_step * s for s in steps])
        column[0].set(title=f"{record['run']}: {record['parameters'] / 1e6:.1f} M", xlabel="mean HRM steps a token")
        column[1].set(xlabel="block applications a token, generated over the cache")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss, nats per token")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axis, record: dict[str, Any], key: str, compute_of_fixed: list[float]) -> None:
    losses = record["by_depth"]
    axis.plot(compute_of_fixed, losses, "o-", color="gray", ms=4, label="fixed depths")
    sweeps = {
        "by_price": ("C0", "heads fitted at other prices"),
        "by_bias": ("C1", "joint head, other biases"),
        "settled": ("C2", "stop when z_H settles (untrained)"),
    }
    for name, (colour, text) in sweeps.items():
        points = sorted((found[key], found["loss"]) for found in record[name].values())
        axis.plot(*zip(*points, strict=True), ".-", color=colour, label=text)
    axis.scatter(
        record["joint"][key], record["joint"]["loss"], marker="*", s=130, color="C3", label="joint head", zorder=3
    )
    axis.grid(alpha=0.3)
