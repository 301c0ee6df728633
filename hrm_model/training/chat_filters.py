"""Which conversations are left out: by whole words, duplicates, answers that are empty or of another assistant.

Words are whole words: "Bard" is not in "Lombardy", nor "Alexa" in "Alexander". A phrase may have any white space
between its words. Case does not matter.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from .chat_forms import Messages

# Assistants by name. Those of the second list are also names and words of everyday life: "I am Claude Monet", "I'm a
# Gemini", "I am a bard".
_PRODUCTS = (
    r"chat\s?gpt|gpt[\s-]?[1-5](?:\.\d)?|open\s?assistant|google assistant|deepseek|microsoft copilot|bing chat|vicuna|"
    r"wizardlm|llama[\s-]?[1-4]|qwen|mixtral"
)
_NAMES = r"claude|bard|gemini|alexa|siri|cortana|copilot|grok|bixby"
_MAKERS = (
    r"open\s?ai|anthropic|google|deepmind|meta(?: ai)?|microsoft|amazon|apple|laion|mistral(?: ai)?|alibaba|baidu|"
    r"deepseek|stanford|databricks|nomic(?: ai)?"
)
_MADE = rf"(?:developed|created|trained|made|built|designed)(?: and \w+)? by (?:{_MAKERS})\b"
# Not within quotation marks, where somebody else speaks.
_I_AM = r"(?<![\w\"'\u201c])(?:i am|i'm|my name is|my name's|i am called|i'm called)"
CLAIMS = (
    rf"{_I_AM}(?: (?:just|only|actually))?(?: (?:a|an|the))?(?: version of)? (?:{_PRODUCTS})\b",
    # No article, and no surname: the only place where case counts.
    rf"{_I_AM} (?:{_NAMES})\b(?!\x20(?-i:[A-Z])\w|'s\b|-\w)",
    rf"\bas (?:{_PRODUCTS}|{_NAMES}),? i\b",
    rf"(?:\bas an|{_I_AM} an?) (?:[\w-]+ )?(?:ai|artificial|assistant|language|chat\s?bot)\b[^.!?\n]{{0,60}}?\b{_MADE}",
    rf"(?<![\w\"'\u201c])(?:i am|i'm|i was|i have been|i've been) {_MADE}",
)

# Where no such name stands, which is nearly everywhere, no claim has to be looked for.
_NAMED = re.compile(rf"\b(?:{_PRODUCTS}|{_NAMES}|{_MAKERS})\b".replace(" ", r"\s+"), re.IGNORECASE)


class Filter:
    """Decides about conversations, one after the other: it remembers them, to know a duplicate.

    Args:
        words: whole words or phrases; a conversation with one of them in any message is dropped.
        claims: whether answers are dropped in which the assistant says that it is another one, or of another maker.
        duplicates: whether a conversation that came before is dropped.

    Raises:
        ValueError: a word that is empty or has no letter or digit.
    """

    def __init__(self, words: Iterable[str] = (), claims: bool = True, duplicates: bool = True):
        self.words = sorted({" ".join(_plain(word).split()) for word in words})
        for word in self.words:
            if not re.search(r"\w", word):
                raise ValueError(f"--drop {word!r} has no letter and no digit, so it is no word; leave it out")
        patterns = [r"\s+".join(map(re.escape, word.split())) for word in sorted(self.words, key=len, reverse=True)]
        self._words = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE) if patterns else None
        self._claims = re.compile("|".join(CLAIMS).replace(" ", r"\s+"), re.IGNORECASE) if claims else None
        self._duplicates = duplicates
        self._seen: set[bytes] = set()

    def reason(self, messages: Messages) -> tuple[str, str] | None:
        """Why the conversation is dropped and the passage that shows it; None to keep it."""
        if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
            return "empty answer", messages[-2]["content"]
        for message in messages:
            text = _plain(message["content"])
            if self._words and (found := self._word_in(text)):
                return f"word {' '.join(found[0].lower().split())!r}", _around(text, found)
            is_answer = message["role"] == "assistant"
            if self._claims and is_answer and _NAMED.search(text) and (found := self._claims.search(text)):
                return "another assistant", _around(text, found)
        if not self._duplicates:
            return None
        # White space does not tell two conversations apart.
        texts = json.dumps([[message["role"], " ".join(message["content"].split())] for message in messages])
        digest = hashlib.blake2b(texts.encode(), digest_size=16).digest()
        if digest in self._seen:
            return "duplicate", next(m["content"] for m in messages if m["role"] == "user")
        self._seen.add(digest)
        return None

    def _word_in(self, text: str) -> re.Match | None:
        for found in self._words.finditer(text):
            # For `re` a mark, such as a vowel sign of Devanagari, is no part of a word.
            around = text[max(0, found.start() - 1) : found.start()] + text[found.end() : found.end() + 1]
            if not any(unicodedata.category(char).startswith("M") for char in around):
                return found
        return None


def read_words(file: str | Path) -> list[str]:
    """The words or phrases of a file, one a line; empty lines and those that begin with # are none.

    Raises:
        ValueError: it cannot be read or is not UTF-8.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read --drop-words {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--drop-words {file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _plain(text: str) -> str:
    """Composed characters, so that an accent cannot end a word, and straight apostrophes."""
    return unicodedata.normalize("NFC", text).replace("\u2019", "'")


def _around(text: str, found: re.Match) -> str:
    return text[max(0, found.start() - 20) : found.end() + 20]
