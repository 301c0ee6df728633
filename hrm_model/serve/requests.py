"""From the bytes of a request to jobs, or to one clear error. Fields are OpenAI's, and a few of our own.

Nothing is ignored silently: a field that is unknown, or known and not offered here, is an error unless its value asks
for nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import END_OF_TEXT, is_int
from ..generate import DEPTH_UPDATES
from ..sampling import N_GPT2_IDS, Sampling
from ..template import INSTRUCTION, prompt, stop_strings
from ..text_input import checked_text
from ..tokenizer import Tokenizer
from .errors import ApiError
from .fields import Fields, asking_for_nothing, bad, flag, integer, number, one_of, read_object, shown, string
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
    fields = Fields(read_object(data))
    model = fields.take("model", string, None)
    if model is not None and model != limits.model:
        raise ApiError(
            404,
            f"the model {shown(model)} is not here; this server has {limits.model!r}",
            param="model",
            code="model_not_found",
        )
    logprobs, texts, echo = _chat_logprobs(fields) if chat else _logprobs(fields), [], False
    if chat:
        prompts = [_conversation(fields, limits, tokenizer)]
    else:
        echo = fields.take("echo", flag, False)
        prompts, texts = _prompts(fields, limits, tokenizer, echo)
    n = fields.take("n", integer(1, MAX_CHOICES), 1)
    if n * len(prompts) > MAX_CHOICES:
        raise bad(
            "n", f"{len(prompts)} prompts with n {n} are {n * len(prompts)} choices; at most {MAX_CHOICES} a request"
        )
    if not chat:
        best_of = fields.take("best_of", integer(1, MAX_CHOICES), n)
        if best_of != n:
            raise bad("best_of", f"best_of {best_of} is not offered; leave it out, or make it n ({n})")
        if echo and logprobs is not None:
            raise bad("logprobs", "logprobs with echo is not offered: a prompt's own are not computed; leave one out")
    longest = max(map(len, prompts))
    max_tokens = _max_tokens(fields, chat, limits, longest)
    asked = Asked(
        chat=chat, prompts=prompts, texts=texts, n=n, max_tokens=max_tokens, logprobs=logprobs,
        min_tokens=fields.take("min_tokens", integer(0, max_tokens), 0),
        sampling=_sampling(fields, limits),
        seed=fields.take("seed", integer(-(2**63), 2**63 - 1), None, secrets.randbelow(2**31)),
        stop=_stops(fields) + (stop_strings() if chat else ()),
        stream=(stream := fields.take("stream", flag, False)),
        include_usage=_include_usage(fields, stream),
        force_steps=fields.take("force_steps", integer(1, limits.max_steps), 0),
        keep_depth=fields.take("depth_update", one_of(DEPTH_UPDATES), "token") == "turn",
    )  # fmt: skip
    for name, nothing in _NOTHING.items():
        fields.take(name, asking_for_nothing(nothing, _INSTEAD.get(name)), None)
    for name in _LABELS:
        fields.take(name, lambda value: value, None)
    fields.check_all_taken(_NOTHING)
    return asked


def _sampling(fields: Fields, limits: Limits) -> Sampling:
    n_ids = min(limits.vocab_size, N_GPT2_IDS)
    top_k = fields.take("top_k", integer(0, n_ids), 0)
    found = {
        "temperature": fields.take("temperature", number(0, 2), 1.0),
        "top_p": fields.take("top_p", number(0, 1), 1.0),
        "min_p": fields.take("min_p", number(0, 1), 0.0),
        "repetition_penalty": fields.take("repetition_penalty", number(1, 100), 1.0),
    }
    try:
        return Sampling(top_k=top_k or None, **found)
    except ValueError as error:
        raise bad(next((name for name in found if str(error).startswith(name)), "top_k"), str(error)) from error


def _stops(fields: Fields) -> tuple[str, ...]:
    def check(value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS:
            raise ValueError(f"{shown(value)} must be a string or a list of at most {MAX_STOPS}")
        for one in stops:
            if not isinstance(one, str) or not 1 <= len(one) <= MAX_STOP_CHARS:
                raise ValueError(f"{shown(one)} must be a string of 1..{MAX_STOP_CHARS} characters")
            checked_text(one, "string")
        return tuple(stops)

    return fields.take("stop", check, ())


def _logprobs(fields: Fields) -> int | None:
    return fields.take("logprobs", integer(0, MAX_TOP), None)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.take("logprobs", flag, False), fields.take("top_logprobs", integer(0, MAX_TOP), None)
    if top is not None and not wanted:
        raise bad("top_logprobs", "top_logprobs needs logprobs true")
    return (top or 0) if wanted else None


def _include_usage(fields: Fields, stream: bool) -> bool:
    def check(value: Any) -> bool:
        if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
            raise ValueError(f"{shown(value)} must be an object with include_usage")
        if not stream:
            raise ValueError("needs stream true")
        wanted = value.get("include_usage")
        return False if wanted is None else flag(wanted)

    return fields.take("stream_options", check, False)


def _max_tokens(fields: Fields, chat: bool, limits: Limits, longest: int) -> int:
    name, check, most = "max_tokens", integer(1, limits.most), min(limits.most, limits.window - longest)
    asked = fields.take(name, check, None)
    if chat and (other := fields.take("max_completion_tokens", check, None)) is not None:
        if asked not in (None, other):
            raise bad(name, f"max_tokens {asked} and max_completion_tokens {other} differ; give one")
        name, asked = "max_completion_tokens", other
    if asked is None:
        asked = most if chat else min(16, most)
    if asked > most or most < 1:
        param = "messages" if chat else "prompt"
        raise bad(
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


def _prompts(fields: Fields, limits: Limits, tokenizer: Tokenizer, echo: bool) -> tuple[list[list[int]], list[str]]:
    def ids_of(one: Any) -> list[int]:
        if isinstance(one, str):
            if not one:
                raise ValueError("is empty; give at least one character")
            _check_length(one, limits, "the text")
            return tokenizer.encode(one)
        if not isinstance(one, list) or not one:
            raise ValueError(f"{shown(one)} must be a text or a list of token ids, not empty")
        if len(one) > limits.window:
            return one[: limits.window + 1]  # too long whatever it says: the window's error follows
        top = min(limits.vocab_size, N_GPT2_IDS)
        for token in one:
            if not is_int(token) or not 0 <= token < top:
                raise ValueError(f"has the token {shown(token)}; ids are integers in 0..{top - 1}")
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


def _conversation(fields: Fields, limits: Limits, tokenizer: Tokenizer) -> list[int]:
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
        raise bad("messages", "messages is missing; give a list with at least one message")
    return ids


def _message(one: Any) -> dict[str, str]:
    if not isinstance(one, dict):
        raise ValueError(f"has {shown(one)}, which must be an object with role and content")
    extra = {name for name, value in one.items() if value not in (None, [], "")} - {"role", "content", "name"}
    if extra:
        raise ValueError(f"has a message with {shown(min(extra))}, which is not offered; leave it out")
    role, content = one.get("role"), one.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"has the content {shown(part)}; only texts are offered")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str):
        raise ValueError(f"has the role {shown(role)}, which must be system, user or assistant")
    if not isinstance(content, str):
        raise ValueError(f"has the content {shown(content)}, which must be a text")
    return {"role": "system" if role == "developer" else role, "content": content}
