"""Who a model says it is: a few fields, the default of this project, and files of one's own."""

from __future__ import annotations

import unicodedata
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .values_file import read_values

TONES = ("friendly", "formal")
_LONGEST = 400


class PersonaError(ValueError):
    """A persona that cannot be used; the message lists everything that is wrong with it."""


@dataclass(frozen=True)
class Persona:
    """What a model says of itself. Answers are made of these fields and of nothing else that could be untrue.

    Raises:
        PersonaError: lists every field that is wrong.
    """

    name: str
    """what it is called, such as CosmicFish"""
    kind: str = "a language model"
    """what it is, with its article; it reads after "I am" """
    maker: str = ""
    """who made it; it reads after "I was made by". Empty: it says that it does not know"""
    description: str = ""
    """a sentence or two in the first person on how it works"""
    abilities: tuple[str, ...] = ("answer questions", "hold a short conversation")
    """what it can do; each reads after "I can" """
    limits: tuple[str, ...] = ("browse the internet", "remember earlier conversations")
    """what it cannot do; each reads after "I cannot" """
    tone: str = "friendly"
    """friendly, or formal: no contractions, no exclamation marks"""
    cutoff: str = ""
    """until when its knowledge goes, such as "June 2024". Empty: it says that it does not know"""

    def __post_init__(self):
        for name in ("abilities", "limits"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if faults := list(self._faults()):
            raise PersonaError("\n".join(faults))

    def _faults(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("abilities", "limits"):
                if not isinstance(value, tuple):
                    yield f"{field.name} is a {type(value).__name__}, expected a list of texts"
                    continue
                if not value:
                    yield f"{field.name} is empty; give at least one"
                for number, text in enumerate(value, 1):
                    yield from _text_faults(f"entry {number} of {field.name}", text, required=True)
            else:
                yield from _text_faults(field.name, value, required=field.name in ("name", "kind", "tone"))
        if isinstance(self.tone, str) and self.tone.strip() and self.tone not in TONES:
            yield f"tone {self.tone!r} is none of {', '.join(TONES)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as in a file."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def read_persona(path: str | Path) -> Persona:
    """The persona of a .json file, or of a .yaml or .yml file where PyYAML is installed.

    Raises:
        PersonaError: the file cannot be read or is of another kind, or keys or values are wrong; all are listed.
    """
    path = Path(path)
    values = _read(path)
    if not isinstance(values, dict):
        raise PersonaError(f"persona {path} holds a {type(values).__name__}, not an object; {_allowed()}")
    known = {field.name for field in fields(Persona)}
    faults = [f"unknown key {key!r}" for key in values if key not in known]
    required = [f.name for f in fields(Persona) if f.default is MISSING]
    faults += [f"{name} is missing" for name in required if name not in values]
    # Missing ones have a stand-in, so that what else is wrong is said at the same time.
    try:
        persona = Persona(**dict.fromkeys(required, "?") | {k: v for k, v in values.items() if k in known})
    except PersonaError as error:
        faults += str(error).splitlines()
    if faults:
        raise PersonaError(f"persona {path} cannot be used:\n  " + "\n  ".join(faults) + f"\n{_allowed()}")
    return persona


def _read(path: Path) -> Any:
    try:
        return read_values(path, "persona")
    except ValueError as error:
        raise PersonaError(str(error)) from error


def _text_faults(what: str, value: Any, required: bool):
    if not isinstance(value, str):
        yield f"{what} is a {type(value).__name__}, expected a text"
    elif required and not value.strip():
        yield f"{what} is empty"
    elif len(value.strip().splitlines()) > 1:
        yield f"{what} has several lines; give one"
    elif any(unicodedata.category(char) in ("Cc", "Cs") for char in value.strip()):
        yield f"{what} has control characters or half ones: {value!a}"
    elif len(value) > _LONGEST:
        yield f"{what} has {len(value)} characters, at most {_LONGEST} fit into an answer"


def _allowed() -> str:
    names = [f"{f.name} (required)" if f.default is MISSING else f.name for f in fields(Persona)]
    return f"keys are {', '.join(names)}"


DEFAULT_PERSONA = Persona(
    name="CosmicFish",
    kind="a small hierarchical-reasoning language model",
    maker="an open-source project",
    description="I run a variable number of reasoning steps: few where a word is easy, more where it is hard.",
    abilities=(
        "answer short questions about Python's standard library",
        "say what a module, a class or a function is for",
        "hold a short conversation",
    ),
    limits=("browse the internet", "remember earlier conversations", "see pictures", "promise that I am right"),
)
