"""From the bytes of a request to jobs, or to one clear error. Fields are OpenAI's, and a few of our own.

Nothing is ignored silently: a field that is unknown, or known and not offered here, is an error unless its value asks
for nothing.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import END_OF_TEXT, is_int, is_number
from ..generate import DEPTH_UPDATES
from ..sampling import N_GPT2_IDS, Sampling
from ..template import INSTRUCTION, prompt, stop_strings
from ..text_input import checked_text
from ..tokenizer import Tokenizer
from .errors import ApiError
from .jobs import Failure, Job, Told

MAX_CHOICES = 16
"""Continuations of one request, over all its prompts."""
MAX_STOPS, MAX_STOP_CHARS = 16, 1024
MAX_TOP = 20
"""Likeliest tokens told in place of each."""
LONGEST_TOKEN = 128
"""Bytes of GPT-2's longest token: a text of more than so many bytes a token of the window is refused unread."""

_NOTHING = {
    "suffix": (None, ""), "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "parallel_tool_calls": (None, True, False),
    "functions": (None, []), "function_call": (None, "none", "auto"), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "reasoning_effort": (None,),
    "web_search_options": (None,), "store": (None, False), "service_tier": (None, "auto", "default"),
    "verbosity": (None, "medium"),
}  # fmt: skip
"""Fields that are not offered, and the values that ask for nothing."""
_LABELS = "user", "metadata", "safety_identifier", "prompt_cache_key"
"""Fields that say who asks; they change nothing."""
_INSTEAD = {"presence_penalty": "repetition_penalty", "frequency_penalty": "repetition_penalty"}


@dataclass(frozen=True)
class Limits:
    """What a server allows."""

    model: str
    """The one name that requests may ask for."""
    window: int
    """Tokens of a prompt and its continuation together."""
    max_steps: int
    vocab_size: int
    max_tokens: int | None = None
    """Most new tokens of a choice; None is what the window holds."""

    @property
    def most(self) -> int:
        """Most new tokens of a choice."""
        return min(self.max_tokens or self.window, self.window - 1)


@dataclass(frozen=True)
class Asked:
    """A request that makes sense."""

    chat: bool
    prompts: list[list[int]]
    texts: list[str]
    """What is echoed of each prompt; empty without `echo`."""
    n: int
    """Continuations of each prompt."""
    max_tokens: int
    min_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    """How many of the likeliest tokens are told beside each; None: no log-probabilities at all."""
    stream: bool
    include_usage: bool
    force_steps: int
    keep_depth: bool

    @property
    def choices(self) -> int:
        """Continuations in all."""
        return self.n * len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were given."""
        return sum(map(len, self.prompts))

    def jobs(self, sink: Callable[[int, Told | Failure], None], deadline: float | None) -> list[Job]:
        """One job a choice; the sink is told the choice's number too."""

        def of(number: int) -> Callable[[Told | Failure], None]:
            return lambda told: sink(number, told)

        return [
            Job(
                ids=self.prompts[number // self.n],
                max_new_tokens=self.max_tokens,
                sink=of(number),
                sampling=self.sampling,
                seed=self.seed,
                number=number,
                min_new_tokens=self.min_tokens,
                stop=self.stop,
                force_steps=self.force_steps,
                keep_depth=self.keep_depth,
                top=self.logprobs or 0,
                deadline=deadline,
            )
            for number in range(self.choices)
        ]


def parse(data: bytes, chat: bool, limits: Limits, tokenizer: Tokenizer) -> Asked:
    """The request in a body.

    Raises:
        ApiError: 400 or 404 (another model), naming the field, the value, the limit and the remedy.
    """
    fields = _Fields(_object(data))
    model = fields.take("model", _text, None)
    if model is not None and model != limits.model:
        raise ApiError(
            404,
            f"the model {_shown(model)} is not here; this server has {limits.model!r}",
            param="model",
            code="model_not_found",
        )
    logprobs, texts, echo = _chat_logprobs(fields) if chat else _logprobs(fields), [], False
    if chat:
        prompts = [_conversation(fields, limits, tokenizer)]
    else:
        echo = fields.take("echo", _flag, False)
        prompts, texts = _prompts(fields, limits, tokenizer, echo)
    n = fields.take("n", _integer(1, MAX_CHOICES), 1)
    if n * len(prompts) > MAX_CHOICES:
        raise _bad(
            "n", f"{len(prompts)} prompts with n {n} are {n * len(prompts)} choices; at most {MAX_CHOICES} a request"
        )
    if not chat:
        best_of = fields.take("best_of", _integer(1, MAX_CHOICES), n)
        if best_of != n:
            raise _bad("best_of", f"best_of {best_of} is not offered; leave it out, or make it n ({n})")
        if echo and logprobs is not None:
            raise _bad("logprobs", "logprobs with echo is not offered: a prompt's own are not computed; leave one out")
    longest = max(map(len, prompts))
    max_tokens = _max_tokens(fields, chat, limits, longest)
    asked = Asked(
        chat=chat, prompts=prompts, texts=texts, n=n, max_tokens=max_tokens, logprobs=logprobs,
        min_tokens=fields.take("min_tokens", _integer(0, max_tokens), 0),
        sampling=_sampling(fields, limits),
        seed=fields.take("seed", _integer(-(2**63), 2**63 - 1), None, secrets.randbelow(2**31)),
        stop=_stops(fields) + (stop_strings() if chat else ()),
        stream=(stream := fields.take("stream", _flag, False)),
        include_usage=_include_usage(fields, stream),
        force_steps=fields.take("force_steps", _integer(1, limits.max_steps), 0),
        keep_depth=fields.take("depth_update", _one_of(DEPTH_UPDATES), "token") == "turn",
    )  # fmt: skip
    for name, nothing in _NOTHING.items():
        fields.take(name, _asking_for_nothing(nothing, _INSTEAD.get(name)), None)
    for name in _LABELS:
        fields.take(name, lambda value: value, None)
    fields.check_all_taken()
    return asked


class _Fields:
    """The fields of an object, taken one by one. null is as if it were left out."""

    def __init__(self, values: dict[str, Any]):
        self._values, self._known = values, []

    def take(self, name: str, check: Callable[[Any], Any], *defaults: Any) -> Any:
        """The checked value; without one, the last of the defaults."""
        self._known.append(name)
        value = self._values.pop(name, None)
        if value is None:
            return defaults[-1]
        try:
            return check(value)
        except ValueError as error:
            raise _bad(name, f"{name} {error}") from error

    def check_all_taken(self) -> None:
        """Raise ApiError for a field that nobody asked for."""
        for name in self._values:
            known = ", ".join(sorted(set(self._known) - _NOTHING.keys()))
            raise _bad(name[:64], f"unknown field {_shown(name)}; this endpoint knows {known}")


def _object(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        ) from error
    try:
        found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twice, parse_float=_finite)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply; send one flat JSON object") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {_shown(found)}; send a JSON object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is larger than any float")
    return value


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the field {_shown(twice)} is there twice")
    return found


