"""Fixtures that several test files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of some 14,000 tokens: numbered sentences, so that no two windows are alike."""
    from train.prepare import main

    root = tmp_path_factory.mktemp("small")
    sentences = [f"Sentence {i} says that {i} plus {i + 1} makes {2 * i + 1}, nothing more.\n" for i in range(800)]
    with (root / "text.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, 800, 20):
            file.write(json.dumps({"text": "".join(sentences[start : start + 20])}) + "\n")
    assert main(["--source", str(root / "text.jsonl"), "--out", str(root / "data"), "--workers", "1"]) == 0
    return root / "data"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A config.json of a model that takes milliseconds a step (but has GPT-2's vocabulary)."""
    shape = dict(vocab_size=50304, n_embd=8, block_size=16, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
    shape |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=3, halt_bias=0.0)
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(shape), encoding="utf-8")
    return path
