"""Random numbers as pure functions of a key: nothing is remembered between draws, and none depends on another.

Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key (seed, stream) and a
counter (a sample's or token's number) into four 64-bit words. Only raw words are used: numpy keeps those stable across
versions, unlike the distributions built on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Streams keep draws for different purposes independent: one constant for each purpose.
WINDOW_STREAM = 1
SPLIT_STREAM = 2
DEPTH_STREAM = 3
TOKEN_STREAM = 4
"""Of generation's row r: TOKEN_STREAM + 256 r."""
POSITION_STREAM = 5
EXPLORER_STREAM = 6
DROPOUT_STREAM = 7
"""Of process r: DROPOUT_STREAM + 256 r. The sample number is the optimizer step."""
ROW_STREAM = 8
"""Of dataset d in a mixture of conversations: ROW_STREAM + 256 d."""
BATCH_STREAM = 9
REPLAY_STREAM = 31
"""Which stored sequences of earlier texts come back."""
MARKOV_STREAM = 32
"""What a Markov chain writes."""
PHRASE_STREAM = 10
"""What an identity's questions and answers are composed of."""
TASK_STREAM = 13
"""The operands of toy sums, and the seeds of reasoning-gym's datasets."""
TASK_CHOICE_STREAM = 14
"""Which task a sample is of."""


def keyed_words(seed: int, first: int, n: int, stream: int) -> np.ndarray:
    """Random words of samples first..first+n-1, uint64 [n, 4]. Raises ValueError for a negative number."""
    if first < 0:
        raise ValueError(f"sample number {first} is negative; numbers start at 0")
    mask = (1 << 64) - 1
    # Philox draws its first block at counter + 1; any fixed shift will do.
    philox = np.random.Philox(key=np.array([seed & mask, stream & mask], dtype=np.uint64), counter=first)
    return philox.random_raw(4 * n).reshape(n, 4)


def keyed_uniform(seed: int, sample: int, stream: int) -> float:
    """A number in [0, 1) with 53 random bits that is a function of (seed, sample, stream)."""
    return int(keyed_words(seed, sample, 1, stream)[0, 0] >> np.uint64(11)) * 2.0**-53


def keyed_integers(seed: int, samples: Sequence[int], low: int, high: int | Sequence[int], stream: int) -> np.ndarray:
    """One integer in low..high (both included) for each sample number, int64 [len(samples)]; each may have its `high`.

    Each is a function of (seed, its sample number, stream), whatever else is in `samples`: with stream a
    constant of one's own this draws a row's depth. Raises ValueError when low > high.
    """
    samples = np.asarray(samples, dtype=np.int64)
    highs = np.broadcast_to(np.asarray(high, dtype=np.int64), samples.shape).tolist()
    if low > min(highs, default=low):
        raise ValueError(f"low {low} is above high {min(highs)}; both are included, so they may be equal")
    if len(samples) and np.array_equal(samples, np.arange(samples[0], samples[0] + len(samples))):
        words = keyed_words(seed, int(samples[0]), len(samples), stream)[:, 0].tolist()
    else:
        words = [int(keyed_words(seed, i, 1, stream)[0, 0]) for i in samples.tolist()]
    drawn = [low + scaled(word, most - low + 1) for word, most in zip(words, highs, strict=True)]
    return np.array(drawn, dtype=np.int64)


def scaled(word: int, n: int) -> int:
    """floor(word * n / 2^64): uniform over 0..n-1 up to a bias below n / 2^64."""
    return (word * n) >> 64
