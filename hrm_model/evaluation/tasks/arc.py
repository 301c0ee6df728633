"""ARC (Clark et al., 2018), test sets: science questions for school, easy and challenging. Each answer's text is scored
after "Question: ..\\nAnswer:". (No published score of CosmicFish-HRM.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import Choices, Hub, Task, label_of, text, texts_of


def example(row: Mapping[str, Any]) -> Choices:
    """The hub's layout, or the authors', in which the choices are part of the question."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = text(question, "stem"), question["choices"]
    else:
        question = text(row, "question")
    if isinstance(choices, dict):
        texts, labels = texts_of(choices, "text"), texts_of(choices, "label")
    else:
        texts, labels = [text(choice, "text") for choice in choices], [text(choice, "label") for choice in choices]
    if len(texts) < 2 or len(texts) != len(labels):
        raise ValueError(f"'choices' has {len(texts)} texts and {len(labels)} labels; at least two of each are needed")
    return Choices(f"Question: {question.strip()}\nAnswer:", texts, label_of(str(row["answerKey"]), labels))


def _task(name: str, kind: str) -> Task:
    return Task(
        name=name,
        hub=Hub("allenai/ai2_arc", "test", f"ARC-{kind}"),
        files=(f"ARC-{kind}-Test.jsonl",),
        source=f"ARC-{kind}-Test.jsonl of ARC-V1-Feb2018, from the Allen Institute's page on ARC",
        example=example,
        layout='{"question": text, "choices": {"text": [..], "label": [..]}, "answerKey": label}',
        chance=0.25,
    )


EASY, CHALLENGE = _task("arc_easy", "Easy"), _task("arc_challenge", "Challenge")
