"""bench/hybrid.py: the recorded evidence, what it concludes from a record, and adapters of as many weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hybrid_models import save_language_model

from bench.hybrid import lora_rank, main

RECORDS = Path(__file__).parents[1] / "bench" / "results" / "hybrid.jsonl"


@pytest.fixture
def record() -> dict:
    return json.loads(RECORDS.read_text(encoding="utf-8").splitlines()[0])


def read(record: dict, tmp_path: Path, *more: dict) -> int:
    """Exit status for a file of these records."""
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (record, *more)), encoding="utf-8")
    return main(["--from", str(path), "--plot", str(tmp_path / "picture.png")])


def test_what_was_recorded_holds_and_a_later_record_of_adapters_alone_is_passed_over(record, tmp_path, capsys):
    adapters = record | {"systems": {"LM + LoRA": record["systems"]["LM + LoRA"]}}
    assert read(record, tmp_path, adapters) == 0
    out = capsys.readouterr().out
    assert "hybrid, z_H of another prompt" in out and "DOES NOT HOLD" not in out
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("accuracy", 0.94, "the hybrid answers at least 95 %"),
        ("shuffled", 0.2, "with another prompt's z_H at most 10 %"),
        ("language model alone", 0.06, "the language model alone answers at most 5 %"),
        ("frozen", False, "the language model's weights are as before"),
        ("test_prompts_trained_on", 1, "no test prompt or its commutation was trained on"),
    ],
)
def test_what_does_not_hold_is_said_and_is_status_1(record, tmp_path, capsys, key, value, sentence):
    record["systems"]["hybrid"][key] = value
    assert read(record, tmp_path) == 1
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("DOES NOT HOLD")] == [
        f"{'DOES NOT HOLD':<14}{sentence}"
    ]


def test_adapters_have_about_as_many_weights(tmp_path):
    pytest.importorskip("peft")
    from hrm_model.hybrid import HybridConfig, HybridModel, load_language_model

    path = save_language_model(tmp_path / "lm")
    for weights in (20_000, 50_000):
        config = HybridConfig(injector="none", lora_rank=lora_rank(path, weights), lora_layers=0)
        found = HybridModel(load_language_model(path, torch.device("cpu")), config).num_parameters()
        assert abs(found - weights) < 0.05 * weights
