"""HellaSwag (Zellers et al., 2019): which of four endings follows. Preprocessing as published with CosmicFish-HRM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .task import Choices, Hub, Task, label_of, text, texts_of


def clean(raw: str) -> str:
    """ " [title]" becomes ". ", other words in brackets go, runs of spaces become one, none at the ends."""
    without = re.sub(r"\[.*?\]", "", raw.strip().replace(" [title]", ". "))
    return re.sub(" +", " ", without).strip()


def example(row: Mapping[str, Any]) -> Choices:
    """ctx and endings."""
    endings = texts_of(row, "endings")
    if len(endings) < 2:
        raise ValueError("'endings' must be a list of at least two texts")
    label = label_of(row["label"], [str(number) for number in range(len(endings))])
    return Choices(clean(text(row, "ctx")), [clean(ending) for ending in endings], label)


TASK = Task(
    name="hellaswag",
    hub=Hub("Rowan/hellaswag", "validation"),
    files=("hellaswag_val.jsonl",),
    source="hellaswag_val.jsonl of the repository rowanz/hellaswag on GitHub, folder data",
    example=example,
    layout='{"ctx": text, "endings": [text, ..], "label": "0".."3"}',
    chance=0.25,
)
