"""Fixtures that several test files share, and how kernels run where there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton chooses between compiler and interpreter when it is imported, for the whole process.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers, and the processes that their tests start, share the cores: more threads than cores wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A dataset of text with 61 ids, each likely to follow the one before."""
    from conversation_datasets import TINY

    from hrm_model.training.shards import DatasetWriter

    path, chance = tmp_path_factory.mktemp("tiny") / "data", np.random.default_rng(0)
    with DatasetWriter(path, 3000) as writer:
        for split, n in (("train", 8000), ("val", 800)):
            writer.append(split, (np.arange(n) * 7 + chance.integers(0, 4, n)) % 60, documents=1)
        writer.commit(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_model(small_model, tmp_path_factory) -> Path:
    """small_model with the vocabulary of tiny_dataset."""
    path = tmp_path_factory.mktemp("tiny-shape") / "config.json"
    path.write_text(json.dumps(json.loads(small_model.read_text()) | {"vocab_size": 61}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs of several processes that need not import torch, see pretrain_helpers.Forks."""
    from pretrain_helpers import Forks

    with Forks(tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture
def no_pictures(monkeypatch):
    """As if matplotlib were not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def nan_filled():
    """Memory that torch allocates is full of nan, so that an element a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
