"""train/halting.py and the fit that it makes: what is written, what is said of it, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import OURS, published_config, save_pt
from parity import COMPILING
from pretrain_helpers import checkpoint_of
from safetensors.torch import load_file

from hrm_model import HRMConfig, HRMForCausalLM, load_model, save_model
from hrm_model.checkpoint import verify_checkpoint
from hrm_model.depth_statistics import Comparison, Costs, DepthStatistics, shuffled, within
from hrm_model.halting import OBJECTIVES, Price, executed_steps, halt_margin
from hrm_model.training.device import autocast
from hrm_model.training.head_fit import Decisions, Fit, fit
from hrm_model.training.sampler import validation_windows
from hrm_model.training.shards import open_dataset
from hrm_model.training.validation import Reading, read_windows
from train.halting import main
from train.pretrain import main as pretrain

SCRIPT = Path(__file__).parents[1] / "train" / "halting.py"
HEAD = {"hrm_core.q_head.weight", "hrm_core.q_head.bias"}
S, STEPS = 4, 100
KEYS = (
    "checkpoint out objective price target_steps usable_exits loss_by_depth mean_steps dispersion histogram loss "
    "applications gain_correlation rivals pays"
)


@pytest.fixture(scope="module")
def run(small_dataset, small_model, tmp_path_factory) -> Path:
    """A training run of 100 steps at random depths: a model without blocks around the core, whose depth matters."""
    root = tmp_path_factory.mktemp("trained")
    shape = json.loads(small_model.read_text()) | dict(n_embd=32, n_input_layers=0, n_output_layers=0)
    shape |= dict(hrm_L_layers=0, hrm_max_steps=S, halt_bias=0.35)
    (root / "config.json").write_text(json.dumps(shape))
    flags = f"--recipe tiny --config {root / 'config.json'} --data {small_dataset} --out {root / 'run.v1'}"
    flags += f" --steps {STEPS} --batch-size 8 --lr 0.01 --min-lr 0.002 --warmup 10 --depth random --halting none"
    flags += f" --device cpu --eval-every {STEPS} --save-every {STEPS} --log-every {STEPS} --sample-tokens 0"
    with pytest.MonkeyPatch.context() as patch, pytest.warns(RuntimeWarning, match=r"no dashboard\.png"):
        patch.setitem(sys.modules, "matplotlib", None)  # no picture is looked at
        assert pretrain(flags.split()) == 0
    return root / "run.v1"


@pytest.fixture(scope="module")
def untrained(small_model, tmp_path_factory) -> Path:
    """A model whose every exit says less than token frequencies do."""
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(small_model.read_text())))
    return save_model(model, tmp_path_factory.mktemp("untrained") / "model")


@pytest.fixture
def flags(small_dataset, tmp_path) -> list[str]:
    return f"--data {small_dataset} --out {tmp_path / 'out'} --eval-windows 40 --device cpu".split()


def fitted(capsys, *arguments: object) -> tuple[dict, str]:
    """(the last line's content, what was printed before it) of a run that succeeds."""
    assert main(list(map(str, arguments))) == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not (a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]))}


