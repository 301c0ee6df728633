"""When a row stops: the rule, the objectives that train the head which decides, and the price of a step.

S steps at most, s = 1..S. After step s the head says q_s = [halt, continue], and a row stops at the first s with

    margin_s = q_halt + bias - q_continue > 0,        at S if there is none

Stopping at s costs l_s + lambda s: l_s is the loss of the answer that would be given there, lambda the price of a step
in the same unit (nats). Which stop is best, given what is known so far, is an optimal stopping problem. Policy
iteration (Longstaff & Schwartz, "Valuing American Options by Simulation", 2001) solves it from samples that were run to
the end. With d_s = q_continue - q_halt, backwards from V_S = l_S:

    C_s = lambda + V_{s+1}                        cost of going on under today's decisions
    A_s = l_s - C_s                               advantage of going on
    V_s = C_s if margin_s <= 0, else l_s          at bias 0
    L_q = sum |A_s| softplus(-sign(A_s) d_s) / sum |A_s|

The weights |A| make the sign of L_q's minimiser the sign of E[A | what the head sees], however noisy single samples
are; the normaliser takes the loss's scale out. docs/halting.md derives it and says what the other objectives lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_kernels import halt_margin

from .keyed import DEPTH_STREAM, EXPLORER_STREAM, POSITION_STREAM, keyed_integers

# -- the rule ----------------------------------------------------------------------------------------------------------


def executed_steps(margins: Tensor) -> Tensor:
    """The steps that are run: the first with a margin above 0, S where there is none before it.

    Args:
        margins: [..., S], of `halt_margin`. What it says after the last step counts for nothing.
    Returns:
        [...] int64, 1..S.
    """
    halt = margins > 0
    halt[..., -1] = True
    return halt.int().argmax(-1) + 1  # the first of equal ones


def executed_by(rule: str, margins: Tensor, change: Tensor) -> Tensor:
    """The steps that a rule runs: one option for the trained head and what it is held against.

    Args:
        rule: "head" (whatever trained it, or nothing), or untrained: "fixed:N", N steps for all; "settled:X", stop
            after the first step that changed z_H by less than X of its norm.
        margins, change: [..., S], as exits.Exits has them.
    Returns:
        [...] int64, 1..S.
    Raises:
        ValueError: no such rule.
    """
    kind, _, number = rule.partition(":")
    if rule == "head":
        return executed_steps(margins)
    try:
        if kind == "fixed" and 1 <= int(number) <= margins.shape[-1]:
            return torch.full(margins.shape[:-1], int(number), device=margins.device)
        if kind == "settled" and float(number) >= 0:
            return executed_steps(float(number) - change)
    except ValueError:
        pass
    raise ValueError(f"rule {rule!r} is none of head, fixed:N (N in 1..{margins.shape[-1]}), settled:X (X at least 0)")


# -- objectives --------------------------------------------------------------------------------------------------------

Terms = tuple[Tensor, Tensor]
"""(sum over decisions, with gradient; what to divide it by). Terms of parts of a batch add up."""


def advantages(losses: Tensor, goes_on: Tensor, price: float) -> Tensor:
    """A_s of going on after s = 1..S-1, when later decisions are `goes_on`.

    Args:
        losses: [N, S] nats. goes_on: [N, S] bool, the decisions after each step. price: nats a step.
    Returns:
        [N, S-1] of losses' dtype.
    """
    value, found = losses[:, -1], []
    for s in range(losses.shape[1] - 2, -1, -1):
        cost = price + value
        found.append(losses[:, s] - cost)
        value = torch.where(goes_on[:, s], cost, losses[:, s])
    return torch.stack(found[::-1], 1)


def _weighted_sign(advantage: Tensor, d: Tensor, weights: Tensor) -> Terms:
    """sum |A| softplus(-sign(A) d), sum |A|."""
    size = advantage.abs() * weights[:, None]
    return (size * F.softplus(-advantage.sign() * d)).sum(), size.sum()


def _policy(losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Terms:
    d = q[..., 1] - q[..., 0]
    goes_on = halt_margin(q.detach()) <= 0
    return _weighted_sign(advantages(losses, goes_on, price), d[:, :-1], weights)


def _gain(losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Terms:
    """Go on where the next step alone gains more than its price. Blind to gains that come later."""
    d = q[..., 1] - q[..., 0]
    return _weighted_sign(losses[:, :-1] - losses[:, 1:] - price, d[:, :-1], weights)


def _expected(losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Terms:
    """E[l_s + lambda s] when the head stops at random, with probability sigmoid(-d_s) after s (Banino et al.,
    "PonderNet", 2021, without its prior)."""
    d = q[..., 1] - q[..., 0]
    stop, go = F.logsigmoid(-d[:, :-1]), F.logsigmoid(d[:, :-1])
    reach = F.pad(go.cumsum(1), (1, 0))  # log probability of coming to step s
    p = (reach + F.pad(stop, (0, 1))).exp()  # who comes to S stops there
    steps = torch.arange(1, losses.shape[1] + 1, device=losses.device)
    cost = (p * (losses + price * steps)).sum(1)
    return (cost * weights).sum(), weights.sum()


def _q_learning(losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Terms:
    """The head's two numbers as logits of what halting and going on are worth (Wang et al., "Hierarchical Reasoning
    Model", 2025, section 2). There halting is worth 1 where the answer is right; here exp(-l_s), the answer's
    probability, as no text is ever right as a whole. A step's price is a discount exp(-lambda), which is 1 there."""
    worth = q.detach().sigmoid()
    best = torch.cat([worth[:, 1:-1].amax(-1), worth[:, -1:, 0]], 1)  # of the step after each
    halt = F.binary_cross_entropy_with_logits(q[..., 0], (-losses).exp(), reduction="none").sum(1)
    go = F.binary_cross_entropy_with_logits(q[:, :-1, 1], best * math.exp(-price), reduction="none").sum(1)
    return ((halt + go) * weights).sum(), weights.sum() * (2 * losses.shape[1] - 1)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Terms]] = {
    "policy": _policy,
    "gain": _gain,
    "expected": _expected,
    "q": _q_learning,
}
"""What can train the head, by the name of --halting."""


