"""Which conversations a step of fine-tuning sees, as a pure function of (seed, step): a conversation a row.

    each dataset   epoch after epoch, every conversation once in each, in an order of its own
    the stream     sample number i is a conversation; the shares of the datasets are exact in every pool
    a pool         some hundreds of consecutive sample numbers, sorted by length and cut into micro-batches of at
                   most tokens_per_batch padded tokens, which then come in random order
    a step         `accumulation` consecutive micro-batches

Sorting within a pool makes the rows of a micro-batch nearly equally long; random order keeps a step's lengths random.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ..keyed import BATCH_STREAM, ROW_STREAM, keyed_words
from .batch import IGNORE, Batch, ValidationRows
from .conversations import Conversations
from .shards import Dataset

POOL_BATCHES = 32
"""Micro-batches of a pool, about: the last is not full, and the lengths within one span a 32nd of all."""
_POOL_ROWS = 256, 8192
_KEPT_POOLS = 8
_ORDER_ROWS = 4096


class _Pool(NamedTuple):
    """P consecutive sample numbers: where each row is, and the micro-batches."""

    datasets: np.ndarray  # int64 [P]
    rows: np.ndarray  # int64 [P], which conversation of its dataset
    batches: list[np.ndarray]  # sample numbers, int64 [B] each, longest first


class RowSampler:
    """Micro-batches of conversations of one or several datasets (implements TrainingData).

    Args:
        datasets: what open_dataset() returns, of conversations; one or more.
        block_size: the most tokens a model sees; a conversation may have one id more, for the last target.
        seed: any integer.
        tokens_per_batch: rows x longest row of a micro-batch is at most this.
        accumulation: micro-batches of a step.
        weights: share of rows of each dataset, up to a factor. Default: each conversation equally often.
        vocab_size: the model's; ids from it on are refused. Default: the tokenizer's.
        train_on_prompt: whether the loss looks at every id, not only at answers.

    Attributes: conversations and answer_tokens (of all datasets with a share, once), rows_per_epoch (the same as
    conversations), shares (floats, of each dataset), pool_rows.

    Raises:
        ValueError: weights that are none, a dataset with a share but without conversations, a conversation longer
            than block_size + 1, too small a vocab_size or tokens_per_batch.
        ShardError: a dataset of text.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        block_size: int,
        seed: int,
        tokens_per_batch: int,
        accumulation: int = 1,
        weights: Sequence[float] | None = None,
        vocab_size: int | None = None,
        train_on_prompt: bool = False,
    ):
        if block_size > tokens_per_batch:
            raise ValueError(
                f"tokens_per_batch {tokens_per_batch} is below block_size {block_size}, so the longest conversation "
                f"would fit into no batch; raise it to at least {block_size}"
            )
        if accumulation < 1:
            raise ValueError(f"accumulation {accumulation} is below 1; a step takes at least one micro-batch")
        self.block_size = block_size
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch
        self.accumulation = accumulation
        self.train_on_prompt = train_on_prompt
        self._eot = _eot(datasets)
        self._parts, self.vocab_size = _opened(datasets, "train", block_size, vocab_size)
        shares = _shares(weights, datasets, self._parts)
        self.shares = [float(share) for share in shares]
        # Whole numbers, so that no rounding depends on the platform.
        common = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * common) for share in shares]
        taken = [part for part, share in zip(self._parts, shares, strict=True) if share]
        self.conversations = self.rows_per_epoch = sum(map(len, taken))
        self.answer_tokens = sum(int(part.answers.sum()) for part in taken)
        mean = sum(
            share * Fraction(int(part.lengths.sum()) - len(part), len(part))
            for part, share in zip(self._parts, shares, strict=True)
            if share
        )
        wanted = math.ceil(POOL_BATCHES * tokens_per_batch / mean)
        # Sorted by length, copies of a conversation would come side by side, in one micro-batch. So no dataset is gone
        # through more than once in a pool, unless it is so small that pools would be, too.
        once = min(len(part) // share for part, share in zip(self._parts, shares, strict=True) if share)
        self.pool_rows = min(max(wanted, _POOL_ROWS[0]), _POOL_ROWS[1], max(once, _POOL_ROWS[0]), self.conversations)
        # numpy sorts 16-bit integers by radix: a tenth of the time.
        self._length = np.uint16 if block_size < 1 << 16 else np.int64
        # Of each conversation.
        self._targets = [part.lengths - 1 if train_on_prompt else part.answers for part in self._parts]
        self._given = [[0] * len(self._parts)]  # rows of each dataset before pool p
        self._first_batch = [0]  # micro-batches before pool p
        self._pools: OrderedDict[int, _Pool] = OrderedDict()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def plan(self, step: int) -> list[np.ndarray]:
        """Sample numbers, int64 [B], of each micro-batch of `step` (from 0), longest rows first."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps start at 0")
        return [self._batch(step * self.accumulation + i) for i in range(self.accumulation)]

    def count_targets(self, samples: np.ndarray) -> int:
        """How many targets these rows have; no row is read."""
        return sum(int(self._targets[d][rows].sum()) for d, rows, _ in self._by_dataset(samples))

    def batch(self, samples: np.ndarray) -> Batch:
        """The rows of these sample numbers, in this order; of no numbers, a batch without rows (of one position).

        Raises ValueError for an id from vocab_size on, OSError where files cannot be read.
        """
        samples = np.asarray(samples, dtype=np.int64)
        found: list[tuple[Conversations, int]] = [None] * len(samples)
        for d, rows, places in self._by_dataset(samples):
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                found[place] = self._parts[d], row
        return Batch(*_padded(found, self._eot, self.vocab_size, self.train_on_prompt), samples)

    def padding_share(self, steps: int) -> float:
        """Share of padding among all positions of the first `steps` steps. Raises ValueError for fewer than 1."""
        if steps < 1:
            raise ValueError(f"the padding of {steps} steps is asked for; there is some from 1 on")
        real = padded = 0
        for step in range(steps):
            for samples in self.plan(step):
                lengths = self._lengths(samples)
                real += int(lengths.sum())
                padded += len(lengths) * int(lengths.max())
        return 1 - real / padded

    def epochs(self, step: int) -> list[float]:
        """How often each dataset has been seen when `step` begins: its rows so far / its conversations."""
        batch = step * self.accumulation
        number, pool = self._pool_of(batch)
        given = np.array(self._given[number])
        before = pool.batches[: batch - self._first_batch[number]]
        if before:
            here = pool.datasets[np.concatenate(before) - number * self.pool_rows]
            given += np.bincount(here, minlength=len(given))
        return [int(n) / max(1, len(part)) for n, part in zip(given, self._parts, strict=True)]

    def _by_dataset(self, samples: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(dataset, conversations, places in `samples`) that these sample numbers are."""
        samples = np.asarray(samples, dtype=np.int64)
        if len(samples) and samples.min() < 0:
            raise ValueError(f"sample number {samples.min()} is negative; numbers start at 0")
        found = []
        numbers = samples // self.pool_rows
        for number in np.unique(numbers).tolist():
            pool = self._pool(number)
            places = np.flatnonzero(numbers == number)
            offsets = samples[places] - number * self.pool_rows
            for d in np.unique(pool.datasets[offsets]).tolist():
                here = pool.datasets[offsets] == d
                found.append((d, pool.rows[offsets[here]], places[here]))
        return found

    def _lengths(self, samples: np.ndarray) -> np.ndarray:
        """Positions of each row (ids but the last), int64 [B]."""
        lengths = np.empty(len(samples), dtype=np.int64)
        for d, rows, places in self._by_dataset(samples):
            lengths[places] = self._parts[d].lengths[rows] - 1
        return lengths

    def _batch(self, batch: int) -> np.ndarray:
        number, pool = self._pool_of(batch)
        return pool.batches[batch - self._first_batch[number]]

    def _pool_of(self, batch: int) -> tuple[int, _Pool]:
        """The pool with this micro-batch, counted from the first step."""
        while self._first_batch[-1] <= batch:
            self._pool(len(self._first_batch) - 1)
        number = bisect_right(self._first_batch, batch) - 1
        return number, self._pool(number)

    def _pool(self, number: int) -> _Pool:
        while number >= len(self._given):  # shares are carried over from pool to pool
            self._pool(len(self._given) - 1)
        if number not in self._pools:
            self._pools[number] = self._make_pool(number)
            if len(self._pools) > _KEPT_POOLS:
                self._pools.popitem(last=False)
        self._pools.move_to_end(number)
        return self._pools[number]

    def _make_pool(self, number: int) -> _Pool:
        size, given = self.pool_rows, self._given[number]
        counts = _exact_counts(self._weights, given, size)
        datasets = np.repeat(np.arange(len(counts)), counts)
        taken = [self._take(d, given[d], n) for d, n in enumerate(counts)]
        lengths = np.concatenate([part.lengths[rows] for part, rows in zip(self._parts, taken, strict=True)]) - 1
        order = np.argsort((self.block_size - lengths).astype(self._length), kind="stable")
        samples = number * size + order
        cuts = _cuts(lengths[order].tolist(), self.tokens_per_batch)
        words = keyed_words(self.seed, number * size, len(cuts) - 1, BATCH_STREAM)[:, 0]
        batches = [samples[cuts[i] : cuts[i + 1]] for i in np.argsort(words, kind="stable").tolist()]
        if number == len(self._given) - 1:
            self._given.append([before + n for before, n in zip(given, counts, strict=True)])
            self._first_batch.append(self._first_batch[-1] + len(batches))
        return _Pool(datasets, np.concatenate(taken), batches)

    def _take(self, d: int, first: int, n: int) -> np.ndarray:
        """Conversations first..first+n-1 of dataset d's endless stream, int64 [n]."""
        taken, size = [], len(self._parts[d])
        while n:
            epochs = max(1, _ORDER_ROWS // size)  # so many are drawn at once, for the sake of small datasets
            block, place = divmod(first, epochs * size)
            if self._orders.get(d, (None,))[0] != block:
                words = keyed_words(self.seed, block * epochs * size, epochs * size, ROW_STREAM + 256 * d)[:, 0]
                # Not stable, which is slower: of a million words two are equal once in 4e7 times.
                order = np.argsort(words.reshape(epochs, size), axis=1)
                self._orders[d] = block, order.reshape(-1)
            part = self._orders[d][1][place : place + n]
            taken.append(part)
            first, n = first + len(part), n - len(part)
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)


def validation_rows(
    datasets: Sequence[Dataset],
    block_size: int,
    count: int,
    train_on_prompt: bool = False,
    vocab_size: int | None = None,
) -> ValidationRows:
    """Evenly spaced conversations over the datasets' val splits, always the same.

    Returns N rows: count, or with a warning fewer where the splits hold no more. Raises ValueError when they hold none,
    and as RowSampler does.
    """
    parts, limit = _opened(datasets, "val", block_size, vocab_size)
    rows = [(part, i) for part in parts for i in range(len(part))]
    if count < 1 or not rows:
        paths = ", ".join(str(dataset.path) for dataset in datasets)
        raise ValueError(
            f"{count} validation conversations were asked for; the val splits of {paths} have {len(rows)}; ask for at "
            "least 1, or prepare more to validate with"
        )
    if count > len(rows):
        warnings.warn(f"validation uses all {len(rows)} conversations, not {count}", stacklevel=2)
        count = len(rows)
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return ValidationRows(*_padded(chosen, _eot(datasets), limit, train_on_prompt))


def _opened(
    datasets: Sequence[Dataset], split: str, block_size: int, vocab_size: int | None
) -> tuple[list[Conversations], int]:
    """The conversations of each dataset, checked, and the vocab_size that holds."""
    if vocab_size is None:
        vocab_size = min(dataset.manifest["tokenizer"]["vocab_size"] for dataset in datasets)
    parts = []
    for dataset in datasets:
        dataset.check_vocab(vocab_size)
        part = dataset.conversations(split)
        if len(part) and part.lengths.max() > block_size + 1:
            i = int(np.argmax(part.lengths))
            raise ValueError(
                f"conversation {i} of {split!r} in {dataset.path} has {part.lengths[i]} ids, block_size {block_size} "
                f"takes up to {block_size + 1}; prepare the dataset again with --block-size {block_size}, which splits "
                f"it at turns, or use a model of block_size {part.lengths[i] - 1}"
            )
        parts.append(part)
    return parts, vocab_size


def _eot(datasets: Sequence[Dataset]) -> int:
    if not datasets:
        raise ValueError("no dataset to take conversations from; pass at least one of train/prepare.py --format chat")
    return datasets[0].manifest["tokenizer"]["eot"]


def _shares(
    weights: Sequence[float] | None, datasets: Sequence[Dataset], parts: Sequence[Conversations]
) -> list[Fraction]:
    """The share of each dataset; they add up to 1."""
    if weights is None:
        weights = [len(part) or not any(map(len, parts)) for part in parts]
    weights = list(weights)
    if len(weights) != len(parts):
        raise ValueError(f"{len(weights)} weights {weights} for {len(parts)} datasets; give one for each")
    for weight, dataset, part in zip(weights, datasets, parts, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight {weight} in {weights} is not a finite number of at least 0")
        if weight and not len(part):
            raise ValueError(f"{dataset.path} has no conversations to train on; leave it out or prepare it again")
    if not any(weights):
        raise ValueError(f"all weights are 0: {weights}; at least one dataset has to have a share")
    # As written, so that 0.4 and 0.6 are exactly 40 and 60 %.
    exact = [Fraction(str(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _exact_counts(weights: list[int], given: list[int], n: int) -> list[int]:
    """How many of the next n rows each dataset has, by largest remainder, after the rows it has been given."""
    total = sum(weights)
    before = sum(given)
    owed = [(before + n) * weight - had * total for weight, had in zip(weights, given, strict=True)]
    counts = [max(0, rest // total) for rest in owed]
    while (missing := n - sum(counts)) != 0:
        remainders = [rest - count * total for rest, count in zip(owed, counts, strict=True)]
        if missing > 0:
            counts[remainders.index(max(remainders))] += 1
        else:  # one that had more than its share cannot give it back, so another waits
            have = [i for i, count in enumerate(counts) if count]
            counts[min(have, key=remainders.__getitem__)] -= 1
    return counts


def _cuts(lengths: list[int], tokens: int) -> list[int]:
    """Where micro-batches begin and the last ends, rows being sorted from the longest."""
    cuts = [0]
    while cuts[-1] < len(lengths):
        cuts.append(min(cuts[-1] + tokens // lengths[cuts[-1]], len(lengths)))
    return cuts


def _padded(
    rows: Sequence[tuple[Conversations, int]], eot: int, vocab_size: int, train_on_prompt: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """inputs and targets, int64 [B, T], and lengths, int64 [B] or None where all are T."""
    lengths = np.array([part.lengths[i] - 1 for part, i in rows], dtype=np.int64)
    shape = len(rows), int(lengths.max(initial=1))
    inputs, targets = np.full(shape, eot, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    for (part, i), n, row_inputs, row_targets in zip(rows, lengths.tolist(), inputs, targets, strict=True):
        ids, is_answer = part.row(i)
        if ids.max() >= vocab_size:
            raise ValueError(
                f"conversation {i} of {part.path} has token id {ids.max()}, which is not below vocab_size "
                f"{vocab_size}; use a larger vocab_size, or prepare the dataset again if its files were changed"
            )
        row_inputs[:n] = ids[:-1]
        row_targets[:n] = ids[1:] if train_on_prompt else np.where(is_answer[1:], ids[1:], IGNORE)
    return inputs, targets, lengths if (lengths != shape[1]).any() else None
