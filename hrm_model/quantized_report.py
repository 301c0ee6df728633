"""What quantising changed: a model and its quantised copy on the same text, by the causal protocol, and their speed.

Position t of a window is predicted at the depth that the tokens up to t decide, in each model by its own head:

    agreement   share of positions where both give the same likeliest token
    KL          mean over positions of sum_v p(v) (log p(v) - log p'(v)), nats; p the model's, p' the quantised one's
    perplexity  exp(mean -log p(token t + 1))

Times are taken in turns, so that a shared machine slows both alike, at a depth that is the same for both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import hrm_kernels as ops

from .cache import HRMCache
from .config import END_OF_TEXT
from .incremental import extend
from .prefixes import LOGIT_ROWS, decided, log_probs

ROUNDS = 5
"""Times each speed is measured; the median counts."""


@dataclass
class Agreement:
    """Sums over positions, and their means."""

    positions: int = 0
    same_token: int = 0
    same_steps: int = 0
    kl: float = 0.0
    targets: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: list[int] = field(default_factory=lambda: [0, 0])

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """Means; pairs are [float32, quantised]."""
        nats = [nll / self.targets for nll in self.nll]
        return {
            "positions": self.positions,
            "top1_agreement": self.same_token / self.positions,
            "kl_nats": self.kl / self.positions,
            "nats_per_token": nats,
            "perplexity": [math.exp(each) if each < 700 else math.inf for each in nats],
            "step_agreement": self.same_steps / self.positions,
            "mean_steps": [steps / self.positions for steps in self.steps],
        }


@torch.no_grad()
def compare(
    model: nn.Module, quantised: nn.Module, windows: Sequence[Sequence[int]], advance: Callable[[int], None]
) -> Agreement:
    """Read each window of 2 to block_size + 1 ids with both: the last id of a window is only a target.

    advance: told how many positions are done.
    """
    found, n_ids = Agreement(), min(model.config.vocab_size, END_OF_TEXT + 1)
    for window in windows:
        ids = torch.tensor(window, dtype=torch.int64, device=model.device)
        given, targets = ids[:-1], ids[1:]
        both = [decided(m, given, m.config.hrm_max_steps, m.config.halt_bias) for m in (model, quantised)]
        with ops.shared_casts():
            for start in range(0, len(given), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                p, q = (log_probs(m, d.h[part], n_ids) for m, d in zip((model, quantised), both, strict=True))
                # normalised anew in float64: float32's sums are off by 1e-7, below zero as often as above
                wide_p, wide_q = (each.double().log_softmax(-1) for each in (p, q))
                found.kl += float((wide_p.exp() * (wide_p - wide_q)).sum())
                found.same_token += int((p.argmax(-1) == q.argmax(-1)).sum())
                for which, each in enumerate((p, q)):
                    found.nll[which] -= float(each.gather(1, targets[part, None]).sum(dtype=torch.float64))
        found.positions += len(given)
        found.targets += len(given)
        found.same_steps += int((both[0].executed == both[1].executed).sum())
        for which, each in enumerate(both):
            found.steps[which] += int(each.executed.sum())
        advance(len(given))
    return found


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters, each counted once; a quantised one's as it is held."""
    return sum(sum(part.nbytes for part in _parts(p)) for p in model.parameters())


def _parts(weight: Tensor) -> list[Tensor]:
    if not ops.is_quantized(weight):
        return [weight]
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
    return [part for name in names if (part := getattr(weight, name, None)) is not None]


@torch.no_grad()
def speeds(
    models: Sequence[nn.Module], prompt: Sequence[int], n_new: int, depth: int, rounds: int = ROUNDS
) -> list[dict[str, float | int]]:
    """Of each model: tokens/s of reading `prompt` into a cache and of decoding `n_new` tokens after it, one row,
    `depth` steps a token; medians over `rounds`, in turns. copy_bytes: what decoding holds beside the weights."""
    times: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in models]
    caches = [HRMCache(m, 1, len(prompt) + n_new, depth) for m in models]
    for turn in range(rounds + 1):  # the first makes the packed copies of weights, and is not counted
        for cache, taken in zip(caches, times, strict=True):
            cache.clear(0)
            begin = time.perf_counter()
            out = extend(cache.model, cache, {0: prompt}, force_steps=depth, max_steps=depth)
            read = time.perf_counter()
            for _ in range(n_new):
                out = extend(cache.model, cache, {0: [int(out.logits[0].argmax())]}, force_steps=depth, max_steps=depth)
            end = time.perf_counter()
            if turn:
                taken["prefill"].append(read - begin)
                taken["decode"].append(end - read)
    return [
        {
            "prefill_tokens_per_s": len(prompt) / statistics.median(taken["prefill"]),
            "decode_tokens_per_s": n_new / statistics.median(taken["decode"]),
            "copy_bytes": cache.packed.nbytes,
        }
        for cache, taken in zip(caches, times, strict=True)
    ]
