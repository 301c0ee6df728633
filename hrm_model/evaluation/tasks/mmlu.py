"""MMLU (Hendrycks et al., 2021), test set, without examples: the letters A to D are scored after question and choices.
(No published score of CosmicFish-HRM.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import Choices, Hub, Task, label_of, text, texts_of

LETTERS = ("A", "B", "C", "D")


def example(row: Mapping[str, Any]) -> Choices:
    """question, choices and answer; the subject goes into the first line where there is one."""
    choices = texts_of(row, "choices")
    if len(choices) != 4:
        raise ValueError("'choices' must be a list of four texts")
    subject = str(row.get("subject") or "").replace("_", " ")
    about = f" about {subject}" if subject else ""
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True))
    context = (
        f"The following are multiple choice questions (with answers){about}.\n\n"
        f"{text(row, 'question').strip()}\n{listed}Answer:"
    )
    return Choices(context, LETTERS, label_of(row["answer"], LETTERS))


TASK = Task(
    name="mmlu",
    hub=Hub("cais/mmlu", "test", "all"),
    files=("test",),
    source="data.tar of the repository hendrycks/test on GitHub: its folder test, of one .csv a subject",
    example=example,
    layout='{"question": text, "choices": [four texts], "answer": 0..3 or "A".."D", "subject": text}',
    chance=0.25,
)
