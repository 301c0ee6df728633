"""What options of a training run mean: optimizers, schedules, the averaged weights, the gradient window, the loss."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversation_datasets import TINY, some_rows, write_chat
from pretrain_helpers import NO_PICTURES, assert_same_bits, checkpoint_of, records, short_run, weights
from small_models import thinker

from hrm_model import HRMForCausalLM, load_model, save_model
from hrm_model.training import loop
from hrm_model.training.ema import WeightAverage
from hrm_model.training.optim import AdamAtan2
from hrm_model.training.recipes import TrainConfig
from hrm_model.training.rundir import RunLock
from hrm_model.training.schedule import gradient_window, learning_rate
from train import converse
from train.pretrain import build, main, parse

pytestmark = NO_PICTURES


@pytest.fixture
def flags(tiny_dataset, tiny_model, tmp_path) -> list[str]:
    seldom = "--eval-every 8 --save-every 4 --sample-tokens 0".split()
    return [*short_run(tiny_dataset, tiny_model, tmp_path / "run"), *seldom]


def resumed_from(run: Path, step: int, flags: list[str], target: Path) -> Path:
    """A copy of a run that lost all after `step`, gone on from there."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint != checkpoint_of(target, step):
            shutil.rmtree(checkpoint)
    assert main([*flags, "--out", str(target), "--resume", "auto"]) == 0
    return target


# -- AdamAtan2 ---------------------------------------------------------------------------------------------------------


def descend(scale: float, steps: int = 6, **options) -> list[torch.Tensor]:
    """Parameters after each of some steps on a quadratic loss, times `scale`."""
    p = torch.nn.Parameter(torch.tensor([3.0, -0.5, 1e-3, 0.0], dtype=torch.float64))
    optimizer, seen = AdamAtan2([p], lr=0.1, **options), []
    for step in range(steps):
        optimizer.zero_grad()
        (scale * (p - 0.2 * step).square() * torch.tensor([1.0, 50.0, 0.01, 0.0])).sum().backward()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def test_adam_atan2_is_its_formula():
    lr, beta1, beta2, decay = 0.1, 0.8, 0.9, 0.3
    p = torch.tensor([3.0, -0.5, 1e-3, 0.0], dtype=torch.float64)
    m = v = torch.zeros_like(p)
    for step, found in enumerate(descend(1.0, betas=(beta1, beta2), weight_decay=decay)):
        gradient = 2 * (p - 0.2 * step) * torch.tensor([1.0, 50.0, 0.01, 0.0])
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        p = p - lr * decay * p - lr * 4 / math.pi * torch.atan2(m_hat, v_hat.sqrt())
        assert torch.allclose(found, p, rtol=1e-12, atol=0)
    assert p[3] == 0, "no gradient, no update"


