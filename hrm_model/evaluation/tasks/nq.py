"""Natural Questions, open (Kwiatkowski et al., 2019; Lee et al., 2019): a short answer, which must be one of those
given, but for case, punctuation and a leading article."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from .task import Hub, Question, Task, text, texts_of

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """As published: lower case, then "a", "an" and "the" are taken off the front, in this order and even of a longer
    word; then no punctuation, and single spaces."""
    answer = answer.lower().strip()
    for article in ("a", "an", "the"):
        answer = answer.removeprefix(article).strip()
    return " ".join(answer.translate(_NO_PUNCTUATION).split())


def is_right(said: str, answers: Sequence[str]) -> bool:
    """Whether both are the same when normalised. An empty text is never right."""
    said = normalised(said)
    return bool(said) and any(said == normalised(answer) for answer in answers)


def example(row: Mapping[str, Any]) -> Question | None:
    """question and answer; None where one is empty, as published."""
    question, key = text(row, "question").strip(), "answer" if "answer" in row else "answers"
    answers = row[key]
    if isinstance(answers, str):
        try:
            answers = json.loads(answers)
        except ValueError:
            answers = [answers]
    answers = [answer.strip() for answer in texts_of({key: answers}, key) if answer.strip()]
    return Question(f"Question: {question}\nAnswer:", answers) if question and answers else None


TASK = Task(
    name="nq",
    hub=Hub("google-research-datasets/nq_open", "validation"),
    files=("nq_dev.jsonl", "NQ-open.dev.jsonl", "nq_open.jsonl"),
    source="NQ-open.dev.jsonl of the repository google-research-datasets/natural-questions on GitHub, folder nq_open",
    example=example,
    layout='{"question": text, "answer": [text, ..]}',
    is_right=is_right,
    max_new_tokens=20,
    stop=("\n",),
)
