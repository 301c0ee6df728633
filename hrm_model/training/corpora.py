"""The seven corpora that the published model was trained on, and how much of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


class CorpusError(ValueError):
    """A corpus cannot be read or prepared: which one, from where, what is wrong, what to do about it."""


@dataclass(frozen=True)
class Corpus:
    """Where the text of a corpus is on the Hugging Face hub, and how many tokens of it are taken."""

    name: str
    """Of its dataset directory, and in options."""
    repository: str
    config: str | None
    """The repository's configuration; None where it has but one."""
    text_key: str
    """The column with the text."""
    tokens: int
    """GPT-2 tokens at the published budget, ends of text included."""
    split: str = "train"
    revision: str = "main"
    """A branch, tag or commit. It is resolved to a commit once, before anything is read."""

    def describe(self) -> dict[str, Any]:
        """What is read, for the manifest; without the revision."""
        return {
            "kind": "hub",
            "repository": self.repository,
            "config": self.config,
            "split": self.split,
            "text_key": self.text_key,
        }


PUBLISHED = (
    Corpus("fineweb", "HuggingFaceFW/fineweb", "sample-10BT", "text", 3_000_000_000),
    Corpus("wikipedia", "wikimedia/wikipedia", "20231101.en", "text", 3_000_000_000),
    Corpus("openwebtext", "Skylion007/openwebtext", None, "text", 1_000_000_000),
    Corpus("c4", "allenai/c4", "en", "text", 1_000_000_000),
    Corpus("codeparrot", "codeparrot/codeparrot-clean", None, "content", 1_000_000_000),
    Corpus("openwebmath", "open-web-math/open-web-math", None, "text", 500_000_000),
    # 203,037 articles of about 6,000 words: more than is asked for. Formulas are placeholders there (@xmath0).
    Corpus("arxiv", "ccdv/arxiv-summarization", "document", "article", 500_000_000),
)
MIXTURES = {"published": PUBLISHED}


def budgets(corpora: Collection[Corpus], max_tokens: int | None) -> dict[str, int]:
    """Tokens to take of each corpus: as in the catalogue, or each in proportion so that all make `max_tokens`.

    At least one of each. Raises ValueError for a `max_tokens` below 1.
    """
    if max_tokens is None:
        return {corpus.name: corpus.tokens for corpus in corpora}
    if max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens} is below 1; it is the size of all corpora together")
    total = sum(corpus.tokens for corpus in corpora)
    return {corpus.name: max(1, max_tokens * corpus.tokens // total) for corpus in corpora}


def chosen(
    corpora: Collection[Corpus], only: Collection[str] | None = None, start_from: str | None = None
) -> list[Corpus]:
    """The corpora that are asked for, in the catalogue's order: those named, of these the ones from a name on.

    Raises ValueError for a name that is none of theirs, or when nothing is left.
    """
    names = [corpus.name for corpus in corpora]
    check_names("--only", only or (), names)
    check_names("--start-from", [start_from] if start_from else [], names)
    first = names.index(start_from) if start_from else 0
    found = [corpus for corpus in list(corpora)[first:] if not only or corpus.name in only]
    if not found:
        raise ValueError(
            f"--only {','.join(only or ())} names nothing from --start-from {start_from} on: {names[first:]}"
        )
    return found


def check_names(option: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for the first name that is none of a corpus."""
    for name in given:
        if name not in known:
            raise ValueError(f"{option} {name!r} is no corpus of this mixture; it has {', '.join(known)}")
