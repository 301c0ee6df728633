"""PIQA (Bisk et al., 2020): which of two solutions reaches the goal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import Choices, Hub, Task, label_of, text


def example(row: Mapping[str, Any]) -> Choices | None:
    """goal, sol1 and sol2; None where one is empty, as published."""
    goal, *solutions = (text(row, key).strip() for key in ("goal", "sol1", "sol2"))
    label = label_of(row["label"], ("0", "1"))
    return Choices(goal, solutions, label) if goal and all(solutions) else None


TASK = Task(
    name="piqa",
    hub=Hub("ybisk/piqa", "validation", files="plain_text/validation/*.parquet", revision="refs/convert/parquet"),
    files=("piqa_val.jsonl", "valid.jsonl", "piqa_valid.jsonl"),
    source="valid.jsonl with valid-labels.lst beside it, of ybisk/ybisk.github.io on GitHub, folder piqa/data",
    example=example,
    layout='{"goal": text, "sol1": text, "sol2": text, "label": 0 or 1}',
    chance=0.5,
)
