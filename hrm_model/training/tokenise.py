"""From pieces of documents to ids, in this process or in several, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np

from ..tokenizer import get_tokenizer
from .shards import TOKEN
from .sources import PIECE_CHARS, Piece

BATCH_PIECES = 10_000
_BYTES_PER_WORKER = 16_000_000
Mark = TypeVar("Mark")


class Encoded(NamedTuple):
    """The ids of a batch of pieces, end of text after each document's last piece."""

    ids: np.ndarray
    """uint16 [sum of counts]"""
    counts: list[int]
    """Ids of each piece."""
    sizes: list[int]
    """Bytes of each piece's text in UTF-8."""


def default_workers(n_bytes: int) -> int:
    """A process for each core, at most 8, and no more than one for each 16 MB: one takes a second to start."""
    return min(os.cpu_count() or 1, 8, 1 + n_bytes // _BYTES_PER_WORKER)


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces, about PIECE_CHARS characters or BATCH_PIECES of them at a time."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batch: list[Piece]) -> Encoded:
    """Ids of one batch, in this process."""
    tokenizer = get_tokenizer()
    encoded = [tokenizer.encode(piece.text) + [tokenizer.eot] * piece.ends for piece in batch]
    counts = [len(part) for part in encoded]
    ids = np.fromiter(chain.from_iterable(encoded), dtype=TOKEN, count=sum(counts))
    return Encoded(ids, counts, [len(piece.text.encode("utf-8", "replace")) for piece in batch])


def encoded(marked: Iterable[tuple[Mark, list[Piece]]], workers: int) -> Iterator[tuple[Mark, Encoded]]:
    """The ids of each batch with its mark, which stays in this process, in order.

    No more than 2 * workers + 1 batches are read ahead. Close the iterator to stop the workers.

    Raises BrokenProcessPool when a worker dies, and what reading the batches raises: after those read before it.
    """
    if workers == 1:
        for mark, batch in marked:
            yield mark, encode(batch)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy a caller's threads and GPU state
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[tuple[Mark, Future[Encoded]]] = deque()
    source, failure = iter(marked), None
    try:
        while True:
            try:
                mark, batch = next(source)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            pending.append((mark, _submit(pool, batch)))
            if len(pending) > 2 * workers:  # bounds the memory
                mark, future = pending.popleft()
                yield mark, future.result()
        while pending:
            mark, future = pending.popleft()
            yield mark, future.result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: list[Piece]) -> Future[Encoded]:
    # submit() starts workers, which inherit what is blocked: Ctrl-C then reaches this process alone.
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(encode, batch)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:  # killed, it cannot tell its workers to stop
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
