"""From logits to a token: what may be drawn, and the draw.

    l    logits; ids that no text has are -inf from here on, log-probabilities are those of softmax(l)
    l'   penalty: of tokens seen in the row, l / p where l > 0, else l * p (Keskar et al., "CTRL", 2019, section 4.1)
    P    softmax(l' / temperature), or all on the likeliest at temperature 0
    then, each of what is left: top_k, the k likeliest; top_p, the likeliest that together reach it (Holtzman et al.,
    "The Curious Case of Neural Text Degeneration", 2020); min_p, those with at least that share of the likeliest's
    probability (Nguyen et al., "Turning Up the Heat", 2024)

The draw inverts the cumulative distribution at a number that is given, so it can be a function of a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_kernels import to_device

from .config import END_OF_TEXT, is_int, is_number

N_GPT2_IDS = END_OF_TEXT + 1
"""Ids from here on only pad GPT-2's vocabulary to a multiple of 64; no text has them."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Raises:
        ValueError: an option out of range, named with its limit.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens; None keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    repetition_penalty: float = 1.0
    """At least 1: lowers the logits of tokens that are in the row already, prompt included."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest's probability; 0 keeps all."""

    def __post_init__(self):
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature!r} must be finite and at least 0 (0 is greedy)")
        if self.top_k is not None and (not is_int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k {self.top_k!r} must be an integer of at least 1, or None for all")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p!r} is outside 0 < top_p <= 1 (1 keeps all)")
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p!r} is outside 0 <= min_p <= 1 (0 keeps all)")
        if not is_number(self.repetition_penalty) or not 1 <= self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty {self.repetition_penalty!r} must be at least 1 (1 is off)")

    def check_vocabulary(self, vocab_size: int, n_ids: int = N_GPT2_IDS) -> None:
        """Raises ValueError where top_k is more than there are tokens."""
        n = min(vocab_size, n_ids)
        if self.top_k is not None and self.top_k > n:
            raise ValueError(f"top_k {self.top_k} is above {n}, the tokens there are; leave it out to keep all")


def draw(
    logits: Tensor,
    uniform: Sequence[float] | None,
    sampling: Sampling,
    seen: Tensor | None = None,
    forbidden: Tensor | None = None,
    n_ids: int = N_GPT2_IDS,
) -> Tensor:
    """One token for each row, without waiting for the device.

    Args:
        logits: [B, V], any float dtype. uniform: a number in [0, 1) for each row; not looked at when greedy.
        seen: [B, V] bool, tokens that the penalty lowers. forbidden: [B, V] bool, tokens not to be drawn now.
        n_ids: ids from here on are no tokens; the default is GPT-2's number.
    Returns:
        float32 [2, B]: tokens (below 2^24, so float32 carries them exactly), and log-probabilities in nats before
        penalty, temperature and filters: the model's own. nan where the logits are not finite.
    """
    logits = logits.float()
    if logits.shape[1] > n_ids:
        logits = logits[:, :n_ids]
    scores = logits
    if seen is not None and sampling.repetition_penalty != 1.0:
        p = sampling.repetition_penalty
        lowered = torch.where(scores > 0, scores / p, scores * p)
        scores = torch.where(seen[:, : scores.shape[1]], lowered, scores)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden[:, : scores.shape[1]], -math.inf)
    if sampling.temperature == 0:
        chosen = scores.argmax(-1)
    else:
        # the largest float32 below 1, so that none is rounded up to it
        numbers = torch.tensor([min(u, 1 - 2**-24) for u in uniform], dtype=torch.float32)
        chosen = _sampled(scores, to_device(numbers, scores.device), sampling)
    logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
    return torch.stack((chosen.float(), logprobs))


def _sampled(scores: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    # shifted first: a large logit over a small temperature would overflow; and within what a float32 can divide by
    temperature = min(max(sampling.temperature, 1e-30), 1e30)
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    order = None
    if sampling.top_k is not None:
        scores, order = scores.topk(min(sampling.top_k, scores.shape[1]), sorted=True)
    elif sampling.top_p < 1:
        scores, order = scores.sort(descending=True)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        # the token that crosses top_p is kept, so at least one always is
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # first index whose cumulative sum exceeds uniform * total: never one of probability 0
    # wide: 50,257 additions in float32 are off by 1e-5, which moves the edges of rare tokens past one another whenever
    # a logit is rounded differently
    sums = probabilities.cumsum(-1, dtype=torch.float32 if scores.device.type == "mps" else torch.float64)
    index = torch.searchsorted(sums, uniform[:, None].to(sums.dtype) * sums[:, -1:], right=True)
    # rounding can put the product at the total itself: the last token that has a probability
    last = (probabilities > 0).float().mul_(torch.arange(1, sums.shape[1] + 1, device=sums.device)).argmax(-1, True)
    index = torch.minimum(index, last)
    return (index if order is None else order.gather(1, index))[:, 0]
