"""train/pretrain.py and the halting head: who decides a row's depth, what trains the head, what is said of it."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain_helpers import (
    NO_PICTURES,
    assert_same_bits,
    checkpoint_of,
    decided,
    records,
    short_run,
    start,
    start_from,
    weights,
)

from hrm_model import HRMForCausalLM, load_model, save_model
from hrm_model.exits import exits
from hrm_model.halting import Exploration
from hrm_model.training.loop import Training
from train.pretrain import build, main, parse

SEED, WARMUP = 1337, 3
"""Of the runs of this file: a third of their 8 steps, of 8 rows each."""
HEAD = ("hrm_core.q_head.weight", "hrm_core.q_head.bias")
pytestmark = NO_PICTURES


@pytest.fixture
def flags(small_dataset, small_model, tmp_path) -> list[str]:
    seldom = "--eval-every 8 --save-every 8 --sample-tokens 0".split()
    return [*short_run(small_dataset, small_model, tmp_path / "run"), *seldom]


def training_of(flags: list[str], *more: str) -> Training:
    """A run that is not begun."""
    return build(vars(parse([*flags, *more])))


def saved(run: Path, step: int, name: str) -> dict:
    return json.loads((checkpoint_of(run, step) / name).read_text())


@torch.no_grad()
def undecided(model: HRMForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, path: Path) -> Path:
    """The model with a head that stops half of these prefixes after one step."""
    head = model.hrm_core.q_head
    head.weight.normal_(generator=torch.Generator().manual_seed(0))
    head.bias[0] -= exits(model, inputs, targets).margins()[..., 0].median()
    return save_model(model, path)


def logits_at(model: HRMForCausalLM, ids: torch.Tensor, depth: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the last position, executed steps) of rows that run `depth` steps, or as many as they decide."""
    with torch.no_grad():
        out = model.eval()(ids, force_steps=depth)
    return out.logits[:, -1], out.executed_steps


# -- who decides -------------------------------------------------------------------------------------------------------


def test_depths_are_random_in_the_warm_up_and_then_only_those_of_explorers(flags, small_model, tmp_path):
    """The head, which learning rates of 0 keep as it is, would always stop after one step."""
    start_from(decided(small_model, (5.0, -5.0), tmp_path / "decided"), flags)
    assert main([*flags, "--lr", "0", "--min-lr", "0", "--head-lr", "0"]) == 0
    exploration = Exploration(SEED, 3, 0.5, WARMUP)
    for step, record in enumerate(records(tmp_path / "run", "train")):
        samples = range(8 * step, 8 * step + 8)
        explores = exploration.explorers(samples)
        assert 0 < explores.sum() < 8
        drawn = exploration.random_depths(samples)
        expected = [d if explores[i] or step < WARMUP else 1 for i, d in enumerate(drawn)]
        assert {int(d): n for d, n in record["depths"].items()} == Counter(expected), step
        assert sum(record["head_depths"].values()) == record["head_depths"]["1"] == 16 * explores.sum()


@pytest.mark.parametrize(("depth", "found"), [("random", None), ("fixed:2", {"2"})])
def test_a_head_can_be_trained_while_something_else_sets_the_depth(flags, tmp_path, depth, found):
    before = training_of(flags, "--out", str(tmp_path / "other")).model.state_dict()
    assert main([*flags, "--depth", depth]) == 0
    depths = [r["depths"] for r in records(tmp_path / "run", "train")]
    if found is None:
        exploration = Exploration(SEED, 3, 0.5, 0)
        drawn = [Counter(exploration.random_depths(range(8 * step, 8 * step + 8))) for step in range(8)]
        assert [{int(d): n for d, n in of_step.items()} for of_step in depths] == drawn
    else:
        assert set().union(*depths) == found
    after = weights(tmp_path / "run", 8)
    assert not any(torch.equal(before[key], after[key]) for key in HEAD)


def test_explorers_depths_and_deciding_prefixes_do_not_depend_on_how_samples_are_cut(flags, tmp_path):
    """Two cuts of the same samples into micro-batches, after the warm-up."""
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        cut = ["--batch-size", str(batch), "--accumulation", str(accumulation), "--out", str(tmp_path / str(batch))]
        run = training_of(flags, *cut)
        rows = []
        for samples in (s for step in range(5) for s in run.data.training.plan(step)):
            depths, pooled = run.train_step.depths(run.data.training.batch(samples), WARMUP)
            prefixes = pooled or [16] * batch  # None where no row of the micro-batch decides
            explores = run.train_step.exploration.explorers(samples).tolist()
            rows += [(e, d, d or p) for e, d, p in zip(explores, depths, prefixes, strict=True)]
        found.append(rows)
    assert found[0] == found[1]
    explores, depths, prefixes = zip(*found[0], strict=True)
    assert [depth > 0 for depth in depths] == list(explores), "who does not explore follows the head"
    assert len({p for d, p in zip(depths, prefixes, strict=True) if d == 0}) > 8


