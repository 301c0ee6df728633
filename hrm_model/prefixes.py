"""What every prefix of a text decides, from one unroll.

Attention is causal, so a position's state after s steps is the same in every prefix that holds it. One pass of all S
steps therefore shows each prefix ..t what it would see alone:

    q[t, s]        = q_head(mean over u <= t of z_H[u] after step s) = [halt, continue]
    executed[t]    = first s with q_halt + bias > q_continue, else S
    nll[t]         = -log p(token t + 1), decoded from the states after executed[t] steps

This is what generation does at each position, and no token is predicted with a look at what follows it ("causal
protocol"). A depth that one decision over the whole row gives does look: the row's later tokens are in its mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hrm_kernels as ops

from .config import END_OF_TEXT
from .depth_statistics import rank_correlation
from .exits import cumulative_mean
from .incremental import evaluating

# Rows of logits alive at a time: 128 x 50,304 float32 is 26 MB.
LOGIT_ROWS = 128


@dataclass(frozen=True)
class Prefixes:
    """The prefixes ..t of a text, t = 0..T-1. S steps at most. On the model's device."""

    executed: Tensor
    """[T] int64, 1..S: the steps that the model takes when it has read the tokens up to t."""
    halted: Tensor
    """[T] bool: whether it stopped by decision; else it ran into S."""
    margins: Tensor
    """[T, S] float32, in units of q: q_halt + halt_bias - q_continue after each step. Positive means halt. Steps
    after executed[t] are what the head would say had the model gone on."""
    nll: Tensor
    """[T-1] float32, nats: -log p(token t + 1 | tokens up to t), at the depth that this prefix decides."""
    next_log_probs: Tensor
    """[min(V, 50257)] float32, nats: log p of each id after the whole text, at its depth."""

    def cpu(self) -> Prefixes:
        """The same on the CPU."""
        return Prefixes(*(t.cpu() for t in vars(self).values()))


@torch.no_grad()
@ops.shared_casts()
def prefixes(model, ids: Tensor, *, max_steps: int | None = None, halt_bias: float | None = None) -> Prefixes:
    """Every prefix's own decision, and the text's loss by the causal protocol.

    executed[t] is what model(ids[None, :t + 1]) executes in eval mode. The cost is one unroll of S steps, the
    output blocks once for each depth in use, and the head once a position; S x T x V logits are never held, nor the
    states of more than one step.

    Args:
        model: an HRMForCausalLM; it is put in eval mode, and its training mode restored afterwards.
        ids: [T] int64 token ids, 1 <= T <= block_size.
        max_steps, halt_bias: as in HRMForCausalLM.forward in eval mode. With max_steps 1 nothing is decided.

    Raises:
        ValueError: an argument out of range, or an id that no text has (the embedding's padding); the message names
            the value, the limit and the remedy.
    """
    config = model.config
    max_steps = config.hrm_max_steps if max_steps is None else max_steps
    halt_bias = config.halt_bias if halt_bias is None else halt_bias
    n_ids = min(config.vocab_size, END_OF_TEXT + 1)
    _check(ids, config.block_size, n_ids, max_steps, halt_bias)
    ids = ids.to(model.device, torch.int64)
    found = decided(model, ids, max_steps, halt_bias)
    nll = torch.empty(len(ids) - 1, dtype=torch.float32, device=ids.device)
    for start in range(0, len(ids), LOGIT_ROWS):
        part = log_probs(model, found.h[start : start + LOGIT_ROWS], n_ids)
        targets = ids[start + 1 : start + 1 + LOGIT_ROWS]
        nll[start : start + len(targets)] = -part[: len(targets)].gather(1, targets[:, None])[:, 0]
    return Prefixes(found.executed, found.halted, found.margins, nll, part[-1].clone())


@dataclass(frozen=True)
class Decided:
    """What every prefix decides, and the hidden states that predict its next token. T tokens, C channels, S steps."""

    executed: Tensor
    """[T] int64, as in Prefixes."""
    halted: Tensor
    """[T] bool."""
    margins: Tensor
    """[T, S] float32."""
    h: Tensor
    """[T, C]: the lm_head's input at each position, at the depth that its prefix decides."""


@torch.no_grad()
@ops.shared_casts()
def decided(model, ids: Tensor, max_steps: int, halt_bias: float) -> Decided:
    """The unroll of prefixes(), for ids [T] on the model's device, before anything is scored."""
    with evaluating(model):
        return _unroll(model, ids, max_steps, halt_bias)


