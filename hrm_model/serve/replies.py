"""What is sent back: OpenAI's objects, whole or in pieces, with the depth of each token in a field `hrm` of ours.

choice.hrm   {"tokens": [id, ..], "steps": [n, ..]}   of every new token; in a stream, of those in this piece
reply.hrm    {"seed": n}                              which draws the same again
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .jobs import Told
from .requests import Asked

FINISH = {"stop": "stop", "stop_token": "stop", "length": "length"}


class Reply:
    """The reply to one request.

    Args:
        model: the name that is told.
    """

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer):
        self._asked, self._model, self._tokenizer = asked, model, tokenizer
        self._id = ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._told: list[list[Told]] = [[] for _ in range(asked.choices)]
        self._begun = [not asked.chat] * asked.choices
        self._offsets = [0] * asked.choices

    def take(self, number: int, told: Told) -> bool:
        """Note a token of a choice; returns whether the choice is over."""
        self._told[number].append(told)
        return told.event.finish is not None

    def whole(self) -> dict[str, Any]:
        """The reply when all choices are over."""
        return self._object("", [self._choice(number) for number in range(self._asked.choices)]) | {
            "usage": self._usage()
        }

    def first(self) -> list[dict[str, Any]]:
        """Pieces of a stream that come before any token."""
        asked = self._asked
        if asked.chat:
            begin = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            return [self._piece([{"index": number} | begin]) for number in range(asked.choices)]
        echo = [(number, asked.texts[number // asked.n]) for number in range(asked.choices)] if asked.texts else []
        return [
            self._piece([{"index": number, "text": text, "logprobs": None, "finish_reason": None}])
            for number, text in echo
        ]

    def piece(self, number: int, told: Told) -> dict[str, Any]:
        """A token of a choice, as a piece of a stream."""
        self.take(number, told)
        text = self._stripped(number, told.event.text)
        words = {"delta": {"content": text}} if self._asked.chat else {"text": text}
        finish = FINISH[told.event.finish] if told.event.finish else None
        choice = {"index": number} | words
        return self._piece(
            [choice | {"logprobs": self._logprobs(number, [told]), "finish_reason": finish} | _depth([told])]
        )

    def last(self) -> list[dict[str, Any]]:
        """Pieces of a stream that come after all tokens."""
        return [self._object(".chunk", []) | {"usage": self._usage()}] if self._asked.include_usage else []

    def _choice(self, number: int) -> dict[str, Any]:
        told = self._told[number]
        text = self._stripped(number, "".join(one.event.text for one in told))
        if self._asked.texts:
            text = self._asked.texts[number // self._asked.n] + text
        words = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._asked.chat else {"text": text}
        )
        found = {"index": number} | words
        return found | {
            "logprobs": self._logprobs(number, told),
            "finish_reason": FINISH[told[-1].event.finish],
        } | _depth(told)  # fmt: skip

    def _stripped(self, number: int, text: str) -> str:
        """An answer without the space that the chat's form puts before it."""
        if not self._begun[number] and text:
            self._begun[number] = True
            return text.removeprefix(" ")
        return text

    def _piece(self, choices: list) -> dict[str, Any]:
        return self._object(".chunk", choices) | ({"usage": None} if self._asked.include_usage else {})

    def _object(self, kind: str, choices: list) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self._asked.chat else "text_completion"
        head = {"id": self._id, "object": name, "created": self._created, "model": self._model}
        return head | {"choices": choices, "hrm": {"seed": self._asked.seed}}

    def _usage(self) -> dict[str, int]:
        given, new = self._asked.prompt_tokens, sum(map(len, self._told))
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}

    def _logprobs(self, number: int, told: Sequence[Told]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [self._chat_logprob(one) for one in told], "refusal": None}
        offsets = []
        for one in told:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(one.event.text)
        return {
            "tokens": [self._name(one.event.token) for one in told],
            "token_logprobs": [one.event.logprob for one in told],
            "top_logprobs": [{self._name(token): p for token, p in one.top or ()} for one in told]
            if self._asked.logprobs
            else None,
            "text_offset": offsets,
        }

    def _chat_logprob(self, told: Told) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in told.top or ()]
        return self._named(told.event.token, told.event.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.decode_bytes([token])
        return {"token": self._name(token), "logprob": logprob, "bytes": list(raw)}

    def _name(self, token: int) -> str:
        """A token as text; one that is no whole characters as its bytes, so that no two have one name."""
        raw = self._tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def event_line(value: dict[str, Any]) -> bytes:
    """A piece of a stream as a server-sent event. json escapes line ends and everything beyond ASCII."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _depth(told: Sequence[Told]) -> dict[str, Any]:
    return {"hrm": {"tokens": [one.event.token for one in told], "steps": [one.event.steps for one in told]}}