def _bad(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message.encode("utf-8", "replace").decode("utf-8"), param=param, code=code)


def _shown(value: Any) -> str:
    """A value as it may stand in a message: short, and with nothing that UTF-8 cannot carry."""
    shown = ascii(value) if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} must be a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} must be true or false")
    return value


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not is_int(value) or not least <= value <= most:
            raise ValueError(f"{_shown(value)} must be an integer in {least}..{most}")
        return value

    return check


def _number(least: float, most: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if not is_number(value) or not least <= value <= most:
            raise ValueError(f"{_shown(value)} must be a number in {least:g}..{most:g}")
        return float(value)

    return check


def _one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{_shown(value)} is none of {', '.join(known)}")
        return value

    return check


def _asking_for_nothing(nothing: tuple, instead: str | None) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in nothing):
            remedy = f"use {instead}" if instead else "leave it out"
            raise ValueError(f"{_shown(value)} is not offered by this server; {remedy}")

    return check


def _sampling(fields: _Fields, limits: Limits) -> Sampling:
    n_ids = min(limits.vocab_size, N_GPT2_IDS)
    top_k = fields.take("top_k", _integer(0, n_ids), 0)
    found = {
        "temperature": fields.take("temperature", _number(0, 2), 1.0),
        "top_p": fields.take("top_p", _number(0, 1), 1.0),
        "min_p": fields.take("min_p", _number(0, 1), 0.0),
        "repetition_penalty": fields.take("repetition_penalty", _number(1, 100), 1.0),
    }
    try:
        return Sampling(top_k=top_k or None, **found)
    except ValueError as error:
        raise _bad(next((name for name in found if str(error).startswith(name)), "top_k"), str(error)) from error