def test_the_head_learns_the_same_however_samples_are_cut(flags, tmp_path):
    """Also in what is said of it: the normaliser is one for all micro-batches."""
    for name, batch, accumulation in (("a", "8", "1"), ("b", "2", "4")):
        run = ["--out", str(tmp_path / name), "--batch-size", batch, "--accumulation", accumulation]
        assert main([*flags, *run, "--dropout", "0"]) == 0
    a, b = (weights(tmp_path / name, 8) for name in "ab")
    initial = training_of(flags).model.state_dict()
    for key in HEAD:
        assert torch.allclose(a[key], b[key], rtol=0, atol=1e-5), key
        assert (a[key] - initial[key]).abs().max() > 1e-2, "it was trained"
    a, b = (records(tmp_path / name, "train") for name in "ab")
    assert [r["head_depths"] for r in a] == [r["head_depths"] for r in b]
    for key in ("head_loss", "price", "oracle_agreement", "head_own_loss"):
        assert [r[key] for r in a] == pytest.approx([r[key] for r in b], abs=1e-4), key


# -- what trains it ----------------------------------------------------------------------------------------------------


def test_without_an_objective_the_head_stays_as_it_is_and_all_steps_are_evaluated(flags, tmp_path):
    before = training_of(flags, "--out", str(tmp_path / "other")).model.state_dict()
    assert main([*flags, "--halting", "none", "--target-steps", "0"]) == 0
    after = weights(tmp_path / "run", 8)
    assert all(torch.equal(before[key], after[key]) for key in HEAD)
    last = records(tmp_path / "run", "eval")[-1]
    assert last["val_loss"] == last["loss_by_depth"]["3"] and last["depths"] == {"1": 0, "2": 0, "3": 64}
    assert last["dispersion"] is None and last["mean_steps"] == 3
    assert "fixed_at_equal_steps" not in last, "a fixed depth has no rivals"
    assert not any("head_loss" in r or "price" in r for r in records(tmp_path / "run", "train"))
    exploration = Exploration(SEED, 3, 0.0, 0)
    drawn = [Counter(exploration.random_depths(range(8 * step, 8 * step + 8))) for step in range(8)]
    depths = [r["depths"] for r in records(tmp_path / "run", "train")]
    assert [{int(d): n for d, n in of_step.items()} for of_step in depths] == drawn


