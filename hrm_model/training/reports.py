"""What a run says of depth: how it is set, what an evaluation found, whether a target was reached."""

from __future__ import annotations

from typing import Any

from ..depth_statistics import DepthStatistics
from .recipes import TrainConfig
from .validation import reported_depths

NEAR_TARGET = 0.25
"""Steps that a mean may be off its target without a word."""


def depth_plan(run: TrainConfig, warmup: int) -> str:
    """A line's part: what sets depths, what trains the head, what has a gradient. warmup: steps of random depths."""
    depth = run.depth if run.driver == "fixed" else run.driver
    if warmup:
        depth = f"random for {warmup} steps, then {depth}"
    price = f" at {run.step_price:g} nats a step" if run.trains_head else ""
    steered = f", steered to {run.target_steps:g} steps" if run.target_steps and run.trains_head else ""
    last = f", last {run.gradient_steps} steps with gradient" if run.gradient_steps > 1 else ""
    return f"depth {depth}, halting {run.halting}{price}{steered}, gradient {run.gradient}{last}"


def evaluation(record: dict[str, Any], own: int | None, depths: DepthStatistics) -> str:
    """Lines that say what an evaluation found. own: the steps at which the model is evaluated, None for the head's."""
    shown = reported_depths(len(record["loss_by_depth"]))
    protocol = "at the depth each prefix decides" if own is None else f"{own} step{'s' * (own > 1)}"
    lines = [
        f"val loss {record['val_loss']:.4f} ({protocol}; unigram {record['unigram']:.4f}, bigram "
        f"{record['bigram']:.4f})"
        + (f"  {record['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in record else ""),
        "val loss by depth: " + "  ".join(f"{s}: {record['loss_by_depth'][str(s)]:.4f}" for s in shown),
    ]
    if "losses" in record:
        lines.insert(1, "val loss by dataset: " + "  ".join(f"{name}: {x:.4f}" for name, x in record["losses"].items()))
    if "ema_val_loss" in record:
        lines.insert(1, f"val loss of the averaged weights {record['ema_val_loss']:.4f}")
    if own is None:
        histogram = " ".join(f"{s}:{n}" for s, n in record["depths"].items() if n)
        lines += [
            f"executed steps: {depths}; {histogram}; generated over the cache {record['applications']:.1f} block "
            "applications a token",
            f"rivals: fixed depths at equal steps {record['fixed_at_equal_steps']:.4f}, at equal block "
            f"applications {record['fixed_at_equal_blocks']:.4f}, the same steps shuffled {record['shuffled']:.4f}",
        ]
    return "\n".join("  " + line for line in lines)


def missed_target(run: TrainConfig, mean_steps: float, price: float) -> str | None:
    """What to say where --target-steps was not reached, else None."""
    if not run.target_steps or abs(mean_steps - run.target_steps) <= NEAR_TARGET:
        return None
    return (
        f"--target-steps {run.target_steps:g} was not reached: mean {mean_steps:.2f} at price {price:.3g}; start there "
        "(--step-price), or train for longer; a depth at which steps gain nothing cannot be reached at any price"
    )