def config_of(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


# -- what is written ---------------------------------------------------------------------------------------------------


def test_only_the_head_of_a_run_changes_and_the_result_says_what_it_does(run, flags, tmp_path, small_dataset, capsys):
    result, printed = fitted(capsys, run, *flags, "--step-price", "0.005")
    out, source = tmp_path / "out", checkpoint_of(run, STEPS)
    verify_checkpoint(out)
    assert differing(load_file(out / "model.safetensors"), load_file(source / "model.safetensors")) == HEAD
    before, after = config_of(source), config_of(out)
    assert (before["halting"], before["halt_bias"]) == ("published", 0.35)
    assert {key for key in after if after[key] != before[key]} == {"halting", "halt_bias"}
    assert (after["halting"], after["halt_bias"]) == ("policy", 0.0)

    assert list(result) == KEYS.split()
    assert (result["checkpoint"], result["out"]) == (str(run), str(out))
    assert (result["objective"], result["price"], result["target_steps"]) == ("policy", 0.005, None)
    assert result["usable_exits"] == [1, 2, 3, 4]
    model, _ = load_model(out)
    inputs, targets = validation_windows([open_dataset(small_dataset)], 16, 40)
    reading = read_windows(model, inputs, targets, 8, lambda: autocast(torch.device("cpu"), torch.float32))
    executed = reading.executed()
    assert result["histogram"] == reading.statistics(executed).histogram and sum(result["histogram"]) == 40 * 16
    assert len([n for n in result["histogram"] if n]) > 1, "depths that differ"
    assert result["mean_steps"] == pytest.approx(executed.mean())
    assert result["loss"] == pytest.approx(reading.loss(executed), abs=1e-6)
    assert result["loss_by_depth"] == pytest.approx(reading.by_depth(), abs=1e-6)
    for name, rival in result["rivals"].items():
        low, high = rival["difference_interval"]
        assert low < result["loss"] - rival["loss"] < high, name
    assert list(result["rivals"]) == ["fixed_at_equal_steps", "fixed_at_equal_blocks", "shuffled"]
    assert result["pays"] == all(rival["difference_interval"][1] < 0 for rival in result["rivals"].values())

    lines = printed.splitlines()
    assert lines[0].startswith("loss by depth, nats per token (640 tokens; unigram ")
    assert [float(line.split()[1]) for line in lines[1:5]] == pytest.approx(result["loss_by_depth"], abs=1e-4)
    assert re.fullmatch(r" {3}2  [\d.]+ {3}[+-][\d.]+ against 1 step \([+-][\d.]+ to [+-][\d.]+\)", lines[2])
    for expected in (
        "usable exits (below unigram): 1, 2, 3, 4",
        "depth can pay: a step gains up to ",
        "fitting policy to 2,048 decisions of 128 windows",
        f"price 0.005 nats a step; executed steps: mean {result['mean_steps']:.2f}, sd ",
        f"loss at the decided depths {result['loss']:.4f}, by the causal protocol; learned minus",
        "  fixed at equal blocks ",
        f"wrote {out}",
    ):
        assert expected in printed


def test_a_published_file_is_fitted_and_nothing_else_of_it_changes(untrained, flags, tmp_path, capsys):
    model, config = load_model(untrained)
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in OURS}
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    path = save_pt({"config": published_config(fields), "model_state_dict": weights}, tmp_path / "best.pt")
    arguments = [path, *flags, "--windows", "8", "--iterations", "50"]
    assert main(list(map(str, arguments))) == 1
    assert "0 of 3 exits of" in capsys.readouterr().err and not (tmp_path / "out").exists()
    result, _ = fitted(capsys, *arguments, "--force")
    assert differing(load_file(tmp_path / "out" / "model.safetensors"), weights) == HEAD
    assert result["usable_exits"] == [] and result["checkpoint"] == str(path)
    after = HRMConfig.from_dict(config_of(tmp_path / "out"))
    assert after == dataclasses.replace(HRMConfig.from_dict(fields), halting="policy", halt_bias=0.0)


def test_a_model_goes_beside_its_checkpoint_where_no_place_is_named(run, untrained, small_dataset, tmp_path, capsys):
    model, config = load_model(untrained)
    content = {"config": dataclasses.asdict(config), "model": model.state_dict()}
    shutil.copytree(run, tmp_path / "run.v1")
    quick = f"--data {small_dataset} --device cpu --force --windows 4 --eval-windows 2 --iterations 1".split()
    for checkpoint, out in (("run.v1", "run.v1-halting"), ("best.pt", "best-halting")):
        save_pt(content, tmp_path / "best.pt")
        assert fitted(capsys, tmp_path / checkpoint, *quick)[0]["out"] == str(tmp_path / out)
        verify_checkpoint(tmp_path / out)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("decisions", ["prefix", "row"])
