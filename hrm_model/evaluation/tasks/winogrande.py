"""WinoGrande (Sakaguchi et al., 2019), development set: which of two names fills the gap. The rest of the sentence is
scored too, with the name before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import Choices, Hub, Task, label_of, text


def example(row: Mapping[str, Any]) -> Choices:
    """The sentence up to its first "_", and what may stand from there on."""
    before, gap, after = text(row, "sentence").partition("_")
    if not gap:
        raise ValueError("'sentence' has no gap, written _")
    choices = [text(row, key).strip() + after for key in ("option1", "option2")]
    return Choices(before.rstrip(), choices, label_of(str(row["answer"]), ("1", "2")))


TASK = Task(
    name="winogrande",
    hub=Hub("allenai/winogrande", "validation", "winogrande_xl"),
    files=("winogrande_val.jsonl", "dev.jsonl"),
    source="dev.jsonl of winogrande_1.1.zip, which the repository allenai/winogrande on GitHub links to",
    example=example,
    layout='{"sentence": text with _, "option1": text, "option2": text, "answer": "1" or "2"}',
    chance=0.5,
)
