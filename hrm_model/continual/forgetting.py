"""What a model still knows of each text after each text: a matrix of losses, as JSON and as a picture.

R[i][j]        loss on text j's validation split after text i was learned, j <= i, nats per character
forgetting_j   R[last][j] - min over i >= j of R[i][j]         0: nothing was lost
learning_j     R[j][j]
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..atomic import write_file

FILE, PICTURE = "forgetting.json", "forgetting.png"


def summary(names: list[str], rows: list[list[float]]) -> dict[str, Any]:
    """The matrix with what follows from it, as plain JSON values."""
    last = len(rows) - 1
    forgotten = [rows[last][j] - min(rows[i][j] for i in range(j, last + 1)) for j in range(len(rows))]
    earlier = forgotten[:-1]
    return {
        "unit": "nats per character of each text's validation split",
        "texts": names,
        "after": [
            {"text": name, "losses": dict(zip(names, row, strict=False))} for name, row in zip(names, rows, strict=True)
        ],
        "forgetting": dict(zip(names, forgotten, strict=True)),
        "mean_forgetting_of_earlier": sum(earlier) / len(earlier) if earlier else 0.0,
        "mean_loss": sum(rows[last]) / len(rows[last]),
    }


def write(directory: Path, names: list[str], rows: list[list[float]]) -> dict[str, Any]:
    """Write forgetting.json and, where matplotlib is, forgetting.png; returns the summary. Raises OSError."""
    found = summary(names, rows)
    data = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_file(directory / FILE, data.encode("utf-8"), overwrite=True)
    try:
        draw({"": (names, rows)}, directory / PICTURE)
    except Exception as error:  # a picture is never worth a lesson, which is over once this is written
        warnings.warn(f"no {PICTURE}: {error}", RuntimeWarning, stacklevel=2)
    return found


def table(names: list[str], rows: list[list[float]]) -> str:
    """The matrix for a terminal: a line for each text that was learned."""
    width = max(8, *(len(name) for name in names))
    lines = ["after \\ on".ljust(width) + "".join(f"  {name:>{width}}" for name in names)]
    for name, row in zip(names, rows, strict=True):
        lines.append(name.ljust(width) + "".join(f"  {x:>{width}.4f}" for x in row))
    return "\n".join(lines)


def draw(matrices: dict[str, tuple[list[str], list[list[float]]]], path: Path) -> bool:
    """One picture of matrices side by side, by title; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(matrices), 4), layout="constrained")
    every = [x for _, rows in matrices.values() for row in rows for x in row]
    for i, (title, (names, rows)) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), i + 1)
        size = len(names)
        full = [[*row, *[float("nan")] * (size - len(row))] for row in rows]
        image = axes.imshow(full, vmin=min(every), vmax=max(every), cmap="viridis_r")
        for a, row in enumerate(rows):
            for b, x in enumerate(row):
                dark = x > (min(every) + max(every)) / 2
                axes.text(b, a, f"{x:.2f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(size), names, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), [f"after {name}" for name in names[: len(rows)]])
        axes.set_title(title or "loss on each text's validation split")
    figure.colorbar(image, ax=figure.axes, label="nats per character")
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return True
