"""Which windows of text a training run sees, as a pure function of (seed, sample number).

Nothing is remembered between samples, so a resumed run continues with the next number, and the order does not depend on
the batch or world size.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from ..keyed import WINDOW_STREAM, keyed_words, scaled
from .batch import Batch
from .shards import Dataset, Split


class Sampler:
    """Windows of block_size + 1 tokens at uniformly random places of one or several prepared datasets.

    Args:
        datasets: what open_dataset() returns; one or more.
        block_size: T, the tokens a model sees; a window holds one more, for the last target.
        seed: any integer.
        weights: share of samples of each dataset, up to a factor. Default: the datasets' token counts.
        split: "train" or "val".
        vocab_size: the model's; ids from it on are refused, as an embedding would read beyond its table.
            Default: the tokenizer's.

    Raises:
        ValueError: weights that are no weights, a split shorter than a window, too small a vocab_size.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        block_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        split: str = "train",
        vocab_size: int | None = None,
    ):
        if not datasets:
            raise ValueError("no dataset to sample from; pass at least one, made by train/prepare.py")
        if block_size < 1:
            raise ValueError(f"block_size {block_size} is below 1; a window needs a token to predict from")
        self.block_size = block_size
        self.seed = seed
        self.splits = [dataset.split(split) for dataset in datasets]
        self.vocab_size = _vocab_size(datasets) if vocab_size is None else vocab_size
        shares = _shares(weights, self.splits)
        for dataset, part, share in zip(datasets, self.splits, shares, strict=True):
            dataset.check_vocab(self.vocab_size)
            if share and len(part) <= block_size:
                raise ValueError(
                    f"split {split!r} of {dataset.path} has {len(part):,} tokens, a window of block_size "
                    f"{block_size} needs {block_size + 1:,}; lower block_size or prepare more text"
                )
        # Thresholds as exact integers, so that no rounding depends on the platform.
        self._thresholds = [math.floor((total * 2**64) / sum(shares)) for total in accumulate(shares)]

    def sample(self, i: int) -> np.ndarray:
        """Window number i, int64 [block_size + 1]. Raises ValueError for an id from vocab_size on."""
        return self.windows(np.array([i]))[0]

    def batch(self, first_sample: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples first_sample..first_sample+n-1.

        Returns:
            inputs int64 [n, T], targets of the same shape (inputs moved on by one token) and sample_numbers int64 [n].

        Raises:
            ValueError: n is below 1, or an id is from vocab_size on.
        """
        if n < 1:
            raise ValueError(f"{n} samples were asked for; a batch has at least 1")
        samples = np.arange(first_sample, first_sample + n, dtype=np.int64)
        windows = self.windows(samples)
        return windows[:, :-1].copy(), windows[:, 1:].copy(), samples

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """The windows of these numbers (ascending), int64 [len(samples), block_size + 1]. Raises as batch()."""
        windows = np.empty((len(samples), self.block_size + 1), dtype=np.int64)
        first = int(samples[0])
        words_of = keyed_words(self.seed, first, int(samples[-1]) - first + 1, WINDOW_STREAM)[samples - first].tolist()
        for window, words in zip(windows, words_of, strict=True):
            split = self.splits[bisect_right(self._thresholds, words[0])]
            start = scaled(words[1], len(split) - self.block_size)
            window[:] = split.read(start, self.block_size + 1)
            _check_ids(window, self.vocab_size, split, start)
        return windows


class WindowBatches:
    """Micro-batches of consecutive samples (implements TrainingData)."""

    def __init__(self, sampler: Sampler, batch_size: int, accumulation: int):
        self.sampler, self.batch_size, self.accumulation = sampler, batch_size, accumulation

    def plan(self, step: int) -> list[np.ndarray]:
        """Sample numbers [batch_size] of each of `accumulation` micro-batches of optimizer step `step`."""
        first = step * self.accumulation * self.batch_size
        numbers = np.arange(first, first + self.accumulation * self.batch_size, dtype=np.int64)
        return list(numbers.reshape(self.accumulation, self.batch_size))

    def count_targets(self, samples: np.ndarray) -> int:
        """block_size for each row."""
        return len(samples) * self.sampler.block_size

    def batch(self, samples: np.ndarray) -> Batch:
        """The windows of these numbers. Raises ValueError or OSError where they cannot be read."""
        windows = self.sampler.windows(samples)
        return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), None, samples)


def validation_windows(
    datasets: Sequence[Dataset], block_size: int, count: int, vocab_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced windows over the datasets' val splits, always the same; no token is a target twice.

    Returns inputs and targets, int64 [N, block_size]. N is count, or with a warning fewer where the splits
    hold no more. Raises ValueError when they hold none, or for an id from vocab_size on.
    """
    splits = [dataset.split("val") for dataset in datasets]
    available = [max(0, len(split) - 1) // block_size for split in splits]
    total = sum(available)
    if count < 1 or not total:
        paths = ", ".join(str(dataset.path) for dataset in datasets)
        raise ValueError(
            f"{count} validation windows of {block_size} tokens were asked for; the val splits of {paths} "
            f"have {sum(map(len, splits)):,} tokens, enough for {total}; ask for at least 1, lower "
            "block_size or prepare more validation text"
        )
    if count > total:
        warnings.warn(f"validation uses all {total} windows of {block_size}, not {count}", stacklevel=2)
        count = total
    limit = _vocab_size(datasets) if vocab_size is None else vocab_size
    ends = list(accumulate(available))
    windows = np.empty((count, block_size + 1), dtype=np.int64)
    for i, window in enumerate(windows):
        place = i * total // count
        which = bisect_right(ends, place)
        start = (place - ends[which] + available[which]) * block_size
        window[:] = splits[which].read(start, block_size + 1)
        _check_ids(window, limit, splits[which], start)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def _vocab_size(datasets: Sequence[Dataset]) -> int:
    return min(dataset.manifest["tokenizer"]["vocab_size"] for dataset in datasets)


def _shares(weights: Sequence[float] | None, splits: Sequence[Split]) -> list[Fraction]:
    if weights is None:
        # Where all are empty, the message to come is that they are too short.
        return [Fraction(len(split) or not any(map(len, splits))) for split in splits]
    weights = list(weights)
    if len(weights) != len(splits):
        raise ValueError(f"{len(weights)} weights {weights} for {len(splits)} datasets; give one for each")
    for weight in weights:
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight {weight} in {weights} is not a finite number of at least 0")
    if not any(weights):
        raise ValueError(f"all weights are 0: {weights}; at least one dataset has to have a share")
    return [Fraction(float(weight)) for weight in weights]


def _check_ids(window: np.ndarray, vocab_size: int, split: Split, start: int) -> None:
    if window.max() >= vocab_size:
        position = start + int(np.argmax(window >= vocab_size))
        raise ValueError(
            f"token id {window[position - start]} in {split.file_of(position)} is not below vocab_size "
            f"{vocab_size}; use a larger vocab_size, or prepare the dataset again if its files were changed"
        )
