"""dashboard.png of a run of the hybrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_run(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss by segment, accuracy, norm of z_H and gradient norm over a run's steps; whole or not at all.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, evals = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    figure.suptitle(title)
    (loss, accuracy), (state, norm) = axes
    for segment in train[-1]["segment_losses"] if train else ():
        points = [(r["step"], r["segment_losses"][segment]) for r in train]
        loss.plot(*zip(*points, strict=True), label=f"segment {segment}")
    loss.set(title="training loss after each segment", ylabel="nats a token", yscale="log")
    for key, label in (("accuracy", "as trained"), ("accuracy_deep", "with eval_segments")):
        if points := [(r["step"], r[key]) for r in evals if key in r]:
            accuracy.plot(*zip(*points, strict=True), "o-", label=label)
    accuracy.set(title="accuracy on held-out examples", ylim=(-0.02, 1.02))
    for axis, key, name in (
        (state, "z_norm", "mean norm of z_H"),
        (norm, "grad_norm", "gradient norm before clipping"),
    ):
        axis.plot([r["step"] for r in train], [r[key] for r in train])
        axis.set(title=name)
    for axis in axes.flat:
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)
