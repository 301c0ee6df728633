"""Questions and answers about Python's standard library, made from its docstrings and signatures; the offline default.

    sources (read, not imported) and C docstrings -> objects: module, name, signature, first paragraph of the docstring
    -> a few conversations about each

Which form of a question an object gets depends on its name alone, so the same interpreter always gives the same data.
Every answer says what some docstring or signature says, nothing is made up.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from .chat_forms import Messages
from .sources import Report, c_docstrings, library_sources

_SKIPPED_MODULES = re.compile(
    r"(idlelib|lib2to3|turtledemo|ensurepip|pydoc_data|encodings|this|antigravity|test)(\.|$)"
)
_SENTENCE_CHARS = 15, 400
_SIGNATURE_CHARS = 160
# What belongs to this machine or reads badly: paths, addresses, interpreter sessions, tables, notes to maintainers.
_UNUSABLE = re.compile(r"/usr|/home|/tmp|[A-Z]:\\|0x[0-9a-f]{6,}|>>>|\.\.\. |TODO|XXX|FIXME|@\w|\|[^|]*\||--+|==+")

_ABOUT = {
    "function": (
        "What does {name} do?",
        "What is {name} for?",
        "Explain {name}.",
        "Tell me what the function {name} does.",
        "When would I use {name}?",
    ),
    "method": (
        "What does the method {name} do?",
        "What does {name} do?",
        "Explain the method {name}.",
        "What is the method {bare} of {owner} for?",
    ),
    "class": (
        "What is {name}?",
        "What is the class {name} for?",
        "Describe the class {name}.",
        "Tell me about {name}.",
    ),
    "module": (
        "What is the module {name} for?",
        "What does the module {name} do?",
        "Describe the module {name} of Python's standard library.",
    ),
}
_ARGUMENTS = (
    "What are the arguments of {name}?",
    "How do I call {name}?",
    "What is the signature of {name}?",
    "Which arguments does {name} take?",
)
_THEN_ARGUMENTS = (
    "What are its arguments?",
    "How do I call it?",
    "And its signature?",
    "Which arguments does it take?",
)
_WHICH_MODULE = (
    "Which module has {bare}?",
    "Where in the standard library is {bare}?",
    "From which module do I import {bare}?",
)
_WHICH_NAME = (
    "Which {kind} of the module {owner} is this: {about}",
    "{about} Which {kind} of {owner} is described here?",
)
_CONTENTS = ("Which {kinds} does the module {name} have?", "Name some {kinds} of the module {name}.")


class Documented(NamedTuple):
    """A module, class, function or method of the standard library with what its docstring says first."""

    kind: str
    owner: str
    """Module, for a method its class with the module; "" for a module."""
    bare: str
    signature: str
    """Such as "(obj, *, indent=None)"; "" where it is not known."""
    about: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.bare}" if self.owner else self.bare


def stdlib_conversations() -> Iterator[tuple[str, Messages]]:
    """(what it is about, messages) of each conversation. Those about one object have the same subject."""
    found = documented()
    modules_of = defaultdict(set)
    members = defaultdict(list)
    for thing in found:
        if thing.kind in ("function", "class"):
            modules_of[thing.bare].add(thing.owner)
            members[thing.owner, thing.kind].append(thing)
    for thing in found:
        for messages in _about(thing):
            yield thing.name, messages
        if thing.kind in ("function", "class"):
            if len(modules_of[thing.bare]) == 1:
                yield thing.name, _turns(_pick(_WHICH_MODULE, thing), f"{thing.bare} is in the module {thing.owner}.")
            if sum(other.about == thing.about for other in members[thing.owner, thing.kind]) == 1:
                yield thing.name, _turns(_pick(_WHICH_NAME, thing), f"{thing.name}")
        if thing.kind == "module":
            for kind, kinds in (("function", "functions"), ("class", "classes")):
                names = [member.bare for member in members[thing.name, kind]]
                if len(names) > 2:
                    question = _pick(_CONTENTS, thing).replace("{kinds}", kinds)
                    yield (
                        thing.name,
                        _turns(question, f"The module {thing.name} has, among others, {_list(names[:8])}."),
                    )


def documented() -> list[Documented]:
    """All public objects with a usable docstring, sorted by name, each once."""
    things = {}
    report = Report()
    for file, text in library_sources(report):
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")) or _SKIPPED_MODULES.match(module):
            continue
        with warnings.catch_warnings(), suppress(SyntaxError):  # whose parts are of another version
            warnings.simplefilter("ignore")  # sources may hold escapes that are deprecated
            for thing in _of_source(module, ast.parse(text)):
                things.setdefault(thing.name, thing)
    for module, path, signature, doc in c_docstrings():
        thing = _of_c(module, path, signature, doc)
        if thing:
            things.setdefault(thing.name, thing)
    return [things[name] for name in sorted(things)]


def _of_source(module: str, tree: ast.Module) -> Iterator[Documented]:
    if about := _first_paragraph(ast.get_docstring(tree)):
        yield Documented("module", "", module, "", about)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _function(node, "function", module)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if about := _first_paragraph(ast.get_docstring(node)):
                yield Documented("class", module, node.name, "", about)
            for part in node.body:
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from _function(part, "method", f"{module}.{node.name}")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str, owner: str) -> Iterator[Documented]:
    about = _first_paragraph(ast.get_docstring(node))
    if not about or node.name.startswith("_"):
        return
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if any(re.fullmatch(r"(\w+\.)?(cached_)?property|\w+\.(setter|getter|deleter)", d) for d in decorators):
        return  # an attribute to its users
    arguments = node.args
    if kind == "method" and "staticmethod" not in decorators:
        first = arguments.posonlyargs or arguments.args
        del first[:1]
    signature = f"({ast.unparse(arguments)})"
    yield Documented(kind, owner, node.name, signature if len(signature) <= _SIGNATURE_CHARS else "", about)


def _of_c(module: str, path: str, signature: str, doc: str) -> Documented | None:
    about = _first_paragraph(doc)
    name = re.sub(r"^(posix|nt)\.", "os.", path.removeprefix("builtins."))  # which os has imported
    parts = name.split(".")
    if not about or any(part.startswith("_") for part in parts):
        return None
    if path == module and name not in ("posix", "nt", "builtins"):
        return Documented("module", "", name, "", about)
    owner, bare = ".".join(parts[:-1]), parts[-1]
    within_class = len(path.split(".")) == 3
    kind = "method" if within_class else "class" if bare[:1].isupper() and not signature else "function"
    if within_class and not signature:
        return None  # perhaps an attribute
    signature = " ".join(signature.split())
    if within_class:
        signature = re.sub(r"^\(self(, /)?(, )?", "(", signature)
    usable = 0 < len(signature) <= _SIGNATURE_CHARS and "<" not in signature and "$" not in signature
    return Documented(kind, owner or "builtins", bare, signature if usable else "", about)


def _first_paragraph(doc: str | None) -> str:
    """The first paragraph as one line that ends a sentence; "" where there is none that stands on its own."""
    if not doc:
        return ""
    text = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    text = re.sub(r"``?([^`]*)``?", r"\1", re.sub(r":\w+:`~?([^`]*)`", r"\1", text))
    text = re.sub(r"\*(\w+)\*", r"\1", text)  # emphasis
    # "name(x) -> y" and the like are signatures, which the arguments are asked about.
    if re.match(r"[\w.]+\(.*\)", text) or text.endswith((":", ",")) or _UNUSABLE.search(text):
        return ""
    if not _SENTENCE_CHARS[0] <= len(text) <= _SENTENCE_CHARS[1] or " " not in text:
        return ""
    return text if text[-1] in ".!?" else text + "."


def _about(thing: Documented) -> Iterator[Messages]:
    """What it does and how it is called: as two conversations, or for one object in three as one of two turns."""
    question = _pick(_ABOUT[thing.kind], thing)
    if not thing.signature:
        yield _turns(question, thing.about)
        return
    call = f"{thing.name}{thing.signature}" if thing.kind == "function" else f"{thing.bare}{thing.signature}"
    call = call if thing.signature != "()" else f"It takes no arguments: {call}"
    if _number(thing.name) % 3 == 0:
        yield _turns(question, thing.about, _pick(_THEN_ARGUMENTS, thing), call)
    else:
        yield _turns(question, thing.about)
        yield _turns(_pick(_ARGUMENTS, thing), call)


def _pick(forms: tuple[str, ...], thing: Documented) -> str:
    form = forms[_number(forms[0] + thing.name) % len(forms)]
    for key, value in (("kind", thing.kind), ("owner", thing.owner), ("bare", thing.bare), ("name", thing.name)):
        form = form.replace("{" + key + "}", value)
    return form.replace("{about}", thing.about)


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


def _turns(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _list(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
