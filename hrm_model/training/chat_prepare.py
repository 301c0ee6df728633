"""From conversations to a dataset on disk: filter, encode, split what is too long, choose who validates, write."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..template import INSTRUCTION, LABELS
from ..tokenizer import get_tokenizer
from .chat_filters import CLAIMS, Filter, read_words
from .chat_fit import fit
from .chat_report import ChatReport
from .chat_sources import STDLIB, STDLIB_PARTS, Source, open_sources
from .prepare import VAL_FRACTION, choose_validation
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_TOKENS,
    Dataset,
    DatasetWriter,
    ShardError,
    check_output,
    is_up_to_date,
    open_dataset,
)

BLOCK_SIZE = 512
SMALLEST_BLOCK = 128
"""That of the smallest recipe: what is prepared by default for every recipe fits it."""


def prepare_chat(
    out: str | Path,
    sources: Sequence[str | Source] | None = None,
    *,
    block_size: int | None = None,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    drop: Sequence[str] = (),
    drop_words: str | Path | None = None,
    filters: bool = True,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the dataset directory `out` and print what was dropped and why; nothing is done if it is there already.

    Args:
        out: the directory. It appears when it is complete, and never half.
        sources: names and paths (see chat_sources.py), or sources; None for what Python brings along.
        block_size: the most tokens that a model will see; a longer conversation is split at turns. None: 512, and for
            the standard library alone, whose conversations are short, 128, which every recipe can take.
        val_fraction: validation share of the tokens, below 1. Above 0 at least one conversation validates.
        seed: which conversations validate.
        drop: words or phrases; conversations that have one are dropped.
        drop_words: a file of more of them, one a line.
        filters: False keeps duplicates and the answers of other assistants. Empty answers are always dropped.
        overwrite: replace a dataset that is there.
        shard_tokens: most tokens in a file.

    Returns:
        out, up_to_date, conversations (rows, of both splits), train_tokens, val_tokens, answer_tokens (of both),
        val_share, dropped and changed (counts by reason), seconds.

    Raises:
        ValueError: an option or a source that cannot be used, no conversation that is left.
        ShardError: `out` is in the way, of other inputs, damaged or cannot be written.
    """
    started = time.perf_counter()
    sources = list(sources or [STDLIB])
    if block_size is None:
        block_size = SMALLEST_BLOCK if set(sources) <= STDLIB_PARTS.keys() else BLOCK_SIZE
    _check_options(block_size, val_fraction, shard_tokens)
    out, report, tokenizer = Path(out), ChatReport(), get_tokenizer()
    words = [*drop, *(read_words(drop_words) if drop_words is not None else [])]
    keep = Filter(words, claims=filters, duplicates=filters)
    check_output(out, overwrite=True)  # what no option could help comes before any work
    names = [source if isinstance(source, str) else source.name for source in sources]
    opened = open_sources(sources)
    options = {"block_size": block_size, "val_fraction": val_fraction, "seed": seed, "drop": keep.words}
    options |= {"filters": filters, "shard_tokens": shard_tokens}
    inputs = [FORMAT_VERSION, "chat", tokenizer.sha256, INSTRUCTION, LABELS, CLAIMS, options]
    inputs.append([source.fingerprint for source in opened])
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    if not overwrite and (counts := is_up_to_date(out, fingerprint)) is not None:
        seconds = round(time.perf_counter() - started, 2)
        return {"out": str(out), "up_to_date": True, **counts, "seconds": seconds}
    check_output(out, overwrite)

    print(f"preparing {out} from {', '.join(names)}", flush=True)
    rows = _Rows()
    for source in opened:
        _encode(source, keep, block_size, rows, report)
    for line in report.lines():
        print(line, flush=True)
    if not rows.lengths:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.counts()["dropped"].items())
        raise ValueError(f"no conversation is left of {', '.join(names)} ({reasons or 'there was none'}); give others")
    try:
        with DatasetWriter(out, shard_tokens, overwrite, chat=True) as writer:
            ids, is_answer = np.frombuffer(rows.ids, dtype=np.uint16), np.frombuffer(rows.is_answer, dtype=bool)
            lengths = np.array(rows.lengths)
            validates = rows.choose(val_fraction, seed)
            for split, chosen in (("train", ~validates), ("val", validates)):
                here = np.repeat(chosen, lengths)
                writer.append_conversations(split, ids[here], is_answer[here], lengths[chosen])
            tokens = writer.tokens
            counts = {
                "conversations": len(lengths),
                "train_tokens": tokens["train"],
                "val_tokens": tokens["val"],
                "answer_tokens": int(is_answer.sum()),
                "val_share": round(tokens["val"] / len(ids), 6),
                **report.counts(),
            }
            about = {
                "tokenizer": tokenizer.describe(),
                "source": {"kind": "chat", "paths": names, "parts": [source.description for source in opened]},
                "options": options,
                "fingerprint": fingerprint,
                "counts": counts,
                "report": report.as_dict(),
            }
            writer.commit(about)
    except OSError as error:
        remedy = "check the path, its permissions and the free space"
        raise ShardError(f"cannot prepare {out}: {error}; {remedy}") from error
    seconds = time.perf_counter() - started
    print(
        f"{len(lengths):,} conversations; {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate "
        f"({counts['val_share']:.2%}); {counts['answer_tokens'] / len(ids):.0%} of them in answers; "
        f"{np.mean(lengths):.0f} tokens in a conversation, at most {lengths.max()}; {seconds:.1f} s",
        flush=True,
    )
    return {"out": str(out), "up_to_date": False, **counts, "seconds": round(seconds, 2)}


