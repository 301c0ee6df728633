"""Command-line flags out of a dataclass: one per field, its help the text under the field."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
from dataclasses import MISSING, fields
from typing import Any


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the body of the class, or of the nearest one it derives from."""
    classes = [c for c in reversed(cls.__mro__) if c is not object]
    bodies = [ast.parse(inspect.cleandoc("\n" + inspect.getsource(c))).body[0].body for c in classes]
    docs = {}
    for statement, after in itertools.chain.from_iterable(map(itertools.pairwise, bodies)):
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[statement.target.id] = after.value.value
    return docs


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    special: dict[str, dict[str, Any]],
    without: frozenset[str] = frozenset(),
) -> None:
    """Give `parser` a flag for every field of dataclass `cls` but those in `without`; `special` holds argparse
    arguments of some of them.

    Flags that are not given leave no trace in the parsed namespace, so that a recipe's value stays.
    """
    docs = field_docs(cls)
    for f in fields(cls):
        if f.name in without:
            continue
        default = f.default if f.default is not MISSING else f.default_factory()
        options: dict[str, Any] = {"help": docs[f.name], "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif isinstance(default, list):
            options |= {"nargs": "+", "type": float if "float" in str(f.type) else str, "metavar": "X"}
        else:
            options |= {"type": type(default), "metavar": type(default).__name__.upper()}
        options |= special.get(f.name, {})
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
