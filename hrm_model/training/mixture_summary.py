"""What a prepared mixture consists of, as summary.json for programs and summary.md for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..atomic import CheckpointError, read_json, remove_leftovers, write_file
from .corpora import Corpus
from .shards import MANIFEST, ShardError, open_dataset

JSON, MARKDOWN = "summary.json", "summary.md"


def of_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a corpus's entry that its dataset says itself."""
    source, counts = manifest["source"], manifest["counts"]
    where = source.get("repository") or ", ".join(source["paths"])
    return {"source": where, "revision": source.get("revision"), **counts}


def write(
    out: Path,
    name: str,
    entry: dict[str, Any],
    corpora: Sequence[Corpus],
    budgets: dict[str, int],
    max_tokens: int | None,
    val_fraction: float,
) -> None:
    """Bring the summary in `out` up to date after corpus `name`; the others are those whose datasets are there.

    Seconds and retries of a dataset that was not made now are those that the summary had. Raises OSError.
    """
    before = {}
    with suppress(CheckpointError, KeyError, TypeError):  # there is none, or none of ours
        before = {earlier["name"]: earlier for earlier in read_json(out / JSON)["corpora"]}
    entries = []
    for corpus in corpora:
        found = entry if corpus.name == name else _of_dataset(out / corpus.name, corpus.name)
        if found is None:
            continue
        kept = before.get(corpus.name, {})
        for key in ("seconds", "retries"):
            if found[key] is None and kept.get("train_tokens") == found["train_tokens"]:
                found[key] = kept.get(key)
        entries.append(found)
    asked, taken = sum(budgets.values()), sum(map(_tokens, entries))
    for found in entries:
        found["share_asked"] = round(budgets[found["name"]] / asked, 6)
        found["share"] = round(_tokens(found) / taken, 6)
    sums = {key: sum(found[key] for found in entries) for key in ("documents", "train_tokens", "val_tokens")}
    n_bytes = sum(found["bytes_per_token"] * _tokens(found) for found in entries)
    totals = {
        "corpora": len(entries),
        "missing": [corpus.name for corpus in corpora if corpus.name not in {found["name"] for found in entries}],
        **sums,
        "tokens_asked": asked,
        "bytes_per_token": round(n_bytes / taken, 4),
        "val_share": round(sums["val_tokens"] / taken, 8),
        "empty": sum(found["empty"] for found in entries),
        "unusable": sum(found["unusable"] for found in entries),
        "seconds": round(sum(found["seconds"] or 0 for found in entries), 2),
    }
    summary = {"max_tokens": max_tokens, "val_fraction": val_fraction, "corpora": entries, "totals": totals}
    for file in (JSON, MARKDOWN):
        remove_leftovers(out, file)
    write_file(out / JSON, (json.dumps(summary, indent=2) + "\n").encode(), overwrite=True)
    write_file(out / MARKDOWN, _markdown(summary).encode(), overwrite=True)


def read(out: Path) -> dict[str, Any]:
    """The summary in `out`."""
    return read_json(out / JSON)


def line(entry: dict[str, Any], seconds: float) -> str:
    """A corpus in one line."""
    if entry["up_to_date"]:
        return f"{entry['name']} is up to date: {_tokens(entry):,} tokens"
    short = "" if _tokens(entry) >= entry["tokens_asked"] else f" of {entry['tokens_asked']:,} asked: that is all of it"
    return (
        f"{entry['name']}: {entry['documents']:,} documents, {_tokens(entry):,} tokens{short}; val "
        f"{entry['val_share']:.4%} (asked {entry['val_share_asked']:.4%}); {entry['bytes_per_token']:.2f} bytes per "
        f"token; skipped {entry['empty']} empty and {entry['unusable']} without text; {seconds:.1f} s"
    )


def _tokens(entry: dict[str, Any]) -> int:
    return entry["train_tokens"] + entry["val_tokens"]


def _of_dataset(path: Path, name: str) -> dict[str, Any] | None:
    if not (path / MANIFEST).exists():
        return None
    try:
        manifest = open_dataset(path).manifest
    except ShardError:  # it is damaged
        return None
    if "mixture" not in manifest["source"]:  # some other dataset
        return None
    return {"name": name, "up_to_date": True, **of_manifest(manifest), "seconds": None, "retries": None}


def _markdown(summary: dict[str, Any]) -> str:
    head = (
        "corpus|source|revision|documents|train tokens|val tokens|share asked|share|val asked|val|bytes/token|"
        "empty|without text|retries|seconds"
    ).split("|")
    rows = [
        [
            found["name"],
            found["source"],
            found["revision"] or "local files",
            f"{found['documents']:,}",
            f"{found['train_tokens']:,}",
            f"{found['val_tokens']:,}",
            f"{found['share_asked']:.2%}",
            f"{found['share']:.2%}",
            f"{found['val_share_asked']:.4%}",
            f"{found['val_share']:.4%}",
            f"{found['bytes_per_token']:.3f}",
            f"{found['empty']:,}",
            f"{found['unusable']:,}",
            "" if found["retries"] is None else f"{found['retries']:,}",
            "" if found["seconds"] is None else f"{found['seconds']:,.1f}",
        ]
        for found in summary["corpora"]
    ]
    totals = summary["totals"]
    last = [
        "all",
        "",
        "",
        f"{totals['documents']:,}",
        f"{totals['train_tokens']:,}",
        f"{totals['val_tokens']:,}",
        "",
        "",
    ]
    last += [f"{summary['val_fraction']:.4%}", f"{totals['val_share']:.4%}", f"{totals['bytes_per_token']:.3f}"]
    last += [f"{totals['empty']:,}", f"{totals['unusable']:,}", "", f"{totals['seconds']:,.1f}"]
    table = [head, ["---"] * len(head), *rows, last]
    lines = ["# The prepared corpora", "", *("| " + " | ".join(cells) + " |" for cells in table), ""]
    if totals["missing"]:
        lines += [f"Not prepared: {', '.join(totals['missing'])}.", ""]
    lines += ["Shares are of tokens; a share asked is of the whole mixture.", ""]
    return "\n".join(lines)
