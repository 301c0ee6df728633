"""Text that comes from people and files: UTF-8 or a message that says where it is not."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path


def checked_text(text: str, name: str) -> str:
    """`text` itself, if UTF-8 can carry it. Bytes that were no UTF-8 reach Python as lone surrogates.

    Args:
        name: what the text is, for the message.

    Raises:
        ValueError: names the first byte or surrogate that is wrong, and where it is (bytes from the start, from 0).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code, offset = ord(text[error.start]), len(text[: error.start].encode("utf-8", "surrogateescape"))
        # 0xDC80..0xDCFF is how Python keeps a byte that it could not decode (PEP 383)
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise ValueError(
            f"{name} is not UTF-8: {what} at byte {offset}; use a UTF-8 terminal or file, or leave it out"
        ) from error
    return text


def read_text(path: str) -> str:
    """The text of a UTF-8 file; "-" is standard input. A byte order mark is taken off.

    Raises:
        OSError: it cannot be read.
        ValueError: bytes that are not UTF-8; names the file, the first such byte, its offset and a remedy.
    """
    name = "standard input" if path == "-" else path
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        likely = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise ValueError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,} of {len(data):,}; "
            f"convert it first, e.g. iconv -f {likely} -t utf-8"
        ) from error


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file ("-" is standard input), without their ends; empty lines at the end are left out.

    Raises:
        OSError, ValueError: as read_text(); ValueError also for an empty line in between, or no lines at all.
    """
    name = "standard input" if path == "-" else path
    # Not splitlines(): that also cuts at characters that are text, such as U+2028.
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{name} has no text; write one prompt a line into it")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"line {number:,} of {name} is empty; every line is a prompt, so take it out")
    return lines
