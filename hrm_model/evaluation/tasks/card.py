"""The prompts of the published model card, of which it gives mean steps: 2.78, 4.77, 7.03 and 8.40. It shows only how
the two riddles begin and does not say how many tokens were generated, nor how; here it is the likeliest 20."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .task import Question, Task, text

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which plants",
    "If all roses are flowers and some flowers fade quickly, can we conclude that some roses fade quickly?",
    "A bat and a ball cost $1.10 in total. The bat costs $1.00 more than the ball. How much does the ball cost?",
)


def example(row: Mapping[str, Any]) -> Question:
    """The prompt as it stands."""
    return Question(text(row, "prompt"))


TASK = Task(
    name="card",
    hub=None,
    files=(),
    source="",
    example=example,
    layout='{"prompt": text}',
    max_new_tokens=20,
    rows=[{"prompt": prompt} for prompt in PROMPTS],
)
