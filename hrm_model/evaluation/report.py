"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BAR = "▁▂▃▄▅▆▇█"


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines, one for each result (TaskResult.to_dict), under a line of headings."""
    biases = {result.get("halt_bias") for result in results if result["steps"]}
    head = ["model", *(["bias"] if len(biases) > 1 else []), "task", "n", "score %", "chance", "nats/token"]
    with_steps = any(result["steps"] for result in results)
    head += ["steps (sd)", "published", "rho", "histogram"] if with_steps else []
    head.append("ex/s")
    rows = []
    for result in results:
        row = [result["model"]]
        if len(biases) > 1:
            row.append(f"{result['halt_bias']:g}" if result["steps"] else "-")
        score = "-"
        if result["score"] is not None:
            stderr = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
            score = f"{100 * result['score']:.1f}{stderr}"
        chance = "-" if result["chance"] is None else f"{100 * result['chance']:.0f}"
        row += [result["task"], f"{result['examples']:,}", score, chance, f"{result['nats_per_token']:.3f}"]
        if with_steps:
            row += _steps(result["steps"])
        rows.append([*row, f"{result['examples_per_second']:.2f}"])
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    left = 3 if len(biases) > 1 else 2
    return [
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *rows)
    ]


def _steps(steps: dict[str, Any] | None) -> list[str]:
    if steps is None:
        return ["-"] * 4
    rho = steps["rank_correlation_with_loss"]
    return [
        f"{steps['mean']:.2f} ({steps['sd']:.2f})",
        f"{steps['published_mean']:.3f} ± {steps['published_sd']:.3f}",
        "constant" if rho is None else f"{rho:+.2f}",
        sparkline(steps["histogram"]),
    ]


def sparkline(counts: Sequence[int]) -> str:
    """A character for each count, from 1 step to the most; a space where there is none."""
    most = max(counts, default=0) or 1
    return "".join(" " if not count else BAR[min(len(BAR) - 1, count * len(BAR) // (most + 1))] for count in counts)
