"""Accuracies of bench/hybrid.py's record, and accuracy against segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(record: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture to `path`. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, line) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = [r["name"] for r in rows]
    drawn = bars.barh(names, [r["accuracy"] for r in rows], color=["C0" if n == "hybrid" else "C7" for n in names])
    bars.bar_label(drawn, fmt="%.3f", padding=3)
    bars.invert_yaxis()
    bars.set(title=f"accuracy, {record['task']}, n = {record['n']}", xlim=(0, 1.15))
    if hybrid := record["systems"].get("hybrid"):
        points = [(int(n), x) for n, x in hybrid["by_segments"].items()]
        line.plot(*zip(*points, strict=True), "o-")
        line.axvline(hybrid["segments"], color="gray", linestyle=":", label="as trained")
        line.set(title="accuracy against segments", xlabel="segments", ylim=(0, 1.05))
        line.legend()
        line.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
