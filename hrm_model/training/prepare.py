"""From documents to a dataset on disk: tokenise, choose the validation documents, write shards.

    source -> pieces of documents -> ids (in several processes) -> one spool file -> train and val shards

There is a spool because the validation split is asked for in tokens, which are known only at the end.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..keyed import SPLIT_STREAM, keyed_words
from ..tokenizer import get_tokenizer
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_TOKENS,
    TOKEN,
    Dataset,
    DatasetWriter,
    ShardError,
    check_output,
    is_up_to_date,
    open_dataset,
)
from .sources import FileSource, Report, StdlibSource
from .tokenise import batches, default_workers, encoded

# 5 % of a small corpus, and of a large one no more than its loss needs: losses of tokens have a standard
# deviation of about 3 nats, so a million give their mean to 0.003, the standard library's 270,000 to 0.006.
VAL_FRACTION = 0.05
VAL_TOKENS = 1_000_000
_COPY_TOKENS = 4_000_000

Source = FileSource | StdlibSource


def prepare(
    out: str | Path,
    sources: list[str] | None = None,
    *,
    val_fraction: float | None = None,
    val_tokens: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    text_key: str = "text",
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write the dataset directory `out` and print what was done; nothing is done if it is there already.

    Args:
        out: the directory. It appears when it is complete, and never half.
        sources: files and folders (see FileSource); None or ["stdlib"] for what Python brings along.
        val_fraction: validation share of the tokens, below 1. Default: 0.05, at most a million tokens.
        val_tokens: validation tokens, instead of a share. Met as closely as whole documents allow.
        workers: processes that tokenise. Default: a core each, at most 8, and no more than one for each 16 MB
            of source, as a process takes a second to start. The result does not depend on it.
        seed: which documents validate.
        text_key: key of the text in JSON lines.
        overwrite: replace a dataset that is there.
        shard_tokens: most tokens in a file.

    Returns:
        out, up_to_date, documents, train_tokens, val_tokens, bytes_per_token, val_share_asked, val_share,
        empty and problems (skipped documents), seconds.

    Raises:
        ValueError: an option or a source that cannot be used, a val split that leaves nothing to train on.
        ShardError: `out` is in the way, of other inputs, damaged or cannot be written.
    """
    started = time.perf_counter()
    _check_options(val_fraction, val_tokens, workers, shard_tokens)
    out, report = Path(out), Report()
    check_output(out, overwrite=True)  # what no option could help comes before any work
    if not sources or sources == ["stdlib"]:
        source = StdlibSource(report)
    elif "stdlib" in sources:
        raise ValueError("stdlib cannot be mixed with paths; prepare each, and weigh them when training")
    else:
        source = FileSource(sources, text_key, report)
    if workers is None:
        workers = default_workers(source.size)
    tokenizer = get_tokenizer()
    options = {
        "val_fraction": val_fraction,
        "val_tokens": val_tokens,
        "seed": seed,
        "text_key": text_key,
        "shard_tokens": shard_tokens,
    }
    inputs = [FORMAT_VERSION, tokenizer.sha256, source.fingerprint, options]
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    if not overwrite and (counts := is_up_to_date(out, fingerprint)) is not None:
        seconds = round(time.perf_counter() - started, 2)
        return {"out": str(out), "up_to_date": True, **counts, "seconds": seconds}
    check_output(out, overwrite)

    print(f"preparing {out} from {_describe(source)}", flush=True)
    try:
        with DatasetWriter(out, shard_tokens, overwrite) as writer:
            spool = writer.scratch / "spool.bin"
            lengths, n_bytes = _tokenise(source, report, workers, spool)
            total = int(lengths.sum())
            if not total:
                raise ValueError(
                    f"no document in {_describe(source)} ({report.empty} empty, {report.problems} unusable); "
                    "give a source with text"
                )
            target = _val_target(total, val_fraction, val_tokens)
            if len(lengths) == 1 and target:
                _write_one(writer, spool, total, target)
            else:
                _write(writer, spool, lengths, choose_validation(lengths, target, seed))
            tokens = writer.tokens
            counts = {
                "documents": len(lengths),
                "train_tokens": tokens["train"],
                "val_tokens": tokens["val"],
                "bytes_per_token": round(n_bytes / total, 4),
                "val_share_asked": round(target / total, 6),
                "val_share": round(tokens["val"] / sum(tokens.values()), 6),
                "empty": report.empty,
                "problems": report.problems,
            }
            about = {
                "tokenizer": tokenizer.describe(),
                "source": source.description,
                "options": options,
                "fingerprint": fingerprint,
                "counts": counts,
            }
            writer.commit(about)
    except OSError as error:
        remedy = "check the path, its permissions and the free space"
        raise ShardError(f"cannot prepare {out}: {error}; {remedy}") from error
    except BrokenProcessPool as error:
        remedy = f"it is probably out of memory, lower --workers {workers}"
        raise ShardError(f"cannot prepare {out}: a worker process died; {remedy}") from error
    seconds = time.perf_counter() - started
    print(
        f"{len(lengths):,} documents; {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate "
        f"({counts['val_share']:.2%}, asked for {counts['val_share_asked']:.2%}); "
        f"{counts['bytes_per_token']:.2f} bytes per token; skipped {report.empty} empty documents and "
        f"{report.problems} unusable; {seconds:.1f} s",
        flush=True,
    )
    return {"out": str(out), "up_to_date": False, **counts, "seconds": round(seconds, 2)}


