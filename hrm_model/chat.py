"""A conversation with a model: history, window, settings. No terminal in it.

    session = ChatSession(model, get_tokenizer(), ChatSettings(seed=1))
    for event in session.ask("What is a prime?"):
        print(event.text, end="")

The history keeps every turn; a prompt has the instruction and the newest whole turns that fit into the window beside
room for an answer. A prompt begins with the ids of the turn before, so the cache computes only what is new.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .cache import HRMCache
from .chat_commands import COMMANDS, run_command
from .config import END_OF_TEXT, HRMConfig, is_int, is_number
from .generate import DEPTH_UPDATES, stream
from .sampling import Sampling
from .tally import Tally
from .template import INSTRUCTION, LABELS, Labels, answer_of, prompt, stop_strings, trim
from .text_input import checked_text


@dataclass(frozen=True)
class ChatSettings:
    """How answers are drawn, at which depth, and what a prompt looks like."""

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_k=50, top_p=0.95))
    """Temperature, filters, repetition penalty."""
    max_new_tokens: int = 200
    """Most tokens of an answer."""
    min_new_tokens: int = 0
    """Fewest tokens of an answer."""
    seed: int = 0
    """Turn t draws from a generator seeded with (seed, t)."""
    force_steps: int | None = None
    """Exact HRM steps of every token; None lets the head decide."""
    max_steps: int | None = None
    """Most HRM steps of a token; None is the model's hrm_max_steps."""
    halt_bias: float | None = None
    """Added to q_halt; None is the model's own."""
    depth_update: str = "token"
    """When the head decides anew: at every "token" or once a "turn"."""
    instruction: str = INSTRUCTION
    """What stands before the first question; "" is nothing."""
    labels: Labels = LABELS
    """What stands before questions and answers."""
    max_history: int | None = None
    """Most earlier turns in a prompt; None is as many as fit."""

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("seed", 0), ("max_history", 0)):
            value = getattr(self, name)
            if not ((is_int(value) and value >= least) or (value is None and name == "max_history")):
                raise ValueError(f"{name} {value!r:.40} must be an integer of at least {least}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}; lower the one "
                "or raise the other"
            )
        for name in ("force_steps", "max_steps"):
            value = getattr(self, name)
            if value is not None and not (is_int(value) and value >= 1):
                raise ValueError(f"{name} {value!r:.40} must be an integer of at least 1, or none at all")
        if self.halt_bias is not None and (not is_number(self.halt_bias) or math.isnan(self.halt_bias)):
            raise ValueError(f"halt_bias {self.halt_bias!r:.40} must be a number; positive halts earlier")
        if self.depth_update not in DEPTH_UPDATES:
            raise ValueError(f"depth_update {self.depth_update!r:.40} is none of {', '.join(DEPTH_UPDATES)}")
        if not isinstance(self.instruction, str):
            raise ValueError(f"instruction {self.instruction!r:.40} is no text")
        checked_text(self.instruction, "the instruction")

    def limit(self, config: HRMConfig) -> int:
        """Most steps that a token can take under these settings."""
        return self.max_steps or config.hrm_max_steps

    def check(self, config: HRMConfig) -> None:
        """Raise ValueError if a model of `config` cannot be used with these settings."""
        self.sampling.check_vocabulary(config.vocab_size)
        if self.force_steps is not None and self.force_steps > self.limit(config):
            raise ValueError(
                f"{self.force_steps} steps are more than the {self.limit(config)} that this model takes at most; "
                f"choose 1 to {self.limit(config)}, or auto to let it decide"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; from_dict() reads them back."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        sampling = {name: getattr(self.sampling, name) for name in Sampling.__dataclass_fields__}
        return values | {"sampling": sampling, "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChatSettings:
        """Settings from what to_dict() gave.

        Raises:
            ValueError: an unknown or missing name, or a bad value.
        """
        _check_names(values, cls.__dataclass_fields__, "settings")
        _check_names(values["sampling"], Sampling.__dataclass_fields__, "sampling")
        labels = values["labels"]
        if not (isinstance(labels, list) and len(labels) == 2 and all(isinstance(text, str) for text in labels)):
            raise ValueError(f"labels {labels!r:.40} must be two texts")
        for name, value in values["sampling"].items():
            if not (is_number(value) or value is None):
                raise ValueError(f"{name} {value!r:.40} is no number")
        return cls(**values | {"sampling": Sampling(**values["sampling"]), "labels": Labels.of(*labels)})


class ChatSession:
    """A conversation with `model`.

    Args:
        model: an HRMForCausalLM in eval mode.
        tokenizer: as get_tokenizer() gives.
        settings: default ChatSettings().

    Raises:
        ValueError: settings that do not fit the model, or a window too small for the instruction.
    """

    commands = COMMANDS
    """Name -> what a line such as "/temp 0.5" does; see command()."""

    def __init__(self, model, tokenizer, settings: ChatSettings | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or ChatSettings()
        self.history: list[dict[str, str]] = []
        """Every question and answer, {"role", "content"} each; it never loses a turn."""
        self.tally = Tally()
        """Tokens, seconds and steps of all answers."""
        self.cache = self._new_cache(self.settings)
        self.left_out = 0
        """Oldest turns that were not in the last prompt because the window was full."""
        self.prompt_ids: list[int] = []
        """The last prompt."""
        self.reused = 0
        """How many of its first tokens the cache held already."""
        self.unknown = 0
        """Characters of the last question that a model of characters does not have."""
        self.over = False
        """Whether /exit was asked for."""
        self.show_steps = False
        """Whether a front end should show the steps of each token."""
        self.debug = False
        """Whether a front end should show prompt, seed and tokens."""

    @property
    def settings(self) -> ChatSettings:
        """What the next answer is made with. Setting it raises ValueError for what the model cannot do."""
        return self._settings

    @settings.setter
    def settings(self, settings: ChatSettings) -> None:
        settings.check(self.model.config)
        if hasattr(self, "cache") and settings.limit(self.model.config) > self.cache.max_steps:
            self.cache = self._new_cache(settings)
        self._settings = settings

    @property
    def turns(self) -> int:
        """Questions asked so far, those of a loaded conversation included."""
        return len(self.history) // 2

    @property
    def turn_seed(self) -> int:
        """The seed of the next answer: a function of (seed, number of the turn), so that a turn's answer does not
        depend on how many numbers the turns before it drew."""
        digest = hashlib.sha256(f"{self.settings.seed} {self.turns}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def ask(self, text: str) -> Iterator:
        """Answer a question: an iterator of generation events (see hrm_model.generate.stream), one a token.

        Question and answer enter the history when the iterator ends; closed early, or interrupted by Ctrl-C, the answer
        is what there was. If an error ends it, the history stays as it was.

        Raises:
            ValueError: at once, with the history as it was: nothing in it, no UTF-8, or longer than the window.
        """
        question = {"role": "user", "content": checked_text(text, "the message")}
        ids = self._prompt([*self._recent(), question])
        self.prompt_ids = ids
        self.reused = min(self.cache.common(0, ids), len(ids) - 1)
        return self._answer(question, ids)

    def set(self, **changes: Any) -> None:
        """Change settings; names of Sampling's fields change settings.sampling.

        Raises:
            ValueError: a bad value; the settings stay.
        """
        sampling = {name: value for name, value in changes.items() if name in Sampling.__dataclass_fields__}
        others = {name: value for name, value in changes.items() if name not in sampling}
        self.settings = replace(self.settings, sampling=replace(self.settings.sampling, **sampling), **others)

    def clear(self) -> None:
        """Forget the conversation; settings and counts stay."""
        self.history.clear()
        self.cache.clear(0)
        self.left_out = 0

    def command(self, line: str) -> str:
        """Run a line such as "/temp 0.5" and return what there is to tell, "" for nothing.

        Raises:
            ValueError: an unknown command or a bad value, in one line with value, limit and remedy; nothing changed.
            OSError: a file could not be read or written.
        """
        return run_command(self, line)

    def to_dict(self) -> dict[str, Any]:
        """Settings and messages as plain JSON values."""
        return {"settings": self.settings.to_dict(), "messages": [dict(m) for m in self.history]}

    def restore(self, settings: ChatSettings, messages: list[dict[str, str]]) -> None:
        """Go on from another conversation.

        Raises:
            ValueError: the settings do not fit this model; nothing changed.
        """
        self.settings = settings
        self.history[:] = messages
        self.left_out = 0

    def _new_cache(self, settings: ChatSettings) -> HRMCache:
        config = self.model.config
        try:
            return HRMCache(self.model, rows=1, max_steps=settings.max_steps)
        except ValueError as error:  # its remedies are those of a batch
            raise ValueError(
                f"max_steps {settings.limit(config)} needs more memory for a window of {config.block_size} tokens than "
                f"is free on {self.model.device}; take fewer steps"
            ) from error

    def _recent(self) -> list[dict[str, str]]:
        most = self.settings.max_history
        return self.history if most is None else self.history[len(self.history) - min(2 * most, len(self.history)) :]

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        s, window = self.settings, self.model.config.block_size
        how = self.tokenizer, s.instruction, s.labels
        alone = len(prompt(messages[-1:], *how))
        # Room for the answer, so that it need not push the instruction out: half of the window at most, and less
        # where the question itself is longer than the other half.
        room = min(s.max_new_tokens, window // 2)
        budget = max(window - room, min(alone, window - 1))
        kept = trim(messages, budget, *how)
        self.left_out = (len(messages) - len(kept)) // 2
        return prompt(kept, *how)

    def _stops(self) -> tuple[str, ...]:
        return stop_strings(self.settings.labels)

    def _answer(self, question: dict[str, str], ids: list[int]) -> Iterator:
        s = self.settings
        parts: list[str] = []
        events = stream(
            self.model,
            [ids],
            s.max_new_tokens,
            sampling=s.sampling,
            min_new_tokens=s.min_new_tokens,
            stop=self._stops(),
            stop_tokens=(END_OF_TEXT,),
            seed=self.turn_seed,
            max_steps=s.max_steps,
            force_steps=s.force_steps,
            halt_bias=s.halt_bias,
            depth_update=s.depth_update,
            cache=self.cache,
            drop_oldest=max(1, self.model.config.block_size // 8),  # each drop computes the window again
            tokenizer=self.tokenizer,
        )
        try:
            for event in self.tally.counted(events):
                parts.append(event.text)
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(question, parts)
            raise
        self._keep(question, parts)

    def _keep(self, question: dict[str, str], parts: list[str]) -> None:
        self.history += [question, {"role": "assistant", "content": answer_of("".join(parts))}]


def _check_names(values: Any, known: Any, what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} are a {type(values).__name__}, not an object")
    for problem, names in (("unknown", values.keys() - set(known)), ("missing", set(known) - values.keys())):
        if names:
            raise ValueError(f"{problem} in {what}: {', '.join(sorted(map(repr, names)))[:80]}")
