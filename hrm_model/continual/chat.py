"""A conversation with a character model: the language model's, but for what a prompt is and how an answer ends.

Such a model has no roles: it goes on with a text. A prompt is what was said so far, as one text, and then the question;
the answer is what the model writes after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..chat import ChatSession, ChatSettings
from ..chat_commands import COMMANDS, Command
from ..sampling import Sampling
from .modes import LONG, MODES, UNLIMITED, cycles, ends_naturally
from .store import History

SETTINGS = ChatSettings(sampling=Sampling(temperature=0.8), max_new_tokens=LONG, instruction="")


@dataclass
class Answering:
    """How answers come."""

    mode: str = "normal"
    live: bool = True
    """Shown as they come, or at once when they are there."""
    natural: bool = False
    """Whether the end of a sentence ends them."""


class ContinualSession(ChatSession):
    """A conversation with a character model.

    Args:
        model: as trained; modes run its weights with other N x T. tokenizer: a CharTokenizer. settings: default
            SETTINGS, temperature 0.8. history: what the model has seen, for /status.
    """

    def __init__(self, model, tokenizer, settings: ChatSettings | None = None, history: History | None = None):
        super().__init__(model, tokenizer, settings or SETTINGS)
        config = model.config
        self._models = {(config.hrm_H_cycles, config.hrm_L_cycles): model}
        self.learned = history
        trained = f"{config.hrm_H_cycles}x{config.hrm_L_cycles}"
        self.answering = Answering(next((n for n, pair in MODES.items() if "{}x{}".format(*pair) == trained), trained))

    def think(self, mode: str) -> tuple[int, int]:
        """Answer in this mode from now on; returns N and T. Raises ValueError for a mode that is none."""
        pair = cycles(mode)
        if pair not in self._models:
            self._models[pair] = next(iter(self._models.values())).with_cycles(*pair)
        self.model, self.answering.mode = self._models[pair], mode.strip().lower()
        self.cache = self._new_cache(self.settings)
        return pair

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        question = messages[-1]["content"]
        if not question:
            raise ValueError("the message is empty; give the beginning of a text")
        before = sum(self.tokenizer.unknown.values())
        self.tokenizer.encode(question)
        counted = self.tokenizer.unknown.copy()
        self.unknown = sum(counted.values()) - before
        pieces = [m["content"] + ("\n" if m["role"] == "assistant" else "") for m in messages]
        window = self.model.config.block_size
        budget = max(window - min(self.settings.max_new_tokens, window // 2), min(len(question), window))
        ids = self.tokenizer.encode("".join(pieces))[-budget:]
        self.tokenizer.unknown = counted  # the whole prompt met what was counted when it was said
        earlier, shown = messages[:-1], len(ids) - len(question)
        self.left_out = 0
        for message in reversed(earlier):  # turns of which nothing is in the prompt
            self.left_out += message["role"] == "user" and shown <= 0
            shown -= len(message["content"])
        return ids

    def _stops(self) -> tuple[str, ...]:
        return ()

    def _answer(self, question: dict[str, str], ids: list[int]) -> Iterator:
        events = super()._answer(question, ids)
        text, waiting = "", []
        try:
            for event in events:
                text += event.text
                ended = self.answering.natural and event.finish is None and ends_naturally(text)
                if ended:
                    event = event._replace(finish="stop")
                if self.answering.live:
                    yield event
                else:
                    waiting.append(event)
                if ended:
                    break
        finally:
            events.close()  # keeps what there is
        yield from waiting

    def status(self) -> str:
        """Model, mode, and what it has learned, for /status."""
        config, a = self.model.config, self.answering
        n, t = config.hrm_H_cycles, config.hrm_L_cycles
        unlimited = self.settings.max_new_tokens >= UNLIMITED
        lines = [
            f"model    {self.model.num_parameters():,} parameters, {config.hrm_L_layers} L + {config.hrm_H_layers} H "
            f"layers, {config.n_chars} characters in {config.vocab_size} rows, window {config.block_size}",
            f"mode     {a.mode}: {n} x {t}; temperature {self.settings.sampling.temperature:g}",
            f"answers  {'as they come' if a.live else 'at once'}, "
            + ("no limit" if unlimited else f"at most {self.settings.max_new_tokens} characters")
            + (", ended at a sentence's end" if a.natural else ""),
            f"unknown  {sum(self.tokenizer.unknown.values())} characters met that it does not have"
            + (f": {' '.join(map(repr, self.tokenizer.unknown))[:60]}" if self.tokenizer.unknown else ""),
        ]
        for number, seen in enumerate(self.learned.texts if self.learned else [], 1):
            lines.append(f"text {number}   {seen.name}, {seen.characters:,} characters, {seen.status}")
        return "\n".join(lines)


def _mode(session, argument: str) -> str:
    if not argument:
        shown = ", ".join(f"{name} {n}x{t}" for name, (n, t) in MODES.items())
        return f"mode {session.answering.mode}; there are {shown}, and any N x T such as /mode 4x2"
    n, t = session.think(argument)
    return f"mode {session.answering.mode}: {n} cycles x {t} steps"


def _interactive(session, argument: str) -> str:
    session.answering.live = True
    return "answers are shown as they come"


def _batch(session, argument: str) -> str:
    session.answering.live = False
    return "answers are shown when they are whole"


def _unlimited(session, argument: str) -> str:
    off = session.settings.max_new_tokens >= UNLIMITED
    session.set(max_new_tokens=LONG if off else UNLIMITED)
    return f"answers have at most {LONG} characters" if off else f"no limit ({UNLIMITED:,}); Ctrl-C ends an answer"


def _natural(session, argument: str) -> str:
    session.answering.natural = not session.answering.natural
    return f"answers {'end' if session.answering.natural else 'no longer end'} at the end of a sentence"


def _status(session, argument: str) -> str:
    return session.status()


def _history(session, argument: str) -> str:
    if not session.history:
        return "nothing was said yet"
    return "\n".join(f"{'you' if m['role'] == 'user' else 'it '}  {m['content']}" for m in session.history)


ContinualSession.commands = {name: c for name, c in COMMANDS.items() if name != "/system"} | {
    "/mode": Command("/mode NAME", "fast 1x1, normal 2x2, deep 3x2, extreme 6x4, or N x T", _mode),
    "/interactive": Command("/interactive", "show answers as they come", _interactive),
    "/batch": Command("/batch", "show answers when they are whole", _batch),
    "/unlimited": Command("/unlimited", "no limit to an answer, or the limit again", _unlimited),
    "/natural": Command("/natural", "end answers at the end of a sentence, or no longer", _natural),
    "/status": Command("/status", "the model, its mode and what it has learned", _status),
    "/history": Command("/history", "what was said so far", _history),
}
