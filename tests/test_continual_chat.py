"""A model of characters in the same chat as the language model; what it writes in numbers; how it thinks."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from continual_helpers import ENGLISH, Classroom

from hrm_model import load_model
from hrm_model.cli import main as hrm
from hrm_model.continual.analysis import Reference
from hrm_model.continual.chat import ContinualSession
from hrm_model.continual.markov import Markov
from hrm_model.continual.modes import cycles, ends_naturally
from hrm_model.continual.store import ModelDirectory
from hrm_model.continual.trace import trace


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Classroom:
    """A model that learned a text of few sentences well enough to have words."""
    room = Classroom(tmp_path_factory.mktemp("chat"))
    assert room.learn("english", steps=150, batch_size=8, lr=1e-2, min_lr=1e-3, log_every=50, save_epochs=9.0) == 0
    return room


@pytest.fixture
def session(room) -> ContinualSession:
    directory = ModelDirectory(room.model())
    model, _ = load_model(directory.path)
    return ContinualSession(model, directory.tokenizer(), history=directory.history())


def say(session: ContinualSession, text: str) -> list:
    return list(session.ask(text))


# -- chat --------------------------------------------------------------------------------------------------------------


def test_an_answer_goes_on_with_the_text(session):
    session.set(temperature=0.0, max_new_tokens=20)
    events = say(session, "The 4th sheep went over ")
    assert len(events) == 20 and events[-1].finish == "length"
    assert session.history[0]["content"] == "The 4th sheep went over "
    assert "".join(e.text for e in events).strip() == session.history[1]["content"].strip()
    assert session.prompt_ids == session.tokenizer.encode("The 4th sheep went over ")[-len(session.prompt_ids) :]


def test_modes_run_the_same_weights_with_other_cycles(session):
    session.set(temperature=0.0, max_new_tokens=6)
    shared = session.model.wte.weight
    assert session.answering.mode == "normal"
    for mode, pair in (("fast", (1, 1)), ("deep", (3, 2)), ("extreme", (6, 4)), ("4x1", (4, 1)), ("normal", (2, 2))):
        assert f"{pair[0]} cycles x {pair[1]} steps" in session.command(f"/mode {mode}")
        assert (session.model.config.hrm_H_cycles, session.model.config.hrm_L_cycles) == pair
        assert session.model.wte.weight is shared
        say(session, "The ")
    with pytest.raises(ValueError, match="mode 'deeper' is none of fast"):
        session.command("/mode deeper")
    assert session.answering.mode == "normal"


def test_modes_and_pairs_are_read():
    assert [cycles(m) for m in ("fast", "Normal", "deep", "extreme", "5x3", "2\u00d72")] == [
        (1, 1), (2, 2), (3, 2), (6, 4), (5, 3), (2, 2),
    ]  # fmt: skip
    for wrong in ("0x1", "17x1", "x", "", "2x"):
        with pytest.raises(ValueError, match="is none of fast"):
            cycles(wrong)


def test_natural_answers_end_with_a_sentence(session):
    session.set(temperature=0.0, max_new_tokens=300)
    session.command("/natural")
    events = say(session, "The 4th sheep went ")
    text = "".join(e.text for e in events)
    if events[-1].finish != "length":
        assert events[-1].finish == "stop" and text.rstrip()[-1] in ".!?" and len(text) >= 40
    assert ends_naturally("x" * 40 + ". ") and ends_naturally("x" * 40 + '!" ') and not ends_naturally("x" * 40 + ".")
    assert not ends_naturally("Oh! ") and not ends_naturally("x" * 40 + ". A")


def test_batch_answers_come_at_once_and_are_the_same(session):
    session.set(temperature=0.0, max_new_tokens=12)
    live = [e.token for e in say(session, "The ")]
    session.clear()
    session.command("/batch")
    answer = session.ask("The ")
    first = next(answer)
    assert len(session.history) == 2, "all of it is there before any of it is shown"
    assert [first.token, *(e.token for e in answer)] == live


def test_unlimited_status_history_and_unknown_characters(session):
    session.command("/unlimited")
    assert session.settings.max_new_tokens == 10_000 and "no limit" in session.command("/status")
    session.command("/unlimited")
    session.set(max_new_tokens=3)
    say(session, "The \u732b and \u732b")
    assert (
        session.unknown == 2
        and "unknown  2 characters met that it does not have: '\u732b'\n" in session.status() + "\n"
    )
    say(session, "The ")
    assert session.unknown == 0 and sum(session.tokenizer.unknown.values()) == 2, "each is counted when it is said"
    assert "english" in session.command("/status") and "The \u732b" in session.command("/history")
    assert "/mode" in session.command("/help") and "/natural" in session.command("/help")


def test_a_language_models_chat_has_no_modes():
    from small_models import speaker

    from hrm_model import get_tokenizer
    from hrm_model.chat import ChatSession

    with pytest.raises(ValueError, match="unknown command '/mode'"):
        ChatSession(speaker([5, 6, 7]), get_tokenizer()).command("/mode fast")


def test_a_long_history_is_cut_to_the_window(session):
    session.set(max_new_tokens=5)
    for _ in range(4):
        say(session, "The sheep went over.")
    assert len(session.prompt_ids) <= session.model.config.block_size
    assert session.left_out >= 2


def test_the_command_chats_with_it(room, capsys, monkeypatch):
    arguments = [str(room.model()), "--max-new-tokens", "8", "--seed", "1"]
    assert hrm(["chat", *arguments, "--prompt", "The \u732b sheep", "--mode", "deep"]) == 0
    told = capsys.readouterr()
    assert "1 characters of that are unknown" in told.out + told.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/mode fast\nThe sheep\n/status\n/exit\n"))
    assert hrm(["chat", *arguments]) == 0
    out = capsys.readouterr().out
    assert "mode fast: 1 cycles x 1 steps" in out and "text 1   english" in out


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_of_the_text_itself_and_of_noise():
    reference = Reference(ENGLISH)
    own, noise = reference.scores(ENGLISH), reference.scores("qwxz vvkj 8842 zzqk " * 60)
    assert own.trigrams == pytest.approx(100) and own.characters == 100 and own.words == 100
    assert own.copied == 100 and own.meaning == 100
    assert noise.words == 0 and noise.copied == 0 and noise.trigrams < 20


def test_each_score_is_its_definition():
    reference = Reference("Some words make sentences here. Others follow them later on.")
    assert reference.scores("words them nonsuch follow, abc de").words == 75.0, "three of four words of four letters"
    assert reference.scores("a b a b a b a b a b a").diversity == pytest.approx(100 * 2 / 11)
    ends = reference.scores("One here now. two here now! Three (here now?")
    assert ends.structure == pytest.approx((200 / 3 + 100 + 0) / 3)
    copied = reference.scores("words make sentences" + "x")
    assert copied.copied == 50.0, "one of two sequences of twenty"


def test_a_markov_chain_writes_what_it_counted():
    chain = Markov("abcabcabcabd", 3)
    written = chain.generate("abc", 200, seed=0)
    assert written == chain.generate("abc", 200, seed=0) != chain.generate("abc", 200, seed=1)
    counted = {"abcabcabcabd"[i : i + 4] for i in range(9)}
    text = "abc" + written
    assert {text[i : i + 4] for i in range(len(text) - 3) if text[i : i + 3] in ("abc", "bca", "cab")} <= counted
    assert set(Markov("ab", 0).generate("zz", 50, seed=0)) == {"a", "b"}, "a context that is unknown becomes shorter"


def test_the_command_scores_a_model_beside_a_chain_and_people(room, capsys):
    flags = ["--text", str(room.folder / "english.txt"), "--length", "150", "--samples", "2", "--json"]
    assert hrm(["analyze", str(room.model()), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["scores"]) == {"model", "markov", "people"} and found["characters"] >= 300
    assert all(0 <= x <= 100 for scores in found["scores"].values() for x in scores.values())
    assert found["scores"]["people"]["words"] == 100
    assert hrm(["analyze", str(room.model()), *flags[:2], "--length", "5"]) == 1
    assert "--length 5 is below its minimum 100" in capsys.readouterr().err


def test_commands_say_what_they_do_not_know_and_what_is_too_short(room, capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(ENGLISH[:500] + "\u732b" * 3, encoding="utf-8")
    assert hrm(["analyze", str(room.model()), "--text", str(path), "--length", "100", "--samples", "1"]) == 0
    assert "3 characters of the text are unknown" in capsys.readouterr().err
    assert hrm(["generate", str(room.model()), "-p", "The \u732b", "--max-new-tokens", "2"]) == 0
    assert "1 characters of the prompts are unknown" in capsys.readouterr().err
    assert hrm(["demo", str(room.model()), "--text", "The \u732b", "--modes", "fast"]) == 0
    assert "1 characters of --text are unknown" in capsys.readouterr().err
    path.write_text(ENGLISH[:150], encoding="utf-8")
    assert hrm(["analyze", str(room.model()), "--text", str(path)]) == 1
    assert "has 150 characters; its last tenth stands for people and needs 20: give 200 up" in capsys.readouterr().err


# -- how it thinks -----------------------------------------------------------------------------------------------------


def test_the_trace_ends_in_the_models_own_answer(room):
    directory = ModelDirectory(room.model())
    model, _ = load_model(directory.path)
    import torch

    ids = directory.tokenizer().encode("The sheep")
    for n, t in ((2, 2), (3, 1)):
        shaped = model.with_cycles(n, t)
        moments = trace(shaped, ids)
        assert [m.level for m in moments] == (["L"] * t + ["H"]) * n
        expected = shaped(torch.tensor([ids])).logits[0, -1].detach().softmax(-1)
        assert int(moments[-1].says) == int(expected.argmax())
        assert moments[-1].probability == pytest.approx(float(expected.max()), rel=1e-5)
        assert all(m.norm > 0 and m.change > 0 for m in moments)


def test_the_command_shows_and_draws_configurations_side_by_side(room, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--text", "The sheep", "--modes", "fast", "3x1", "--out", str(tmp_path / "demo.png")]
    assert hrm(["demo", str(room.model()), *flags]) == 0
    out = capsys.readouterr().out
    assert "fast 1x1" in out and "3x1 3x1" in out and out.count("H update") == 4
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert hrm(["demo", str(room.model()), "--modes", "quick"]) == 1
    assert "mode 'quick' is none of" in capsys.readouterr().err


# -- the window --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_display():
    """Runs a step of settings_window_steps.py on a display that nobody looks at; its output."""
    pytest.importorskip("tkinter")
    if not shutil.which("Xvfb"):
        pytest.skip("no Xvfb: apt install xvfb")
    reader, writer = os.pipe()
    command = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "640x480x24"]
    server = subprocess.Popen(command, pass_fds=[writer], stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as file:
        number = file.readline().strip()
    assert number, "Xvfb did not start"

    def run(*step: str) -> str:
        script = Path(__file__).with_name("settings_window_steps.py")
        done = subprocess.run(
            [sys.executable, str(script), *step], env=os.environ | {"DISPLAY": f":{number}"}, capture_output=True,
            text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    server.terminate()
    server.wait(timeout=20)


def test_the_window_takes_settings_and_says_what_is_wrong(on_a_display, tmp_path):
    (tmp_path / "english.txt").write_text(ENGLISH, encoding="utf-8")
    assert "as expected" in on_a_display("settings", str(tmp_path / "english.txt"))


def test_the_window_is_cancelled_and_leaves_nothing(on_a_display):
    assert on_a_display("cancelled").splitlines() == ["nothing was chosen", "as expected"]


def test_without_a_display_the_way_out_is_named(monkeypatch, capsys):
    pytest.importorskip("tkinter")
    from train.continual import main

    monkeypatch.delenv("DISPLAY", raising=False)
    assert main(["--gui"]) == 1
    assert "--gui needs a display" in capsys.readouterr().err
