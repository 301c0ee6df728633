"""The identity set: synthetic conversations in which a model says who it is, made from a persona."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..template import encode
from ..tokenizer import get_tokenizer
from .chat_forms import Messages
from .chat_prepare import SMALLEST_BLOCK, prepare_chat
from .chat_report import ChatReport
from .chat_sources import Item
from .identity_pairs import PROPORTIONS, Pair, conversations, identity_pairs
from .persona import DEFAULT_PERSONA, Persona, read_persona
from .prepare import VAL_FRACTION
from .shards import MANIFEST, Dataset, ShardError, open_dataset

PAIRS = 2800
"""As many as were published."""
DEFAULT_PATH = "data/identity"


def prepare_identity(
    out: str | Path,
    persona: Persona = DEFAULT_PERSONA,
    n: int = PAIRS,
    seed: int = 0,
    *,
    proportions: Mapping[str, float] = PROPORTIONS,
    block_size: int = SMALLEST_BLOCK,
    val_fraction: float = VAL_FRACTION,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the dataset directory `out`: n pairs of question and answer, some in conversations of several turns.

    Nothing is done if it is there already. The pairs are a function of (persona, n, seed, proportions); no phrasing of
    a validation question is in a training conversation.

    Args:
        out: the directory. It appears when it is complete, and never half.
        persona: who the model is.
        n: pairs; a conversation has one to three.
        seed: which pairs, and which validate.
        proportions: share of greetings, identity, help and small_talk among the pairs, up to a factor.
        block_size: the most tokens that a model will see; conversations are kept within it.
        val_fraction: validation share of the tokens, about: phrasings validate in twentieths.
        overwrite: replace a dataset that is there.

    Returns:
        What prepare_chat() returns, and pairs, distinct_questions, distinct_answers, categories.

    Raises:
        ValueError, ShardError: as identity_pairs() and prepare_chat().
    """
    source = IdentityChat(persona, n, seed, proportions, block_size)
    # Its own name must not be taken for another assistant's; duplicates there are none.
    summary = prepare_chat(
        out, [source], block_size=block_size, val_fraction=val_fraction, seed=seed, filters=False, overwrite=overwrite
    )
    about = {
        name: source.description[name] for name in ("pairs", "categories", "distinct_questions", "distinct_answers")
    }
    if not summary["up_to_date"]:
        print(
            f"{about['pairs']:,} pairs ({', '.join(f'{n:,} {name}' for name, n in about['categories'].items())}): "
            f"{about['distinct_questions']:,} different questions, {about['distinct_answers']:,} different answers",
            flush=True,
        )
    return summary | about


def dataset_path(persona_file: str | None = None) -> str:
    """Where the set of a persona's file, or of the default persona, is by default.

    Raises:
        ValueError: the file cannot be used.
    """
    if persona_file is None:
        return DEFAULT_PATH
    name = re.sub(r"\W+", "-", read_persona(persona_file).name.lower()).strip("-")
    return f"{DEFAULT_PATH}-{name or 'persona'}"


def make_identity(out: str, persona_file: str | None = None, **options: Any) -> dict[str, Any]:
    """prepare_identity() for a command: the persona is a file's, and a set of other inputs that is there stays.

    Raises:
        ValueError, OSError: as prepare_identity().
    """
    persona = DEFAULT_PERSONA if persona_file is None else read_persona(persona_file)
    try:
        return prepare_identity(out, persona, **options)
    except ShardError as error:
        if "other inputs" not in str(error):
            raise
        raise ShardError(
            f"{out} is there and was made from another persona or with other options than these; write this one with "
            "--data-only --out DIR and train on it with --data DIR, or replace the other with --data-only --overwrite"
        ) from error


def ensure_default_identity(out: str | Path) -> Dataset:
    """The dataset at `out`, made from the default persona if there is none. Raises as prepare_identity() does."""
    if not (Path(out) / MANIFEST).exists():
        prepare_identity(out)
    return open_dataset(out)


class IdentityChat:
    """A source of conversations (implements chat_sources.Source)."""

    name = "identity"

    def __init__(self, persona: Persona, n: int, seed: int, proportions: Mapping[str, float], block_size: int):
        pairs = identity_pairs(persona, n, seed, proportions)
        tokenizer = get_tokenizer()

        def fits(turns: list[Pair]) -> bool:
            return len(encode(_messages(turns), tokenizer)[0]) <= block_size + 1

        self._conversations = [(f, _messages(turns)) for f, turns in conversations(pairs, seed, fits)]
        self.fingerprint = hashlib.sha256(json.dumps(self._conversations).encode()).hexdigest()
        self.description = {
            "name": self.name,
            "persona": persona.as_dict(),
            "pairs": n,
            "seed": seed,
            "proportions": dict(proportions),
            "categories": dict(Counter(pair.category for pair in pairs)),
            "distinct_questions": len({pair.question for pair in pairs}),
            "distinct_answers": len({pair.answer for pair in pairs}),
            "sha256": self.fingerprint,
        }

    def items(self, report: ChatReport) -> Iterator[Item]:
        """The conversations; those of one family of phrasings validate together."""
        for number, (family, messages) in enumerate(self._conversations, 1):
            yield Item(messages, f"{self.name}:{number}", f"{self.name} {family}")


def _messages(turns: list[Pair]) -> Messages:
    return [
        {"role": role, "content": text}
        for pair in turns
        for role, text in (("user", pair.question), ("assistant", pair.answer))
    ]
