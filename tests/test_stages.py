"""The stages after pretraining: what they train on, what they go on from, how calibration ends and resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conversation_datasets import EOT, write_chat
from pretrain_helpers import assert_same_bits, checkpoint_of, records, signal_during, weights
from torch.nn.functional import cross_entropy

from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer, load_model, save_model, template
from hrm_model.chat import ChatSession, ChatSettings
from hrm_model.checkpoint import best_checkpoint
from hrm_model.training.chat_prepare import prepare_chat
from hrm_model.training.command import build, run, stage_parser
from hrm_model.training.rows import validation_rows
from hrm_model.training.shards import open_dataset

ROOT = Path(__file__).parents[1]
STAGES = ("converse", "instruct", "identity", "calibrate")


@pytest.fixture(scope="module")
def start_model(small_model, tmp_path_factory) -> Path:
    """Random weights of the small shape."""
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(small_model.read_text())))
    return save_model(model, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> dict[str, Path]:
    """Two sets: what one answers has nothing in common with what the other does."""
    root = tmp_path_factory.mktemp("talks")
    for name, first, seed in (("identity", 100, 0), ("talk", 30_000, 1)):
        draw = np.random.default_rng(seed)
        rows = []
        for size in draw.integers(6, 17, 200):
            ids = np.append(draw.integers(first, first + 20, size - 1), EOT)
            rows.append((ids, np.arange(size) >= size // 2))
        write_chat(root / name, rows[:160], rows[160:])
    return {name: root / name for name in ("identity", "talk")}


def flags(stage: str, talks, start: Path, out: Path, *more: str) -> dict:
    """A run of 8 steps, as what its command line gives."""
    data = [talks["identity"], talks["talk"]] if stage == "calibrate" else [talks["talk"]]
    line = (
        f"--recipe tiny --out {out} --steps 8 --tokens-per-batch 64 --lr 0.01 --min-lr 0.001 --warmup 2 --dropout 0.1"
    )
    line += " --explore 0.5 --target-steps 1.5 --log-every 1 --eval-every 4 --eval-windows 8 --save-every 2"
    line += f" --sample-tokens 4 --device cpu --init-from {start} --data {' '.join(map(str, data))}"
    return vars(stage_parser(stage, "").parse_args([*line.split(), *more]))


def stopped_at(step: int, given: dict, stage: str) -> int:
    """Exit status of a run, in this process, that gets SIGTERM while it takes step `step`."""
    return signal_during(build(given, stage), step, signal.SIGTERM)()


def answer_loss(model: HRMForCausalLM, dataset: Path, count: int, everything: bool = False) -> float:
    """Mean loss of validation rows at depth 1, each run alone, from the dataset's ids and mask."""
    found = validation_rows([open_dataset(dataset)], model.config.block_size, count)
    chosen = open_dataset(dataset).conversations("val")
    total, n = 0.0, 0
    for number in range(count):
        ids, is_answer = chosen.row(number * len(chosen) // count)
        ids, wanted = torch.tensor(ids.astype(np.int64)), torch.tensor(is_answer[1:])
        wanted = torch.ones_like(wanted) if everything else wanted
        with torch.no_grad():
            logits = model(ids[None, :-1], force_steps=1).logits[0]
        total += float(cross_entropy(logits[wanted], ids[1:][wanted], reduction="sum"))
        n += int(wanted.sum())
    assert len(found.inputs) == count
    return total / n


# -- what a stage goes on from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "before"), list(zip(STAGES, ("pretrain", *STAGES[:-1]), strict=True)))
def test_without_the_run_before_the_error_names_the_command_to_run_first(stage, before, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run({"recipe": "tiny"}, stage) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"python train/{before}.py --recipe tiny" in error and "--init-from" in error
    assert not list(tmp_path.iterdir()), "nothing is made"


def test_a_resumed_stage_does_not_need_what_it_began_from(talks, start_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(start_model, tmp_path / "runs" / "tiny")
    given = flags("converse", talks, start_model, tmp_path / "run")
    del given["init_from"]
    assert stopped_at(3, dict(given), "converse") == 75
    shutil.rmtree(tmp_path / "runs")
    assert run(given | {"resume": "auto"}, "converse") == 0


@pytest.mark.parametrize("stage", ["instruct", "identity"])
def test_a_stage_runs_and_says_what_it_began_and_ended_with(stage, talks, start_model, tmp_path):
    out = tmp_path / "run"
    assert run(flags(stage, talks, start_model, out), stage) == 0
    found = records(out, "eval")
    assert [r["step"] for r in found] == [0, 4, 8]
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.3
    assert load_model(out)[1].hrm_max_steps == 3


# -- what has a loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
def test_only_answers_have_a_loss_unless_asked_otherwise(everything, talks, start_model, tmp_path):
    """The published fine-tuning has no mask: its loss is that of --train-on-prompt."""
    more = ["--halting", "none", "--target-steps", "0", "--depth", "fixed:1"] + everything * ["--train-on-prompt"]
    out = tmp_path / "run"
    assert run(flags("converse", talks, start_model, out, *more), "converse") == 0
    model = load_model(start_model)[0].eval()
    losses = [answer_loss(model, talks["talk"], 8, each) for each in (everything, not everything)]
    assert records(out, "eval")[0]["val_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_what_a_question_says_changes_no_target(talks, start_model, tmp_path):
    """The loss of the first step counts answers alone: targets of other ids than answers' are never drawn."""
    training = build(flags("converse", talks, start_model, tmp_path / "run", "--dry-run"), "converse")
    part = open_dataset(talks["talk"]).conversations("train")
    for samples in training.data.training.plan(0):
        batch = training.data.training.batch(samples)
        answers = {int(i) for number in range(len(part)) for i in part.row(number)[0][part.row(number)[1]]}
        assert {int(t) for t in batch.targets.ravel() if t >= 0} <= answers
        assert (batch.targets >= 0).sum() == training.data.training.count_targets(samples)


def test_chat_asks_with_the_prefix_that_training_has(tmp_path):
    """The published chat has another instruction than its training."""
    tokenizer = get_tokenizer()
    source = tmp_path / "talk.jsonl"
    pairs = [("Who?", "Me."), ("Where?", "Here.")]
    source.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    prepare_chat(tmp_path / "data", [str(source)], val_fraction=0)
    rows = open_dataset(tmp_path / "data").conversations("train")
    torch.manual_seed(0)
    shape = dict(vocab_size=50304, n_embd=8, block_size=64, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
    shape |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=1)
    session = ChatSession(HRMForCausalLM(HRMConfig(**shape)).eval(), tokenizer, ChatSettings(max_new_tokens=1))
    for number, (question, _) in enumerate(pairs):
        ids, is_answer = rows.row(number)
        session.clear()
        list(session.ask(question))
        assert list(session.prompt_ids) == ids[~is_answer].tolist()
        assert tokenizer.decode(session.prompt_ids).startswith(template.INSTRUCTION)


def test_no_row_begins_or_ends_within_a_turn(tmp_path):
    """The published windows cut conversations wherever they happened to end."""
    tokenizer = get_tokenizer()
    talk = [{"role": r, "content": f"{r} {i} " + "word " * 9} for i in range(8) for r in ("user", "assistant")]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 1)
    prepare_chat(tmp_path / "data", [str(tmp_path / "talk.jsonl")], block_size=100, val_fraction=0)
    rows = open_dataset(tmp_path / "data").conversations("train")
    found = [tokenizer.decode(rows.row(i)[0].tolist()) for i in range(len(rows))]
    assert len(found) > 2
    assert all(text.startswith(template.INSTRUCTION + "\n\nHuman: user") for text in found)
    assert all(text.endswith("word\n\n<|endoftext|>") for text in found)
    joined = "".join(text.removeprefix(template.INSTRUCTION).removesuffix("\n\n<|endoftext|>") for text in found)
    assert joined == template.render(talk).removeprefix(template.INSTRUCTION).removesuffix("\n\n")


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_takes_forty_rows_of_identity_for_sixty_of_conversation(talks, start_model, tmp_path):
    given = flags("calibrate", talks, start_model, tmp_path / "run", "--dry-run")
    rows = build(given, "calibrate").data.training
    assert rows.shares == [0.4, 0.6]
    of_identity = seen = 0
    for step in range(200):
        for samples in rows.plan(step):
            batch = rows.batch(samples)
            of_identity += int((batch.inputs[:, 0] < 1000).sum())
            seen += len(samples)
    assert abs(of_identity - 0.4 * seen) < 0.02 * seen
    pools = rows.batch(np.arange(5 * rows.pool_rows)).inputs[:, 0] < 1000
    assert pools.sum() == 2 * rows.pool_rows, "exact over whole pools"


@pytest.mark.parametrize("data", ["identity", "identity talk talk"])
def test_calibration_takes_two_datasets(data, talks, start_model, tmp_path, capsys):
    given = flags("calibrate", talks, start_model, tmp_path / "run")
    given["data"] = [str(talks[name]) for name in data.split()]
    assert run(given, "calibrate") == 1
    assert "--data IDENTITY CONVERSATIONS" in capsys.readouterr().err


def test_both_losses_are_recorded_and_the_best_is_that_of_the_mix(talks, start_model, tmp_path):
    out = tmp_path / "run"
    more = ["--halting", "none", "--target-steps", "0", "--depth", "fixed:1", "--save-every", "4", "--max-rise", "0"]
    assert run(flags("calibrate", talks, start_model, out, *more), "calibrate") == 0
    found = records(out, "eval")
    model = load_model(start_model)[0].eval()
    for name in ("identity", "talk"):
        assert found[0]["losses"][name] == pytest.approx(answer_loss(model, talks[name], 4), abs=1e-5)
    for record in found:
        mix = 0.4 * record["losses"]["identity"] + 0.6 * record["losses"]["talk"]
        assert record["val_loss"] == pytest.approx(mix, abs=1e-5)
    lowest = min((r for r in found if r["step"]), key=lambda r: r["val_loss"])
    assert best_checkpoint(out) == checkpoint_of(out, lowest["step"])


def test_datasets_of_one_name_have_a_loss_each(talks, start_model, tmp_path):
    shutil.copytree(talks["talk"], tmp_path / "other" / "identity")
    given = flags("calibrate", talks, start_model, tmp_path / "run")
    given["data"] = [str(talks["identity"]), str(tmp_path / "other" / "identity")]
    assert run(given, "calibrate") == 0
    losses = records(tmp_path / "run", "eval")[-1]["losses"]
    assert list(losses) == given["data"]


@pytest.fixture
def forgetting(talks, start_model, tmp_path) -> dict:
    """Calibration on identity alone, at a rate at which conversations are soon unlearned."""
    more = ["--data-weights", "1", "0", "--lr", "0.05", "--max-rise", "0.15", "--eval-every", "2", "--steps", "40"]
    return flags("calibrate", talks, start_model, tmp_path / "run", *more)


def test_calibration_ends_once_conversations_are_unlearned(forgetting, tmp_path, capsys):
    assert run(dict(forgetting), "calibrate") == 0
    out = tmp_path / "run"
    losses = [r["losses"]["talk"] for r in records(out, "eval")]
    steps = [r["step"] for r in records(out, "eval")]
    assert losses[-1] - losses[0] >= 0.15 and all(loss - losses[0] < 0.15 for loss in losses[:-1])
    assert steps[-1] < 40 and checkpoint_of(out, steps[-1]).exists()
    assert f"ended at step {steps[-1]}" in capsys.readouterr().out


def test_resuming_a_run_that_ended_early_does_nothing(forgetting, tmp_path, capsys):
    assert run(dict(forgetting), "calibrate") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run(forgetting | {"resume": "auto"}, "calibrate") == 0
    assert "ended early; nothing to do" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(forgetting, tmp_path):
    """The rise counts from before the first step, not from where the run was resumed."""
    whole = forgetting | {"out": str(tmp_path / "whole")}
    assert run(dict(whole), "calibrate") == 0
    ended = records(tmp_path / "whole", "eval")[-1]["step"]
    assert ended > 2
    assert stopped_at(ended - 1, dict(forgetting), "calibrate") == 75
    assert run(forgetting | {"resume": "auto"}, "calibrate") == 0
    assert records(tmp_path / "run", "eval")[-1]["step"] == ended
    assert_same_bits(weights(tmp_path / "run", ended), weights(tmp_path / "whole", ended))


def test_an_evaluation_that_a_signal_interrupted_is_made_up_for(forgetting, tmp_path):
    """Without it the resumed run would not see that conversations have been unlearned."""
    whole = forgetting | {"out": str(tmp_path / "whole")}
    assert run(dict(whole), "calibrate") == 0
    ended = records(tmp_path / "whole", "eval")[-1]["step"]
    assert ended > 2
    training = build(dict(forgetting), "calibrate")
    read = training.evaluation._read

    def interrupted(stop):
        if training.step == ended:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(stop)

    training.evaluation._read = interrupted
    assert training() == 75
    assert run(forgetting | {"resume": "auto"}, "calibrate") == 0
    found, expected = ([(r["step"], r["val_loss"]) for r in records(tmp_path / n, "eval")] for n in ("run", "whole"))
    assert found == expected
    assert best_checkpoint(tmp_path / "run").name == best_checkpoint(tmp_path / "whole").name
    assert_same_bits(weights(tmp_path / "run", ended), weights(tmp_path / "whole", ended))


@pytest.mark.parametrize(("stage", "ema"), [("converse", 0.0), ("calibrate", 0.0), ("calibrate", 0.9)])
def test_a_resumed_stage_has_the_weights_and_optimizer_of_an_uninterrupted_one(
    stage, ema, talks, start_model, tmp_path
):
    """The published calibration resumes with neither."""
    more = ["--max-rise", "100"] if stage == "calibrate" else []
    given = flags(stage, talks, start_model, tmp_path / "run", "--ema", str(ema), *more)
    whole = given | {"out": str(tmp_path / "whole")}
    assert run(dict(whole), stage) == 0
    assert stopped_at(3, dict(given), stage) == 75
    assert run(given | {"resume": "auto"}, stage) == 0
    assert_same_bits(weights(tmp_path / "run", 8), weights(tmp_path / "whole", 8))
    same = ("step", "loss", "grad_norm", "depths")
    found, expected = ([[r[k] for k in same] for r in records(tmp_path / n, "train")] for n in ("run", "whole"))
    assert found == expected
    if ema:
        averages = [(checkpoint_of(tmp_path / n, 8) / "ema.safetensors").read_bytes() for n in ("run", "whole")]
        assert averages[0] == averages[1]


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pipeline_runs_from_nothing_and_goes_on_after_a_kill(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train" / "pipeline.py"),
        "--recipe",
        "tiny",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    command += ["--resume", "auto", "--out", "made"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line.startswith("== instruct"):
            first.kill()
            break
    first.stdout.read()
    assert first.wait() == -9
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("the run has finished") == 2, "pretrain and converse are skipped"
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["stage"] for row in result["stages"]] == ["pretrain", *STAGES]
    assert all(row["val_loss_after"] for row in result["stages"])
    assert len(result["answers"]) == 3 and Path(tmp_path, result["checkpoint"]).is_dir()
    assert set(result["right"]) == {"greetings", "identity", "help", "small_talk"}


def test_the_pipeline_ends_at_the_first_stage_that_fails_and_says_which(small_dataset, tmp_path, monkeypatch, capsys):
    from train.pipeline import main

    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_dataset, tmp_path / "data" / "stdlib")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "mine.txt").write_text("mine")
    assert main([]) == 1
    assert "the stage pretrain ended with exit status 1" in capsys.readouterr().err