def test_every_objective_can_be_fitted(run, flags, tmp_path, capsys, objective, decisions):
    options = f"--halting {objective} --decisions {decisions} --windows 16 --iterations 20 --eval-windows 4".split()
    result, printed = fitted(capsys, run, *flags, *options)
    n = 16 if decisions == "row" else 16 * 16
    assert result["objective"] == objective and f"fitting {objective} to {n} decisions of 16 windows" in printed
    assert config_of(tmp_path / "out")["halting"] == objective


def test_fitting_again_gives_the_same_bits(run, flags, tmp_path, capsys):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        result, _ = fitted(capsys, run, *flags, *"--windows 32 --iterations 40 --eval-windows 4 --overwrite".split())
        found.append((result, load_file(tmp_path / "out" / "model.safetensors")))
    assert found[0][0] == found[1][0] and not differing(found[0][1], found[1][1])


# -- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.5, 2.5])
def test_a_target_is_met_on_text_that_was_not_fitted_to(run, flags, capsys, target):
    result, printed = fitted(capsys, run, *flags, "--target-steps", target)
    assert abs(result["mean_steps"] - target) < 0.5, result["histogram"]
    assert result["target_steps"] == target and result["price"] != 0.01
    mean = re.search(rf"target {target:g} steps: mean ([\d.]+) on the text fitted to, at price [\de.-]+\n", printed)
    assert abs(float(mean[1]) - target) < 0.25 and "was not reached" not in printed


