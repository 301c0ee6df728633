"""Fit the halting head alone, 2 C + 2 numbers, to a model that stays as it is.

The head sees nothing of a text but means of z_H, and those do not depend on the head. So a text is unrolled once, its
decisions are kept (what the head would see, and the loss, at every exit), and the objective is then minimised over them
in memory: seconds, where training the model takes hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..exits import exits
from ..halting import Price, executed_steps, halt_margin, head_loss

FIT_BYTES = 1 << 28
"""Memory for what the head sees of the decisions that it is fitted to: 256 MiB, 9,300 of the base model's."""
ITERATIONS = 600
LEARNING_RATE = 0.03
PRICE_RATE = 0.01
"""Of the controller: the fit's mean depth has no noise that would make it swing."""


@dataclass(frozen=True)
class Decisions:
    """N decisions of which every exit is known. S steps, C channels; float32."""

    means: Tensor
    """[N, S, C] what the head sees."""
    losses: Tensor
    """[N, S] nats."""

    def split(self, share: float) -> tuple[Decisions, Decisions]:
        """(the first, the last `share` of them)."""
        n = len(self.losses) - round(share * len(self.losses))
        return Decisions(self.means[:n], self.losses[:n]), Decisions(self.means[n:], self.losses[n:])

    def cost(self, executed: Tensor, price: float) -> float:
        """Mean of l_s + lambda s at steps executed [N]."""
        own = self.losses.gather(1, executed[:, None] - 1)[:, 0]
        return float((own + price * executed).double().mean())


def collect(
    model,
    batches: Iterator[tuple[Tensor, Tensor]],
    decisions: str,
    most: int,
    autocast: Callable[[], AbstractContextManager],
) -> Decisions:
    """The decisions of batches of (ids [B, T], targets [B, T]), at most `most` from each row, evenly spread over it; to
    the CPU's memory."""
    means, losses = [], []
    for ids, targets in batches:
        with autocast():
            found = exits(model, ids, targets, decisions=decisions, keep_means=True, keep_change=False)
        for row in range(len(ids)):
            real = found.weights[row].nonzero()[:, 0]
            if len(real) > most:
                real = real[torch.arange(most, device=real.device) * len(real) // most]
            means.append(found.means[row, real].float().cpu())
            losses.append(found.losses[row, real].cpu())
    return Decisions(torch.cat(means), torch.cat(losses))


@dataclass(frozen=True)
class Fit:
    """What a fit ended with."""

    weight: Tensor
    """[2, C] float32"""
    bias: Tensor
    """[2] float32"""
    price: float
    """lambda, nats; steered where there was a target."""
    mean_steps: float
    """Over all the decisions."""


def fit(
    decisions: Decisions,
    objective: str,
    price: Price,
    iterations: int = ITERATIONS,
    progress: Callable[[int, float], None] = lambda i, loss: None,
) -> Fit:
    """Minimise the objective over all decisions at once, by Adam, in coordinates of unit variance.

    A quarter of the decisions, the last, is held out: the head that costs least there (l + lambda s at its own
    decisions) is returned, so that a head of 2 C + 2 numbers cannot learn its text by heart. With a target mean depth
    it is the last one, as costs at different prices do not compare.

    Args:
        price: steered in place where it has a target.
        progress: called with the iteration's number and its L_q.
    Raises:
        ValueError: fewer than four decisions, or what they hold is not finite.
    """
    if len(decisions.losses) < 4:
        raise ValueError(f"{len(decisions.losses)} decisions are too few to fit a head and to test it; give at least 4")
    if not all(t.isfinite().all() for t in (decisions.means, decisions.losses)):
        raise ValueError("some exits have a loss or a state that is not finite; nothing can be fitted to such a model")
    learn, held_out = decisions.split(0.25)
    centre, scale = learn.means.mean((0, 1)), learn.means.std((0, 1)).clamp_min(1e-6)
    x, x_held = (learn.means - centre) / scale, (held_out.means - centre) / scale
    head = nn.Linear(x.shape[-1], 2)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.1]))  # go on everywhere: later exits are then part of every sample's value
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    weights = torch.ones(len(x))
    best, least = None, float("inf")
    for i in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - i / iterations)
        q = head(x)
        total, normaliser = head_loss(objective, learn.losses, q, weights, price.value)
        loss = total / normaliser.clamp_min(1e-12)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress(i + 1, loss.item())
        price.steer(float(executed_steps(halt_margin(q.detach())).double().mean()))
        with torch.no_grad():
            cost = held_out.cost(executed_steps(halt_margin(head(x_held))), price.value)
        if price.target is not None or cost <= least:  # of equal ones the last, which has the wider margins
            least, best = cost, {name: t.clone() for name, t in head.state_dict().items()}
    weight = best["weight"] / scale
    bias = best["bias"] - weight @ centre
    with torch.no_grad():
        executed = executed_steps(halt_margin(nn.functional.linear(decisions.means, weight, bias)))
    return Fit(weight, bias, price.value, float(executed.double().mean()))
