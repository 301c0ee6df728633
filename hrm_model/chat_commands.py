"""The lines that begin with "/" in a chat: what each does to a session, and what it answers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from .chat_file import read_chat, write_chat
from .template import INSTRUCTION
from .terminal import as_typed
from .text_input import checked_text


@dataclass(frozen=True)
class Command:
    """One command: how it is written, what it is for, and what it does with (session, argument)."""

    usage: str
    help: str
    run: Callable[..., str]


def run_command(session, line: str) -> str:
    """Run a line that begins with "/"; returns what there is to tell.

    Raises:
        ValueError: an unknown command or a bad value.
        OSError: a file could not be read or written.
    """
    name, argument = [*line.split(None, 1), ""][:2]
    name = _ALIASES.get(name.lower(), name.lower())
    if name not in session.commands:
        near = difflib.get_close_matches(name, [*session.commands, *_ALIASES], n=1)
        remedy = f"did you mean {near[0]}?" if near else 'to send it as a message, put it between """ and """;'
        raise ValueError(f"unknown command {_short(name)}; {remedy} /help lists the commands")
    command, argument = session.commands[name], checked_text(argument.strip(), f"what follows {name}")
    if argument and " " not in command.usage:
        raise ValueError(f"{name} takes nothing after it, not {_short(argument)}; write {name} alone")
    return command.run(session, argument)


def _help(session, argument: str) -> str:
    width = max(len(c.usage) for c in session.commands.values())
    lines = [f"  {c.usage:<{width}}  {c.help}" for c in session.commands.values()]
    lines.append('A line that ends in a backslash goes on in the next; """ begins and ends a block of lines.')
    lines.append("Ctrl-C stops an answer, or clears the line; twice at an empty line, or Ctrl-D, leaves.")
    return "\n".join(lines)


def _clear(session, argument: str) -> str:
    session.clear()
    return "conversation cleared"


def _exit(session, argument: str) -> str:
    session.over = True
    return ""


def _stats(session, argument: str) -> str:
    config, s, tally = session.model.config, session.settings, session.tally
    limit = s.limit(config)
    depth = f"{s.force_steps} for every token" if s.force_steps else f"decided by the model, 1 to {limit}"
    left_out = f", the oldest {session.left_out} not in the window" if session.left_out else ""
    lines = [
        f"turns    {session.turns}{left_out}",
        f"window   {len(session.cache.ids(0))} of {config.block_size} tokens",
        f"speed    {tally.rate:.1f} tokens/s, {tally.tokens} tokens in {tally.seconds:.1f} s",
        f"steps    {depth}; mean {tally.mean_steps:.2f}",
        f"cache    {session.cache.nbytes / 2**20:.1f} MiB",
        f"draws    {_describe(s)}",
    ]
    if tally.tokens:
        lines += ["steps of a token, how many tokens took so many:", *tally.histogram(limit)]
    return "\n".join(lines)


def _describe(s) -> str:
    p = s.sampling
    top_k = "off" if p.top_k is None else p.top_k
    return (
        f"temperature {p.temperature:g}, top-k {top_k}, top-p {p.top_p:g}, min-p {p.min_p:g}, "
        f"penalty {p.repetition_penalty:g}, at most {s.max_new_tokens} tokens, seed {s.seed}"
    )


def _save(session, argument: str) -> str:
    return _write(session, argument, overwrite=False)


def _save_over(session, argument: str) -> str:
    return _write(session, argument, overwrite=True)


def _write(session, argument: str, overwrite: bool) -> str:
    path = write_chat(argument, session.to_dict(), overwrite)
    return f"saved {session.turns} turns and the settings to {path}"


def _load(session, argument: str) -> str:
    path, settings, messages = read_chat(argument, type(session.settings).from_dict)
    try:
        session.restore(settings, messages)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    return f"loaded {session.turns} turns and the settings from {path}; {_describe(settings)}"


def _number(name: str, field: str, convert: Callable[[str], float], example: str, words: dict | None = None):
    """A command that shows a setting without a value and changes it with one; `words` are values in letters."""

    def run(session, argument: str) -> str:
        word = argument.lower()
        if not argument:
            where = session.settings.sampling if hasattr(session.settings.sampling, field) else session.settings
            return f"{name} is {_shown(getattr(where, field), words)}; change it with e.g. {example}"
        if words and word in words:
            value = words[word]
        else:
            try:
                value = convert(argument)
            except ValueError:
                kind = "an integer" if convert is int else "a number"
                others = f" or {' or '.join(words)}" if words else ""
                raise ValueError(f"{name} {_short(argument)} is not {kind}{others}; write e.g. {example}") from None
        try:
            session.set(**{field: value})
        except ValueError as error:
            typed = {field: example.split()[0], "min_new_tokens": "--min-new-tokens"}
            raise as_typed(error, typed | {"None for all": "off", "leave it out to keep": "off keeps"}) from error
        return f"{name} {_shown(value, words)}"

    return run


