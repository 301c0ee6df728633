"""train/hybrid.py: a run from flags to checkpoints, resumed to the same bits; its baselines; what it refuses."""

from __future__ import annotations

import csv
import json
import signal

import pytest
import torch
from pretrain_helpers import assert_same_bits, checkpoint_of, records, weights

pytest.importorskip("transformers")
from hybrid_models import save_language_model, tokenizer

from hrm_model.checkpoint import CheckpointError, load_checkpoint
from hrm_model.cli import main as hrm
from hrm_model.hybrid.generate import GREEDY
from hrm_model.hybrid.training.command import options, parse
from hrm_model.hybrid.training.loop import HybridTraining
from train.hybrid import __doc__ as DESCRIPTION
from train.hybrid import main


@pytest.fixture(scope="module")
def small_lm(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("language") / "lm")


def line(small_lm, out, more: str = "") -> list[str]:
    """A run of 6 steps, with flags spelled as the seed spells them."""
    flags = f"--model_name {small_lm} --tasks toy_addition --d_h 16 --h_layers 1 --l_layers 1 --n_heads 2 --inner_T 2"
    flags += " --injector cab --max_steps 6 --batch_size 4 --accumulation 2 --lr 0.01 --warmup 2 --eval_n 6"
    flags += " --eval_every 3 --save_every 2 --log_every 1 --max_new_tokens 4 --log_samples_every 4 --device cpu"
    flags += " --controller_warmup 2"
    return [*flags.split(), "--out", str(out), *more.split()]


def training(small_lm, out, more: str = "") -> HybridTraining:
    return HybridTraining(options(parse(DESCRIPTION, line(small_lm, out, more))))


@pytest.fixture(scope="module")
def whole(small_lm, tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert training(small_lm, out, "--use_act --dropout 0.1 --eval_segments 5")() == 0
    return out


def test_a_run_logs_losses_by_segment_the_head_and_accuracy(whole, capsys):
    train, evals = records(whole, "train"), records(whole, "eval")
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in evals] == [3, 6]
    for r in train:
        assert set(r["segment_losses"]) == {"1", "2", "3"} and r["head_loss"] > 0 and r["z_norm"] > 1
        assert r["loss"] == pytest.approx(sum(r["segment_losses"].values()) / 3)
    assert train[-1]["loss"] < train[0]["loss"]
    for r in evals:
        assert r["accuracy_by_task"] == {"toy_addition:2": r["accuracy"]} and "accuracy_deep" in r
        assert min(r["loss_by_segment"].values()) - 1e-6 <= r["val_loss"] <= max(r["loss_by_segment"].values()) + 1e-6
    with (whole / "eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["val_loss"]) for r in rows] == [r["val_loss"] for r in evals]


def test_a_checkpoint_holds_only_what_is_trained(whole, small_lm):
    held = weights(whole, 6)
    made = training(small_lm, whole.parent / "other", "--use_act --dropout 0.1")
    assert {name for name in held if not name.startswith("optimizer/")} == set(made.model.state_dict())
    assert not any("language" in name or "lm_head" in name or "embed" in name for name in held)
    config = json.loads((checkpoint_of(whole, 6) / "config.json").read_text())
    assert config["language_model"]["width"] == 32 and config["d_h"] == 16


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(whole, small_lm, tmp_path, number):
    more = "--use_act --dropout 0.1 --eval_segments 5"
    interrupted = training(small_lm, tmp_path / "run", more)
    read = interrupted.train_step.data.batches

    def signalled(step):
        if step == 3 and interrupted.step == 3:
            signal.raise_signal(number)
        return read(step)

    interrupted.train_step.data.batches = signalled
    assert interrupted() == 75
    assert training(small_lm, tmp_path / "run", more + " --resume auto")() == 0
    assert_same_bits(weights(whole, 6), weights(tmp_path / "run", 6))
    again = [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records(tmp_path / "run", "train")]
    assert again == [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records(whole, "train")]


def test_resume_takes_the_path_of_a_run_or_of_its_newest_checkpoint(whole, small_lm, tmp_path, capsys):
    flags = line(small_lm, whole, "--use_act --dropout 0.1")
    at = flags.index("--out")
    del flags[at : at + 2]
    for path in (whole, checkpoint_of(whole, 6)):
        assert main([*flags, "--resume", str(path)]) == 0
        assert "the run has finished" in capsys.readouterr().out
    assert main([*flags, "--resume", str(checkpoint_of(whole, 4))]) == 1
    assert "is not the newest checkpoint" in capsys.readouterr().err
    assert main([*flags, "--resume", str(tmp_path)]) == 1
    assert "nor a run with a checkpoint" in capsys.readouterr().err


def test_another_language_model_or_width_cannot_go_on(whole, small_lm, tmp_path, capsys):
    other = save_language_model(tmp_path / "other", hidden_size=64)
    more = "--use_act --dropout 0.1 --resume auto"
    assert main(line(other, whole, more)) == 1
    error = capsys.readouterr().err
    assert "is of another model" in error and "language_model" in error and error.count("\n") < 8
    assert main(line(small_lm, whole, f"{more} --d_h 32")) == 1
    assert "--d-h was 16, is 32" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="of another model"):
        load_checkpoint(checkpoint_of(whole, 6), training(small_lm, tmp_path / "x", "--d_h 32").model)


