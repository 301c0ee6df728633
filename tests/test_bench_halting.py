"""bench/halting_tasks.py and bench/halting_text.py: tasks are what they say, rivals too, committed records hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import halting_tasks, halting_text
from bench.halting_tasks_cases import MOST_OPERATIONS, NODES, POINTER_SETS, TASKS, THINGS, S, _pointer_sets, make_model
from bench.halting_tasks_markdown import tables
from hrm_model import HRMConfig, HRMForCausalLM, save_model
from hrm_model.model import IGNORE

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def walk(moves, first, tokens) -> list[int]:
    places, at = [], first
    for token in tokens:
        at = moves[token][at]
        places.append(at)
    return places


def swapped(a: int, b: int) -> list[int]:
    places = list(range(THINGS))
    places[a], places[b] = b, a
    return places


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_operations_made_one_after_the_other(task):
    rows = TASKS[task](torch.Generator().manual_seed(3), 50)
    swaps = [swapped(a, b) for a, b in itertools.combinations(range(THINGS), 2)]
    moves = swaps if task == "permutations" else _pointer_sets().tolist()
    assert set(rows.needed.tolist()) == set(range(1, MOST_OPERATIONS + 1))
    for ids, targets, rewards, length, k in zip(
        rows.ids.tolist(), rows.targets.tolist(), rows.rewards.tolist(), rows.lengths.tolist(), rows.needed.tolist(),
        strict=True,
    ):  # fmt: skip
        assert length == k + 1
        answers = [len(moves) + place for place in walk(moves, ids[0] - len(moves), ids[1:length])]
        assert targets == [IGNORE, *answers, *[IGNORE] * (len(ids) - length)]
        if task == "delayed":
            assert rewards == [IGNORE] * k + [answers[-1]] + [IGNORE] * (len(ids) - length)
        else:
            assert rewards == targets
        assert ids[length:] == [0] * (len(ids) - length)


def test_pointers_forget_little():
    sets = _pointer_sets()
    assert len(sets) == POINTER_SETS and all(len(set(pointers)) >= NODES - 1 for pointers in sets.tolist())


def made(needed: np.ndarray) -> halting_tasks.Measured:
    """Rows whose loss is 1 until as many steps as operations, then 0."""
    measured = object.__new__(halting_tasks.Measured)
    steps = np.arange(1, S + 1)
    measured.right = steps >= needed[:, None]
    measured.losses = torch.from_numpy(1.0 - measured.right).float()
    measured.needed = needed
    return measured


def test_depths_that_follow_the_task_beat_their_rivals_and_others_do_not():
    needed = np.random.default_rng(0).integers(1, S + 1, 400)
    perfect = made(needed).figures(torch.from_numpy(needed), 0.03, draws=50)
    assert perfect["loss"] == 0 and perfect["accuracy"] == 1 and perfect["rank_correlation"] == pytest.approx(1)
    assert perfect["cost"] == pytest.approx(0.03 * needed.mean())
    mean = needed.mean()
    assert perfect["loss_fixed"] == pytest.approx(
        np.interp(mean, range(1, S + 1), [(needed > s).mean() for s in range(1, S + 1)])
    )
    assert perfect["loss_shuffled"] == pytest.approx(np.mean([(needed > s).mean() for s in needed]))
    assert halting_tasks.beats_rivals(perfect)

    other = np.random.default_rng(1).permutation(needed)
    assert not halting_tasks.beats_rivals(made(needed).figures(torch.from_numpy(other), 0.03, draws=50))
    fixed = made(needed).figures(torch.full((400,), 4), 0.03, draws=50)
    assert fixed["dispersion"] == 0 and fixed["rank_correlation"] is None and not halting_tasks.beats_rivals(fixed)


def test_right_answers_are_the_models_own(capsys):
    model, rows = make_model(0, "none").eval(), TASKS["pointers"](torch.Generator().manual_seed(0), 6)
    found = halting_tasks.Measured(model, rows)
    for s in (1, S):
        out = model(rows.ids, lengths=rows.lengths, force_steps=s)
        last = rows.lengths - 1
        says = out.logits[torch.arange(6), last].argmax(-1)
        assert (found.right[:, s - 1] == (says == rows.targets[torch.arange(6), last]).numpy()).all()


def test_the_committed_records_hold_what_the_documentation_says(tmp_path, capsys):
    picture = tmp_path / "tasks.png"
    assert halting_tasks.main(["--from", str(RESULTS / "halting_tasks.jsonl"), "--plot", str(picture)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["holds"] and len(said["conclusions"]) == 12 and picture.read_bytes().startswith(b"\x89PNG")


def test_the_committed_text_records_are_drawn(tmp_path, capsys):
    picture = tmp_path / "text.png"
    assert halting_text.main(["--from", str(RESULTS / "halting_text.jsonl"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "learned_depth_pays" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_text_is_measured_at_every_depth(small_dataset, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(halting_text, "DRAWS", 20)
    monkeypatch.setattr(halting_text, "FIT_WINDOWS", 8)
    shape = json.loads(small_model.read_text()) | {"halting": "policy"}
    torch.manual_seed(0)
    save_model(HRMForCausalLM(HRMConfig.from_dict(shape)), tmp_path / "model")
    assert halting_text.main(["--runs", str(tmp_path / "model"), "--data", str(small_dataset), "--windows", "4"]) == 0
    printed = capsys.readouterr().out
    for expected in ("fixed at 3", "joint", "fitted, price 0.01", "joint, bias -4.0", "settled below 0.1"):
        assert expected in printed


def test_an_untrained_head_is_not_measured(small_dataset, small_model, tmp_path):
    save_model(HRMForCausalLM(HRMConfig.from_dict(json.loads(small_model.read_text()))), tmp_path / "model")
    with pytest.raises(SystemExit, match=r"not trained; train/halting\.py fits one"):
        halting_text.main(["--runs", str(tmp_path / "model"), "--data", str(small_dataset)])


def test_the_tables_of_the_documentation_are_those_of_the_committed_records():
    lines = (RESULTS / "halting_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    page = (RESULTS.parents[1] / "docs" / "halting.md").read_text(encoding="utf-8")
    found = tables([json.loads(line) for line in lines])
    assert list(found) == list(TASKS)
    for task, table in found.items():
        assert table in page, task
