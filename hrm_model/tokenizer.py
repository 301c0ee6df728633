"""GPT-2 byte-level BPE, offline.

The ranks come with the package (assets/gpt2.tiktoken) and run through tiktoken, so that ids are those of the
GPT-2 release (Radford et al. 2019, section 2.2) and nothing is fetched. 50,256 byte sequences have ids
0..50255; <|endoftext|> is 50256.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import operator
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = Path(__file__).parent / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
N_RANKS = 50_256

# The split of the GPT-2 release: contractions; a word, a number or a run of symbols, each with at most one
# space before it; and white space, whose last character is left to what follows. Possessive and atomic where
# no match can change, so that the regex engine need not remember a way back for every character.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|(?>\s+(?=\s))|\s"""

# It does remember one in white space, and panics at a million. Long texts are therefore cut inside white
# space, before the last character of a run, where the pattern cuts as well: the ids are the same. (Without
# the four control characters that only Python counts as white space.)
PART_CHARS = 500_000
_WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]{2,}")


def _parts(text: str) -> list[str]:
    """The text in parts that encode to the same ids, with long white space only where a part ends."""
    cuts = [0]
    for position in range(PART_CHARS, len(text), PART_CHARS):
        run = _WHITE_SPACE.match(text, position)
        if run and run.end() < len(text) and run.end() - 1 > cuts[-1]:
            cuts.append(run.end() - 1)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The id of each byte sequence.

    Raises FileNotFoundError without the file and ValueError when its contents are not the published ones: one
    wrong rank silently changes ids, and a model trained on others talks nonsense.
    """
    remedy = "restore it with `git checkout -- hrm_model/assets` or reinstall the package"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer file {path} is missing; {remedy}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != RANKS_SHA256:
        what = f"tokenizer file {path} ({len(data):,} bytes) is damaged"
        raise ValueError(f"{what}: sha256 {found}, expected {RANKS_SHA256}; {remedy}")
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


class Tokenizer:
    """Text to GPT-2 ids and back. Get the shared one from get_tokenizer().

    name: "gpt2". n_vocab: 50257. eot: 50256, the id of <|endoftext|>.
    """

    name = "gpt2"
    sha256 = RANKS_SHA256
    eot = N_RANKS
    n_vocab = N_RANKS + 1

    def __init__(self, ranks_file: Path = RANKS_FILE):
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=read_ranks(Path(ranks_file)),
            special_tokens={END_OF_TEXT: self.eot},
            explicit_n_vocab=self.n_vocab,
        )

    def describe(self) -> dict[str, str | int]:
        """What a dataset's manifest says of the tokenizer that made it."""
        return {"name": self.name, "sha256": self.sha256, "vocab_size": self.n_vocab, "eot": self.eot}

    def check_vocabulary(self, vocab_size: int, whose: str) -> None:
        """Raises ValueError where a model of so many ids cannot read text."""
        if vocab_size < self.n_vocab:
            raise ValueError(
                f"{whose} has vocab_size {vocab_size}, and text needs GPT-2's {self.n_vocab}; "
                "take a model that was trained on text"
            )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text.

        The characters "<|endoftext|>" in it are text like any other, so that no user can end a document by
        writing them; allow_special=True makes them id 50256. Lone surrogates, which UTF-8 cannot carry,
        become U+FFFD.
        """
        ids = []
        for part in _parts(text):
            if allow_special:
                ids += self._encoding.encode(part, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """encode() of each text, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken works outside the interpreter lock
            return list(pool.map(lambda text: self.encode(text, allow_special), texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, which may begin or end inside a character.

        Raises ValueError for an id outside 0..50256.
        """
        ids = [operator.index(i) for i in ids]
        for extreme in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= extreme < self.n_vocab:
                raise ValueError(
                    f"token id {extreme} is outside 0..{self.n_vocab - 1}; where a model's vocabulary is "
                    f"padded, set its logits from {self.n_vocab} on to -inf before sampling"
                )
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Raises as decode_bytes() does."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Length in bytes of each token, int64 [n_vocab]; 0 for <|endoftext|>, which stands for no text.

        Bits per byte = (sum of losses in nats / ln 2) / token_bytes()[targets].sum().
        """
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.eot)]
        return np.array([*lengths, 0], dtype=np.int64)


@cache
def get_tokenizer() -> Tokenizer:
    """The tokenizer, loaded once in a process.

    Raises FileNotFoundError or ValueError when its file is gone or damaged.
    """
    return Tokenizer()


class IncrementalDecoder:
    """Text of a growing id sequence, a complete character at a time.

    A character may span tokens (most emoji do), so its bytes wait until the last one is here. All that push()
    and finish() returned, joined, is tokenizer.decode(ids).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, possibly "". Raises as decode_bytes() does."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """An unfinished character as U+FFFD, else ""; the decoder is then ready for another sequence."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
