"""train/pretrain.py as its user runs it: what it leaves behind, resuming, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import COMPILING
from pretrain_helpers import (
    NO_PICTURES,
    assert_same_bits,
    checkpoint_of,
    decided,
    records,
    short_run,
    signal_during,
    start,
    start_from,
    weights,
)

from train.pretrain import build, main, parse

pytestmark = NO_PICTURES


@pytest.fixture
def flags(tiny_dataset, tiny_model, tmp_path) -> list[str]:
    return [*short_run(tiny_dataset, tiny_model, tmp_path / "run"), *"--sample-tokens 0".split()]


def run_stopped_during(step: int, number: int, flags: list[str]) -> int:
    """Exit status of a run, in this process, that gets signal `number` while it takes step `step`."""
    return signal_during(build(vars(parse(flags))), step, number)()


def test_accumulation_gives_the_gradients_of_the_whole_batch(flags, tmp_path):
    flags[flags.index("--dropout") + 1] = "0"
    ways = {"a": ("8", "1"), "b": ("2", "4")}
    for name, (batch, accumulation) in ways.items():
        assert main([*flags, "--out", str(tmp_path / name), "--batch-size", batch, "--accumulation", accumulation]) == 0
    a, b = (weights(tmp_path / name, 8) for name in ways)
    for key in ("wte.weight", "hrm_core.L_level.layers.0.mlp.up.weight"):
        assert torch.allclose(a[key], b[key], atol=2e-5), key
    for key in ("hrm_core.q_head.weight", "hrm_core.q_head.bias"):
        assert torch.allclose(a[key], b[key], rtol=0, atol=1e-5), key


def test_depth_of_a_row_depends_on_its_sample_number_only(flags, tmp_path):
    for name, batch, accumulation in (("a", "8", "1"), ("b", "2", "4")):
        run = ["--out", str(tmp_path / name), "--batch-size", batch, "--accumulation", accumulation]
        assert main([*flags, *run, "--halting", "none", "--target-steps", "0"]) == 0
    a, b = ([r["depths"] for r in records(tmp_path / name, "train")] for name in ("a", "b"))
    assert a == b and len({json.dumps(d) for d in a}) > 1


def test_a_fixed_depth_is_every_rows_depth(flags, tmp_path):
    assert main([*flags, "--depth", "fixed:2"]) == 0
    assert set().union(*(r["depths"] for r in records(tmp_path / "run", "train"))) == {"2"}
    last = records(tmp_path / "run", "eval")[-1]
    assert last["val_loss"] == last["loss_by_depth"]["2"]


@pytest.mark.parametrize(("q", "depth"), [((5.0, -5.0), "1"), ((-5.0, 5.0), "3")])
def test_the_head_can_set_the_depth_in_training_and_evaluation(flags, tiny_model, tmp_path, q, depth):
    """A head that was trained before, and is left as it is now."""
    start_from(decided(tiny_model, q, tmp_path / "decided", halting="policy"), flags)
    assert main([*flags, "--halting", "none", "--target-steps", "0", "--depth", "head"]) == 0
    for kind in ("train", "eval"):
        assert all({d for d, n in r["depths"].items() if n} == {depth} for r in records(tmp_path / "run", kind))
    last = records(tmp_path / "run", "eval")[-1]
    assert last["val_loss"] == last["loss_by_depth"][depth]


def test_published_gradient_is_the_replayed_one_where_all_rows_run_all_steps(flags, tmp_path):
    flags[flags.index("--dropout") + 1] = "0"
    for gradient in ("replay", "published"):
        run = ["--gradient", gradient, "--depth", "fixed:3", "--out", str(tmp_path / gradient)]
        assert main([*flags, *run]) == 0
    replay, published = ([r["loss"] for r in records(tmp_path / g, "train")] for g in ("replay", "published"))
    assert np.allclose(np.array(published) - 0.01 * 3, replay, atol=1e-5), "the published step penalty is a constant"


def test_init_from_starts_a_new_run_from_weights(flags, tmp_path):
    assert main(flags) == 0
    start_from(tmp_path / "run", flags)
    second = [*flags, "--out", str(tmp_path / "second"), "--lr", "0", "--min-lr"]
    assert main([*second, "0"]) == 0
    assert torch.equal(weights(tmp_path / "second", 8)["wte.weight"], weights(tmp_path / "run", 8)["wte.weight"])


def test_a_tracker_that_fails_warns_and_is_left_out(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.warns(RuntimeWarning, match="tracker wandb is left out"):
        assert main([*flags, "--track", "wandb"]) == 0
    assert len(records(tmp_path / "run", "train")) == 8


def test_fused_on_a_machine_without_a_gpu_says_so_and_trains(flags):
    printed = start(*flags, "--fused", env=COMPILING).communicate()[0]
    assert "Triton kernels need a CUDA device, or a CPU with TRITON_INTERPRET=1; the reference runs" in printed


def test_fused_training_follows_the_same_curve(flags, tmp_path):
    """The whole script with every op a kernel (through the interpreter on a CPU) and with none."""
    flags[flags.index("--dropout") + 1] = "0"
    flags += "--steps 3 --batch-size 2 --accumulation 1 --eval-every 3 --eval-windows 1".split()
    for name, fused in (("with", ["--fused=require"]), ("without", [])):
        assert main([*flags, *fused, "--out", str(tmp_path / name)]) == 0
    with_kernels, without = ([r["loss"] for r in records(tmp_path / n, "train")] for n in ("with", "without"))
    assert len(without) == 3 and np.allclose(with_kernels, without, rtol=0, atol=1e-3)
    with_kernels, without = ([r.get("head_loss") for r in records(tmp_path / n, "train")] for n in ("with", "without"))
    explored = [i for i, loss in enumerate(without) if loss is not None]
    assert explored and np.allclose([with_kernels[i] for i in explored], [without[i] for i in explored], atol=1e-3)
    a, b = weights(tmp_path / "with", 3), weights(tmp_path / "without", 3)
    assert any(not torch.equal(a[k], b[k]) for k in a), "equal to the last bit would mean that no kernel ran"


def test_a_kernel_asked_for_by_the_environment_is_never_replaced_silently(flags):
    process = start(*flags, env=COMPILING | {"HRM_KERNELS": "triton"})
    printed = process.communicate()[0]
    assert process.returncode == 1 and "error: HRM_KERNELS=triton: no kernel can run" in printed
    process = start(*flags, env=os.environ | {"HRM_KERNELS": "fast"})
    printed = process.communicate()[0]
    assert process.returncode == 1 and "error: the environment variable HRM_KERNELS is 'fast'" in printed


def test_fused_require_without_a_gpu_is_an_error(flags):
    process = start(*flags, "--fused=require", env=COMPILING)
    printed = process.communicate()[0]
    assert process.returncode == 1 and "--fused=require: no kernel can run for rms_norm" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="for where there is no GPU")
def test_a_driver_of_the_loop_that_cannot_run_here_is_an_error_of_one_line(flags):
    process = start(*flags, env=COMPILING | {"HRM_KERNELS": "auto,hrm_loop=graph"})
    printed = process.communicate()[0]
    assert process.returncode == 1 and "Traceback" not in printed
    assert "error: hrm_loop=graph was asked for, but the tensors are on cpu" in printed.splitlines()[-1]


def test_recomputed_activations_train_to_the_same_bits(flags, tmp_path):
    for name in ("kept", "recompute"):
        assert main([*flags, "--out", str(tmp_path / name), *(["--recompute"] if name == "recompute" else [])]) == 0
    assert_same_bits(weights(tmp_path / "recompute", 8), weights(tmp_path / "kept", 8))


def test_bfloat16_autocast_trains_close_to_float32(flags, tmp_path):
    flags[flags.index("--dropout") + 1] = "0"
    for dtype in ("float32", "bfloat16"):
        assert main([*flags, "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    exact, rounded = ([r["loss"] for r in records(tmp_path / n, "train")] for n in ("float32", "bfloat16"))
    assert exact != rounded and np.allclose(exact, rounded, rtol=5e-3)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "bfloat16", 8).values() if t.is_floating_point())


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(flags, tmp_path):
    flags[flags.index("--dropout") + 1] = "0"
    assert main([*flags, "--out", str(tmp_path / "eager")]) == 0
    assert main([*flags, "--out", str(tmp_path / "compiled"), "--compile"]) == 0
    eager, compiled = ([r["loss"] for r in records(tmp_path / n, "train")] for n in ("eager", "compiled"))
    assert np.allclose(eager, compiled, rtol=1e-4)


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_a_stopped_run_saves_and_resumes_to_the_same_bits(flags, tmp_path):
    """SIGTERM after the third step: that step is saved (2 is the save interval), and the run goes on from there."""
    whole = tmp_path / "whole"
    assert main([*flags, "--out", str(whole)]) == 0

    process = start(*flags)
    for line in process.stdout:
        if line.split()[:2] == ["step", "3/8"]:
            process.terminate()
    assert process.wait() == 75
    assert not (tmp_path / "run" / "checkpoints" / "step-00000008").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a line cut off by a kill

    assert main([*flags, "--resume", "auto"]) == 0
    assert_same_bits(weights(tmp_path / "run", 8), weights(whole, 8))
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 9))
    same = ("step", "loss", "grad_norm", "depths", "price", "head_loss", "head_depths", "exit_losses")
    found, expected = ([[r[key] for key in same] for r in records(run, "train")] for run in (tmp_path / "run", whole))
    assert found == expected
    ended = [json.loads((checkpoint_of(run, 8) / "state.json").read_text()) for run in (tmp_path / "run", whole)]
    assert ended[0]["price"] == ended[1]["price"] != 0.02, "the price goes on from where it was steered to"


def kill_and_resume(flags: list[str], tmp_path: Path, kills: int, seed: int) -> None:
    """kill -9 a run at random moments, resume each time, and compare its end with an uninterrupted run's."""
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    chance = np.random.default_rng(seed)
    done = 0
    while done < kills:
        process = start(*flags, "--resume", "auto")
        for line in process.stdout:
            if line.startswith("kernels"):  # the header's last line: the run is at work from here on
                time.sleep(chance.uniform(0.0, 1.0))
                process.kill()
                break
        process.stdout.read()
        code = process.wait()
        assert code in (0, -9), code
        done += code == -9
        if code == 0:  # it finished before the kill: begin again, so that every kill hits a run at work
            shutil.rmtree(tmp_path / "run")
    assert main([*flags, "--resume", "auto"]) == 0
    assert_same_bits(weights(tmp_path / "run", 8), weights(tmp_path / "whole", 8))


