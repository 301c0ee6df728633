"""The elastic penalty: what matters for earlier texts is held, what does not may move.

    penalty  (lambda / 2) sum_i F_i (theta_i - theta*_i)^2        theta*: the weights before the new text
    F_i      mean over stored sequences of (d loss / d theta_i)^2, loss the sequence's mean in nats times its length

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, with the empirical
Fisher information, one text's samples counting as much as another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import atomic_file
from ..model import HRMForCausalLM
from ..tensors import check_fit, read_tensors

SAMPLES = 64
"""Sequences of each text that the Fisher information is measured on, a backward pass each."""


def fisher(model: HRMForCausalLM, texts: Sequence[np.ndarray], depth: int | None) -> dict[str, Tensor]:
    """The diagonal F by parameter name, float32, from rows [m, T + 1] of each text; `depth` as force_steps."""
    was_training = model.training
    model.eval()  # what generation computes knows no dropout
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for rows in texts:
        rows = rows[:SAMPLES].astype(np.int64)
        for row in rows:
            ids = torch.from_numpy(row).to(model.device)[None]
            model.zero_grad(set_to_none=True)
            model(ids[:, :-1], ids[:, 1:].contiguous(), force_steps=depth, reduction="sum").loss.backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[name] += p.grad.square() / (len(rows) * len(texts))
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return found


class Elastic:
    """Adds lambda F (theta - theta*) to the gradients. theta* and F stay on disk for a run that is resumed.

    Args:
        model: what is trained. strength: lambda. information, anchor: F and theta* by parameter name.
    """

    def __init__(
        self, model: HRMForCausalLM, strength: float, information: dict[str, Tensor], anchor: dict[str, Tensor]
    ):
        self.model, self.strength, self.information, self.anchor = model, strength, information, anchor

    @classmethod
    def measured(cls, model: HRMForCausalLM, strength: float, texts: Sequence[np.ndarray], depth: int | None):
        """At the model's present weights."""
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        return cls(model, strength, fisher(model, texts, depth), anchor)

    def save(self, path: Path) -> None:
        """Write F and theta*, whole or not at all."""
        tensors = {f"fisher/{name}": t.cpu() for name, t in self.information.items()}
        tensors |= {f"anchor/{name}": t.cpu() for name, t in self.anchor.items()}
        with atomic_file(path, overwrite=True) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, model: HRMForCausalLM, strength: float, path: Path):
        """What save() wrote. Raises CheckpointError where it is missing, damaged or of another model."""
        tensors, _ = read_tensors(path)
        parts = {}
        for kind in ("fisher", "anchor"):
            found = {n.partition("/")[2]: t.to(model.device) for n, t in tensors.items() if n.startswith(kind)}
            check_fit(dict(model.named_parameters()), found, path)
            parts[kind] = found
        return cls(model, strength, parts["fisher"], parts["anchor"])

    @torch.no_grad()
    def __call__(self) -> None:
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                p.grad.addcmul_(self.information[name], p - self.anchor[name], value=self.strength)

    @torch.no_grad()
    def value(self) -> float:
        """The penalty itself, nats of one sequence."""
        parts = (
            (self.information[name] * (p - self.anchor[name]).square()).sum()
            for name, p in self.model.named_parameters()
        )
        return 0.5 * self.strength * float(sum(parts))
