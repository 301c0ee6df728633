"""What lessons survive: a kill between two files, files of a text that was never begun, options nobody should give."""

from __future__ import annotations

import io
import json
import re
import signal
import sys

import numpy as np
import pytest
from continual_helpers import GREEK, SYMBOLS, Classroom
from pretrain_helpers import assert_same_bits, signal_during, weights

from hrm_model.atomic import beside
from hrm_model.cli import main as hrm
from hrm_model.continual import command, elastic, forgetting
from hrm_model.continual.store import ModelDirectory
from hrm_model.continual.training import ContinualTraining
from hrm_model.training.loop import EXIT_INTERRUPTED

SHORT = dict(steps=2)


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They would take most of a short lesson's time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def room(tmp_path) -> Classroom:
    return Classroom(tmp_path)


def killed_at_link(monkeypatch, lesson, role: str, number: int = 1) -> None:
    """Run a lesson that ends as if killed before it links `role` for the `number`-th time."""
    link, linked = ModelDirectory.link, []

    def until(self, name, checkpoint):
        linked.append(name)
        if linked.count(role) == number:
            raise Killed
        link(self, name, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(ModelDirectory, "link", until)
        with pytest.raises(Killed):
            lesson()


def never_begun(room: Classroom, text: str) -> None:
    """A lesson that is interrupted before its first step."""
    assert room.learn(text, **SHORT, max_minutes=1e-9) == EXIT_INTERRUPTED


# -- kills -------------------------------------------------------------------------------------------------------------


def test_killed_before_its_first_links_a_lesson_still_knows_that_the_model_grew(room, monkeypatch):
    more = dict(SHORT, growth_chars=6000, growth_params=1)
    assert signal_during(room.training("english", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    killed_at_link(monkeypatch, lambda: room.learn("greek", **more), "latest")
    assert len(ModelDirectory(room.model()).history().texts) == 1
    assert room.learn("greek", **more) == 0
    history = ModelDirectory(room.model()).history()
    assert [g.L for g in history.growths] == [1]
    assert [len(row) for row in history.losses] == [1, 2], "the paused text's row is there too"


@pytest.mark.parametrize("role", ("main", "latest", "best"))
def test_killed_while_it_is_finished_a_lesson_is_finished_again(room, monkeypatch, role):
    assert room.learn("english", **SHORT) == 0
    once = {"main": 1, "latest": 3, "best": 2}[role]  # when it is linked for the last time
    killed_at_link(monkeypatch, lambda: room.learn("greek", **SHORT), role, once)
    assert room.learn("greek", **SHORT) == 0
    directory = ModelDirectory(room.model())
    found = json.loads((directory.path / "forgetting.json").read_text(encoding="utf-8"))
    assert len(found["after"]) == 2
    for name in ("latest", "best", "main"):
        state = json.loads((directory.path / name / "state.json").read_text(encoding="utf-8"))
        assert state["continual"]["texts"][-1]["status"] == "learned", name
    assert len(directory.history().losses) == 2


def test_killed_while_a_save_was_replaced_the_same_command_goes_on(room):
    assert signal_during(room.training("english", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    save = room.model() / "runs" / "001-english" / "checkpoints" / "step-00000001"
    save.rename(beside(save, "old"))  # between the two renames
    assert room.learn("english", **SHORT) == 0


def test_killed_before_its_first_checkpoint_a_first_lesson_goes_on_in_its_directory(room, monkeypatch):
    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ContinualTraining, "_hold_on", killed)
        patch.setattr(command, "_remove_if_bare", lambda directory: None)  # no process is left to do so
        with pytest.raises(Killed):
            room.learn("english", **SHORT)
    assert (room.model() / "tokenizer.json").exists()
    assert room.learn("english", **SHORT) == 0
    assert [path.name for path in (room.folder / "models").iterdir()] == ["model"]


def test_paused_again_before_a_step_it_stays_paused(room):
    assert signal_during(room.training("english", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    never_begun(room, "english")
    assert (room.model() / "pause" / "state.json").exists()
    assert room.learn("english", **SHORT) == 0


# -- a text that was never begun ---------------------------------------------------------------------------------------


def test_characters_of_a_text_that_was_never_begun_are_none_of_the_models(room, capsys):
    assert room.learn("english", **SHORT) == 0
    before = ModelDirectory(room.model()).tokenizer().characters
    never_begun(room, "symbols")
    assert ModelDirectory(room.model()).tokenizer().characters == before
    assert hrm(["generate", str(room.model()), "-p", SYMBOLS[:9], "--max-new-tokens", "2"]) == 0
    assert room.learn("greek", **SHORT) == 0
    history = ModelDirectory(room.model()).history()
    assert not set(SYMBOLS) & set(history.characters) - {" "}
    assert history.texts[1].new_characters == len(set(GREEK) - set(before))


def test_samples_of_a_text_that_was_never_begun_are_not_taken_for_the_next_ones(tmp_path):
    for name in ("straight", "changed"):
        (tmp_path / name).mkdir()
    straight, changed = Classroom(tmp_path / "straight"), Classroom(tmp_path / "changed")
    (changed.folder / "greek.txt").write_text(SYMBOLS, encoding="utf-8")
    assert changed.learn("english", **SHORT) == 0
    never_begun(changed, "greek")
    (changed.folder / "greek.txt").write_text(GREEK, encoding="utf-8")
    assert straight.learn("english", **SHORT) == 0
    for room in (straight, changed):
        assert room.learn("greek", **SHORT) == 0
    samples = [np.load(room.model() / "samples" / "002-greek.npy") for room in (straight, changed)]
    assert np.array_equal(*samples)
    assert_same_bits(*(weights(room.model() / "runs" / "002-greek", 2) for room in (straight, changed)))


# -- files and options -------------------------------------------------------------------------------------------------


def test_an_earlier_text_that_is_gone_is_missed_before_the_next_one_is_learned(room, capsys):
    assert room.learn("english", **SHORT) == 0
    lost = room.model() / "data" / "001-english" / "train-00000.bin"
    lost.unlink()
    capsys.readouterr()
    assert room.learn("greek", **SHORT) == 1
    error = capsys.readouterr().err
    assert "text 1, english, has no whole copy" in error and f"put {lost.parent} back" in error
    assert "prepare.py" not in error and error.count("\n") == 1
    assert not (room.model() / "runs" / "002-greek").exists()


def test_a_damaged_copy_of_the_text_at_hand_is_made_again(room):
    assert signal_during(room.training("english", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    copy = room.model() / "data" / "001-english" / "train-00000.bin"
    good = copy.read_bytes()
    copy.write_bytes(good[:-2] + b"\xff\xff")
    assert room.learn("english", **SHORT) == 0
    assert copy.read_bytes() == good


@pytest.mark.parametrize(
    ("damage", "told"),
    (
        (lambda rows: rows[:, :5], r"no samples of 25 characters but uint16 of shape \(\d+, 5\)"),
        (lambda rows: rows[:0], r"no samples of 25 characters but uint16 of shape \(0, 25\)"),
        (lambda rows: rows + np.uint16(60_000), r"the character id 600\d\d, outside 0..40"),
    ),
)
def test_samples_that_are_none_are_named(room, capsys, damage, told):
    assert room.learn("english", **SHORT) == 0
    path = room.model() / "samples" / "001-english.npy"
    np.save(path, damage(np.load(path)))
    assert room.learn("greek", **SHORT, replay=0.5) == 1
    error = capsys.readouterr().err
    assert str(path) in error and re.search(told, error), error


def test_a_penalty_whose_file_is_gone_is_named_with_a_way_out_that_works(room, capsys, monkeypatch):
    monkeypatch.setattr(elastic, "SAMPLES", 2)
    assert room.learn("english", **SHORT) == 0
    more = dict(SHORT, elastic=1.0)
    assert signal_during(room.training("greek", **more), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    path, run = room.model() / "elastic" / "002-greek.safetensors", room.model() / "runs" / "002-greek"
    path.unlink()
    assert room.learn("greek", **more) == 1
    error = capsys.readouterr().err
    assert f"{path} does not exist; the penalty holds" in error and f"move {run} away" in error
    run.rename(room.folder / "away")
    assert room.learn("greek", **more) == 0


def test_a_picture_that_cannot_be_drawn_does_not_keep_a_lesson_from_its_end(room, monkeypatch):
    def draw(matrices, path):
        raise OSError(f"no room for {path}")

    monkeypatch.setattr(forgetting, "draw", draw)
    with pytest.warns(RuntimeWarning, match=r"no forgetting\.png: no room for"):
        assert room.learn("english", **SHORT) == 0
    assert [t.status for t in ModelDirectory(room.model()).history().texts] == ["learned"]


def test_options_that_a_paused_text_began_with_are_said_with_a_way_out_that_exists(room, capsys):
    assert signal_during(room.training("english", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    assert room.learn("english", steps=9) == 1
    error = capsys.readouterr().err
    assert "--steps was 2, is 9" in error and "--fresh" in error
    assert "--init-from" not in error and "--out" not in error


def test_another_dropout_than_the_models_is_not_passed_over(room, capsys):
    assert room.learn("english", **SHORT) == 0
    assert room.learn("greek", **SHORT, dropout=0.5) == 1
    assert "--dropout 0.5 is not what" in capsys.readouterr().err


def test_a_run_without_an_intact_checkpoint_is_named_with_a_way_out_that_works(room, capsys):
    assert room.learn("english", **SHORT) == 0
    assert signal_during(room.training("greek", **SHORT), 1, signal.SIGINT)() == EXIT_INTERRUPTED
    run = room.model() / "runs" / "002-greek"
    with open(run / "checkpoints" / "step-00000001" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.warns(UserWarning, match="skipped broken checkpoint latest"):
        assert room.learn("greek", **SHORT) == 1
    error = capsys.readouterr().err
    assert f"move {run} away" in error and "--overwrite" not in error and "--out" not in error
    run.rename(room.folder / "away")
    assert room.learn("greek", **SHORT) == 0


def test_a_loss_that_is_no_number_is_said_with_a_way_out_that_exists(room, capsys):
    assert room.learn("english", **SHORT, lr=1e30, min_lr=0.0, embed_lr=1e30, grad_clip=0.0, warmup_ratio=0.0) == 76
    error = capsys.readouterr().err
    assert "start anew with a lower --lr or --grad-clip, " in error
    assert "--init-from" not in error and "--overwrite" not in error


@pytest.mark.parametrize("name", ("..", ".", ".hidden", "a/b"))
def test_a_model_is_in_its_folder_and_is_seen_there(room, capsys, name):
    assert room.learn("english", **SHORT, model=name) == 1
    assert f"--model {name!r} is no name" in capsys.readouterr().err
    assert not (room.folder / "tokenizer.json").exists() and not (room.folder / "models").exists()


def test_a_directory_of_something_else_is_not_written_to(room, capsys):
    other = room.model("model")
    other.mkdir(parents=True)
    for name in ("tokenizer.json", "config.json"):
        (other / name).write_text("{}", encoding="utf-8")
    assert room.learn("english", **SHORT, model="model") == 1
    assert "holds no model of characters but config.json" in capsys.readouterr().err
    assert room.learn("english", **SHORT) == 0
    assert sorted(path.name for path in other.iterdir()) == ["config.json", "tokenizer.json"]
    assert (other / "tokenizer.json").read_text(encoding="utf-8") == "{}" and room.model("model-2").exists()


@pytest.mark.parametrize("name", ("epochs", "eval_epochs", "save_epochs"))
def test_epochs_beyond_counting_are_refused(room, capsys, name):
    assert room.learn("english", **{"steps": 2 * (name != "epochs"), name: 1e308}) == 1
    assert f"--{name.replace('_', '-')} 1e+308" in capsys.readouterr().err


# -- two at once -------------------------------------------------------------------------------------------------------


def test_a_model_that_learned_meanwhile_is_not_taught_on_what_it_was(room, capsys, monkeypatch):
    assert room.learn("english", **SHORT) == 0
    lock = command.RunLock

    def late(*path):
        monkeypatch.setattr(command, "RunLock", lock)
        assert room.learn("symbols", **SHORT) == 0
        return lock(*path)

    monkeypatch.setattr(command, "RunLock", late)
    assert room.learn("greek", **SHORT) == 1
    assert "another process taught" in capsys.readouterr().err
    assert [t.name for t in ModelDirectory(room.model()).history().texts] == ["english", "symbols"]


def test_a_new_model_of_another_process_is_left_to_it(room, capsys, monkeypatch):
    def taken(path, flag):
        path.mkdir(parents=True)
        (path / "tokenizer.json").write_text("{}", encoding="utf-8")
        raise ValueError(f"{flag} {path} is in use")

    monkeypatch.setattr(command, "RunLock", taken)
    assert room.learn("english", **SHORT, model="ours") == 1
    assert "is in use" in capsys.readouterr().err
    assert (room.model("ours") / "tokenizer.json").exists()


def test_at_a_terminal_a_damaged_model_leaves_the_others_to_choose(room, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert room.learn("english", **SHORT) == 0
    assert room.learn("greek", **SHORT, fresh=True) == 0
    for role in ("latest", "best", "main"):
        (room.model("model-2") / role / "config.json").unlink()
    monkeypatch.setattr("sys.stdout", Terminal())
    for typed, told in (("1\n", "has no intact checkpoint"), ("", "no model was chosen")):
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        assert room.learn("symbols", **SHORT) == 1
        assert told in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", Terminal("3\n"))
    assert room.learn("symbols", **SHORT) == 0


def test_a_model_that_learns_when_to_stop_goes_on_learning_it(room):
    shape = json.loads((room.folder / "shape.json").read_text(encoding="utf-8"))
    (room.folder / "shape.json").write_text(json.dumps(shape | {"hrm_max_steps": 3}), encoding="utf-8")
    assert room.learn("english", **SHORT, halting="policy", depth="auto") == 0
    assert room.learn("greek", **SHORT) == 0
    state = json.loads((room.model() / "latest" / "state.json").read_text(encoding="utf-8"))
    assert (state["run"]["halting"], state["run"]["depth"]) == ("policy", "auto")