def _shown(value, words: dict | None) -> str:
    return next((word for word, meaning in (words or {}).items() if meaning == value), f"{value}".removesuffix(".0"))


def _hrm(session, argument: str) -> str:
    limit = session.settings.limit(session.model.config)
    if not argument:
        forced = session.settings.force_steps
        state = f"every token takes {forced}" if forced else "the model decides"
        return f"steps: {state}; /hrm N forces N of 1 to {limit}, /hrm auto lets the model decide"
    if argument.lower() == "auto":
        session.set(force_steps=None)
        return f"the model decides, up to {limit} steps a token"
    try:
        steps = int(argument)
    except ValueError:
        steps = 0
    if not 1 <= steps <= limit:
        raise ValueError(
            f"/hrm {_short(argument)} is none of 1 to {limit}, the steps that this model takes; "
            f"write e.g. /hrm {limit}, or /hrm auto to let it decide"
        )
    session.set(force_steps=steps)
    return f"every token takes exactly {steps} step{'s' if steps > 1 else ''}"


def _show(session, argument: str) -> str:
    session.show_steps = _switch("/show", session.show_steps, argument)
    return f"steps of each token are {'shown' if session.show_steps else 'not shown'}"


def _debug(session, argument: str) -> str:
    session.debug = _switch("/debug", session.debug, argument)
    return f"prompt, seed and tokens are {'shown' if session.debug else 'not shown'}"


def _switch(name: str, state: bool, argument: str) -> bool:
    word = argument.lower()
    if word not in ("", "on", "off"):
        raise ValueError(f"{name} {_short(argument)} is neither on nor off; {name} alone changes from one to the other")
    return not state if not word else word == "on"


def _system(session, argument: str) -> str:
    if not argument:
        return f"the instruction is: {session.settings.instruction or '(none)'}"
    values = {"default": INSTRUCTION, "none": ""}
    session.set(instruction=values.get(argument.lower(), argument))
    return f"the instruction is now: {session.settings.instruction or '(none)'}"


def _short(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:37] + "...")


_OFF = {"off": None}
COMMANDS: dict[str, Command] = {
    "/help": Command("/help", "this list", _help),
    "/clear": Command("/clear", "begin a new conversation", _clear),
    "/exit": Command("/exit", "leave (also /quit, Ctrl-D)", _exit),
    "/stats": Command("/stats", "turns, window, speed, steps, memory", _stats),
    "/save": Command("/save PATH", "write settings and conversation to a new file", _save),
    "/save!": Command("/save! PATH", "the same, replacing a file that is there", _save_over),
    "/load": Command("/load PATH", "go on with a conversation that was saved", _load),
    "/temp": Command(
        "/temp X",
        "temperature; 0 always takes the likeliest token",
        _number("temperature", "temperature", float, "/temp 0.8"),
    ),
    "/topk": Command(
        "/topk N", "draw from the N likeliest tokens; off for all", _number("top-k", "top_k", int, "/topk 50", _OFF)
    ),
    "/topp": Command(
        "/topp X",
        "draw from the likeliest tokens that reach probability X together",
        _number("top-p", "top_p", float, "/topp 0.9"),
    ),
    "/minp": Command(
        "/minp X",
        "drop tokens less likely than X times the likeliest",
        _number("min-p", "min_p", float, "/minp 0.05"),
    ),
    "/penalty": Command(
        "/penalty X",
        "lower what was said already; 1 is off",
        _number("repetition penalty", "repetition_penalty", float, "/penalty 1.1"),
    ),
    "/tokens": Command(
        "/tokens N", "most tokens of an answer", _number("tokens of an answer", "max_new_tokens", int, "/tokens 200")
    ),
    "/hrm": Command("/hrm N|auto", "exactly N reasoning steps for every token, or as many as the model decides", _hrm),
    "/show": Command("/show [on|off]", "colour each token by the steps it took", _show),
    "/debug": Command("/debug [on|off]", "show prompt, seed and every token", _debug),
    "/system": Command("/system TEXT", "another instruction; default for the usual one, none for nothing", _system),
}
_ALIASES = {"/quit": "/exit", "/?": "/help"}