def test_a_target_that_was_missed_is_said_with_the_remedy(run, flags, capsys):
    """20 iterations are not enough to get anywhere from a price that halts everything."""
    options = "--target-steps 4 --step-price 10 --iterations 20 --windows 8".split()
    result, printed = fitted(capsys, run, *flags, *options)
    assert "the target was not reached: start at --step-price " in printed and "or give more --iterations" in printed
    assert result["mean_steps"] < 3.5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_exits_that_say_nothing_are_shown_and_then_refused(untrained, flags, tmp_path, capsys):
    assert main([str(untrained), *flags]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("loss by depth, nats per token")
    assert "usable exits (below unigram): none" in said.out and "fitting" not in said.out
    error = said.err.splitlines()[-1]
    assert error.startswith(f"error: 0 of 3 exits of {untrained} say more than token frequencies do")
    for remedy in (f"--init-from {untrained} --depth random --halting none", "--data", "--force"):
        assert remedy in error
    assert not (tmp_path / "out").exists()


def test_the_remedy_named_is_a_command_that_runs(untrained, flags, small_dataset, tmp_path, capsys):
    assert main([str(untrained), *flags]) == 1
    words = re.search(r"\(python train/pretrain.py (.*?)\)", capsys.readouterr().err)[1].split()
    more = f"--data {small_dataset} --out {tmp_path / 'on'} --steps 1 --eval-windows 1 --sample-tokens 0 --recipe tiny"
    assert pretrain([*words, *more.split(), "--device", "cpu"]) == 0


def test_what_stands_at_out_is_refused_before_any_work(run, flags, tmp_path, capsys):
    """Before the checkpoint and the data, which do not exist, are looked for."""
    flags[flags.index("--data") + 1] = "nowhere"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert main(["no-model", *flags]) == 1
    error = f"error: {tmp_path / 'out'} already exists; choose another --out or pass --overwrite\n"
    assert capsys.readouterr().err == error
    assert main(["no-model", *flags, "--overwrite"]) == 1
    assert "would be replaced, but holds thesis.txt" in capsys.readouterr().err
    assert main(["no-model", *flags, "--out", str(run), "--overwrite"]) == 1
    assert "would be replaced, but holds checkpoints" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").exists() and (run / "checkpoints").exists()


def test_an_earlier_model_is_replaced_where_that_is_asked_for(run, flags, tmp_path, capsys):
    quick = ["--windows", "4", "--iterations", "2", "--eval-windows", "2"]
    fitted(capsys, run, *flags, *quick)
    assert main([str(run), *flags, *quick]) == 1
    assert "already exists" in capsys.readouterr().err and config_of(tmp_path / "out")["halting"] == "policy"
    fitted(capsys, run, *flags, *quick, "--halting", "gain", "--overwrite")
    assert config_of(tmp_path / "out")["halting"] == "gain"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--halting none", "--halting 'none' is none of policy, gain, expected, q, which train a head"),
        ("--halting published", "--halting 'published' is none of policy"),
        ("--decisions all", "--decisions 'all' is none of prefix, row"),
        ("--windows 3", "--windows 3 is below its minimum 4"),
        ("--eval-windows 0", "--eval-windows 0 is below its minimum 2"),
        ("--iterations 0", "--iterations 0 is below its minimum 1"),
        ("--batch-size 0", "--batch-size 0 is below its minimum 1"),
        ("--seed -1", "--seed -1 is outside 0..2^63 - 1"),
        ("--step-price -1", "--step-price -1.0 is not a finite number of at least 0"),
        ("--step-price nan", "--step-price nan is not a finite number"),
        ("--step-price inf", "--step-price inf is not a finite number"),
        ("--target-steps 0", "--target-steps 0.0 is not a number of at least 1"),
        ("--target-steps nan", "--target-steps nan is not a number of at least 1"),
        ("--target-steps 4.5", "--target-steps 4.5 is over hrm_max_steps 4 of the model"),
        ("--target-steps 2 --step-price 0", "--target-steps steers the price by factors"),
        ("--data nowhere", "nowhere"),
        ("--device meta", "--device 'meta' is not to be had here"),
    ],
)
def test_bad_options_are_named_in_one_line_each_and_nothing_is_written(run, flags, tmp_path, capsys, extra, message):
    assert main([str(run), *flags, *extra.split()]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith("error: ") and len(said.err.splitlines()) <= 2
    assert said.out == "" and not (tmp_path / "out").exists()


def test_faults_are_listed_together(run, flags, capsys):
    assert main([str(run), *flags, *"--step-price nan --target-steps nan --windows 0".split()]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_checkpoints_that_cannot_be_fitted_are_named(untrained, flags, tmp_path, capsys):
    assert main(["nowhere", *flags]) == 1
    assert capsys.readouterr().err == "error: nowhere does not exist; check the path\n"
    model, config = load_model(untrained)
    one = HRMForCausalLM(dataclasses.replace(config, hrm_max_steps=1))
    assert main([str(save_model(one, tmp_path / "one")), *flags]) == 1
    assert "has hrm_max_steps 1: with one step there is nothing to decide" in capsys.readouterr().err
    few = HRMForCausalLM(dataclasses.replace(config, vocab_size=300))
    assert main([str(save_model(few, tmp_path / "few")), *flags]) == 1
    assert "vocab_size 300 allows up to 299" in capsys.readouterr().err
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    assert main([str(save_model(model, tmp_path / "broken")), *flags, "--force", "--windows", "4"]) == 1
    assert "nothing can be fitted to such a model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for where there is no GPU")
def test_a_driver_of_the_loop_that_cannot_run_here_is_an_error_of_one_line(untrained, flags):
    command = [sys.executable, str(SCRIPT), str(untrained), *flags, "--eval-windows", "2"]
    environment = COMPILING | {"HRM_KERNELS": "auto,hrm_loop=graph"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: hrm_loop=graph was asked for, but the tensors are on cpu" in done.stderr.splitlines()[-1]


# -- the fit itself ----------------------------------------------------------------------------------------------------


PRICE = 0.15
"""Half of what a step gains that is needed, so that one too few costs as much as one too many."""


def separable(n: int = 400, seed: int = 0) -> tuple[Decisions, torch.Tensor]:
    """(decisions, the best step of each): after step s the head sees how many steps a text needs, s, and noise. Each
    step gains 2 PRICE until the text has what it needs."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(1, S + 1, (n,), generator=generator)
    steps = torch.arange(1, S + 1)
    means = torch.randn(n, S, 6, generator=generator)
    means[..., 1] = 3 * best[:, None] + 5
    means[..., 4] = 2 * steps
    return Decisions(means, 2 * PRICE * (best[:, None] - steps).clamp_min(0).float() + 1), best


def decided(found: Fit, decisions: Decisions) -> torch.Tensor:
    return executed_steps(halt_margin(torch.nn.functional.linear(decisions.means, found.weight, found.bias)))


@pytest.mark.parametrize("objective", ["policy", "gain", "expected"])
def test_a_depth_that_is_a_linear_function_of_what_the_head_sees_is_learned_exactly(objective):
    decisions, best = separable()
    found = fit(decisions, objective, Price(PRICE))
    assert torch.equal(decided(found, decisions), best)
    assert found.mean_steps == pytest.approx(best.double().mean().item()) and found.price == PRICE
    others, best = separable(seed=1)
    assert torch.equal(decided(found, others), best), "also where it was not fitted"


def test_a_gain_that_comes_with_the_last_step_needed_is_learned_too():
    """Steps before it gain nothing: what pays for them comes later."""
    decisions, best = separable()
    late = dataclasses.replace(decisions, losses=(torch.arange(1, S + 1) < best[:, None]).float())
    assert torch.equal(decided(fit(late, "policy", Price(PRICE)), late), best)


def test_a_draw_of_windows_is_compared_as_its_windows_alone():
    rng = np.random.default_rng(0)
    losses, margins = rng.random((9, 7, S), dtype=np.float32), rng.standard_normal((9, 7, S)).astype(np.float32)
    reading = Reading(losses, margins, np.zeros_like(losses))
    executed, windows = reading.executed(), np.array([3, 3, 0, 8, 5])
    for costs in (None, Costs(5, (1, 2))):
        found = reading.comparing(executed, costs)(windows)
        drawn = Reading(losses[windows], margins[windows], losses[windows])
        mine, by_depth = executed[windows], drawn.by_depth()
        spent = mine.mean() if costs is None else costs.equal_steps(mine)
        dealt = shuffled(by_depth, DepthStatistics.of(mine, S).histogram)
        expected = Comparison(drawn.loss(mine), within(by_depth, spent), dealt, mine.mean())
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), abs=1e-12)


def test_the_head_that_costs_least_on_text_held_out_is_kept():
    """Of noise there is nothing to learn but by heart. A target with a rate of 0 keeps the last head."""
    generator = torch.Generator().manual_seed(0)
    noise = Decisions(torch.randn(80, S, 40, generator=generator), torch.rand(80, S, generator=generator))
    learn, held_out = noise.split(0.25)
    kept, last = fit(noise, "policy", Price(0.01)), fit(noise, "policy", Price(0.01, target=2.0, rate=0.0))
    costs = [[part.cost(decided(found, part), 0.01) for part in (learn, held_out)] for found in (kept, last)]
    assert costs[0][1] < costs[1][1] - 0.02 and costs[1][0] < costs[0][0] - 0.02, "the last one knows its text by heart"
    assert [len(part.losses) for part in (learn, held_out)] == [60, 20]
    assert torch.equal(torch.cat([learn.means, held_out.means]), noise.means)


def test_a_target_steers_the_price_to_a_mean_depth():
    decisions, _ = separable()
    generator = torch.Generator().manual_seed(3)
    decisions = dataclasses.replace(decisions, losses=decisions.losses + 0.1 * torch.rand(400, S, generator=generator))
    for target in (1.5, 2.0):
        price = Price(0.01, target, 0.01)
        found = fit(decisions, "policy", price)
        assert abs(found.mean_steps - target) < 0.25 and found.price == price.value > 0.1


def test_progress_is_told_and_a_fit_does_not_depend_on_chance():
    decisions, _ = separable(100)
    told: list[tuple[int, float]] = []
    first = fit(decisions, "policy", Price(0.01), 30, lambda *progress: told.append(progress))
    torch.manual_seed(99)
    second = fit(decisions, "policy", Price(0.01), 30)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert [i for i, _ in told] == list(range(1, 31)) and told[-1][1] < told[0][1] and np.isfinite(told).all()
