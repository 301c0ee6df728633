"""Going on after errors that pass: which ones do, how long to wait, and where to start again."""

from __future__ import annotations

import errno
import http.client
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from .corpora import Corpus, CorpusError
from .documents import Cursor, Documents

_NETWORK_PACKAGES = frozenset("httpx httpx2 httpcore httpcore2 requests urllib3 aiohttp".split())
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_NUMBERS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SHOWN_CHARS = 300
T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """How often and how patiently a failed read is repeated: about ten minutes in all."""

    attempts: int = 12
    """Failures in a row, without a document in between, after which it is given up."""
    first_s: float = 1.0
    longest_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    """A number in [0, 1): clients that failed together do not come back together."""

    def delay(self, failures: int) -> float:
        """Seconds before the next attempt after `failures` in a row: doubling, of which half is drawn."""
        return min(self.longest_s, self.first_s * 2.0 ** (failures - 1)) * (0.5 + 0.5 * self.draw())


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later.

    A status decides where there is one: 408, 425, 429 and 5xx pass, other ones last. Then the kind: connections,
    timeouts and most operating system errors pass; what is not found, not allowed or does not fit on the disk lasts.
    The first in the chain of causes that says something decides.
    """
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        status = status_of(seen)
        if status is not None:
            return status in (408, 425, 429) or status >= 500
        if type(seen).__name__ == "OfflineModeIsEnabled" or isinstance(seen, CorpusError):
            return False
        if isinstance(seen, OSError):
            return not isinstance(seen, _LASTING) and seen.errno not in _LASTING_NUMBERS
        if isinstance(seen, (EOFError, http.client.HTTPException)):
            return True
        if type(seen).__module__.partition(".")[0] in _NETWORK_PACKAGES:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries, whatever library raised it."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            status = getattr(holder, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return status
    return None


def patiently(call: Callable[[], T], corpus: Corpus, backoff: Backoff) -> T:
    """What `call` returns, repeated while it fails in a way that passes. Raises CorpusError when it does not."""
    failures = 0
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            _wait(error, failures, "before the first document", corpus, backoff)


class PatientReader:
    """The documents of a corpus from a cursor on, each once, however often reading has to be taken up again.

    After an error it reads from the last cursor that position() returned, and leaves out what it has given already:
    where a source stands after an error is not relied on.

    Attributes: retries, how often reading was taken up again.

    Iterating raises CorpusError for an error that lasts, or after too many in a row.
    """

    def __init__(self, documents: Documents, cursor: Cursor, corpus: Corpus, backoff: Backoff):
        self._documents = documents
        self._safe = cursor.get("after", cursor)
        self._number = cursor.get("next", 0)
        self._corpus = corpus
        self._backoff = backoff
        self.retries = 0

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        failures = 0
        while True:
            try:
                for number, text in self._documents.read(self._safe):
                    if number < self._number:
                        continue
                    failures = 0
                    self._number = number + 1
                    yield number, text
                return
            except Exception as error:
                failures += 1
                _wait(error, failures, f"at document {self._number:,}", self._corpus, self._backoff)
                self.retries += 1

    def position(self) -> Cursor:
        """Where to go on after the last document that was given."""
        self._safe = self._documents.position()
        return self._safe

    def stopped(self) -> Cursor:
        """The same after an error that lasts."""
        return {"next": self._number, "after": self._safe}


def _wait(error: Exception, failures: int, where: str, corpus: Corpus, backoff: Backoff) -> None:
    if isinstance(error, CorpusError):
        raise error
    what = f"{type(error).__name__}: {error}".replace("\n", " ")[:_SHOWN_CHARS]
    if not is_transient(error):
        raise CorpusError(f"{corpus.name} ({corpus.repository}) {where}: {what}; {_remedy(error, corpus)}") from error
    if failures >= backoff.attempts:
        raise CorpusError(
            f"{corpus.name} ({corpus.repository}) {where}: gave up after {failures} attempts: {what}; "
            "the same command goes on"
        ) from error
    delay = backoff.delay(failures)
    tqdm.write(
        f"{corpus.name} {where}: {what}; attempt {failures + 1} of {backoff.attempts} in {delay:.1f} s", file=sys.stderr
    )
    backoff.sleep(delay)


def _remedy(error: BaseException, corpus: Corpus) -> str:
    status = status_of(error)
    if "scripts are no longer supported" in str(error):
        return (
            f"pin a revision of the repository that has files instead (--revision {corpus.name}=refs/convert/parquet, "
            f"or a pull request, refs/pr/N), or give files: --local {corpus.name}=PATH"
        )
    if status in (401, 403) or "Gated" in type(error).__name__:
        return f"log in with an account that may read it (hf auth login), or give files: --local {corpus.name}=PATH"
    if status == 404 or isinstance(error, FileNotFoundError):
        return (
            f"check the repository and its revision (--revision {corpus.name}=...), or give files: "
            f"--local {corpus.name}=PATH"
        )
    return f"pin another revision (--revision {corpus.name}=...) or give files: --local {corpus.name}=PATH"