def test_a_new_run_can_begin_from_a_checkpoint(whole, small_lm, tmp_path):
    made = training(small_lm, tmp_path / "run", f"--use_act --dropout 0.1 --init-from {whole}")
    held = weights(whole, 6)
    assert all(torch.equal(p, held[name]) for name, p in made.model.state_dict().items()) and made.step == 0


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_flags_come_from_a_file_and_the_command_line_wins(small_lm, tmp_path, ending):
    if ending == "yaml":
        pytest.importorskip("yaml")
    text = {
        "json": json.dumps(
            {"model_name": "x", "segments": 2, "lr": 1e-4, "tasks": ["chain_sum", "toy_addition"], "use-act": True}
        ),
        "yaml": "model_name: x\nsegments: 2\nlr: 1e-4\ntasks: [chain_sum, toy_addition]\nuse-act: true\n",
    }[ending]
    path = tmp_path / f"run.{ending}"
    path.write_text(text)
    run = options(parse(DESCRIPTION, ["--config", str(path), "--segments", "4"]))
    assert (run.segments, run.lr, run.model_name, run.use_act) == (4, 1e-4, "x", True)
    assert run.task_names == ["chain_sum", "toy_addition"]
    path.write_text(text.replace("segments", "segmints"))
    with pytest.raises(ValueError, match="unknown flags: segmints"):
        options(parse(DESCRIPTION, ["--config", str(path)]))
    path.write_text(text.replace("2", '"two"'))
    with pytest.raises(ValueError, match="segments is 'two', expected a int"):
        options(parse(DESCRIPTION, ["--config", str(path)]))


def test_the_seeds_decoding_is_greedy_and_others_can_be_asked_for(small_lm, tmp_path):
    assert options(parse(DESCRIPTION, line(small_lm, tmp_path))).sampling.temperature == 0
    more = "--decode_temperature 0.7 --decode_top_p 0.9 --decode_top_k 5"
    sampling = options(parse(DESCRIPTION, line(small_lm, tmp_path, more))).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 5)


