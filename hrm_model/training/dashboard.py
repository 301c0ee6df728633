"""dashboard.png: the run in six panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .validation import reported_depths

MARGINS = {"left": 0.05, "right": 0.945, "bottom": 0.065, "top": 0.915, "wspace": 0.24, "hspace": 0.26}


def draw_dashboard(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss, validation loss by depth, learning rate and price, gradient norm, speed and depths over a run's steps.

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
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), gridspec_kw=MARGINS)  # computing them takes longer
    figure.suptitle(title)
    (loss, by_depth, rate), (norm, speed, depths) = axes

    _curve(loss, train, "loss", label="training, at each row's own depth", alpha=0.6)
    _curve(loss, evals, "val_loss", label="validation", marker="o", color="C1")
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if evals:
            loss.axhline(evals[-1][name], linestyle=style, color="gray", label=name)
    loss.set(title="loss", ylabel="nats per token")
    loss.legend()

    _draw_gains(by_depth, evals)
    _curve(rate, train, "lr")
    rate.set(title="learning rate")
    if any("price" in r for r in train):
        price = rate.twinx()
        _curve(price, train, "price", color="C1")
        price.set(ylim=(0, None), ylabel="price of a step, nats")
        price.yaxis.label.set_color("C1")
        rate.set(title="learning rate (blue) and price of a step (orange)")
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


def _draw_gains(axis, evals) -> None:
    """What each depth's validation loss is above or below that of one step: the losses themselves hardly differ."""
    axis.set(title="validation loss less that of 1 step", ylabel="nats per token; below 0 depth helps")
    if not evals:
        return
    deepest = max(int(d) for d in evals[-1]["loss_by_depth"])
    shown = {f"depth {d}": lambda r, d=str(d): r["loss_by_depth"][d] for d in reported_depths(deepest) if d > 1}
    if "shuffled" in evals[-1]:
        shown["at the decided depths"] = lambda r: r["val_loss"]
    axis.axhline(0, color="gray", linewidth=0.8)
    steps = [r["step"] for r in evals]
    for label, of in shown.items():
        gains = [of(r) - r["loss_by_depth"]["1"] for r in evals]
        axis.plot(steps, gains, "k*--" if "decided" in label else "o-", label=label)
    if shown:
        axis.legend()


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
    axis.plot(steps, [r["mean_steps"] for r in train], color="C3", label="mean of the rows trained on")
    _curve(axis, train, "head_steps", color="C2", label="mean that the head decides for explorers")
    axis.legend()
