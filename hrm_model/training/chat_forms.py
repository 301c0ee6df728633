"""The forms in which one line of a file, or one row of a table, may hold a conversation; each becomes messages.

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}       ShareGPT's
    {"conversations": ["question", "answer", ...]}                    LIMA's
    {"instruction": "...", "input": "...", "output": "..."}           Alpaca's; "input" may be missing
    {"instruction": "...", "context": "...", "response": "..."}       Dolly's; "context" may be missing
    {"prompt": "...", "response": "..."}, {"prompt": "...", "completion": "..."}, {"question": "...", "answer": "..."}

With a key "system" beside it, its text takes the place of the instruction that a conversation otherwise begins with.
OpenAssistant's rows are messages of trees; `oasst_conversations` reads all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..template import check_messages

Messages = list[dict[str, str]]
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
}
# (question, what it is about or None, answer): the first whose question and answer are there is the form of a line.
_PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("question", None, "answer"),
)


def messages_of(value: Any) -> Messages:
    """The messages of one line; the first system message and then question and answer in turns. A last question without
    an answer is left out.

    Raises:
        ValueError: no known form, a text that is none, roles that are unknown or not in turn, no answer at all.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a JSON {type(value).__name__} is no object; {_KNOWN}")
    if "messages" in value:
        messages = _listed(value["messages"], "messages", "role", "content")
    elif "conversations" in value:
        messages = _listed(value["conversations"], "conversations", "from", "value")
    else:
        messages = _pair(value)
    if value.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(value, "system")})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no answer in it")
    check_messages(messages)
    return messages


def oasst_conversations(rows: Iterable[Mapping[str, Any]], problem: Callable[[str], object]) -> Iterator[Messages]:
    """A conversation of each English tree of OpenAssistant's messages: from its first question along the best ranked
    replies, down to the last answer. `problem` is told of trees that have no answer."""
    children: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("lang") == "en" and not row.get("deleted"):
            children[row["parent_id"]].append(row)
    for replies in children.values():
        replies.sort(key=lambda row: float("inf") if row.get("rank") is None else row["rank"])  # rank 0 is the best
    for root in sorted(children[None], key=lambda row: row["message_id"]):
        path = [root]
        while replies := children.pop(path[-1]["message_id"], None):  # taken out, as damaged data may have circles
            path.append(replies[0])
        try:
            yield messages_of({"messages": [{"role": row["role"], "content": row["text"]} for row in path]})
        except ValueError as error:
            problem(f"tree {root['message_id']}: {error}")


_KNOWN = (
    "give messages, conversations, or a pair such as prompt and response, instruction and output, question and answer"
)


def _listed(entries: Any, key: str, role_key: str, text_key: str) -> Messages:
    if not isinstance(entries, list):
        raise ValueError(f"{key!r} is a {type(entries).__name__}, not a list")
    messages = []
    for number, entry in enumerate(entries):
        if isinstance(entry, str) and key == "conversations":
            messages.append({"role": ("user", "assistant")[number % 2], "content": entry})
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"entry {number + 1} of {key!r} is a {type(entry).__name__}, not an object")
        keys = (role_key, text_key) if role_key in entry else ("role", "content")
        role = entry.get(keys[0])
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise ValueError(f"entry {number + 1} of {key!r} has the role {role!r}; known are {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[role.lower()], "content": _text(entry, keys[1])})
    return messages


def _pair(value: Mapping[str, Any]) -> Messages:
    for question, about, answer in _PAIRS:
        if question in value and answer in value:
            text = _text(value, question)
            if about and value.get(about):
                text = f"{text.rstrip()}\n\n{_text(value, about)}"
            return [{"role": "user", "content": text}, {"role": "assistant", "content": _text(value, answer)}]
    raise ValueError(f"no known form: its keys are {list(value)[:6]}; {_KNOWN}")


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is a {type(text).__name__}, not a string")
    return text
