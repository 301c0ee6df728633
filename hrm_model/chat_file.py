"""Conversations as files: written whole or not at all, read with nothing taken on trust."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import write_file
from .template import check_messages
from .text_input import checked_text

FORMAT = "hrm-chat"
VERSION = 1
MAX_BYTES = 16 * 2**20
"""Larger than any conversation; a file beyond it was named by mistake."""


def write_chat(path: str, content: dict[str, Any], overwrite: bool) -> Path:
    """Write a conversation to a JSON file that appears whole or not at all.

    Args:
        path: the file; "~" is the home directory.
        content: {"settings": ..., "messages": ...} of plain JSON values.
        overwrite: replace a regular file that is there.

    Returns:
        The path.

    Raises:
        ValueError: no path, something there that may not be replaced, no folder for it, or it cannot be written.
    """
    target = _path(path, "/save")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name a file, e.g. {target / 'chat.json'}")
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"{target} is no regular file; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent}; make it first, or choose another")
    data = json.dumps({"format": FORMAT, "version": VERSION} | content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_file(target.resolve(), data.encode("utf-8"), overwrite)  # resolved: a link stays a link
    except FileExistsError:
        raise ValueError(f"{target} exists; choose another name, or replace it with /save! {path}") from None
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}; nothing was saved, try another place") from error
    return target


def read_chat(path: str, settings_of: Callable[[dict[str, Any]], Any]) -> tuple[Path, Any, list[dict[str, str]]]:
    """Read what write_chat() wrote.

    Args:
        settings_of: makes settings of their JSON values, raising ValueError for bad ones.

    Returns:
        The path, the settings, the messages: questions and answers in turn, ending with an answer.

    Raises:
        ValueError: no path, no regular file, too large, not UTF-8, not JSON, or not a conversation; in one line.
    """
    source = _path(path, "/load")
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ValueError(f"{source} is {what}; name a file that /save wrote")
        if status.st_size > MAX_BYTES:
            raise ValueError(
                f"{source} has {status.st_size:,} bytes, over the limit of {MAX_BYTES:,}; name a file that /save wrote"
            )
        data = source.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}; check the path") from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{source} is not JSON ({reason}); name a file that /save wrote") from None
    try:
        return source, settings_of(_object(content, "settings")), _messages(content)
    except ValueError as error:
        raise ValueError(f"{source} is no saved chat: {' '.join(str(error).split())[:200]}") from error


def _path(path: str, command: str) -> Path:
    if not path:
        raise ValueError(f"{command} needs a file; write e.g. {command} chat.json")
    if "\0" in path:
        raise ValueError(f"{path!r:.40} cannot be a file's name; choose another")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~someone who does not exist
        raise ValueError(f"{path} cannot be a path: {error}; write it without ~") from error


def _object(content: Any, key: str) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'it has no "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r:.20}, this program reads {VERSION}")
    if not isinstance(content.get(key), dict):
        raise ValueError(f"it has no {key}")
    return content[key]


def _messages(content: dict[str, Any]) -> list[dict[str, str]]:
    messages = content.get("messages")
    if not isinstance(messages, list):
        raise ValueError("it has no list of messages")
    if not messages:
        return []
    check_messages(messages)
    if messages[0]["role"] == "system" or messages[-1]["role"] != "assistant":
        raise ValueError("its messages do not begin with a question and end with an answer")
    for number, message in enumerate(messages, 1):
        checked_text(message["content"], f"message {number}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
