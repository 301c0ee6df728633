"""Trackers are somebody else's service: one that fails, hangs or falls behind costs a warning and no training."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path

import pytest
from pretrain_helpers import records, short_run

from hrm_model.training import metrics
from hrm_model.training.metrics import Trackers
from train.pretrain import main

STEPS = 3


@pytest.fixture
def flags(tiny_dataset, tiny_model, tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return [*short_run(tiny_dataset, tiny_model, tmp_path / "run"), *f"--steps {STEPS} --sample-tokens 0".split()]


class Blocking:
    """Stands for the wandb package: a service that does not answer once `log` is called."""

    def __init__(self):
        self.answers, self.logged = threading.Event(), []

    def module(self) -> types.ModuleType:
        made = types.ModuleType("wandb")
        made.init = lambda **options: self
        return made

    def log(self, numbers: dict, step: int) -> None:
        self.logged.append(step)
        self.answers.wait()

    def finish(self) -> None:
        self.logged.append("finished")


@pytest.fixture
def blocking(monkeypatch):
    service = Blocking()
    monkeypatch.setitem(sys.modules, "wandb", service.module())
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.3)
    yield service
    service.answers.set()


def test_a_tracker_that_hangs_does_not_stop_training(flags, tmp_path, blocking):
    with pytest.warns(RuntimeWarning, match="tracker wandb did not finish within 0.3 s; its last records are lost"):
        assert main([*flags, "--track", "wandb"]) == 0
    assert len(records(tmp_path / "run", "train")) == STEPS and blocking.logged == [1]


def test_a_tracker_that_falls_behind_loses_records_with_one_warning(tmp_path, blocking, recwarn):
    trackers = Trackers(["wandb"], tmp_path, {})
    for step in range(metrics.WAITING_RECORDS + 100):
        trackers.log(step, {"loss": 1.0})
    said = [str(w.message) for w in recwarn]
    assert len(said) == 1 and "tracker wandb does not keep up: records from step 25" in said[0]
    trackers.close()
    assert "did not finish" in str(recwarn.list[-1].message) and len(recwarn) == 2


def test_a_tracker_gets_every_record_in_order_and_is_finished(tmp_path, blocking):
    blocking.answers.set()
    trackers = Trackers(["wandb"], tmp_path, {})
    for step in range(50):
        trackers.log(step, {"kind": "train", "step": step, "loss": 1.0})
    trackers.close()
    assert blocking.logged == [*range(50), "finished"]


def test_a_tracker_that_fails_later_is_left_out_with_one_warning(tmp_path, blocking, monkeypatch, recwarn):
    def failing(numbers, step):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(blocking, "log", failing)
    trackers = Trackers(["wandb"], tmp_path, {})
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert [str(w.message) for w in recwarn] == ["tracker wandb is left out: ConnectionError: no route to host"]


def test_the_metrics_of_a_run_survive_a_cut_and_nul_bytes(tmp_path):
    """What a power cut leaves of a file's last block."""
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.write({"kind": "train", "step": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps({"kind": "train", "step": 3})[:9].encode() + bytes(100))
    again = metrics.MetricsLog(tmp_path / "metrics.jsonl", resume_step=2)
    again.close()
    assert [r["step"] for r in again.records] == [1, 2] and records(tmp_path, "train") == again.records