def head_loss(objective: str, losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Terms:
    """The terms of the head's loss over N decisions that were run through all S steps.

    A decision is that of a row (per-sample form: l the row's mean loss, q of its mean state) or of a prefix ..t
    (l the loss of token t + 1, q of the mean over the prefix, which is what generation decides from).

    Args:
        objective: a name of OBJECTIVES.
        losses: [N, S] nats, no gradient. q: [N, S, 2] float32, [halt, continue] after each step, with gradient.
        weights: [N], 0 where there is no target. price: nats a step.
    Returns:
        (sum, normaliser), scalars: their quotient is L_q, and so is the quotient of their sums over parts of a batch.
    Raises:
        ValueError: an unknown objective, or S below 2, where there is nothing to decide.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if losses.shape[1] < 2:
        raise ValueError("with one step there is nothing to decide; use hrm_max_steps of at least 2, or halting none")
    return OBJECTIVES[objective](losses, q, weights, price)


# -- what a step costs -------------------------------------------------------------------------------------------------


@dataclass
class Price:
    """lambda, the price of a step in nats: constant, or steered so that the mean depth comes to `target`.

    After each optimizer step lambda *= exp(rate clip(mean - target, -2, 2)), within LEAST..MOST. At 0.003 it takes some
    120 steps for a factor of two when the mean is two steps off.
    """

    value: float
    target: float | None = None
    rate: float = 0.003

    LEAST, MOST = 1e-6, 10.0

    def steer(self, mean_steps: float) -> None:
        """Move towards the target, which `mean_steps` is held against."""
        if self.target is not None:
            off = min(max(mean_steps - self.target, -2.0), 2.0)
            self.value = min(max(self.value * math.exp(self.rate * off), self.LEAST), self.MOST)


def price_rate(n_steps: float) -> float:
    """A controller's rate for a run that steers `n_steps` times: slow, yet able to move the price by a factor of 400
    where the mean is a step off all along. At 0.02 and faster the depth of a model in training swings."""
    return min(max(6 / max(n_steps, 1), 0.003), 0.02)


def price_faults(price: float, target: float | None) -> list[str]:
    """What is wrong with a --step-price and a --target-steps (None: no target), a sentence each."""
    faults = []
    if not 0 <= price < math.inf:
        faults.append(f"--step-price {price} is not a finite number of at least 0 (nats a step; 0.01 is usual)")
    if target is not None:
        if not 1 <= target < math.inf:
            faults.append(f"--target-steps {target} is not a number of at least 1, the fewest steps there are")
        if price == 0:
            faults.append("--target-steps steers the price by factors, which --step-price 0 leaves at 0; start at 0.01")
    return faults


def target_fault(target: float | None, max_steps: int) -> str | None:
    """What is wrong with a --target-steps for a model of `max_steps`, or None."""
    if target is not None and target > max_steps:
        return f"--target-steps {target} is over hrm_max_steps {max_steps} of the model; give a mean of 1..{max_steps}"
    return None


# -- who explores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exploration:
    """Which rows of a batch run to a random depth, which follow the head, and which are run through all exits for it.
    Pure functions of (seed, sample number): neither batch nor world size plays a part."""

    seed: int
    max_steps: int
    share: float
    """Of rows that explore, 0..1."""
    warmup: int
    """Optimizer steps in which every row's depth is random."""

    def explorers(self, samples: Sequence[int]) -> np.ndarray:
        """[len(samples)] bool: the rows that give the head its loss, and that keep a random depth after the warm-up."""
        draws = keyed_integers(self.seed, samples, 0, 2**32 - 1, EXPLORER_STREAM)
        return draws < self.share * 2**32

    def random_depths(self, samples: Sequence[int]) -> list[int]:
        """A depth for each row, uniform over 1..S."""
        return keyed_integers(self.seed, samples, 1, self.max_steps, DEPTH_STREAM).tolist()

    def depths(self, samples: Sequence[int], step: int) -> list[int]:
        """Each row's depth in optimizer step `step` (from 0); 0 where the head decides."""
        depths = self.random_depths(samples)
        if step < self.warmup:
            return depths
        return [depth if explores else 0 for depth, explores in zip(depths, self.explorers(samples), strict=True)]

    def pooled(self, samples: Sequence[int], lengths: int | Sequence[int]) -> list[int]:
        """Of each row the length of the prefix that decides its depth, uniform over 1..lengths (one for all, or one for
        each). A mean over the whole row would tell its early positions about its late tokens."""
        return keyed_integers(self.seed, samples, 1, lengths, POSITION_STREAM).tolist()
