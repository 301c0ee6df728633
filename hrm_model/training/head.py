"""The halting head's own training step: its loss over explorers, summed over micro-batches and ranks.

The head is two linear functions of a mean that is detached from the rest, so its gradient can be summed as it comes and
divided once by the normaliser of all of it: one quotient for the whole batch, however it was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..depth_statistics import DepthStatistics
from ..exits import Exits, exits
from ..halting import Price, advantages, executed_steps, halt_margin, head_loss

MEANS_BYTES = 1 << 26
"""What the head sees of rows that are unrolled together: 64 MiB, four rows of the base model."""


@dataclass
class HeadStep:
    """What one or several steps of the head's training saw. Means over decisions that have a target; S steps."""

    n: int
    """Decisions."""
    loss: float
    """L_q: the objective's quotient."""
    normaliser: float
    price: float
    """lambda that was in force, of the last step, nats."""
    exit_losses: list[float]
    """[S] nats, each exit's loss."""
    advantages: list[float]
    """[S-1] nats, of going on after each step."""
    histogram: list[int]
    """[S], how many decisions run 1, 2, .. S steps."""
    own: float
    """Nats: loss at the steps that the head decides."""
    agreement: float
    """Share of decisions that stop where l_s + lambda s is least in hindsight."""
    is_finite: bool = True
    """Whether its loss and gradient are numbers."""

    def __add__(self, other: HeadStep) -> HeadStep:
        n, normaliser = self.n + other.n, self.normaliser + other.normaliser

        def mean(a: float, b: float) -> float:
            return (a * self.n + b * other.n) / n

        loss = (self.loss * self.normaliser + other.loss * other.normaliser) / normaliser if normaliser else 0.0
        return HeadStep(
            n, loss, normaliser, other.price,
            list(map(mean, self.exit_losses, other.exit_losses)), list(map(mean, self.advantages, other.advantages)),
            [a + b for a, b in zip(self.histogram, other.histogram, strict=True)],
            mean(self.own, other.own), mean(self.agreement, other.agreement), self.is_finite and other.is_finite,
        )  # fmt: skip

    def depths(self) -> DepthStatistics:
        """Of the steps that the head decides."""
        return DepthStatistics(self.histogram)

    def record(self) -> dict:
        """What metrics.jsonl keeps of it."""
        depths = self.depths()
        return {
            "head_loss": self.loss,
            "price": self.price,
            "head_steps": depths.mean,
            "head_dispersion": depths.dispersion,
            "head_depths": {str(s): n for s, n in enumerate(self.histogram, 1)},
            "head_own_loss": self.own,
            "oracle_agreement": self.agreement,
            "exit_losses": {str(s): loss for s, loss in enumerate(self.exit_losses, 1)},
            "advantages": {str(s): advantage for s, advantage in enumerate(self.advantages, 1)},
        }


