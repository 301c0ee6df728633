"""Conversations as rows that a model's block can hold: a longer one is split at turns."""

from __future__ import annotations

from typing import NamedTuple

from ..template import encode
from ..tokenizer import Tokenizer
from .chat_forms import Messages


class Row(NamedTuple):
    """One conversation as ids, all but the last of which a model sees."""

    ids: list[int]
    is_answer: list[bool]


class Fit(NamedTuple):
    """What became of a conversation: its rows (more than one where it was split), and turns that lost something."""

    rows: list[Row]
    cut: int
    """Turns whose answer lost its end."""
    dropped: int
    """Turns that were left out, as their question alone is too long."""


def fit(messages: Messages, tokenizer: Tokenizer, block_size: int) -> Fit:
    """Rows of at most block_size + 1 ids: as many turns in each as fit, each beginning with the system message (or the
    usual instruction) and a question.

    An answer that does not fit even alone loses its end, and then no loss looks at the end of text after it, since that
    is not where an answer ends.
    """
    limit = block_size + 1
    whole = Row(*encode(messages, tokenizer))
    if len(whole.ids) <= limit:
        return Fit([whole], 0, 0)
    first = 1 if messages[0]["role"] == "system" else 0
    head, turns = messages[:first], [messages[i : i + 2] for i in range(first, len(messages), 2)]
    alone = [Row(*encode([*head, *turn], tokenizer)) for turn in turns]
    # A turn after others takes as many ids whatever they are, since every piece is encoded apart. After a short one:
    short = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    before = len(encode(short, tokenizer)[0])
    more = [len(encode([*short, *turn], tokenizer)[0]) - before for turn in turns]
    rows, cut, dropped, i = [], 0, 0, 0
    while i < len(turns):
        if len(alone[i].ids) > limit:
            ids = [*alone[i].ids[: limit - 1], tokenizer.eot]
            is_answer = [*alone[i].is_answer[: limit - 1], False]
            if any(is_answer):
                rows.append(Row(ids, is_answer))
                cut += 1
            else:
                dropped += 1
            i += 1
            continue
        size, end = len(alone[i].ids), i + 1
        while end < len(turns) and size + more[end] <= limit:
            size, end = size + more[end], end + 1
        rows.append(Row(*encode([*head, *(m for turn in turns[i:end] for m in turn)], tokenizer)))
        i = end
    return Fit(rows, cut, dropped)