def _stops(fields: _Fields) -> tuple[str, ...]:
    def check(value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS:
            raise ValueError(f"{_shown(value)} must be a string or a list of at most {MAX_STOPS}")
        for one in stops:
            if not isinstance(one, str) or not 1 <= len(one) <= MAX_STOP_CHARS:
                raise ValueError(f"{_shown(one)} must be a string of 1..{MAX_STOP_CHARS} characters")
            checked_text(one, "string")
        return tuple(stops)

    return fields.take("stop", check, ())


def _logprobs(fields: _Fields) -> int | None:
    return fields.take("logprobs", _integer(0, MAX_TOP), None)


def _chat_logprobs(fields: _Fields) -> int | None:
    wanted, top = fields.take("logprobs", _flag, False), fields.take("top_logprobs", _integer(0, MAX_TOP), None)
    if top is not None and not wanted:
        raise _bad("top_logprobs", "top_logprobs needs logprobs true")
    return (top or 0) if wanted else None


def _include_usage(fields: _Fields, stream: bool) -> bool:
    def check(value: Any) -> bool:
        if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
            raise ValueError(f"{_shown(value)} must be an object with include_usage")
        if not stream:
            raise ValueError("needs stream true")
        wanted = value.get("include_usage")
        return False if wanted is None else _flag(wanted)

    return fields.take("stream_options", check, False)


def _max_tokens(fields: _Fields, chat: bool, limits: Limits, longest: int) -> int:
    name, check, most = "max_tokens", _integer(1, limits.most), min(limits.most, limits.window - longest)
    asked = fields.take(name, check, None)
    if chat and (other := fields.take("max_completion_tokens", check, None)) is not None:
        if asked not in (None, other):
            raise _bad(name, f"max_tokens {asked} and max_completion_tokens {other} differ; give one")
        name, asked = "max_completion_tokens", other
    if asked is None:
        asked = most if chat else min(16, most)
    if asked > most or most < 1:
        param = "messages" if chat else "prompt"
        raise _bad(
            param,
            f"the prompt has {longest:,} tokens and {max(asked, 1):,} are to follow; the model's window holds "
            f"{limits.window:,}: shorten the prompt or lower {name}",
            "context_length_exceeded",
        )
    return asked


def _check_length(text: str, limits: Limits, what: str) -> None:
    checked_text(text, what)
    if len(text) > limits.window * LONGEST_TOKEN:
        raise ValueError(
            f"has {len(text):,} characters, more than the model's window of {limits.window:,} tokens can hold"
        )


def _prompts(fields: _Fields, limits: Limits, tokenizer: Tokenizer, echo: bool) -> tuple[list[list[int]], list[str]]:
    def ids_of(one: Any) -> list[int]:
        if isinstance(one, str):
            if not one:
                raise ValueError("is empty; give at least one character")
            _check_length(one, limits, "the text")
            return tokenizer.encode(one)
        if not isinstance(one, list) or not one:
            raise ValueError(f"{_shown(one)} must be a text or a list of token ids, not empty")
        if len(one) > limits.window:
            return one[: limits.window + 1]  # too long whatever it says: the window's error follows
        top = min(limits.vocab_size, N_GPT2_IDS)
        for token in one:
            if not is_int(token) or not 0 <= token < top:
                raise ValueError(f"has the token {_shown(token)}; ids are integers in 0..{top - 1}")
        return one

    def check(value: Any) -> list[list[int]]:
        several = isinstance(value, list) and value and not is_int(value[0])
        given = value if several else [value]
        if len(given) > MAX_CHOICES:
            raise ValueError(f"is a list of {len(given):,}; at most {MAX_CHOICES} a request")
        return [ids_of(one) for one in given]

    # as documented by OpenAI: without a prompt the text begins anew
    prompts = fields.take("prompt", check, [[END_OF_TEXT]])
    texts = [tokenizer.decode(i for i in ids if i != END_OF_TEXT) for ids in prompts] if echo else []
    return prompts, texts


def _conversation(fields: _Fields, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    def check(value: Any) -> list[int]:
        if not isinstance(value, list) or not value:
            raise ValueError("must be a list with at least one message")
        if len(value) > limits.window:
            raise ValueError(f"are {len(value):,}, more than the model's window of {limits.window:,} tokens can hold")
        messages = [_message(one) for one in value]
        _check_length("".join(one["content"] for one in messages), limits, "the text")
        return prompt(messages, tokenizer, INSTRUCTION)

    ids = fields.take("messages", check, None)
    if ids is None:
        raise _bad("messages", "messages is missing; give a list with at least one message")
    return ids


def _message(one: Any) -> dict[str, str]:
    if not isinstance(one, dict):
        raise ValueError(f"has {_shown(one)}, which must be an object with role and content")
    extra = {name for name, value in one.items() if value not in (None, [], "")} - {"role", "content", "name"}
    if extra:
        raise ValueError(f"has a message with {_shown(min(extra))}, which is not offered; leave it out")
    role, content = one.get("role"), one.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"has the content {_shown(part)}; only texts are offered")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str):
        raise ValueError(f"has the role {_shown(role)}, which must be system, user or assistant")
    if not isinstance(content, str):
        raise ValueError(f"has the content {_shown(content)}, which must be a text")
    return {"role": "system" if role == "developer" else role, "content": content}
