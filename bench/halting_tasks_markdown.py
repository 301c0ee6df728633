"""The tables of docs/halting.md, from the records of bench/halting_tasks.py."""

from __future__ import annotations

from typing import Any

_ROWS = {
    "policy": "policy",
    "gain": "gain",
    "expected": "expected",
    "q": "q",
    "settled": "z_H settled (untrained)",
    "published": "published (untrained)",
}
_JOINT = "**policy, trained jointly**"
_COLUMNS = {
    "accuracy": ("accuracy", "{:.3f}"),
    "fixed": ("accuracy_fixed", "{:.3f}"),
    "loss": ("loss", "{:.3f}"),
    "fixed ": ("loss_fixed", "{:.3f}"),
    "shuffled": ("loss_shuffled", "{:.3f}"),
    "mean steps": ("mean_steps", "{:.1f}"),
    "D": ("dispersion", "{:.2f}"),
    "rank correlation with k": ("rank_correlation", "{:.2f}"),
}


def tables(records: list[dict[str, Any]]) -> dict[str, str]:
    """Of each task a Markdown table, its figures those of every seed in turn."""
    found = {}
    for task in dict.fromkeys(r["task"] for r in records):
        of_task = sorted((r for r in records if r["task"] == task), key=lambda r: r["seed"])
        header = ["rule", *(name.strip() for name in _COLUMNS)]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        rows = {title: [r["staged"][rule] for r in of_task] for rule, title in _ROWS.items()}
        rows[_JOINT] = [r["joint"] for r in of_task]
        for title, figures in rows.items():
            cells = (" / ".join(_shown(f[key], form) for f in figures) for key, form in _COLUMNS.values())
            lines.append("| " + " | ".join([title, *cells]) + " |")
        found[task] = "\n".join(lines)
    return found


def _shown(value: float | None, form: str) -> str:
    return "constant" if value is None else form.format(value)