def ensure_default_chat(out: str | Path, source: str = STDLIB) -> Dataset:
    """The dataset at `out`, made from what Python brings along if there is none. Raises as prepare_chat() does."""
    if not (Path(out) / MANIFEST).exists():
        prepare_chat(out, [source])
    return open_dataset(out)


class _Rows:
    """All rows, one after the other, and which conversation (or subject) each is a part of."""

    def __init__(self) -> None:
        self.ids, self.is_answer = array("H"), bytearray()
        self.lengths: list[int] = []
        self._groups: list[int] = []
        self._subjects: dict[str, int] = {}

    def add(self, ids: list[int], is_answer: list[bool], subject: str) -> None:
        self.ids.extend(ids)
        self.is_answer.extend(is_answer)
        self.lengths.append(len(ids))
        self._groups.append(self._subjects.setdefault(subject, len(self._subjects)))

    def choose(self, val_fraction: float, seed: int) -> np.ndarray:
        """Which rows validate, bool [rows]: parts of one conversation, and conversations of one subject, together."""
        tokens = np.bincount(self._groups, weights=self.lengths).astype(np.int64)
        if not val_fraction:
            return np.zeros(len(self.lengths), dtype=bool)
        if len(tokens) < 2:
            raise ValueError(
                "there is but one conversation, which cannot both train and validate; give more, or --val-fraction 0"
            )
        return choose_validation(tokens, max(1, round(int(tokens.sum()) * val_fraction)), seed)[self._groups]


def _encode(source: Source, keep: Filter, block_size: int, rows: _Rows, report: ChatReport) -> None:
    tokenizer = get_tokenizer()
    for item in tqdm(source.items(report), desc=source.name, unit=" conversations", mininterval=0.5):
        if dropped := keep.reason(item.messages):
            report.drop(dropped[0], item.where, dropped[1])
            continue
        fitted = fit(item.messages, tokenizer, block_size)
        question = next(message["content"] for message in item.messages if message["role"] == "user")
        report.change("split at turns", len(fitted.rows) > 1, item.where, question)
        report.change("end of an answer cut off", fitted.cut, item.where, question)
        if fitted.rows:
            report.change("turn with too long a question left out", fitted.dropped, item.where, question)
        else:
            report.drop("question too long", item.where, question)
        for row in fitted.rows:
            rows.add(row.ids, row.is_answer, item.subject)


def _check_options(block_size: int, val_fraction: float, shard_tokens: int) -> None:
    if block_size < 1:
        raise ValueError(f"--block-size {block_size} is below 1; the published models have {BLOCK_SIZE}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction} is outside 0 <= f < 1; default {VAL_FRACTION}")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens} is below 1; the default is {SHARD_TOKENS}")
