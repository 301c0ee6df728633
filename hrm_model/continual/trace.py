"""What happens inside a step: how the states z_H and z_L move through N cycles x T steps, and what would be said.

After each application of a level, over the tokens of one row:

    norm     mean over tokens of |z|           change   mean of |z - z before| / |z before|
    says     the likeliest next character after the row, and its probability, if z_H were decoded here
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..incremental import evaluating


@dataclass(frozen=True)
class Moment:
    """One application of a level."""

    step: int
    cycle: int
    level: str
    """"L" or "H"."""
    number: int
    """Which L step of the cycle, from 1; of H 1."""
    norm: float
    change: float
    says: str
    probability: float


@torch.no_grad()
def trace(model, ids: list[int], steps: int = 1) -> list[Moment]:
    """The moments of a row of character ids through `steps` HRM steps of the model's N x T.

    Raises:
        ValueError: no ids, more than the window, or fewer than 1 step.
    """
    if not ids or len(ids) > model.config.block_size or steps < 1:
        raise ValueError(f"{len(ids)} tokens and {steps} steps: give 1 to {model.config.block_size} tokens, 1 step up")
    config, core, moments = model.config, model.hrm_core, []
    with evaluating(model):
        rotary = model.rotary(len(ids))
        x = model.embed(torch.tensor([ids], device=model.device))
        for block in model.input_blocks:
            x = block.apply_to(x, rotary, None)
        z_H, z_L = core.initial_state(x)
        for step in range(1, steps + 1):
            for cycle in range(1, config.hrm_H_cycles + 1):
                for number in range(1, config.hrm_L_cycles + 1):
                    before, z_L = z_L, core.L_level(z_L, z_H + x, rotary, None)
                    moments.append(_moment(model, rotary, z_H, before, z_L, step, cycle, "L", number))
                before, z_H = z_H, core.H_level(z_H, z_L, rotary, None)
                moments.append(_moment(model, rotary, z_H, before, z_H, step, cycle, "H", 1))
    return moments


def _moment(model, rotary, z_H: Tensor, before: Tensor, after: Tensor, step: int, cycle: int, level: str, number: int):
    probabilities = model.lm_head(model.decode(z_H, rotary, None)[0, -1]).float().softmax(-1)
    probability, token = probabilities.max(-1)
    size = before.norm(dim=-1).clamp(min=1e-12)
    change = float(((after - before).norm(dim=-1) / size).mean())
    norm = float(after.norm(dim=-1).mean())
    return Moment(step, cycle, level, number, norm, change, str(int(token)), float(probability))


def lines(moments: list[Moment], tokenizer) -> list[str]:
    """For a terminal."""
    shown = []
    for m in moments:
        what = f"L step {m.number}" if m.level == "L" else "H update"
        said = repr(tokenizer.decode([int(m.says)]))
        shown.append(
            f"step {m.step} cycle {m.cycle}  {what:<9}  norm {m.norm:8.3f}  moved by {m.change:7.1%}  "
            f"says {said:<6} {m.probability:5.1%}"
        )
    return shown


def records(moments: list[Moment], tokenizer) -> list[dict[str, Any]]:
    """Plain JSON values."""
    return [asdict(m) | {"says": tokenizer.decode([int(m.says)])} for m in moments]


def draw(traces: dict[str, list[Moment]], path: Path) -> None:
    """Norms, changes and probabilities of several configurations side by side, a PNG. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(traces) + 1, 6.5), layout="constrained")
    axes = figure.subplots(3, len(traces), sharey="row", squeeze=False)
    for column, (title, moments) in enumerate(traces.items()):
        axes[0, column].set_title(title)
        for level, color in (("L", "tab:blue"), ("H", "tab:orange")):
            at = [(i, m) for i, m in enumerate(moments, 1) if m.level == level]
            numbers = [i for i, _ in at]
            axes[0, column].plot(numbers, [m.norm for _, m in at], "o-", color=color, label=f"z_{level}")
            axes[1, column].plot(numbers, [m.change for _, m in at], "o-", color=color)
        axes[2, column].plot(range(1, len(moments) + 1), [m.probability for m in moments], "o-", color="black")
        axes[2, column].set_xlabel("application of a level")
    for row, what in enumerate(("norm", "change", "probability of what is said")):
        axes[row, 0].set_ylabel(what)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
