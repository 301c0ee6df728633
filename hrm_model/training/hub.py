"""The documents of a corpus as the Hugging Face hub streams them, at one commit of its repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .corpora import Corpus, CorpusError
from .documents import Cursor, missing_key

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_installed(corpus: Corpus) -> None:
    """Raises CorpusError with the remedy when the package `datasets` is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise CorpusError(
            f"reading {corpus.name} from the hub needs the package datasets: pip install 'hrm-kernels[data]' "
            f"(in a checkout: pip install -e '.[data]'), or give files of it with --local {corpus.name}=PATH"
        ) from error


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which needs no looking up."""
    return bool(_COMMIT.fullmatch(revision))


def resolve_revision(corpus: Corpus, revision: str) -> str:
    """The commit that a branch, a tag or a short hash stands for now. Asks the hub, unless it is one already."""
    if is_commit(revision):
        return revision
    check_installed(corpus)
    from huggingface_hub import HfApi

    return HfApi().dataset_info(corpus.repository, revision=revision).sha


class HubDocuments:
    """A corpus on the hub at one commit; nothing of it is kept on disk.

    Reading goes on where `datasets` says that it stopped, which skips finished files without reading them. A cursor
    of another version of the package is not trusted: documents are then skipped one by one.
    """

    def __init__(self, corpus: Corpus, revision: str):
        check_installed(corpus)
        self._corpus = corpus
        self._revision = revision
        self._next = 0
        self._dataset: Any = None

    def read(self, cursor: Cursor) -> Iterator[tuple[int, str | None]]:
        """(document number, text) from `cursor` on; None where a row has no text.

        Raises CorpusError when rows have no such text, and whatever reading over the network raises.
        """
        import datasets

        corpus = self._corpus
        dataset = datasets.load_dataset(
            corpus.repository, corpus.config, split=corpus.split, revision=self._revision, streaming=True
        )
        if dataset.features is not None:
            if corpus.text_key not in dataset.features:
                raise missing_key(corpus, f"revision {self._revision}", list(dataset.features))
            dataset = dataset.select_columns([corpus.text_key])
        self._next = cursor.get("next", 0)
        if self._next and cursor.get("datasets") == datasets.__version__:
            dataset.load_state_dict(cursor["state"])
        elif self._next:
            dataset = dataset.skip(self._next)
        self._dataset = dataset
        for row in dataset:
            if corpus.text_key not in row:
                raise missing_key(corpus, f"row {self._next} of revision {self._revision}", list(row))
            text = row[corpus.text_key]
            self._next += 1
            yield self._next - 1, text if isinstance(text, str) else None

    def position(self) -> Cursor:
        """Where to go on after the last document that read() gave."""
        import datasets

        if self._dataset is None or not self._next:
            return {}
        return {"next": self._next, "state": self._dataset.state_dict(), "datasets": datasets.__version__}
