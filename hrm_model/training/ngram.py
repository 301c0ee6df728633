"""What counting alone achieves on a validation set: unigram and bigram losses, the scale for a model's loss.

    unigram   p(w)     = (c(w) + 1) / (N + V)
    bigram    p(w | v) = max(c(v, w) - D, 0) / c(v) + D n(v) / c(v) p(w)
                       = p(w) where v was never followed by anything

N training tokens, V ids, D = 0.75, c(v) = sum over w of c(v, w), n(v) the number of different w seen after v.
The bigram is interpolated absolute discounting (Ney, Essen & Kneser, "On structuring probabilistic
dependences in stochastic language modelling", Computer Speech and Language 8, 1994; Chen & Goodman, "An
empirical study of smoothing techniques for language modeling", Computer Speech and Language 13, 1999, section
2.6) with the unigram above as its lower order.
"""

from __future__ import annotations

import numpy as np

from .shards import Split

Source = Split | np.ndarray

DISCOUNT = 0.75
_PARTS = 100  # a source that is too large is sampled in this many evenly spaced parts


def ngram_losses(
    train_tokens_source: Source | list[Source],
    val_targets: np.ndarray,
    val_inputs: np.ndarray,
    vocab_size: int,
    max_train_tokens: int = 20_000_000,
) -> dict[str, float]:
    """Mean nats per token of both on the validation windows, {"unigram": ..., "bigram": ...}.

    Args:
        train_tokens_source: the train split of a dataset, an integer array [n], or a list of such.
        val_targets, val_inputs: integer arrays [N, T]; target [i, t] is predicted from input [i, t].
        vocab_size: V.
        max_train_tokens: of a longer source, evenly spaced parts of this many tokens in all are counted.

    Raises:
        ValueError: fewer than 2 training tokens, windows that are empty or differ in shape, or an id outside
            0..vocab_size-1.
    """
    val_targets, val_inputs = np.asarray(val_targets), np.asarray(val_inputs)
    if val_targets.shape != val_inputs.shape or not val_targets.size:
        raise ValueError(
            f"validation targets {val_targets.shape} and inputs {val_inputs.shape} need one shape, not empty"
        )
    sources = train_tokens_source if isinstance(train_tokens_source, list) else [train_tokens_source]
    parts = [part for s in sources for part in _read(s, max_train_tokens // len(sources)) if len(part)]
    n_train = sum(map(len, parts))
    if n_train < 2:
        raise ValueError(f"{n_train} training tokens have no pair to count; use a longer training split")
    named = [*(("training", part) for part in parts), ("target", val_targets), ("input", val_inputs)]
    for name, ids in named:
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids.max() if ids.max() >= vocab_size else ids.min()
            raise ValueError(f"{name} id {wrong} is outside 0..{vocab_size - 1}; give the model's vocab_size")

    targets, inputs = val_targets.ravel().astype(np.int64), val_inputs.ravel().astype(np.int64)
    counts = sum(np.bincount(part, minlength=vocab_size) for part in parts)
    unigram = (counts + 1.0) / (n_train + vocab_size)

    # A pair (v, w) is the number v V + w; only pairs that occur are held, sorted.
    codes = np.concatenate([part[:-1].astype(np.int64) * vocab_size + part[1:] for part in parts])
    pairs, pair_counts = np.unique(codes, return_counts=True)
    firsts = pairs // vocab_size
    followed = np.bincount(firsts, weights=pair_counts, minlength=vocab_size)[inputs]
    followers = np.bincount(firsts, minlength=vocab_size)[inputs]

    wanted = inputs * vocab_size + targets
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, pair_counts[at] - DISCOUNT, 0.0)
    share = np.where(followed > 0, seen / np.maximum(followed, 1), 0.0)
    backoff = np.where(followed > 0, DISCOUNT * followers / np.maximum(followed, 1), 1.0)
    bigram = share + backoff * unigram[targets]
    return {"unigram": float(-np.log(unigram[targets]).mean()), "bigram": float(-np.log(bigram).mean())}


def _read(source: Source, limit: int) -> list[np.ndarray]:
    total = len(source)
    n = total if total <= limit else max(2, limit // _PARTS)
    starts = [0] if n == total else [i * total // (limit // n) for i in range(limit // n)]
    if isinstance(source, Split):
        return [source.read(start, n) for start in starts]
    return [np.asarray(source[start : start + n]) for start in starts]