def test_three_kills_change_nothing(flags, tmp_path):
    kill_and_resume(flags, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_twenty_kills_change_nothing(flags, tmp_path):
    kill_and_resume(flags, tmp_path, kills=20, seed=1)


def test_a_second_signal_leaves_at_once_and_harms_nothing(flags, tmp_path):
    """A step of 100,000 micro-batches takes minutes: only leaving at once ends it here."""
    process = start(*flags, "--accumulation", "100000")
    for line in process.stdout:
        if line.startswith("kernels"):
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        if line.startswith("stopping after this step"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    flags[flags.index("--accumulation") + 1] = "2"
    assert main([*flags, "--resume", "auto"]) == 0


def test_ctrl_c_before_training_is_one_line(flags, tmp_path):
    """The model's shape comes from a pipe that never says anything, so that the run is surely still being set up."""
    os.mkfifo(tmp_path / "pipe")
    process = start(*flags, "--config", str(tmp_path / "pipe"))
    with (tmp_path / "pipe").open("w"):
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0]
    assert process.returncode == 130 and printed.strip() == "stopped before training began; nothing was lost"


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_resumed_run(flags, tmp_path):
    """A run that was stopped after its last step, before its evaluation, is not finished."""
    assert run_stopped_during(8, signal.SIGINT, flags) == 75
    assert [r["step"] for r in records(tmp_path / "run", "eval")] == [4]
    assert main([*flags, "--resume", "auto"]) == 0
    assert [r["step"] for r in records(tmp_path / "run", "eval")] == [4, 8]


def test_a_checkpoint_has_the_validation_loss_of_its_own_weights_only(flags, tmp_path):
    assert main([*flags, "--eval-every", "3", "--save-every", "2", "--keep-last", "9"]) == 0
    evals = {r["step"]: r["val_loss"] for r in records(tmp_path / "run", "eval")}
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["val_loss"] == evals.get(state["step"])


def test_a_resumed_run_keeps_its_origin_and_needs_not_what_it_began_from(flags, tmp_path):
    assert main([*flags, "--out", str(tmp_path / "source")]) == 0
    start_from(tmp_path / "source", flags)
    assert run_stopped_during(4, signal.SIGTERM, flags) == 75
    origin = json.loads((tmp_path / "run" / "run.json").read_text())
    shutil.rmtree(tmp_path / "source")
    assert main([*flags, "--resume", "auto"]) == 0
    after = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [entry["step"] for entry in after.pop("resumed")] == [4]
    assert after == {key: value for key, value in origin.items() if key != "resumed"}


def test_a_run_whose_checkpoints_are_all_broken_is_not_silently_begun_anew(flags, tmp_path, capsys):
    assert main(flags) == 0
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.warns(UserWarning, match="skipped broken checkpoint"):
        assert main([*flags, "--resume", "auto"]) == 1
    assert "no checkpoint in" in capsys.readouterr().err
    assert len(records(tmp_path / "run", "train")) == 8


def test_a_finished_run_has_nothing_to_resume(flags, capsys):
    assert main(flags) == 0
    assert main([*flags, "--resume", "auto"]) == 0
    assert "the run has finished: step 8 of 8" in capsys.readouterr().out


def test_resume_falls_back_to_the_newest_intact_checkpoint(flags, tmp_path):
    assert main(flags) == 0
    expected = weights(tmp_path / "run", 8)
    broken = tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.warns(UserWarning, match=r"(?s)step-00000008.*model\.safetensors"):
        assert main([*flags, "--resume", "auto"]) == 0
    assert_same_bits(weights(tmp_path / "run", 8), expected)


def test_resuming_with_other_options_lists_them(flags, tiny_dataset, tmp_path, capsys):
    assert main(flags) == 0
    assert main([*flags, "--resume", "auto", "--halting", "gain"]) == 1, "the model's file differs, too"
    error = capsys.readouterr().err
    assert "--halting was 'policy', is 'gain'" in error and "--init-from" in error
    assert main([*flags, "--resume", "auto", "--lr", "0.02", "--seed", "5"]) == 1
    error = capsys.readouterr().err
    assert "--lr was 0.01, is 0.02" in error and "--seed was 1337, is 5" in error


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_an_occupied_directory_is_never_written_to(flags, tmp_path, capsys):
    assert main(flags) == 0
    assert main(flags) == 1
    assert "holds a run already; continue it with --resume auto" in capsys.readouterr().err
    assert main([*flags, "--overwrite"]) == 0

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"], ["--resume", "auto"]):
        assert main([*flags, "--out", str(tmp_path / "mine"), *extra]) == 1
        assert "holds files that are no training run" in capsys.readouterr().err
        (tmp_path / "mine" / "run.json").write_text("{}")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

    assert main([*flags, "--out", str(tmp_path / "mine" / "thesis.txt")]) == 1
    assert "is a file" in capsys.readouterr().err
    assert main([*flags, "--out", str(tmp_path / "mine" / "thesis.txt" / "run")]) == 1
    assert "thesis.txt" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_step(flags, tmp_path, capsys):
    flags[flags.index("--lr") + 1] = "1e30"
    assert main([*flags, "--save-every", "1"]) == 76
    printed = capsys.readouterr().err
    assert "error: step 2" in printed and "is not finite, in samples 8..11, 12..15" in printed
    assert "step-00000001" in printed and "no parameter was changed" in printed
    after = weights(tmp_path / "run", 1)
    assert all(torch.isfinite(t).all() for t in after.values())
    assert not (tmp_path / "run" / "checkpoints" / "step-00000002").exists()


def test_a_disk_that_fills_during_a_save_is_named_and_earlier_checkpoints_stay(small_dataset, small_model, tmp_path):
    """The file size limit stands for a full disk: the write of the weights fails in the middle."""
    flags = short_run(small_dataset, small_model, tmp_path / "run")
    resource = pytest.importorskip("resource")
    assert main(flags) == 0
    earlier, last = weights(tmp_path / "run", 6), weights(tmp_path / "run", 8)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")

    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))}
    process = start(*flags, "--resume", "auto", **limited)
    printed = process.communicate()[0]
    assert process.returncode == 1
    assert "error:" in printed and "step-00000008" in printed and "Traceback" not in printed
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000006"}
    assert_same_bits(weights(tmp_path / "run", 6), earlier)
    assert main([*flags, "--resume", "auto"]) == 0
    assert_same_bits(weights(tmp_path / "run", 8), last)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "0", "--batch-size", "0"], r"--steps 0 is below its minimum 1\n  --batch-size 0"),
        (["--min-lr", "0.5"], "--min-lr 0.5 is above --lr 0.01"),
        (["--depth", "fixed:0"], "--depth 'fixed:0' is none of auto, random, head, fixed:N"),
        (["--depth", "fixed:9"], "--depth fixed:9 is over hrm_max_steps 3"),
        (["--recipe", "huge"], "--recipe 'huge' is none of tiny, small, base"),
        (["--dtype", "int4"], "--dtype 'int4' is none of auto, float32, bfloat16"),
        (["--device", "cuda:7"], "--device 'cuda:7' is not to be had here"),
        (["--data", "nowhere"], "nowhere"),
        (["--data-weights", "1", "2"], "2 weights"),
        (["--init-from", "nowhere"], "--config and --init-from each say"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--overwrite", "--resume", "auto"], "contradict each other"),
        (["--seed", str(2**70)], "is not below 2"),
        (["--device", "meta"], "'meta' is not to be had here"),
        (["--track", "paper"], "--track 'paper' is none of tensorboard, wandb"),
        (["--dropout", "1"], "--dropout 1.0 is outside"),
        (["--head-lr", "nan"], "--head-lr nan is not a finite number of at least 0"),
        (["--head-lr", "-1"], "--head-lr -1.0 is not a finite number of at least 0"),
        (["--halting", "magic"], "--halting 'magic' is none of policy, gain, expected, q, none, published"),
        (["--decisions", "all"], "--decisions 'all' is none of prefix, row"),
        (["--step-price", "-0.1"], "--step-price -0.1 is not a finite number of at least 0"),
        (["--step-price", "nan"], "--step-price nan is not a finite number"),
        (["--step-price", "inf"], "--step-price inf is not a finite number"),
        (["--step-price", "0"], "--target-steps steers the price by factors, which --step-price 0 leaves at 0"),
        (["--target-steps", "0.5"], "--target-steps 0.5 is not a number of at least 1"),
        (["--target-steps", "-2"], "--target-steps -2.0 is not a number of at least 1"),
        (["--target-steps", "nan"], "--target-steps nan is not a number of at least 1"),
        (["--target-steps", "3.5"], "--target-steps 3.5 is over hrm_max_steps 3 of the model"),
        (["--halting", "none"], "--target-steps 1.5 steers a head that learns, and --halting none has none"),
        (["--explore", "0"], "--explore 0 leaves --halting policy nothing to learn from"),
        (["--explore", "1.5"], r"--explore 1.5 is outside 0\.\.1"),
        (["--depth-warmup", "2"], r"--depth-warmup 2.0 is outside 0\.\.1"),
        (["--gradient-steps", "4"], "--gradient-steps 4 is over hrm_max_steps 3 of the model"),
        (["--gradient-steps", "0"], "--gradient-steps 0 is below its minimum 1"),
        (["--gradient-steps", "2", "--gradient", "published"], "--gradient-steps 2 is for --gradient replay"),
    ],
)
def test_bad_options_are_named_and_nothing_is_made(flags, tmp_path, capsys, extra, message):
    import re

    assert main([*flags, *extra]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ") and not (tmp_path / "run").exists()
    assert len(error.splitlines()) <= 3, "a line for each fault"


def test_a_model_whose_vocabulary_is_too_small_for_the_data_is_refused(flags, tiny_model, tmp_path, capsys):
    shape = json.loads(tiny_model.read_text()) | {"vocab_size": 50}
    (tmp_path / "small.json").write_text(json.dumps(shape))
    assert main([*flags, "--config", str(tmp_path / "small.json")]) == 1
    assert "vocab_size 50" in capsys.readouterr().err


def test_an_impossible_model_lists_its_faults(flags, tiny_model, tmp_path, capsys):
    shape = json.loads(tiny_model.read_text()) | {"n_head": 3, "hrm_max_steps": 0}
    (tmp_path / "bad.json").write_text(json.dumps(shape))
    assert main([*flags, "--config", str(tmp_path / "bad.json")]) == 1
    error = capsys.readouterr().err
    assert "n_embd 8 is not divisible by n_head 3" in error and "hrm_max_steps 0" in error


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "what sets a row's steps" in capsys.readouterr().out
