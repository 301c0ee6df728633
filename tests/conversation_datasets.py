"""Small datasets of conversations, written without tokenising anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hrm_model.training.shards import Dataset, DatasetWriter

EOT = 50256
ABOUT = {
    "tokenizer": {"name": "gpt2", "sha256": "", "vocab_size": 50257, "eot": EOT},
    "source": {"kind": "chat", "paths": ["talk.jsonl"]},
    "fingerprint": "of nothing",
}
TINY = ABOUT | {"tokenizer": {"name": "gpt2", "sha256": "", "vocab_size": 61, "eot": 60}}
"""Of a dataset with ids up to 60, for models of that vocabulary: their logits are a thousandth of GPT-2's."""
Row = tuple[np.ndarray, np.ndarray]


def some_rows(n: int, shortest: int = 4, longest: int = 60, seed: int = 0) -> list[Row]:
    """(ids, is_answer) of n conversations; all ids but the last of row i are i, and its first half is the question."""
    lengths = np.random.default_rng(seed).integers(shortest, longest + 1, n)
    return [(np.array([i] * (size - 1) + [EOT]), np.arange(size) >= size // 2) for i, size in enumerate(lengths)]


def write_chat(path: Path, train: list[Row], val: list[Row] = (), shard_tokens: int = 1000, about=ABOUT) -> Dataset:
    with DatasetWriter(path, shard_tokens, chat=True) as writer:
        for split, rows in (("train", train), ("val", val)):
            if rows:
                ids, masks = (np.concatenate(parts) for parts in zip(*rows, strict=True))
                writer.append_conversations(split, ids, masks, [len(ids) for ids, _ in rows])
        return writer.commit(about)
