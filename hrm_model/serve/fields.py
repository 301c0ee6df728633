"""The fields of a request's JSON object, each checked as it is taken, each fault one error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any

from ..config import is_int, is_number
from .errors import ApiError


class Fields:
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
            raise bad(name, f"{name} {error}") from error

    def check_all_taken(self, untold: Collection[str] = ()) -> None:
        """Raise ApiError for a field that nobody asked for. untold: known ones that the message does not list."""
        for name in self._values:
            known = ", ".join(sorted(set(self._known) - set(untold)))
            raise bad(name[:64], f"unknown field {shown(name)}; this endpoint knows {known}")


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400: not UTF-8, not JSON, no object, a name that is there twice."""
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
        raise ApiError(400, f"the body is {shown(found)}; send a JSON object")
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
        raise ValueError(f"the field {shown(twice)} is there twice")
    return found


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """400, about a field."""
    return ApiError(400, message.encode("utf-8", "replace").decode("utf-8"), param=param, code=code)


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and with nothing that UTF-8 cannot carry."""
    written = ascii(value) if isinstance(value, str) else json.dumps(value)
    return written if len(written) <= 60 else written[:57] + "..."


def string(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} must be a string")
    return value


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} must be true or false")
    return value


def integer(least: int, most: int) -> Callable[[Any], int]:
    """A check for integers of a range."""

    def check(value: Any) -> int:
        if not is_int(value) or not least <= value <= most:
            raise ValueError(f"{shown(value)} must be an integer in {least}..{most}")
        return value

    return check


def number(least: float, most: float) -> Callable[[Any], float]:
    """A check for numbers of a range."""

    def check(value: Any) -> float:
        if not is_number(value) or not least <= value <= most:
            raise ValueError(f"{shown(value)} must be a number in {least:g}..{most:g}")
        return float(value)

    return check


def one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    """A check for one of several words."""

    def check(value: Any) -> str:
        if value not in known:
            raise ValueError(f"{shown(value)} is none of {', '.join(known)}")
        return value

    return check


def asking_for_nothing(nothing: tuple, instead: str | None) -> Callable[[Any], None]:
    """A check of a field that is not offered: only values that ask for nothing pass. instead: the field that is."""

    def check(value: Any) -> None:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in nothing):
            remedy = f"use {instead}" if instead else "leave it out"
            raise ValueError(f"{shown(value)} is not offered by this server; {remedy}")

    return check