@pytest.mark.parametrize("scale", [1000.0, 1e-30])
def test_adam_atan2_does_not_see_the_losses_scale(scale):
    for a, b in zip(descend(1.0), descend(scale), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_an_update_of_adam_atan2_is_at_most_twice_the_learning_rate():
    """The worst case is a large gradient after many small ones: m / sqrt(v) is then largest."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer, before = AdamAtan2([p], lr=0.1, betas=(0.5, 0.9999)), torch.zeros(3)
    for step in range(60):
        p.grad = torch.tensor([1e-8, 1.0, 1.0]) if step < 50 else torch.tensor([1e8, 1.0, -1e30])
        optimizer.step()
        moved = (p.detach() - before).abs()
        assert (moved <= 0.2 * (1 + 1e-6)).all() and moved.isfinite().all()
        before = p.detach().clone()


def test_a_run_with_adam_atan2_resumes_to_the_same_bits_and_differs_from_adamw(flags, tmp_path):
    flags += ["--optimizer", "atan2"]
    assert main(flags) == 0
    again = resumed_from(tmp_path / "run", 4, flags, tmp_path / "again")
    assert_same_bits(weights(again, 8), weights(tmp_path / "run", 8))
    assert main([*flags, "--out", str(tmp_path / "other"), "--optimizer", "adamw"]) == 0
    assert records(tmp_path / "other", "train")[-1]["loss"] != records(tmp_path / "run", "train")[-1]["loss"]
    assert main([*flags, "--resume", "auto", "--optimizer", "adamw"]) == 1


# -- schedules ---------------------------------------------------------------------------------------------------------


def rates(**options) -> list[float]:
    run = TrainConfig.of_recipe("tiny", **dict(lr=1.0, min_lr=0.1, warmup=4, steps=100) | options)
    return [learning_rate(step, run) for step in range(run.steps)]


def test_the_linear_schedule_falls_by_the_same_amount_every_step():
    found = rates(schedule="linear")
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[52] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1 + 0.9 / 96)


def test_wsd_stays_and_then_falls_over_the_last_share():
    found = rates(schedule="wsd", decay=0.2)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and set(found[4:81]) == {1.0}
    assert found[90] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1 + 0.9 / 20)
    assert found[:64] == rates(schedule="wsd", decay=0.2, steps=80)[:64], "a longer run begins alike"
    assert set(rates(schedule="wsd", decay=0.0)[4:]) == {1.0}
    assert rates(schedule="wsd", decay=1.0) == pytest.approx(rates(schedule="linear"))


def test_a_wsd_run_is_prolonged_from_a_checkpoint_at_its_peak(flags, tmp_path, capsys):
    flags += "--schedule wsd --decay 0.25 --dropout 0 --depth fixed:1 --halting none --target-steps 0".split()
    assert main([*flags, "--steps", "12", "--out", str(tmp_path / "long")]) == 0
    assert main(flags) == 0
    longer = resumed_from(tmp_path / "run", 4, [*flags, "--steps", "12"], tmp_path / "longer")
    assert_same_bits(weights(longer, 12), weights(tmp_path / "long", 12))
    capsys.readouterr()
    assert main([*flags, "--steps", "12", "--resume", "auto"]) == 1, "at step 8 it has fallen"
    assert "--steps was 8, is 12" in capsys.readouterr().err
    assert main([*flags, "--schedule", "cosine", "--out", str(tmp_path / "cosine")]) == 0
    assert (
        main([*flags, "--schedule", "cosine", "--out", str(tmp_path / "cosine"), "--steps", "9", "--resume", "auto"])
        == 1
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_every_schedule_takes_runs_shorter_than_their_warm_up(schedule):
    assert rates(schedule=schedule, steps=3, warmup=4, decay=1.0) == pytest.approx([0.25, 0.5, 0.75])
    assert rates(schedule=schedule, steps=1, warmup=0) in ([1.0], [pytest.approx(0.1)])


# -- the averaged weights ----------------------------------------------------------------------------------------------


def test_the_average_is_that_of_a_hand_computation():
    model = torch.nn.Linear(2, 2)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().double()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.double()
    assert torch.allclose(average.average["weight"].double(), expected, rtol=1e-6)
    kept = model.weight.detach().clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, average.average["weight"])
        raise KeyError
    assert torch.equal(model.weight, kept), "whatever happens within, the weights come back"


def test_the_average_is_saved_resumed_to_the_same_bits_and_a_model(flags, tmp_path):
    flags += "--ema 0.95 --keep-last 9 --save-every 1".split()
    assert main(flags) == 0
    steps = [weights(tmp_path / "run", step)["wte.weight"].double() for step in range(1, 9)]
    expected = build(vars(parse([*flags, "--out", str(tmp_path / "fresh")]))).model.wte.weight.detach().double()
    for step, seen in enumerate(steps, 1):
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen
    averaged, _ = load_model(checkpoint_of(tmp_path / "run", 8) / "ema.safetensors")
    assert torch.allclose(averaged.wte.weight.double(), expected, rtol=0, atol=1e-6)

    again = resumed_from(tmp_path / "run", 4, flags, tmp_path / "again")
    assert_same_bits(weights(again, 8), weights(tmp_path / "run", 8))
    twice, _ = load_model(checkpoint_of(again, 8) / "ema.safetensors")
    assert_same_bits(twice.state_dict(), averaged.state_dict())
    evals = [records(run, "eval")[-1] for run in (tmp_path / "run", again)]
    assert evals[0]["ema_val_loss"] == evals[1]["ema_val_loss"] != evals[0]["val_loss"]
    assert evals[0]["val_loss"] == evals[1]["val_loss"]

    assert main([*flags, "--out", str(tmp_path / "plain"), "--ema", "0"]) == 0
    assert_same_bits(weights(tmp_path / "plain", 8), weights(tmp_path / "run", 8))
    assert not list((tmp_path / "plain").rglob("ema*"))


# -- the gradient window -----------------------------------------------------------------------------------------------

DEEP = dict(hrm_H_cycles=2, hrm_L_cycles=2)
"""Six applications of a level in a step: L L H L L H."""


def gradients(model: HRMForCausalLM, **options) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model.train()(ids, ids.roll(-1, 1), force_steps=[1, 2, 4], **options).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("window", [2, 3, 5])
def test_a_gradient_window_cuts_autograd_before_its_applications(window):
    """By hand: the step is written out, and what the applications before the window give is detached."""
    model = thinker(**DEEP)
    core, cut = model.hrm_core, 6 - window
    found = gradients(model, gradient_window=window)

    def step(x, z_H, z_L, rotary, lengths, pasts=None, window=None):
        for number, level in enumerate("LLHLLH"):
            if level == "L":
                z_L = core.L_level(z_L, z_H + x, rotary, lengths)
                z_L = z_L.detach() if number < cut else z_L
            else:
                z_H = core.H_level(z_H, z_L, rotary, lengths)
                z_H = z_H.detach() if number < cut else z_H
        return z_H, z_L

    core.step = step
    by_hand = gradients(model)
    for name, gradient in by_hand.items():
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-13), name
    assert not all(torch.allclose(found[name], g) for name, g in gradients(thinker(**DEEP)).items())
    for name in ("wte.weight", "hrm_core.L_level.layers.0.mlp.up.weight", "hrm_core.H_level.layers.0.mlp.up.weight"):
        assert found[name].abs().max() > 0, name


@pytest.mark.parametrize("window", [6, 100])
def test_a_window_of_all_applications_is_none(window):
    assert_same_bits(gradients(thinker(**DEEP), gradient_window=window), gradients(thinker(**DEEP)))


def test_a_window_changes_no_loss_and_no_depth():
    model, ids = thinker(**DEEP), torch.randint(0, 61, (3, 8))
    whole, cut = model(ids, ids), model(ids, ids, gradient_window=2)
    assert torch.equal(whole.loss, cut.loss) and torch.equal(whole.executed_steps, cut.executed_steps)


def test_the_window_grows_from_two_to_its_size_over_the_warm_up():
    def sizes(**options):
        run = TrainConfig.of_recipe("tiny", steps=20, **options)
        return [gradient_window(step, run, 6) for step in range(20)]

    assert sizes() == [None] * 20
    assert sizes(gradient_window=2) == [2] * 20
    assert sizes(gradient_window=6) == sizes(gradient_window=99) == [None] * 20
    growing = sizes(window_warmup=0.5)
    assert growing[0] == 2 and growing[10:] == [None] * 10
    assert growing[:10] == sorted(growing[:10]) and set(growing[:10]) == {2, 3, 4, 5}
    limited = sizes(window_warmup=0.5, gradient_window=4)
    assert set(limited[:10]) == {2, 3} and limited[10:] == [4] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gradient_window=1), "gradient_window 1 must be an integer of at least 2"),
        (dict(gradient_window=2.0), "gradient_window 2.0 must be an integer of at least 2"),
        (dict(gradient_window=True), "gradient_window True must be an integer"),
        (dict(gradient_window=2, gradient_steps=2), "needs gradient 'replay' and gradient_steps 1"),
        (dict(gradient_window=2, gradient="published"), "needs gradient 'replay' and gradient_steps 1"),
        (dict(reduction="none"), "reduction 'none' is none of mean, sum"),
    ],
)
def test_the_model_refuses_impossible_gradients(options, message):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        thinker()(ids, ids, **options)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--gradient-window 1", "--gradient-window 1 must be at least 2"),
        ("--gradient-window 2 --gradient-steps 2", "--gradient-window 2 must be at least 2 .* --gradient-steps 1"),
        ("--window-warmup 0.5 --gradient published", "--window-warmup 0.5 needs --gradient replay"),
        ("--ema 1", "--ema 1.0 is outside 0 <= ema < 1"),
        ("--ema -0.1", "--ema -0.1 is outside"),
        ("--z-loss -1", "--z-loss -1.0 is not a finite number of at least 0"),
        ("--optimizer sgd", "--optimizer 'sgd' is none of adamw, atan2"),
        ("--schedule step", "--schedule 'step' is none of cosine, linear, wsd"),
        ("--decay 1.5", r"--decay 1.5 is outside 0\.\.1"),
        ("--parallel tensor", "--parallel 'tensor' is none of auto, ddp, fsdp"),
        ("--timeout -1", "--timeout -1.0 is not a finite number of minutes above 0"),
        ("--timeout 0", "--timeout 0.0 is not a finite number of minutes above 0"),
        (
            "--sample-tokens 4",
            "--sample-prompt 'The' has token ids up to 464, the model's vocab_size 61 allows up to 60",
        ),
    ],
)
def test_impossible_options_are_named(flags, capsys, extra, message):
    import re

    assert main([*flags, *extra.split()]) == 1
    assert re.search(message, capsys.readouterr().err)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_z_loss_adds_the_squared_log_partition_and_sums_add_up():
    model = thinker().eval()
    ids = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[0, :5] = -1
    with torch.no_grad():
        plain = model(ids, targets, return_logits=True)
        lse = plain.logits.logsumexp(-1)[targets != -1]
        summed = model(ids, targets, reduction="sum", z_loss=0.01).loss
        parts = sum(model(ids[i : i + 1], targets[i : i + 1], reduction="sum", z_loss=0.01).loss for i in range(3))
        mean = model(ids, targets, z_loss=0.01).loss
    by_hand = F.cross_entropy(plain.logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert torch.allclose(plain.loss, by_hand)
    assert torch.allclose(mean, plain.loss + 0.01 * lse.square().mean())
    assert torch.allclose(summed, mean * len(lse)) and torch.allclose(parts, summed)


def test_a_runs_z_loss_is_in_its_training_loss_and_not_in_validation(flags, tmp_path):
    flags += "--lr 0 --min-lr 0 --head-lr 0 --dropout 0".split()
    for name, weight in (("run", "0"), ("z", "0.01")):
        assert main([*flags, "--out", str(tmp_path / name), "--z-loss", weight]) == 0
    plain, with_z = ([r["loss"] for r in records(tmp_path / name, "train")] for name in ("run", "z"))
    lse = math.log(61)  # of a new model's nearly equal logits
    assert [b - a for a, b in zip(plain, with_z, strict=True)] == pytest.approx([0.01 * lse**2] * 8, rel=0.01)
    assert len({records(tmp_path / name, "eval")[-1]["val_loss"] for name in ("run", "z")}) == 1


# -- epochs ------------------------------------------------------------------------------------------------------------


def test_epochs_are_the_steps_that_see_every_conversation_as_often(tmp_path, capsys):
    rows = [(ids % 60, mask) for ids, mask in some_rows(48, longest=30)]
    write_chat(tmp_path / "talk", rows[:40], rows[40:], about=TINY)
    save_model(thinker(dtype=torch.float32, halting="policy"), tmp_path / "model")
    flags = f"--recipe tiny --data {tmp_path / 'talk'} --init-from {tmp_path / 'model'} --out {tmp_path / 'run'}"
    flags += " --epochs 1.5 --tokens-per-batch 64 --warmup 1 --log-every 1 --device cpu --sample-tokens 0"
    flags = (flags + " --eval-every 100 --eval-windows 2").split()
    assert converse.main(flags) == 0
    rows = [sum(r["depths"].values()) for r in records(tmp_path / "run", "train")]
    assert sum(rows[:-1]) < 60 <= sum(rows), "the first step at which 1.5 times 40 rows were seen is the last"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["run"]["steps"] == len(rows)
    assert converse.main([*flags, "--resume", "auto"]) == 0
    assert "the run has finished" in capsys.readouterr().out
    assert converse.main([*flags, "--steps", "5", "--overwrite"]) == 1
    assert "each say how long the run is" in capsys.readouterr().err


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_of_a_step_depends_on_seed_and_step_alone(flags, tmp_path):
    """Nothing that draws random numbers in between (evaluations, a resumed process) changes it."""
    assert main(flags) == 0
    often = ["--out", str(tmp_path / "often"), "--eval-every", "1"]
    assert main([*flags, *often]) == 0
    assert_same_bits(weights(tmp_path / "often", 8), weights(tmp_path / "run", 8))
    torch.manual_seed(7)
    again = resumed_from(tmp_path / "run", 4, flags, tmp_path / "again")
    assert_same_bits(weights(again, 8), weights(tmp_path / "run", 8))
    losses = [[r["loss"] for r in records(run, "train")] for run in (tmp_path / "run", again)]
    assert losses[0] == losses[1]
    masks = []
    step = build(vars(parse([*flags, "--out", str(tmp_path / "unused")]))).train_step
    for number in (0, 1, 0):
        step.seed_dropout(number)
        masks.append(F.dropout(torch.ones(64), 0.5))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


# -- one run, one directory --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_second_run_in_a_directory_is_refused_with_the_firsts_id(flags, tmp_path, capsys):
    code = "import sys; from hrm_model.training.rundir import RunLock; lock = RunLock(__import__('pathlib').Path("
    code += "sys.argv[1])); print('locked', flush=True); sys.stdin.readline()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        for extra in ([], ["--overwrite"], ["--resume", "auto"]):
            assert main([*flags, *extra]) == 1
            error = capsys.readouterr().err
            assert f"is in use: process {other.pid} on " in error and "choose another --out" in error
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.lock"]
        other.send_signal(signal.SIGKILL)
    assert main(flags) == 0, "the lock of a process that was killed holds nobody up"


def test_a_run_that_began_and_ended_while_another_was_being_built_is_not_trained_over(
    flags, tmp_path, monkeypatch, capsys
):
    """The lock is free again by the time at which the second one asks for it."""
    opened, first = loop.open_stage_data, []

    def meanwhile(*args):
        if not first:
            first.append(True)
            assert main(flags) == 0
            first.append(
                {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.suffix != ".lock"}
            )
        return opened(*args)

    monkeypatch.setattr(loop, "open_stage_data", meanwhile)
    assert main(flags) == 1
    assert f"another process trained in --out {tmp_path / 'run'} while this one started" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in first[1].items())


def test_a_run_gives_its_lock_back(flags, tmp_path):
    assert main(flags) == 0
    RunLock(tmp_path / "run").close()
    assert main([*flags, "--overwrite"]) == 0
