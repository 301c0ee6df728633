"""Results as a picture: scores with their standard errors, histograms of steps, accuracy against steps over a sweep."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

_INK, _SOFT, _LINES = (
    "#1b1d21",
    "#5c626b",
    "#0b6e99 #d1495b #3a7d44 #8d5a97 #c98b1f #57606a #17b3a6 #a0522d #e377c2".split(),
)


def check_matplotlib() -> None:
    """Raise ValueError, with the way to install it, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("a chart needs matplotlib: pip install 'hrm-kernels[plot]', or leave --chart out") from error


def chart(results: Sequence[dict[str, Any]], title: str) -> bytes:
    """A PNG of results (TaskResult.to_dict, with halt_bias).

    Scores and histograms are of the first halt bias of each model; with several there is a third picture, a line for
    each task: score against mean executed steps.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result["task"] for result in results))
    models = list(dict.fromkeys(result["model"] for result in results))
    first: dict[tuple[str, str], dict] = {}
    for result in results:
        first.setdefault((result["model"], result["task"]), result)
    sweep = len({result.get("halt_bias") for result in results if result["steps"]}) > 1
    figure = Figure(figsize=(max(7, 1.6 * len(tasks)), 9.5 if sweep else 6.8), facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=12, color=_INK)
    axes = figure.subplots(3 if sweep else 2, 1)
    _scores(axes[0], tasks, models, first)
    _histograms(axes[1], tasks, first)
    if sweep:
        _sweep(axes[2], tasks, results)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _scores(axis, tasks: list[str], models: list[str], first: dict) -> None:
    width = 0.8 / len(models)
    for m, model in enumerate(models):
        places = [
            t for t, task in enumerate(tasks) if (model, task) in first and first[model, task]["score"] is not None
        ]
        found = [first[model, tasks[t]] for t in places]
        axis.bar(
            [t - 0.4 + width * (m + 0.5) for t in places], [100 * result["score"] for result in found], width,
            yerr=[100 * (result["stderr"] or 0) for result in found], capsize=3, label=model,
            color=_LINES[m % len(_LINES)],
        )  # fmt: skip
    for t, task in enumerate(tasks):
        chance = next((first[model, task]["chance"] for model in models if (model, task) in first), None)
        if chance is not None:
            axis.plot((t - 0.45, t + 0.45), (100 * chance,) * 2, color=_INK, linestyle="--", linewidth=1)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylabel("score, % (dashed: chance)", fontsize=9)
    axis.legend(fontsize=8, frameon=False)


def _histograms(axis, tasks: list[str], first: dict) -> None:
    drawn = [result for result in first.values() if result["steps"]]
    for i, result in enumerate(drawn):
        counts = result["steps"]["histogram"]
        total = sum(counts) or 1
        axis.plot(
            range(1, len(counts) + 1), [count / total for count in counts], marker="o", markersize=3,
            color=_LINES[i % len(_LINES)], label=f"{result['task']}: {result['steps']['mean']:.2f} steps",
        )  # fmt: skip
    axis.set_xlabel("executed steps", fontsize=9)
    axis.set_ylabel("share of rows", fontsize=9)
    if drawn:
        axis.legend(fontsize=8, frameon=False)
    else:
        axis.text(0.5, 0.5, "no model with steps", ha="center", transform=axis.transAxes, color=_SOFT)


def _sweep(axis, tasks: list[str], results: Sequence[dict[str, Any]]) -> None:
    for i, task in enumerate(tasks):
        of_task = [r for r in results if r["task"] == task and r["steps"] and r["score"] is not None]
        of_task.sort(key=lambda r: r["halt_bias"])
        if not of_task:
            continue
        x, y = [r["steps"]["mean"] for r in of_task], [100 * r["score"] for r in of_task]
        error = [100 * (r["stderr"] or 0) for r in of_task]
        axis.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, color=_LINES[i % len(_LINES)], label=task)
        for result, at in zip(of_task, zip(x, y, strict=True), strict=True):
            axis.annotate(
                f"{result['halt_bias']:g}", at, fontsize=7, color=_SOFT, xytext=(3, 3), textcoords="offset points"
            )
    axis.set_xlabel("mean executed steps (numbers: halt bias)", fontsize=9)
    axis.set_ylabel("score, %", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
