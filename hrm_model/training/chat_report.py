"""What became of the conversations of a source: how many were dropped or changed, why, and the first of each."""

from __future__ import annotations

from typing import Any

_EXAMPLES = 3
_EXAMPLE_CHARS = 120


class ChatReport:
    """Counts by reason, with a few examples. `dropped` and `changed` are {reason: {"count": n, "examples": [text]}}."""

    def __init__(self) -> None:
        self.dropped: dict[str, dict[str, Any]] = {}
        self.changed: dict[str, dict[str, Any]] = {}

    def drop(self, reason: str, where: str, text: str) -> None:
        """A conversation, or a line that is none, is left out: where it stands and the passage that shows why."""
        _note(self.dropped, reason, 1, where, text)

    def change(self, reason: str, count: int, where: str, text: str) -> None:
        """`count` parts of a conversation are not as they were."""
        if count:
            _note(self.changed, reason, count, where, text)

    def counts(self) -> dict[str, dict[str, int]]:
        """{"dropped": {reason: count}, "changed": {reason: count}}, the most frequent reason first."""
        return {
            name: {reason: entry["count"] for reason, entry in sorted(part.items(), key=lambda e: -e[1]["count"])}
            for name, part in (("dropped", self.dropped), ("changed", self.changed))
        }

    def lines(self) -> list[str]:
        """A line for each reason: its count and its first example."""
        if not self.dropped and not self.changed:
            return ["  nothing was dropped, split or cut"]
        return [
            f"  {name} {count:,}: {reason}, first {getattr(self, name)[reason]['examples'][0]}"
            for name, part in self.counts().items()
            for reason, count in part.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"dropped": self.dropped, "changed": self.changed}


def _note(part: dict[str, dict[str, Any]], reason: str, count: int, where: str, text: str) -> None:
    entry = part.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += count
    if len(entry["examples"]) < _EXAMPLES:
        short = " ".join(text.split())
        short = short if len(short) <= _EXAMPLE_CHARS else short[: _EXAMPLE_CHARS - 3] + "..."
        # Lone surrogates, which no terminal and no UTF-8 file takes, as "?".
        entry["examples"].append(f"{where}: {short}".encode("utf-8", "replace").decode())