def test_the_baseline_without_a_language_model_learns(small_lm, tmp_path):
    made = training(small_lm, tmp_path / "run", "--system hrm --eval_segments 4")
    assert made() == 0
    losses = [r["loss"] for r in records(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.3
    example = made.mixture.test[0]
    ids = made.collator.prompt_ids(example.prompt)
    (text,), _ = made.evaluation.answer([example], 3)
    for token in made.collator.tokenizer(text, add_special_tokens=False).input_ids:  # greedy, token by token
        logits = made.model.model(torch.tensor([ids]), force_steps=3).logits
        assert logits[0, -1].argmax() == token
        ids.append(token)


def test_the_baseline_of_adapters_alone_learns(small_lm, tmp_path):
    pytest.importorskip("peft")
    made = training(small_lm, tmp_path / "run", "--system lm --lora_rank 4 --lora_layers 1")
    assert made() == 0
    losses = [r["loss"] for r in records(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]
    assert set(weights(tmp_path / "run", 6)) >= set(made.model.state_dict())
    assert training(small_lm, tmp_path / "run", "--system lm --lora_rank 4 --lora_layers 1 --resume auto")() == 0


WRONG = {
    "--tasks chain_summ": "unknown task 'chain_summ'; did you mean chain_sum",
    "--tasks toy_addition,toy_addition": "each once",
    "--tasks toy_addition:x": "a number of digits",
    "--eval_n 0": "--eval-n 0 is below its minimum 1",
    "--tasks toy_addition:1 --eval_n 60": "no 60 different prompts",
    "--injector magic": "--injector 'magic' is none of grb, cab",
    "--system lm": "--lora-rank 0 has none",
    "--d_h 15": "d_h 15 is not divisible by n_heads 2",
    "--use_act --segments 1": "at least 2 segments",
    "--act_penalty -1": "--act-penalty -1.0",
    "--pad-token nothing": "'nothing' is no token",
    "--decode_temperature -1 --decode_top_p 1": "temperature -1.0",
    "--model_name /nowhere/at/all": "/nowhere/at/all",
}


@pytest.mark.parametrize("more", WRONG)
def test_what_is_wrong_is_said_on_one_line_and_nothing_is_written(small_lm, tmp_path, capsys, more):
    if "chain" in more:
        pytest.importorskip("reasoning_gym")
    assert main(line(small_lm, tmp_path / "run", more)) == 1
    error = capsys.readouterr().err
    assert WRONG[more] in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_padding_can_be_given_one(small_lm, tmp_path, capsys):
    tokenizer(pad=False).save_pretrained(tmp_path / "unpadded")
    flags = line(small_lm, tmp_path / "run", f"--tokenizer {tmp_path / 'unpadded'}")
    assert main(flags) == 1 and "--pad-token '<eos>'" in capsys.readouterr().err
    assert (
        HybridTraining(options(parse(DESCRIPTION, [*flags, "--pad-token", "<eos>"]))).collator.tokenizer.pad_token_id
        == 0
    )


def test_a_loss_that_is_no_number_changes_nothing(small_lm, tmp_path, capsys):
    made = training(small_lm, tmp_path / "run")
    with torch.no_grad():
        made.model.injector.gate.raw.fill_(float("nan"))
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    assert made() == 76
    assert "no parameter was changed" in capsys.readouterr().err
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters() if "gate" not in name)


def test_a_run_answers_what_its_evaluation_answered(whole, small_lm, tmp_path, capsys):
    made = training(small_lm, tmp_path / "other", "--use_act --dropout 0.1 --eval_segments 5")
    load_checkpoint(checkpoint_of(whole, 6), made.model, restore_rng=False)
    made.model.eval()
    prompts = [example.prompt for example in made.mixture.test]
    answers, segments = made.model.answers(made.collator, prompts, 4, GREEDY, 3)
    typed = [part for prompt in prompts for part in ("-p", prompt)]
    assert hrm(["ask", str(whole), *typed, "--json", "--device", "cpu"]) == 0
    said = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert said == [
        {"prompt": p, "answer": a, "segments": n} for p, a, n in zip(prompts, answers, segments, strict=True)
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    more = ["--file", str(tmp_path / "prompts.txt"), "--segments", "1", "--temperature", "1", "--seed", "3"]
    drawn = []
    for where in (whole, checkpoint_of(whole, 6)):
        assert hrm(["ask", str(where), *more, "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        drawn.append(out)
        assert f"{len(prompts)} answers, 1.00 segments each" in err
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("system", ["hrm", "lm --lora_rank 2 --lora_layers 0"])
def test_baselines_answer_too(small_lm, tmp_path, capsys, system):
    out = tmp_path / "run"
    assert training(small_lm, out, f"--system {system}")() == 0
    capsys.readouterr()
    assert hrm(["ask", str(out), "-p", "12+34=", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "12+34="
    if system == "hrm":
        assert hrm(["ask", str(out), "-p", "1", "--temperature", "1", "--device", "cpu"]) == 1
        assert "--temperature 1.0 draws" in capsys.readouterr().err


def test_what_cannot_be_asked_is_one_error(whole, small_lm, tmp_path, capsys):
    other = save_language_model(tmp_path / "lm", intermediate_size=48)
    capsys.readouterr()
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "state.json").write_text(json.dumps({"run": {"stage": "pretrain"}}))
    for arguments, message in (
        ([str(tmp_path / "none"), "-p", "1"], "none is neither a run of train/hybrid.py"),
        ([str(tmp_path / "stage"), "-p", "1"], "is of the stage 'pretrain', not of train/hybrid.py"),
        ([str(whole)], "there is no prompt; give -p TEXT"),
        ([str(whole), "-p", "1", "--segments", "0"], "--segments 0 must be at least 1"),
        ([str(whole), "-p", "1", "--language-model", str(other)], "made for another language model"),
        ([str(whole), "-p", "1" * 400], "does not fit the language model's window"),
    ):
        assert hrm(["ask", *arguments, "--device", "cpu"]) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and message in err, err
