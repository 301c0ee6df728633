"""A question with its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """What a task asks, and what it takes for right."""

    prompt: str
    answer: str
    task: str
    entry: dict[str, Any] = field(default_factory=dict, compare=False)
    """What the task's verifier wants to know of it."""
