"""dashboard.png: the run in six panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_dashboard(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, validation loss by depth, learning rate, gradient norm, speed and depths over the steps of a run.

    The picture is written beside `path` and renamed, so a viewer never sees half of one.

    Args:
        records: the lines of metrics.jsonl. path: a .png. title: the heading.
    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    figure.suptitle(title)
    (loss, by_depth, rate), (norm, speed, depths) = axes

    _curve(loss, train, "loss", label="training, at each row's own depth", alpha=0.6)
    _curve(loss, evals, "val_loss", label="validation", marker="o", color="C1")
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if evals:
            loss.axhline(evals[-1][name], linestyle=style, color="gray", label=name)
    loss.set(title="loss", ylabel="nats per token")
    loss.legend()

    for depth in evals[-1]["loss_by_depth"] if evals else ():
        points = [(r["step"], r["loss_by_depth"][depth]) for r in evals if depth in r["loss_by_depth"]]
        by_depth.plot(*zip(*points, strict=True), marker="o", label=f"depth {depth}")
    by_depth.set(title="validation loss at fixed depths", ylabel="nats per token")
    if evals:
        by_depth.legend()

    _curve(rate, train, "lr")
    rate.set(title="learning rate")
    _curve(norm, train, "grad_norm")
    norm.set(title="gradient norm before clipping")
    if any(r.get("grad_norm") for r in train):
        norm.set_yscale("log")
    _curve(speed, train, "tokens_per_s")
    speed.set(title="speed", ylabel="tokens per second", ylim=(0, None))
    _draw_depths(depths, train)
    for axis in axes.flat:
        axis.set_xlabel("step")

    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)


def _curve(axis, records, key: str, **style) -> None:
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _draw_depths(axis, train) -> None:
    """Histogram of executed steps over time (a column a log line, darker is more rows) and their mean."""
    axis.set(title="executed steps: share of rows, and mean", ylabel="HRM steps")
    if not train:
        return
    deepest = max(int(d) for r in train for d in r["depths"])
    shares = [[r["depths"].get(str(d), 0) / sum(r["depths"].values()) for r in train] for d in range(1, deepest + 1)]
    steps = [r["step"] for r in train]
    axis.imshow(
        shares,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0,
        extent=(steps[0], max(steps[-1], steps[0] + 1), 0.5, deepest + 0.5),
    )
    axis.set_yticks(range(1, deepest + 1))
    axis.plot(steps, [r["mean_steps"] for r in train], color="C3", label="mean")
    axis.legend()