def _unroll(model, ids: Tensor, max_steps: int, halt_bias: float) -> Decided:
    core, n_tokens, device = model.hrm_core, len(ids), ids.device
    rotary = model.rotary(n_tokens)
    x = model.embed(ids[None])
    for block in model.input_blocks:
        x = block.apply_to(x, rotary, None)

    h_TC = torch.empty_like(x[0])
    executed = torch.full((n_tokens,), max_steps, dtype=torch.int64, device=device)
    halted = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    margins = torch.empty(n_tokens, max_steps, dtype=torch.float32, device=device)
    for step, z_H in enumerate(core.unroll(x, rotary, None, max_steps), 1):
        q, halt = core.q_values(cumulative_mean(z_H[0])[:, None], halt_bias, None)
        margins[:, step - 1] = ops.halt_margin(q, halt_bias)
        if step < max_steps:
            stops = halt & ~halted
        else:  # who has not stopped by now runs into the limit; where there is one step only, no decision counts
            stops, halt = ~halted, halt & (max_steps > 1)
        executed[stops] = step
        halted |= halt
        rows = stops.nonzero().flatten()
        if len(rows):
            # A prefix decodes every position from its own depth's states; later positions are of no use to it.
            end = int(rows[-1]) + 1
            h_TC[rows] = model.decode(z_H[:, :end], None if rotary is None else rotary[:end], None)[0, rows]
    return Decided(executed, halted, margins, h_TC)


def log_probs(model, h: Tensor, n_ids: int) -> Tensor:
    """[n, C] of Decided.h -> [n, n_ids] float32, nats. Ids that only pad the vocabulary get no probability."""
    return model.lm_head(h)[:, :n_ids].float().log_softmax(-1)


def _check(ids: Tensor, block_size: int, n_ids: int, max_steps: int, halt_bias: float) -> None:
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be [T] int64, one text; got {tuple(ids.shape)} {ids.dtype}")
    if len(ids) == 0:
        raise ValueError("the text has no tokens; give at least one")
    if len(ids) > block_size:
        raise ValueError(f"text of {len(ids)} tokens is over block_size {block_size}; cut or window it")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_ids:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} is outside 0..{n_ids - 1}, the ids that a text of this model can have")
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise ValueError(f"max_steps {max_steps!r} must be an integer of at least 1")
    if math.isnan(halt_bias):
        raise ValueError("halt_bias is nan; give a number (inf halts after one step, -inf never)")


@dataclass(frozen=True)
class Window:
    """A stretch of a text that was read afresh."""

    ids: list[int]
    """The tokens, at most block_size."""
    prefixes: Prefixes
    """Its prefixes, on the CPU."""


@dataclass(frozen=True)
class Reading:
    """A text in consecutive windows, with what the model decided while it read.

    Its N predictions are every token but each window's first, which is given, and the token after the text.
    """

    windows: Sequence[Window]
    """At least one."""
    max_steps: int
    """S."""
    halt_bias: float
    """In units of q."""

    def n_tokens(self) -> int:
        """Tokens of the text."""
        return sum(len(w.ids) for w in self.windows)

    def depths(self) -> np.ndarray:
        """[N] int64: the steps taken for each prediction, in the text's order."""
        return np.concatenate(self._of_predictions("executed"))

    def histogram(self) -> np.ndarray:
        """[S] int64: how many predictions took 1, 2, .. S steps."""
        return np.bincount(self.depths(), minlength=self.max_steps + 1)[1:]

    def surprisal(self) -> np.ndarray:
        """[N-1] float32, nats: of every predicted token of the text."""
        return np.concatenate([w.prefixes.nll.numpy() for w in self.windows])

    def rank_correlation(self) -> float | None:
        """Spearman's correlation between a token's surprisal and the steps taken to predict it, -1..1; None where
        one of them is constant or there are fewer than two tokens."""
        return rank_correlation(self.depths()[:-1], self.surprisal())

    def margin_band(self) -> np.ndarray | None:
        """[3, S] float64: mean, 10th and 90th percentile of the margin after each step, over the predictions; None
        where the bias is infinite, and with it every margin."""
        if math.isinf(self.halt_bias):
            return None
        margins = np.concatenate(self._of_predictions("margins")).astype(np.float64)
        return np.stack([margins.mean(0), *np.percentile(margins, (10, 90), axis=0)])

    def _of_predictions(self, name: str) -> list[np.ndarray]:
        *inner, last = (getattr(w.prefixes, name).numpy() for w in self.windows)
        return [*(values[:-1] for values in inner), last]
