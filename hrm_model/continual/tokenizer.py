"""A tokenizer of characters that only ever grows: an id, once given, means the same character for good.

id 0        U+FFFD: what stands for a character that the tokenizer does not have
id 1, 2, .. characters in the order in which texts brought them, those of one text by code point
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..atomic import write_file

UNKNOWN = "\ufffd"
MOST = 65_536
"""Ids are stored as uint16."""


class CharTokenizer:
    """Text to character ids and back; stands where GPT-2's Tokenizer does.

    Args:
        characters: one of each id, UNKNOWN first.

    Raises:
        ValueError: a character comes twice, is none, or UNKNOWN is not the first.
    """

    name = "characters"
    eot = -1
    """No id ends a text."""

    def __init__(self, characters: str = UNKNOWN):
        if not characters.startswith(UNKNOWN) or len(set(characters)) != len(characters):
            twice = [c for c, n in Counter(characters).items() if n > 1]
            raise ValueError(
                f"a tokenizer's characters are each one of a kind and begin with U+FFFD; twice: {twice[:5]}, first: "
                f"{characters[:1]!r}"
            )
        if len(characters) > MOST:
            raise ValueError(f"{len(characters):,} different characters are over the limit of {MOST:,}")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters)}
        self.unknown: Counter[str] = Counter()
        """Characters that encode() met and did not have, with how often."""

    @property
    def n_vocab(self) -> int:
        """Ids in use."""
        return len(self.characters)

    @property
    def sha256(self) -> str:
        """Of the characters in their order."""
        return hashlib.sha256(self.characters.encode("utf-8")).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """What a dataset's manifest says of it."""
        return {"name": self.name, "sha256": self.sha256, "vocab_size": self.n_vocab, "eot": self.eot}

    def grown(self, text: str) -> CharTokenizer:
        """This tokenizer with the characters of `text` that it lacks, after its own. Raises ValueError beyond MOST."""
        return CharTokenizer(self.characters + "".join(sorted(set(text) - self._ids.keys())))

    def extends(self, other: CharTokenizer) -> bool:
        """Whether every id of `other` means the same here."""
        return self.characters.startswith(other.characters)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """An id for each character; those it lacks become 0 and are counted in `unknown`. There are no special tokens;
        the argument is that of the other tokenizer."""
        ids = [self._ids.get(c, 0) for c in text]
        self.unknown.update(c for c, i in zip(text, ids, strict=True) if i == 0 and c != UNKNOWN)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Raises ValueError for one that means nothing."""
        ids = [operator.index(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise ValueError(f"character id {i} is outside 0..{self.n_vocab - 1}")
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """decode(), as UTF-8."""
        return self.decode(ids).encode("utf-8")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each character, int64 [n_vocab]."""
        return np.array([len(c.encode("utf-8")) for c in self.characters], dtype=np.int64)

    def to_dict(self) -> dict:
        """What a file holds."""
        return {"level": "char", "n_vocab": self.n_vocab, "characters": list(self.characters), "sha256": self.sha256}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all. Raises OSError."""
        data = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        write_file(Path(path), data.encode("utf-8"), overwrite=True)

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read what save() wrote.

        Raises:
            ValueError: it is missing, or not what save() wrote: damaged or edited.
        """
        path = Path(path)
        remedy = f"rebuild it from the checkpoint: hrm recover {path.parent}"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made = cls("".join(found["characters"]))
            changed = made.sha256 != found.get("sha256")
        except FileNotFoundError:
            raise ValueError(f"tokenizer {path} is missing; {remedy}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"tokenizer {path} is damaged ({error!r:.80}); {remedy}") from error
        if changed:
            raise ValueError(f"tokenizer {path} was changed: its characters are not those of its sha256; {remedy}")
        return made