@pytest.mark.parametrize(
    "options",
    [
        ["--halting", "policy", "--decisions", "row"],
        ["--halting", "policy", "--gradient-steps", "2"],
        ["--halting", "policy", "--gradient", "published"],
        ["--halting", "gain"],
        ["--halting", "expected"],
        ["--halting", "q"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_every_way_to_train_a_head_runs_and_trains_it_and_the_model(flags, tmp_path, options):
    base = training_of(flags, "--out", str(tmp_path / "other")).model.state_dict()
    assert main([*flags, "--steps", "4", "--eval-windows", "1", *options]) == 0
    after, train = weights(tmp_path / "run", 4), records(tmp_path / "run", "train")
    assert not any(torch.equal(base[key], after[key]) for key in (*HEAD, "wte.weight"))
    assert all(np.isfinite([r["head_loss"], r["loss"], r["price"]]).all() for r in train)
    decisions = 1 if "row" in options else 16
    explorers = Exploration(SEED, 3, 0.5, 0).explorers(range(8)).sum()
    assert sum(train[0]["head_depths"].values()) == explorers * decisions


def test_more_steps_with_gradient_are_another_gradient_of_the_same_loss(flags, tmp_path):
    for n in ("1", "2"):
        run = f"--depth fixed:3 --dropout 0 --steps 2 --gradient-steps {n} --out {tmp_path / n}".split()
        assert main([*flags, *run]) == 0
    one, two = (records(tmp_path / n, "train") for n in "12")
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-6)
    assert abs(one[0]["grad_norm"] / two[0]["grad_norm"] - 1) > 1e-4
    assert one[1]["loss"] != two[1]["loss"]


def test_a_models_file_says_what_trained_its_head(flags, small_model, tmp_path):
    flags += ["--steps", "1", "--eval-windows", "1"]
    assert main(flags) == 0
    config = saved(tmp_path / "run", 1, "config.json")
    assert (config["halting"], config["halt_bias"]) == ("policy", 0.0)
    start_from(decided(small_model, (0.0, 0.1), tmp_path / "source", halting="published", halt_bias=0.35), flags)
    published = ("published", 0.35)
    expected = {"policy": ("policy", 0.0), "gain": ("gain", 0.0), "none": published, "published": published}
    for halting, found in expected.items():
        assert main([*flags, "--target-steps", "0", "--halting", halting, "--out", str(tmp_path / halting)]) == 0
        config = saved(tmp_path / halting, 1, "config.json")
        assert (config["halting"], config["halt_bias"]) == found, halting


def test_published_halting_brings_its_bias_and_trains_no_head(flags, small_model, tmp_path):
    """The configuration says 0; training is without a bias, as published. The head goes on until the last step."""
    start_from(decided(small_model, (0.0, 0.1), tmp_path / "decided", halting="none", halt_bias=0.0), flags)
    assert main([*flags, "--halting", "published", "--target-steps", "0"]) == 0
    assert saved(tmp_path / "run", 8, "config.json")["halt_bias"] == 0.35
    assert all(set(r["depths"]) == {"3"} and "price" not in r for r in records(tmp_path / "run", "train"))
    assert weights(tmp_path / "run", 8)[HEAD[1]].tolist() == pytest.approx([0.0, 0.1])


# -- the price ---------------------------------------------------------------------------------------------------------


def test_a_price_without_a_target_stays_and_one_with_a_target_moves_towards_it(flags, small_model, tmp_path):
    flags += "--batch-size 4 --accumulation 1 --eval-windows 1".split()
    assert main([*flags, "--target-steps", "0"]) == 0
    assert {r["price"] for r in records(tmp_path / "run", "train")} == {0.02}
    start_from(decided(small_model, (-5.0, 5.0), tmp_path / "decided"), flags)
    for name, target in (("lower", "1"), ("deeper", "3")):
        assert main([*flags, "--target-steps", target, "--out", str(tmp_path / name)]) == 0
    dearer, same = ([r["price"] for r in records(tmp_path / name, "train")] for name in ("lower", "deeper"))
    assert dearer == pytest.approx([0.02 * np.exp(0.02 * 2 * step) for step in range(8)]), "3 steps are 2 too many"
    assert same == [0.02] * 8


def test_a_killed_run_goes_on_with_the_price_that_it_had_come_to(flags, tmp_path):
    """kill -9 after the fifth step: the checkpoint of the fourth holds the price."""
    whole = tmp_path / "whole"
    assert main([*flags, "--out", str(whole)]) == 0
    process = start(*flags, "--save-every", "2")
    for line in process.stdout:
        if line.split()[:2] == ["step", "5/8"]:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert saved(tmp_path / "run", 4, "state.json")["price"] != 0.02
    assert main([*flags, "--resume", "auto"]) == 0
    assert_same_bits(weights(tmp_path / "run", 8), weights(whole, 8))
    for kind in ("train", "eval"):
        found, expected = (records(run, kind) for run in (tmp_path / "run", whole))
        for r in (*found, *expected):
            r.pop("tokens_per_s", None)
        assert found == expected


# -- what is said of it ------------------------------------------------------------------------------------------------


def test_a_training_record_says_what_explorers_found(flags, tmp_path):
    """Its exits' losses are those of the rows that explore, each run to the given depth on its own."""
    run = training_of(flags, "--out", str(tmp_path / "other"))
    batch = run.data.training.batch(np.arange(8))
    explores = run.train_step.exploration.explorers(batch.samples)
    ids, wanted = (torch.from_numpy(a[explores]) for a in (batch.inputs, batch.targets))
    with torch.no_grad():
        by_depth = [run.model.eval()(ids, wanted, force_steps=s).loss.item() for s in (1, 2, 3)]
    assert main(flags) == 0
    first = records(tmp_path / "run", "train")[0]
    assert [first["exit_losses"][s] for s in "123"] == pytest.approx(by_depth, abs=1e-5)
    assert list(first["advantages"]) == ["1", "2"]
    assert first["advantages"]["2"] == pytest.approx(by_depth[1] - by_depth[2] - 0.02, abs=1e-5)
    for record in records(tmp_path / "run", "train"):
        counts = {int(s): n for s, n in record["head_depths"].items()}
        mean = sum(s * n for s, n in counts.items()) / sum(counts.values())
        variance = sum(n * (s - mean) ** 2 for s, n in counts.items()) / sum(counts.values())
        assert list(counts) == [1, 2, 3] and record["head_steps"] == pytest.approx(mean)
        room = (mean - 1) * (3 - mean)
        assert record["head_dispersion"] == (pytest.approx(variance / room) if room else None)
        assert record["head_loss"] > 0 and 0 <= record["oracle_agreement"] <= 1 and record["price"] > 0


def test_the_validation_loss_is_that_of_every_prefix_at_the_depth_it_decides(flags, tmp_path):
    """Each prefix alone, without what follows it: its own depth, and its own next token."""
    flags += "--lr 0 --min-lr 0 --head-lr 0 --eval-windows 6".split()
    before = training_of(flags, "--out", str(tmp_path / "other"))
    inputs, targets = (torch.from_numpy(a) for a in before.data.validations[0][1].rows[:2])
    start_from(undecided(before.model, inputs, targets, tmp_path / "undecided"), flags)
    assert main(flags) == 0
    model, _ = load_model(tmp_path / "run")
    own, steps, by_depth = [], [], {s: [] for s in (1, 2, 3)}
    for t in range(16):
        for depth, losses in (*by_depth.items(), (None, own)):
            logits, executed = logits_at(model, inputs[:, : t + 1], depth)
            losses.append(F.cross_entropy(logits, targets[:, t], reduction="none"))
        steps.append(executed)
    histogram = Counter(torch.cat(steps).tolist())
    assert min(histogram[1], 96 - histogram[1]) > 32, "decisions that differ"
    last = records(tmp_path / "run", "eval")[-1]
    assert {int(s): n for s, n in last["depths"].items()} == {s: histogram[s] for s in (1, 2, 3)}
    assert last["val_loss"] == pytest.approx(torch.cat(own).mean().item(), abs=1e-5)
    fixed = [torch.cat(by_depth[s]).mean().item() for s in (1, 2, 3)]
    assert [last["loss_by_depth"][s] for s in "123"] == pytest.approx(fixed, abs=1e-5)


def test_an_evaluation_holds_the_learned_depth_against_its_rivals(flags, tmp_path):
    assert main([*flags, "--eval-every", "2", "--step-price", "0.0001"]) == 0
    for record in records(tmp_path / "run", "eval"):
        losses, counts = ([record[key][s] for s in "123"] for key in ("loss_by_depth", "depths"))
        assert record["fixed_at_equal_steps"] == pytest.approx(np.interp(record["mean_steps"], [1, 2, 3], losses))
        assert record["shuffled"] == pytest.approx(np.dot(losses, counts) / 64)
        assert min(losses) <= record["fixed_at_equal_blocks"] <= max(losses)
        if max(counts) < 64:
            assert 0 < record["dispersion"] <= 1 and -1 <= record["gain_correlation"] <= 1
        else:
            assert record["gain_correlation"] is None


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halting", ["policy", "gain", "expected", "q"])
def test_a_model_of_one_step_has_nothing_to_decide(flags, small_model, tmp_path, capsys, halting):
    shape = json.loads(small_model.read_text()) | {"hrm_max_steps": 1}
    (tmp_path / "one.json").write_text(json.dumps(shape))
    flags = [*flags, "--config", str(tmp_path / "one.json"), "--target-steps", "1"]
    assert main([*flags, "--halting", halting]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: --halting {halting} needs a model of at least 2 steps") and error.count("\n") == 1
    assert "use --halting none" in error and not (tmp_path / "run").exists()


def test_a_model_of_one_step_trains_without_an_objective(flags, small_model, tmp_path):
    shape = json.loads(small_model.read_text()) | {"hrm_max_steps": 1}
    (tmp_path / "one.json").write_text(json.dumps(shape))
    assert main([*flags, "--config", str(tmp_path / "one.json"), "--halting", "none", "--target-steps", "0"]) == 0
    assert set(records(tmp_path / "run", "eval")[-1]["loss_by_depth"]) == {"1"}


def test_a_heads_loss_that_is_not_finite_stops_before_the_step(flags, tmp_path, capsys):
    """The price is over float32's range."""
    assert main([*flags, "--step-price", "1e300"]) == 76
    error = capsys.readouterr().err
    assert "error: step 1: the halting head's loss or gradient is not finite" in error
    assert "no parameter was changed" in error
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