class HeadTraining:
    """Sums the head's gradient over parts of a batch, then hands it over.

    Args:
        model: an HRMForCausalLM with at least two steps. objective: a name of halting.OBJECTIVES.
        price: of a step; steered by `finish` where it has a target.
        decisions: "prefix" (every prefix of an explorer decides) or "row".
    """

    def __init__(self, model, objective: str, price: Price, decisions: str = "prefix"):
        self.model, self.objective, self.price, self.decisions = model, objective, price, decisions
        self.max_steps = model.config.hrm_max_steps
        self._reset()

    def _reset(self) -> None:
        self._gradient: list[Tensor] | None = None
        self._sums: Tensor | None = None

    def add(self, ids_BT: Tensor, targets: Tensor, lengths: Tensor | None = None) -> None:
        """Unroll these rows (as in HRMForCausalLM.forward), in groups of bounded memory, and add what they say."""
        config = self.model.config
        n_decisions = ids_BT.shape[1] if self.decisions == "prefix" else 1
        of_a_row = n_decisions * self.max_steps * config.n_embd * 4
        group = max(1, MEANS_BYTES // of_a_row)
        for start in range(0, len(ids_BT), group):
            part = slice(start, start + group)
            found = exits(
                self.model, ids_BT[part], targets[part], None if lengths is None else lengths[part],
                decisions=self.decisions, keep_means=True, keep_change=False,
            )  # fmt: skip
            self.add_exits(found)

    def add_exits(self, found: Exits) -> None:
        """Add decisions that were unrolled already, their means kept."""
        head = self.model.hrm_core.q_head
        losses, means, weights = found.losses.flatten(0, 1), found.means.flatten(0, 1), found.weights.flatten()
        with torch.enable_grad(), torch.autocast(means.device.type, enabled=False):
            w, b = (p.detach().to(means.dtype).requires_grad_() for p in (head.weight, head.bias))
            q = torch.nn.functional.linear(means, w, b)
            total, normaliser = head_loss(self.objective, losses, q, weights, self.price.value)
            gradient = torch.autograd.grad(total, (w, b))
        sums = torch.cat(
            [torch.stack([total.detach(), normaliser]).double(), self._statistics(losses, q.detach(), weights)]
        )
        if self._sums is None:
            self._gradient, self._sums = list(gradient), sums
        else:
            self._gradient = [a + b for a, b in zip(self._gradient, gradient, strict=True)]
            self._sums = self._sums + sums

    def _statistics(self, losses: Tensor, q: Tensor, weights: Tensor) -> Tensor:
        """float64: N, loss at the decided steps, agreement, exits' losses [S], advantages [S-1], histogram [S]."""
        price, n_steps = self.price.value, losses.shape[1]
        margins = halt_margin(q)
        executed = executed_steps(margins)
        own = losses.gather(1, executed[:, None] - 1)[:, 0]
        oracle = (losses + price * torch.arange(1, n_steps + 1, device=losses.device)).argmin(1) + 1
        columns = [torch.ones_like(own), own, (executed == oracle).float()]
        table = torch.cat(
            [
                torch.stack(columns, 1), losses, advantages(losses, margins <= 0, price),
                torch.nn.functional.one_hot(executed - 1, n_steps),
            ], 1,
        )  # fmt: skip
        wide = table.dtype if table.device.type == "mps" else torch.float64
        return (table.to(wide) * weights[:, None]).sum(0).double()

    def finish(self, largest_norm: float) -> HeadStep | None:
        """Put the gradient of L_q, of norm at most `largest_norm` (0: any), into the head's parameters, steer the
        price, and begin anew. With torch.distributed every rank has to call this, and all get the same.

        Returns:
            None where nobody explored: the head's gradient is then what it was. So it is, and the price, where the
            loss or the gradient is not finite (`is_finite`).
        """
        head, n_steps = self.model.hrm_core.q_head, self.max_steps
        device = head.weight.device
        if self._sums is None:
            # of the type that ranks with explorers have, as means are never narrower than float32
            self._gradient = [
                torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in (head.weight, head.bias)
            ]
            self._sums = torch.zeros(5 + 3 * n_steps - 1, dtype=torch.float64, device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for t in (*self._gradient, self._sums):
                torch.distributed.all_reduce(t)
        gradient = self._gradient
        squares = torch.stack([g.double().square().sum() for g in gradient]).sum()
        *sums, squares = torch.cat([self._sums, squares[None]]).tolist()  # the host waits
        self._reset()
        total, normaliser, n, own, agreement, *others = sums
        if n == 0:
            return None
        exit_losses, gains, histogram = others[:n_steps], others[n_steps : 2 * n_steps - 1], others[2 * n_steps - 1 :]
        loss = total / normaliser if normaliser else 0.0
        finite = math.isfinite(loss) and math.isfinite(squares)
        if normaliser > 0 and finite:
            gradient = [g / normaliser for g in gradient]
            norm = torch.stack([g.norm() for g in gradient]).norm()
            scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0) if largest_norm > 0 else 1.0
            for p, g in zip((head.weight, head.bias), gradient, strict=True):
                p.grad = (g * scale).to(p.dtype)
        step = HeadStep(
            round(n), loss, normaliser, self.price.value,
            [x / n for x in exit_losses], [x / n for x in gains], [round(x) for x in histogram], own / n, agreement / n,
            finite,
        )  # fmt: skip
        if finite:
            self.price.steer(step.depths().mean)
        return step
