"""The benchmarks: where their rows are, and what of them a model is asked. One file a benchmark."""

from __future__ import annotations

from . import arc, card, gsm8k, hellaswag, mmlu, nq, piqa, winogrande
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        hellaswag.TASK, piqa.TASK, winogrande.TASK, nq.TASK, arc.EASY, arc.CHALLENGE, mmlu.TASK, gsm8k.TASK, card.TASK
    )
}  # fmt: skip
"""By the name that --tasks takes."""
