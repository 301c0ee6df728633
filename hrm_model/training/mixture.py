"""From corpora of any size to datasets: streamed, cut into train and val on the way, resumed where a kill left off.

documents -> pieces -> ids (in several processes) -> train or val -> shards        for each corpus, one by one
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..atomic import is_disk_full
from ..tokenizer import get_tokenizer
from . import hub, mixture_summary
from .corpora import MIXTURES, Corpus, CorpusError, budgets, check_names, chosen
from .documents import Documents, LocalDocuments
from .mixture_books import Books, marked, new_state
from .partial import PartialDataset, discard, read_state, work_of
from .retry import Backoff, PatientReader, patiently
from .shards import FORMAT_VERSION, MANIFEST, SHARD_TOKENS, TOKEN, ShardError, check_output, open_dataset
from .tokenise import default_workers, encoded

VAL_FRACTION = 0.0005
SAVE_EVERY_S = 10.0
_BYTES_PER_TOKEN = 4  # of text, roughly; only the number of processes is guessed by it
Open = Callable[[Corpus, str], Documents]


def prepare_mixture(
    out: str | Path,
    mixture: str | Sequence[Corpus] = "published",
    *,
    max_tokens: int | None = None,
    only: Sequence[str] | None = None,
    start_from: str | None = None,
    local: Mapping[str, Sequence[str | Path]] | None = None,
    revisions: Mapping[str, str] | None = None,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    backoff: Backoff | None = None,
    open_hub: Open = hub.HubDocuments,
    save_every_s: float = SAVE_EVERY_S,
) -> dict[str, Any]:
    """Write a dataset directory of each corpus into `out`, and summary.json and summary.md beside them.

    Args:
        out: the directory of the datasets, one a corpus. Each appears when it is complete; unfinished work is in
            hidden directories beside it, and the same call goes on with it, to the same bytes.
        mixture: "published", or corpora of one's own.
        max_tokens: size of the whole mixture; each corpus takes part in proportion, whichever are chosen here.
            Default: the published budget. A corpus ends with the document that reaches its budget.
        only: names of the corpora to prepare. Default: all.
        start_from: leave out the corpora before this one.
        local: files and folders by corpus, read instead of the hub.
        revisions: commit, branch or tag by corpus. It is resolved to a commit when a corpus is begun.
        val_fraction: validation share of the tokens of each corpus, met within one document (see StreamSplit).
        seed: which documents validate.
        workers: processes that tokenise. Default: a core each, at most 8. The result does not depend on it.
        shard_tokens: most tokens in a file.
        overwrite: replace what is there where it is damaged or of other options; what matches is kept.
        backoff: how errors that pass are met.
        open_hub: makes what is read of a corpus that is not in `local`, at a commit.
        save_every_s: seconds between two moments to go on from.

    Returns:
        What summary.json has: corpora (one entry each), totals, max_tokens, val_fraction.

    Raises:
        ValueError: an option that cannot be used.
        CorpusError: a corpus cannot be read: not installed, not found, not allowed, damaged, or failing for long.
        ShardError: `out` is in the way, of other options, damaged or cannot be written.
    """
    corpora = MIXTURES[mixture] if isinstance(mixture, str) else tuple(mixture)
    local, revisions, out = dict(local or {}), dict(revisions or {}), Path(out)
    names = [corpus.name for corpus in corpora]
    check_names("--local", local, names)
    check_names("--revision", revisions, names)
    _check_options(val_fraction, workers, shard_tokens)
    tokens = budgets(corpora, max_tokens)
    options = {"val_fraction": val_fraction, "seed": seed, "shard_tokens": shard_tokens}
    jobs = []
    for corpus in chosen(corpora, only, start_from):
        documents = LocalDocuments(corpus, list(local[corpus.name])) if corpus.name in local else None
        if documents is None and open_hub is hub.HubDocuments and not (out / corpus.name / MANIFEST).exists():
            hub.check_installed(corpus)
        label = mixture if isinstance(mixture, str) else "own"
        job = _Job(corpus, label, out / corpus.name, tokens[corpus.name], options, documents, revisions)
        jobs.append(job)
    backoff = backoff or Backoff()
    _say_what_is_needed(out, jobs)

    budget = sum(job.budget for job in jobs)
    with _bar(budget, 0, "all") as total:
        for job in jobs:
            started = time.perf_counter()
            try:
                entry = job.run(overwrite, workers, backoff, open_hub, save_every_s, total)
                mixture_summary.write(out, job.corpus.name, entry, corpora, tokens, max_tokens, val_fraction)
            except OSError as error:
                raise _write_error(job.out, error) from error
            except BrokenProcessPool as error:
                raise ShardError(
                    f"cannot prepare {job.out}: a worker process died; it is probably out of memory, pass a lower "
                    "--workers. The same command goes on from the last save"
                ) from error
            total.write(mixture_summary.line(entry, time.perf_counter() - started), file=sys.stderr)
    return mixture_summary.read(out)


class _Job:
    """One corpus on its way to its dataset."""

    def __init__(
        self,
        corpus: Corpus,
        mixture: str,
        out: Path,
        budget: int,
        options: dict[str, Any],
        documents: LocalDocuments | None,
        revisions: Mapping[str, str],
    ):
        self.corpus, self.out, self.budget = corpus, out, budget
        self._documents = documents
        self._pinned = revisions.get(corpus.name)
        self._mixture = mixture
        self._options = options

    def run(
        self,
        overwrite: bool,
        workers: int | None,
        backoff: Backoff,
        open_hub: Open,
        save_every_s: float,
        total: tqdm,
    ) -> dict[str, Any]:
        """Prepare it, or see that it is done; returns its entry of the summary."""
        check_output(self.out, overwrite=True)
        identity = self._identity(backoff, overwrite)
        if (self.out / MANIFEST).exists():
            entry = self._finished(identity, overwrite)
            if entry is not None:
                _advance(total, self.budget)
                return entry
        self._check_work(identity, overwrite)
        workers = workers or default_workers(self.budget * _BYTES_PER_TOKEN)
        documents = self._documents or open_hub(self.corpus, identity["revision"])
        with PartialDataset(self.out, self._options["shard_tokens"], overwrite) as writer:
            state = writer.state or new_state(identity)
            if state["identity"] != identity:  # begun by another process since it was looked at
                raise ShardError(f"{self.out} was begun with other options in the meantime; run the command again")
            if writer.state is None:
                writer.save(state)  # from here on the revision is fixed
            books = Books(writer, state, self._options, self.budget)
            reader = PatientReader(documents, state["cursor"], self.corpus, backoff)
            with _bar(self.budget, books.split.total, self.corpus.name) as bar:
                _advance(total, books.split.total)
                results = encoded(marked(reader), workers)
                with closing(results):
                    while not books.full and (found := _next(results, books, reader)) is not None:
                        before = books.split.total
                        books.enter(*found)
                        bar.update(books.split.total - before)
                        total.update(books.split.total - before)
                        books.save(reader, save_every_s)
                _advance(total, max(0, self.budget - books.split.total))  # a corpus that was all taken
            if not books.split.total:
                raise CorpusError(
                    f"{self.corpus.name}: there is no document with text ({_skips(books.skipped)}); give other files"
                )
            about = self._about(identity, books)
            writer.commit(about)
        books.note_time(reader)
        return self._entry(about, False, books.seconds, books.retries)

    def _identity(self, backoff: Backoff, overwrite: bool) -> dict[str, Any]:
        """All that decides about the bytes, by the names that a user knows."""
        if self._documents is not None:
            revision, source = None, {"files": self._documents.fingerprint, "text_key": self.corpus.text_key}
        else:
            source = self.corpus.describe()
            revision = self._revision(source, backoff, overwrite)
        return {
            "corpus": self.corpus.name,
            "source": source,
            "revision": revision,
            "tokens (--max-tokens)": self.budget,
            "--val-fraction": self._options["val_fraction"],
            "--seed": self._options["seed"],
            "--shard-tokens": self._options["shard_tokens"],
            "tokenizer": get_tokenizer().sha256,
            "format": FORMAT_VERSION,
        }

    def _revision(self, source: dict[str, Any], backoff: Backoff, overwrite: bool) -> str:
        """The commit that an earlier run began or finished with, unless another is asked for; else the hub's now."""
        asked = self._pinned or self.corpus.revision
        before = self._before(overwrite)
        if before and before.get("source") != source:
            if not overwrite:
                return before.get("revision")  # what differs is about to be said
        elif before and self._pinned in (None, before["revision"]):
            return before["revision"]
        return patiently(lambda: hub.resolve_revision(self.corpus, asked), self.corpus, backoff)

    def _before(self, overwrite: bool) -> dict[str, Any] | None:
        """The identity that is there, of a dataset or of unfinished work."""
        try:
            if (self.out / MANIFEST).exists():
                return open_dataset(self.out).manifest.get("options", {})
            content = read_state(self.out)
            return content and content["state"]["identity"]
        except ShardError:
            if overwrite:
                return None
            raise

    def _finished(self, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
        """The entry of a dataset that is there; None when it is to be replaced. Raises ShardError."""
        try:
            manifest = open_dataset(self.out, verify=overwrite).manifest
        except ShardError:
            if overwrite:
                return None
            raise
        if manifest["fingerprint"] != _fingerprint(identity):
            if overwrite:
                return None
            raise _differs(f"{self.out} was made with", manifest.get("options", {}), identity)
        if not (work_of(self.out) / "dataset").exists():  # else it is work on another one, which is to replace this
            with suppress(ShardError):  # a process about to leave does the same
                discard(self.out)  # of one that was killed right after the rename
        return self._entry(manifest, True, None, None)

    def _check_work(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Unfinished work has to be of the same inputs and options; else it is an error, or discarded."""
        try:
            content = read_state(self.out, verify=True)
        except ShardError:
            if not overwrite:
                raise
            discard(self.out)
            return
        begun = content and content["state"]["identity"]
        if content is None or begun == identity:
            return
        if not overwrite:
            raise _differs(f"{work_of(self.out)} was begun with", begun, identity)
        discard(self.out)

    def _about(self, identity: dict[str, Any], books: Books) -> dict[str, Any]:
        source = {"mixture": self._mixture, "name": self.corpus.name}
        if self._documents is None:
            source |= {**self.corpus.describe(), "revision": identity["revision"]}
        else:
            source |= {"kind": "local", "paths": self._documents.paths, "sha256": self._documents.fingerprint}
        total, val = books.split.total, books.split.tokens["val"]
        return {
            "tokenizer": get_tokenizer().describe(),
            "source": source,
            "options": identity,
            "fingerprint": _fingerprint(identity),
            "counts": {
                "documents": books.documents,
                "train_tokens": total - val,
                "val_tokens": val,
                "tokens_asked": self.budget,
                "bytes_per_token": round(books.n_bytes / total, 4),
                "val_share_asked": self._options["val_fraction"],
                "val_share": round(val / total, 8),
                "empty": books.skipped["empty"],
                "unusable": books.skipped["unusable"],
            },
        }

    def _entry(
        self, manifest: dict[str, Any], up_to_date: bool, seconds: float | None, retries: int | None
    ) -> dict[str, Any]:
        return {
            "name": self.corpus.name,
            "up_to_date": up_to_date,
            **mixture_summary.of_manifest(manifest),
            "seconds": seconds,
            "retries": retries,
        }


def _check_options(val_fraction: float, workers: int | None, shard_tokens: int) -> None:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction} is outside 0 <= f < 1; the published share is {VAL_FRACTION}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} is below 1; 1 tokenises in this process")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens} is below 1; the default is {SHARD_TOKENS}")


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _differs(what: str, before: dict[str, Any], now: dict[str, Any]) -> ShardError:
    keys = [key for key in now if before.get(key) != now[key]]
    changes = "; ".join(f"{key} {_shown(before.get(key))}, now {_shown(now[key])}" for key in keys)
    return ShardError(f"{what} {changes}; give the same, or --overwrite to start anew")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return value.get("repository") or f"local files {str(value.get('files'))[:12]}"
    return str(value)


def _skips(skipped: dict[str, int]) -> str:
    return f"{skipped['empty']} empty, {skipped['unusable']} unusable"


def _bar(total: int, initial: int, name: str) -> tqdm:
    seen = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit="token",
        unit_scale=True,
        mininterval=0.5 if seen else 30,
        leave=False,
        dynamic_ncols=True,
    )


def _advance(bar: tqdm, tokens: int) -> None:
    """Move a bar on by what took no time now, so that its rate stays that of the work."""
    bar.n += tokens
    bar.initial += tokens
    bar.last_print_n += tokens
    bar.refresh()


def _next(results: Iterator, books: Books, reader: PatientReader) -> Any:
    try:
        return next(results, None)
    except CorpusError:  # the books are whole: what was read so far is not to be read again
        books.save(reader)
        raise


def _say_what_is_needed(out: Path, jobs: list[_Job]) -> None:
    needed = sum(job.budget for job in jobs if not (job.out / MANIFEST).exists()) * TOKEN.itemsize
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    names = ", ".join(job.corpus.name for job in jobs)
    print(f"preparing {names} in {out}: {needed / 1e9:,.3f} GB to write, {free / 1e9:,.1f} GB free", flush=True)
    if needed > free:
        print("warning: that will not fit; lower --max-tokens or choose another --out", file=sys.stderr, flush=True)


def _write_error(out: Path, error: OSError) -> ShardError:
    again = "the same command goes on from the last save"
    if is_disk_full(error):
        existing = next(parent for parent in out.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free
        return ShardError(
            f"cannot write {out}: {(error.strerror or str(error)).lower()}, {free:,} bytes are free there; make room, "
            f"and {again}"
        )
    return ShardError(f"cannot prepare {out}: {error}; check the path and its permissions, then {again}")
