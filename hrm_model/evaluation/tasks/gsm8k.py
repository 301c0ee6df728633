"""GSM8K (Cobbe et al., 2021), test set, without examples: the number that the model's text ends in. (No published score
of CosmicFish-HRM.)"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from .task import Hub, Question, Task, text

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_in(said: str) -> Decimal | None:
    """The number after "####"; else the last one before another question begins; None where there is none."""
    said = said.split("\nQuestion:")[0]
    marked = re.search(rf"####\s*\$?\s*({_NUMBER.pattern})", said)
    found = [marked[1]] if marked else _NUMBER.findall(said)
    return Decimal(found[-1].replace(",", "")) if found else None


def is_right(said: str, answers: Sequence[str]) -> bool:
    """Whether the number is that of the answer."""
    found = number_in(said)
    return found is not None and any(found == Decimal(answer) for answer in answers)


def example(row: Mapping[str, Any]) -> Question:
    """question, and the number after "####" in its answer."""
    marked = re.search(rf"####\s*({_NUMBER.pattern})", text(row, "answer"))
    if not marked:
        raise ValueError("'answer' has no #### with a number after it")
    return Question(f"Question: {text(row, 'question').strip()}\nAnswer:", [marked[1].replace(",", "")])


TASK = Task(
    name="gsm8k",
    hub=Hub("openai/gsm8k", "test", "main"),
    files=("test.jsonl", "gsm8k_test.jsonl"),
    source="test.jsonl of the repository openai/grade-school-math on GitHub, folder grade_school_math/data",
    example=example,
    layout='{"question": text, "answer": text that ends in #### and a number}',
    is_right=is_right,
    max_new_tokens=200,
)