def ensure_default_dataset(out: str | Path) -> Dataset:
    """The dataset at `out`, made from what Python brings along if there is none. Raises as prepare() does."""
    if not (Path(out) / MANIFEST).exists():
        # In this process: workers would each import the caller's main module, and torch with it.
        prepare(out, workers=1)
    return open_dataset(out)


def choose_validation(lengths: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Which documents validate, bool [n], so that their tokens are as close to `target` as this finds.

    In an order that depends on nothing but (seed, document number) each document is taken that still fits; in
    the end one more is taken, perhaps for one that was, if that comes closer. With a target above 0 either
    side gets at least one.

    Raises ValueError when there is but one document.
    """
    chosen = np.zeros(len(lengths), dtype=bool)
    if not target:
        return chosen
    if len(lengths) < 2:
        raise ValueError("one document cannot be on both sides; cut it")
    order = np.argsort(keyed_words(seed, 0, len(lengths), SPLIT_STREAM)[:, 0], kind="stable")
    shortest, missing = int(lengths.min()), target
    for number in order.tolist():
        if missing < shortest:
            break
        if lengths[number] <= missing:
            chosen[number] = True
            missing -= int(lengths[number])
    left = np.flatnonzero(~chosen)
    left = left[np.argsort(lengths[left], kind="stable")]
    taken = np.flatnonzero(chosen)
    # For each that may be given up, and first for none: the lengths on either side of what is then missing.
    wanted = missing + np.concatenate([[0], lengths[taken]])
    above = np.searchsorted(lengths[left], wanted)
    options = np.stack([above - 1, above]).clip(0, len(left) - 1)
    off = np.abs(lengths[left[options]] - wanted)
    if len(left) == 1:
        off[:, 0] = np.iinfo(off.dtype).max  # the last one cannot be had without giving one up
    side, given = np.unravel_index(np.argmin(off), off.shape)
    if off[side, given] < missing or not len(taken):
        chosen[taken[given - 1 : given]] = False  # given = 0 gives up none
        chosen[left[options[side, given]]] = True
    return chosen


def _check_options(
    val_fraction: float | None,
    val_tokens: int | None,
    workers: int | None,
    shard_tokens: int,
) -> None:
    if val_fraction is not None and val_tokens is not None:
        raise ValueError(f"both --val-fraction {val_fraction} and --val-tokens {val_tokens}; give one")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction} is outside 0 <= f < 1; default {VAL_FRACTION}")
    if val_tokens is not None and val_tokens < 0:
        raise ValueError(f"--val-tokens {val_tokens} is negative; 0 makes no validation split")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} is below 1; 1 tokenises in this process")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens} is below 1; the default is {SHARD_TOKENS}")


def _val_target(total: int, val_fraction: float | None, val_tokens: int | None) -> int:
    if val_tokens is not None:
        if val_tokens >= total:
            raise ValueError(
                f"--val-tokens {val_tokens} leaves nothing to train on: the source has {total} tokens in "
                "all; ask for less"
            )
        return val_tokens
    if val_fraction is not None:
        return min(round(total * val_fraction), total - 1)
    return min(round(total * VAL_FRACTION), VAL_TOKENS)


def _describe(source: Source) -> str:
    about = source.description
    return ", ".join(about.get("paths", ())) or f"the standard library of {about['python']}"


def _tokenise(source: Source, report: Report, workers: int, spool: Path) -> tuple[np.ndarray, int]:
    """Write the ids of all documents to a file; returns their lengths, int64 [n], and the bytes of text."""
    lengths, length, n_bytes, n_tokens = array("q"), 0, 0, 0
    started = time.perf_counter()
    marked = (([(piece.ends, piece.size) for piece in batch], batch) for batch in batches(source.pieces(report)))
    results = encoded(marked, workers)
    with (
        open(spool, "wb") as file,
        closing(results),
        tqdm(total=source.size, desc="tokenising", unit="B", unit_scale=True, mininterval=0.5) as bar,
    ):
        for marks, (ids, counts, sizes) in results:
            file.write(ids)
            n_bytes += sum(sizes)
            n_tokens += len(ids)
            for (ends, read), count in zip(marks, counts, strict=True):
                length += count
                if ends:
                    lengths.append(length)
                    length = 0
                bar.update(read)
            bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
    return np.array(lengths, dtype=np.int64), n_bytes


def _write(writer: DatasetWriter, spool: Path, lengths: np.ndarray, chosen: np.ndarray) -> None:
    """Copy the documents to their splits, neighbours on the same side together."""
    first = np.flatnonzero(np.diff(chosen, prepend=~chosen[:1]))
    runs = zip(first, [*first[1:], len(chosen)], strict=True)
    bar = tqdm(total=int(lengths.sum()), desc="writing", unit="token", unit_scale=True, delay=2)
    with open(spool, "rb") as file, bar:
        for start, end in runs:
            n = int(lengths[start:end].sum())
            _copy(writer, "val" if chosen[start] else "train", file, n, documents=int(end - start))
            bar.update(n)


def _copy(writer: DatasetWriter, split: str, file: Any, n: int, documents: int) -> None:
    while n:
        ids = np.fromfile(file, dtype=TOKEN, count=min(n, _COPY_TOKENS))
        assert len(ids), "the spool is shorter than what was written to it"
        n -= len(ids)
        writer.append(split, ids, 0 if n else documents)


def _write_one(writer: DatasetWriter, spool: Path, total: int, target: int) -> None:
    """Cut the only document where a line ends, as close as possible to `target` tokens before its end."""
    tokenizer = get_tokenizer()
    if total < 3:
        raise ValueError("the source is one document of one token: no part can validate; add text")
    aim = min(max(total - target, 1), total - 2)  # of the text's tokens, how many to train on
    start = max(0, aim - _COPY_TOKENS)
    count = min(2 * _COPY_TOKENS, total - 1 - start)
    near = np.fromfile(spool, dtype=TOKEN, count=count, offset=start * TOKEN.itemsize)
    bytes_of = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    ends_line = np.array([token.endswith(b"\n") for token in bytes_of])
    within = np.array([0x80 <= token[0] < 0xC0 for token in bytes_of])
    # Token i of `near` ends the training text; the last one cannot.
    places = np.flatnonzero(ends_line[near[:-1]])
    where = "at the end of a line"
    if not len(places):
        places = np.flatnonzero(~within[near[1:]])
        where = "within a line, as it has none to spare"
    if not len(places):
        raise ValueError("the source is one document of one character: no part can validate; add text")
    cut = start + 1 + int(places[np.argmin(np.abs(places + 1 + start - aim))])
    print(f"one document only: cut {where}, the last {total - cut:,} tokens validate", flush=True)
    with open(spool, "rb") as file:
        _copy(writer, "train", file, cut, documents=1)
        writer.append("train", np.array([tokenizer.eot]))
        _copy(writer, "val", file, total - cut, documents=1)
