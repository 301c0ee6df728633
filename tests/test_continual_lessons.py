"""One text after another: what comes of a lesson, of a pause, of a stop, and of bad input."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from continual_helpers import ENGLISH, GREEK, Classroom
from pretrain_helpers import assert_same_bits, records, signal_during, weights
from safetensors.torch import load_file

from hrm_model import load_model
from hrm_model.atomic import read_json
from hrm_model.continual import command
from hrm_model.continual.elastic import Elastic
from hrm_model.continual.store import ModelDirectory, model_directory_of, models_in
from hrm_model.continual.tokenizer import CharTokenizer
from hrm_model.continual.windows import TextWindows
from hrm_model.training.loop import EXIT_INTERRUPTED
from train.continual import main


@pytest.fixture
def room(tmp_path) -> Classroom:
    return Classroom(tmp_path)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Classroom:
    """A model that learned English, then Greek with replay and a penalty, and grew by a layer in between."""
    room = Classroom(tmp_path_factory.mktemp("two"))
    assert room.learn("english") == 0
    assert room.learn("greek", replay=0.5, elastic=1.0, growth_chars=6000, growth_params=3000) == 0
    return room


# -- what a lesson leaves ----------------------------------------------------------------------------------------------


def test_history_tokenizer_and_named_checkpoints_say_what_happened(two):
    directory = ModelDirectory(two.model())
    history = directory.history()
    assert [(t.name, t.characters, t.status, t.steps) for t in history.texts] == [
        ("english", len(ENGLISH), "learned", 6),
        ("greek", len(GREEK), "learned", 6),
    ]
    assert history.texts[1].new_characters == len(set(GREEK) - set(ENGLISH)) > 5
    assert history.total == len(ENGLISH) + len(GREEK)
    assert [(g.L, g.H, g.at_characters) for g in history.growths] == [(1, 0, history.total)]
    tokenizer = directory.tokenizer()
    assert tokenizer.extends(CharTokenizer().grown(ENGLISH))
    assert set(tokenizer.characters) == {"\ufffd"} | set(ENGLISH) | set(GREEK)
    for role in ("latest", "best", "main"):
        state = read_json(directory.path / role / "state.json")
        assert len(state["continual"]["texts"]) == 2
    model, config = load_model(directory.path)
    assert config.n_chars == tokenizer.n_vocab and config.hrm_L_layers == 2 and config.hrm_L_grown == 1
    assert model.hrm_core.L_level.layers[1].gate_a.item() != 0, "the gate has learned"


def test_the_matrix_has_a_row_for_each_text_and_says_what_was_forgotten(two):
    found = json.loads((two.model() / "forgetting.json").read_text(encoding="utf-8"))
    assert [len(row["losses"]) for row in found["after"]] == [1, 2]
    after = [list(row["losses"].values()) for row in found["after"]]
    assert all(math.isfinite(x) and x > 0 for row in after for x in row)
    assert found["forgetting"]["1. english"] == pytest.approx(after[1][0] - min(after[0][0], after[1][0]))
    last = records(two.model() / "runs" / "002-greek", "eval")[-1]
    assert after[1][1] == pytest.approx(last["val_loss"])


def test_the_second_text_begins_where_the_first_ended(room):
    """With a learning rate of 0 nothing moves: old weights and old logits are those before."""
    assert room.learn("english") == 0
    before, _ = load_model(room.model())
    first = ModelDirectory(room.model()).history().losses[0][0]
    still = dict(lr=0.0, min_lr=0.0, embed_lr=0.0, weight_decay=0.0)
    assert room.learn("symbols", **still, growth_chars=6000, growth_params=1) == 0
    after, config = load_model(room.model())
    assert config.vocab_size == 192 and config.hrm_L_grown == 1
    ids = torch.randint(0, before.config.n_chars, (3, 24), generator=torch.Generator().manual_seed(0))
    n = before.config.n_chars
    assert torch.equal(before(ids).logits[..., :n], after(ids).logits[..., :n])
    second = ModelDirectory(room.model()).history().losses[1][0]
    assert second > first, "new characters take their share of the probability, and nothing was trained"


def test_moments_of_old_numbers_are_carried_over_and_new_ones_begin_at_zero(room):
    assert room.learn("english") == 0
    old = load_file(room.model() / "latest" / "optimizer.safetensors")
    training = room.training("symbols", growth_chars=6000, growth_params=1)
    names = {id(p): name for name, p in training.model.named_parameters()}
    state = {names[id(p)]: slots for p, slots in training.optimizer.state.items()}
    table = state["wte.weight"]["exp_avg"]
    before = old["state/wte.weight/exp_avg"]
    assert torch.equal(table[: len(before)], before) and before.any() and not table[len(before) :].any()
    assert state["wte.weight"]["step"] == 6
    assert not any("L_level.layers.1." in name for name in state), "a new layer has no moments yet"
    assert torch.equal(state["hrm_core.H_level.layers.0.mlp.up.weight"]["exp_avg"],
                       old["state/hrm_core.H_level.layers.0.mlp.up.weight/exp_avg"])  # fmt: skip
    training._lock.close()


def test_a_text_that_is_known_is_not_learned_again_unless_asked(room, capsys):
    assert room.learn("english") == 0
    before = weights(room.model() / "runs" / "001-english", 6)
    capsys.readouterr()
    assert room.learn("english") == 0
    assert "has learned this text already" in capsys.readouterr().out
    assert_same_bits(before, weights(room.model() / "runs" / "001-english", 6))
    assert room.learn("english", again=True) == 0
    assert [t.name for t in ModelDirectory(room.model()).history().texts] == ["english", "english"]
    assert ModelDirectory(room.model()).history().total == len(ENGLISH), "the same characters count once"


def test_a_fresh_start_overwrites_nothing_and_the_listing_knows_both(room, capsys):
    assert room.learn("english") == 0
    before = weights(room.model() / "runs" / "001-english", 6)
    assert room.learn("greek", fresh=True) == 0
    assert_same_bits(before, weights(room.model() / "runs" / "001-english", 6))
    assert {m.path.name for m in models_in(room.folder / "models")} == {"model", "model-2"}
    capsys.readouterr()
    assert main(["--list", "--models", str(room.folder / "models")]) == 0
    told = capsys.readouterr().out
    assert f"1. english: {len(ENGLISH):,} characters" in told and "1. greek" in told and "model-2:" in told


# -- pause, stop, kill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ({}, dict(replay=0.5, elastic=2.0, growth_chars=6000, growth_params=1)))
def test_paused_and_resumed_it_comes_to_the_same_bits(tmp_path, more):
    for name in ("straight", "paused"):
        (tmp_path / name).mkdir()
    straight, paused = Classroom(tmp_path / "straight"), Classroom(tmp_path / "paused")
    text = "greek" if more else "english"
    for room in (straight, paused):
        assert not more or room.learn("english") == 0
    run = f"00{1 + bool(more)}-{text}"
    assert straight.learn(text, **more) == 0
    assert signal_during(paused.training(text, **more), 4, signal.SIGINT)() == EXIT_INTERRUPTED
    directory = ModelDirectory(paused.model())
    assert read_json(directory.path / "pause" / "state.json")["step"] == 4
    assert directory.history().texts[-1].status == "learning"
    assert paused.learn(text, **more) == 0
    assert not (directory.path / "pause").exists()
    assert_same_bits(weights(straight.model() / "runs" / run, 6), weights(paused.model() / "runs" / run, 6))
    assert ModelDirectory(straight.model()).history() == directory.history()


def test_stopped_the_text_is_over_and_the_next_one_goes_on(room):
    assert signal_during(room.training("english", on_interrupt="stop"), 4, signal.SIGINT)() == 0
    history = ModelDirectory(room.model()).history()
    assert (history.texts[0].status, history.texts[0].steps, len(history.losses)) == ("stopped", 4, 1)
    assert room.learn("greek") == 0
    assert [t.status for t in ModelDirectory(room.model()).history().texts] == ["stopped", "learned"]


@pytest.mark.parametrize(("answer", "status", "left"), (("2", "stopped", 0), ("1", "learning", EXIT_INTERRUPTED)))
def test_at_a_terminal_it_asks_whether_to_pause_or_stop(room, monkeypatch, answer, status, left):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    training = signal_during(room.training("english", on_interrupt="ask"), 4, signal.SIGINT)
    monkeypatch.setattr("sys.stdin", Terminal(answer + "\n"))
    assert training() == left
    assert ModelDirectory(room.model()).history().texts[0].status == status
    assert (room.model() / "pause").exists() == (answer == "1")


def test_another_text_ends_one_that_was_paused(room):
    assert signal_during(room.training("english"), 4, signal.SIGINT)() == EXIT_INTERRUPTED
    assert room.learn("greek") == 0
    history = ModelDirectory(room.model()).history()
    assert [t.status for t in history.texts] == ["stopped", "learned"]
    assert len(history.losses) == 2


def test_time_is_up_like_an_interrupt(room):
    assert room.learn("english", steps=100_000, max_minutes=0.01, save_epochs=1.0) == EXIT_INTERRUPTED
    assert 0 < ModelDirectory(room.model()).history().texts[0].steps < 100_000


def test_a_damaged_latest_is_passed_over_for_the_best_and_then_main(room):
    assert room.learn("english") == 0
    path = room.model()
    for role, left in (("latest", "best"), ("best", "main")):
        file = path / role / "config.json"
        text = file.read_text(encoding="utf-8")
        file.unlink()  # a link: the run's own file stays
        file.write_text(text.replace("16", "17", 1), encoding="utf-8")
        with pytest.warns(UserWarning, match=f"skipped broken checkpoint {role}"):
            assert ModelDirectory(path).checkpoint().name == left
    shutil.rmtree(path / "main")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        load_model(path)


# -- replay and penalty ------------------------------------------------------------------------------------------------


def test_an_epoch_sees_every_window_once_and_replay_takes_its_share():
    ids = np.arange(200, dtype=np.uint16)
    old = [np.full((5, 11), 1000 + i, dtype=np.uint16) for i in range(2)]
    windows = TextWindows(ids, 10, 1, 4, 1, seed=3, old=old, share=0.25)
    assert windows.windows == 190 and windows.replayed == 1 and windows.steps(1) == 64
    starts, replayed = [], []
    for step in range(190):  # three new rows a step: three epochs
        batch = windows.batch(windows.plan(step)[0])
        assert (batch.targets[:3] == batch.inputs[:3] + 1).all()
        starts += batch.inputs[:3, 0].tolist()
        replayed.append(int(batch.inputs[3, 0]))
    epochs = [starts[i : i + 190] for i in range(0, 570, 190)]
    assert all(sorted(epoch) == list(range(190)) for epoch in epochs) and epochs[0] != epochs[1]
    assert 60 < replayed.count(1000) < 130 and set(replayed) == {1000, 1001}
    again = TextWindows(ids, 10, 1, 4, 1, seed=3, old=old, share=0.25)
    assert (again.batch(again.plan(77)[0]).inputs == windows.batch(windows.plan(77)[0]).inputs).all()
    with pytest.raises(ValueError, match="none of the 4 rows"):
        TextWindows(ids, 10, 1, 4, 1, seed=3, old=old, share=0.9)


def test_without_replay_or_penalty_nothing_of_old_texts_is_read(room):
    assert room.learn("english") == 0
    (room.model() / "samples" / "001-english.npy").write_bytes(b"")
    assert room.learn("greek", replay=0.0) == 0


def test_the_penalty_is_zero_at_the_anchor_and_its_gradient_is_lambda_fisher_distance(two):
    model, _ = load_model(two.model())
    rows = np.random.default_rng(0).integers(1, 20, (4, 25)).astype(np.uint16)
    elastic = Elastic.measured(model, 3.0, [rows], 1)
    assert elastic.value() == 0 and any(f.any() for f in elastic.information.values())
    weight = model.hrm_core.H_level.layers[0].mlp.up.weight
    with torch.no_grad():
        weight.add_(0.01)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    elastic()
    information = elastic.information["hrm_core.H_level.layers.0.mlp.up.weight"]
    torch.testing.assert_close(weight.grad, 3.0 * information * 0.01, rtol=1e-3, atol=1e-9)
    assert elastic.value() == pytest.approx(0.5 * 3.0 * float(information.sum()) * 1e-4, rel=1e-3)
    assert not model.lm_head.weight.grad.any()


def test_fisher_information_is_the_mean_square_of_single_gradients(two):
    model, _ = load_model(two.model())
    rows = np.random.default_rng(0).integers(1, 20, (3, 25)).astype(np.uint16)
    found = Elastic.measured(model, 1.0, [rows], 1).information["hrm_core.H_init"]
    expected = torch.zeros_like(found)
    for row in torch.from_numpy(rows.astype(np.int64)):
        model.zero_grad()
        model(row[None, :-1], row[None, 1:], force_steps=1, reduction="sum").loss.backward()
        expected += model.hrm_core.H_init.grad**2 / 3
    torch.testing.assert_close(found, expected)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    (
        (b"", "is empty: 0 characters"),
        (b" \n\n ", "is empty: 4 characters"),
        (b"text\0more", "binary: a zero byte at character 4"),
        (
            "caf\u00e9 ".encode() * 300 + "caf\u00e9".encode("latin-1") + b" more",
            r"not UTF-8: byte 0xe9 at offset 1,803",
        ),
        (b"too short for that", r"has 18 characters; .* need 250"),
    ),
)
def test_a_text_that_cannot_be_learned_is_one_error_and_nothing_is_written(room, capsys, content, told):
    (room.folder / "bad.txt").write_bytes(content)
    assert room.learn("bad") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(told, error), error
    assert not (room.folder / "models").exists()


def test_a_growth_that_memory_cannot_hold_is_refused_before_anything_is_written(room, capsys):
    assert room.learn("english") == 0
    before = {p: p.read_bytes() for p in room.model().rglob("*") if p.is_file() and p.name != "run.lock"}
    capsys.readouterr()
    assert room.learn("greek", growth_chars=6000, growth_params=10**13) == 1
    error = capsys.readouterr().err
    assert "GiB" in error and "lower --growth-params" in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in room.model().rglob("*") if p.is_file() and p.name != "run.lock"} == before


def test_a_dry_run_shows_the_plan_and_writes_nothing(room, capsys):
    assert room.learn("english", dry_run=True, growth_chars=1000, growth_params=6000) == 0
    told = capsys.readouterr().out
    assert "growth" in told and "L + " in told and "nothing was written" in told
    assert not (room.folder / "models").exists()


def test_a_lost_tokenizer_is_rebuilt_by_recover_and_the_old_file_kept(room, capsys):
    from hrm_model.cli import main as hrm

    assert room.learn("english") == 0
    path = room.model() / "tokenizer.json"
    good = path.read_bytes()
    path.unlink()
    assert room.learn("greek") == 1
    assert "hrm recover" in capsys.readouterr().err
    assert hrm(["recover", str(room.model())]) == 0
    assert path.read_bytes() == good
    path.write_text("nonsense", encoding="utf-8")
    assert hrm(["generate", str(room.model()), "-p", "The", "--max-new-tokens", "2"]) == 1
    assert "hrm recover" in capsys.readouterr().err
    assert hrm(["recover", str(room.model())]) == 0
    assert path.read_bytes() == good
    assert (room.model() / "tokenizer.json.old-1").read_text(encoding="utf-8") == "nonsense"
    assert room.learn("greek") == 0


def test_a_tokenizer_of_another_model_is_refused(room, capsys):
    assert room.learn("english") == 0
    CharTokenizer().grown("xyz").save(room.model() / "tokenizer.json")
    assert room.learn("greek") == 1
    assert "is of another model" in capsys.readouterr().err


def test_what_a_model_began_with_it_keeps(room, capsys):
    assert room.learn("english") == 0
    assert room.learn("greek", n_cycles=3) == 1
    assert "--n-cycles 3 is not what" in capsys.readouterr().err
    given = room.flags("greek")
    options = command.prepare(given).options
    assert options.seq_length == 24, "not given, it is the model's own"


def test_the_wrong_options_are_all_named(room, capsys):
    assert room.learn("english", replay=1.5, stride=0, growth_order="X", loss="hinge") == 1
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--replay 1.5", "--stride 0", "--growth-order 'X'", "--loss 'hinge'"))


def test_a_model_is_found_from_any_of_its_checkpoints(two):
    for below in ("", "latest", "runs/002-greek/checkpoints/step-00000006"):
        assert model_directory_of(two.model() / below).path == two.model().resolve()
    with pytest.raises(ValueError, match="no tokenizer belongs to"):
        model_directory_of(os.sep)
