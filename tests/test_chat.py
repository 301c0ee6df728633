"""Chat: the session by itself, and the command as a person at a terminal uses it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from chat_helpers import ANSWER, ROOT, Person, learn, plain, turn

from hrm_model import get_tokenizer, load_model
from hrm_model.chat import ChatSession, ChatSettings
from hrm_model.chat_file import MAX_BYTES
from hrm_model.commands.chat import answer
from hrm_model.sampling import Sampling
from hrm_model.template import INSTRUCTION, encode, prompt
from hrm_model.terminal import Screen

TOKENIZER = get_tokenizer()
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A saved model that says ANSWER."""
    return learn(tmp_path_factory.mktemp("learned") / "model")


@pytest.fixture(scope="module")
def model(learned):
    return load_model(learned)[0]


@pytest.fixture
def session(model) -> ChatSession:
    return ChatSession(model, TOKENIZER, ChatSettings(sampling=GREEDY, seed=1, max_new_tokens=24))


def say(session: ChatSession, text: str) -> str:
    for _ in session.ask(text):
        pass
    return session.history[-1]["content"]


def varied(model, **settings) -> ChatSession:
    """A session whose answers depend on the seed and are 12 tokens long."""
    sampling = Sampling(temperature=20.0, top_k=20)
    return ChatSession(model, TOKENIZER, ChatSettings(sampling, max_new_tokens=12, min_new_tokens=12, **settings))


# The session


def test_an_answer_ends_where_the_template_says(session):
    events = list(session.ask("Hi"))
    assert session.history == turn("Hi", ANSWER)
    assert events[-1].finish in ("stop", "stop_token") and "Human" not in "".join(e.text for e in events)
    assert say(session, "How are you?") == ANSWER and session.turns == 2


def test_a_model_of_four_bits_says_the_same(learned, tmp_path):
    pytest.importorskip("torchao")
    from hrm_model.cli import main

    assert main(["quantize", str(learned), "--to", "int4", "--out", str(tmp_path / "m"), "--no-report"]) == 0
    quantised = load_model(tmp_path / "m")[0]
    session = ChatSession(quantised, TOKENIZER, ChatSettings(sampling=GREEDY, seed=1, max_new_tokens=24))
    assert say(session, "Hi") == ANSWER and say(session, "How are you?") == ANSWER


def test_a_turn_computes_only_what_is_new(session, model):
    say(session, "Hi")
    before = session.cache.work.input
    list(session.ask("How are you?"))
    n_prompt, n_answer = len(session.prompt_ids), len(TOKENIZER.encode(f" {ANSWER}\n\nHuman:"))
    held = len(encode(turn("Hi", ANSWER), TOKENIZER)[0]) - 1
    assert session.reused >= held
    computed = (session.cache.work.input - before) // model.config.n_input_layers
    assert computed <= n_prompt - held + n_answer < n_prompt


def test_a_seed_repeats_a_conversation_and_another_does_not(model):
    said = []
    for seed in (1, 1, 2):
        session = varied(model, seed=seed)
        said.append([say(session, "Hi"), say(session, "Hi")])
    assert said[0] == said[1] != said[2] and said[0][0] != said[0][1]


def test_a_turns_answer_does_not_depend_on_what_the_turns_before_drew(model):
    """Turn 2 draws from (seed, 2), whether turn 1 was drawn, stopped early or loaded."""
    whole, loaded = varied(model, seed=5), varied(model, seed=5)
    say(whole, "Hi")
    loaded.restore(whole.settings, [dict(m) for m in whole.history])
    assert say(whole, "Go on") == say(loaded, "Go on")


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(session):
    events = session.ask("Hi")
    text = next(events).text + next(events).text
    events.close()
    assert session.history == turn("Hi", text.strip()) and ANSWER.startswith(text.strip())
    assert say(session, "How are you?") == ANSWER


def test_the_history_keeps_what_the_window_does_not(session, model):
    for number in range(6):
        assert say(session, f"Hi {number}") == ANSWER
    assert session.turns == 6 and session.history[0]["content"] == "Hi 0"
    assert 0 < session.left_out < 6
    text = TOKENIZER.decode(session.prompt_ids)
    assert text.startswith(INSTRUCTION) and "Hi 5" in text and "Hi 0" not in text
    assert len(session.prompt_ids) + session.settings.max_new_tokens <= model.config.block_size


def test_a_question_longer_than_half_the_window_still_fits(session, model):
    question = "word " * 80
    say(session, question)
    assert session.history[0]["content"] == question


def test_a_question_longer_than_the_window_changes_nothing(session, model):
    say(session, "Hi")
    with pytest.raises(ValueError, match=r"\d+ tokens with its instruction, and the window holds 127; shorten .* by"):
        session.ask("word " * 200)
    assert session.turns == 1 and say(session, "How are you?") == ANSWER


@pytest.mark.parametrize("text", ["", "  \n", "a\ud800b"])
def test_a_question_that_is_none_changes_nothing(session, text):
    with pytest.raises(ValueError, match=r"empty question|lone surrogate U\+D800 at byte 1"):
        session.ask(text)
    assert session.history == []


def test_an_error_in_the_middle_of_an_answer_leaves_the_history(session, model):
    say(session, "Hi")
    events = session.ask("How are you?")
    next(events)
    weight = model.hrm_core.q_head.weight
    kept, weight.data = weight.data, weight.data[:, :3]  # what a fault in a kernel would be like
    try:
        with pytest.raises(ValueError, match="must be"):
            list(events)
    finally:
        weight.data = kept
    assert session.history == turn("Hi", ANSWER)
    assert say(session, "How are you?") == ANSWER


def test_max_history_limits_the_turns_of_a_prompt(model):
    session = ChatSession(model, TOKENIZER, ChatSettings(GREEDY, max_history=1))
    for text in ("one", "two", "three"):
        say(session, text)
    assert TOKENIZER.decode(session.prompt_ids).count("Human:") == 2 and session.turns == 3
    alone = ChatSession(model, TOKENIZER, ChatSettings(GREEDY, max_history=0))
    say(alone, "one"), say(alone, "two")
    assert alone.prompt_ids == prompt([{"role": "user", "content": "two"}], TOKENIZER)


def test_forced_steps_are_taken_by_every_token_and_auto_gives_the_decision_back(session):
    free = [e.steps for e in session.ask("Hi")]
    session.command("/hrm 2")
    assert {e.steps for e in session.ask("Hi")} == {2}
    session.command("/hrm auto")
    session.clear()
    assert [e.steps for e in session.ask("Hi")] == free


def twice_ctrl_c():
    """What a person who is in a hurry does; the second ends what is going on."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_keeps_what_there_is_too(session, model):
    class Paper(io.StringIO):
        def write(self, text):
            if text == " to":
                twice_ctrl_c()
            return super().write(text)

    out, err = Paper(), io.StringIO()
    assert not answer(session, "Hi", Screen(out, err), more="", label=False)
    assert out.getvalue() == "Hello\n" and session.history == turn("Hi", "Hello to")
    assert err.getvalue() == "(stopped; what there is stays in the conversation)\n"
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            twice_ctrl_c()

    hook = model.hrm_core.register_forward_hook(interrupt)
    other = ChatSession(model, TOKENIZER, session.settings)
    block = model.input_blocks[0].register_forward_hook(interrupt)
    try:
        assert not answer(other, "Hi", Screen(io.StringIO(), err), more="", label=False)
    finally:
        hook.remove(), block.remove()
    assert other.turns == 1 and say(other, "How are you?") == ANSWER


def test_an_error_begins_a_line_of_its_own(session, monkeypatch):
    def events(_):
        yield from ()
        raise ValueError("broken")

    monkeypatch.setattr(session, "ask", events)
    out = io.StringIO()
    with pytest.raises(ValueError, match="broken"):
        answer(session, "Hi", Screen(out, io.StringIO()), more="", label=True)
    assert out.getvalue() == "Assistant: \n" and session.history == []


def test_more_steps_than_memory_holds_are_named(model):
    with pytest.raises(ValueError, match=r"^max_steps 10+ needs more memory for a window of 128 .* take fewer steps$"):
        ChatSession(model, TOKENIZER, ChatSettings(max_steps=10**12))


# Commands


def test_settings_are_shown_and_changed(session):
    for line, shown in (("/temp 0.5", "0.5"), ("/topk 7", "7"), ("/topp 0.9", "0.9"), ("/minp 0.1", "0.1")):
        assert shown in session.command(line)
        assert shown in session.command(line.split()[0])
    session.command("/penalty 1.2")
    session.command("/tokens 9")
    assert (
        session.settings.sampling == Sampling(0.5, 7, 0.9, min_p=0.1, repetition_penalty=1.2)
        and session.settings.max_new_tokens == 9
    )
    session.command("/topk off")
    assert session.settings.sampling.top_k is None and "off" in session.command("/topk")
    assert session.command("/temp 0") == "temperature 0"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tmep 1", r"unknown command '/tmep'; did you mean /temp\? /help lists"),
        ("/usr/bin/env", 'to send it as a message, put it between """'),
        ("/temp warm", r"temperature 'warm' is not a number; write e.g. /temp 0.8"),
        ("/temp -1", "/temp -1.0 must be finite and at least 0"),
        ("/temp inf", "/temp inf must be finite"),
        ("/temp nan", "/temp nan must be finite"),
        ("/topk 0", "^/topk 0 must be an integer of at least 1, or off$"),
        ("/topk 60000", "^/topk 60000 is above 50257, the tokens there are; off keeps all$"),
        ("/topk 1.5", "top-k '1.5' is not an integer or off; write e.g. /topk 50"),
        ("/topp 2", "/topp 2.0 is outside"),
        ("/minp -1", "/minp -1.0 is outside"),
        ("/penalty 0", "/penalty 0.0 must be at least 1"),
        ("/tokens 0", "^/tokens 0 must be an integer of at least 1"),
        ("/tokens many", "tokens of an answer 'many' is not an integer"),
        ("/tokens " + "9" * 5000, "is not an integer"),
        ("/hrm 0", "/hrm '0' is none of 1 to 3, the steps that this model takes; write e.g. /hrm 3, or /hrm auto"),
        ("/hrm 4", "/hrm '4' is none of 1 to 3"),
        ("/hrm deep", "/hrm 'deep' is none of 1 to 3"),
        ("/show maybe", "/show 'maybe' is neither on nor off"),
        ("/save", "/save needs a file"),
        ("/load", "/load needs a file"),
        ("/clear now", "^/clear takes nothing after it, not 'now'; write /clear alone$"),
        ("/quit x y", "^/exit takes nothing after it, not 'x y'"),
        ("/system a\udc80", "what follows /system is not UTF-8: byte 0x80 at byte 1"),
    ],
)
def test_a_bad_value_is_named_in_one_line_and_changes_nothing(session, line, message):
    say(session, "Hi")
    before = session.to_dict()
    with pytest.raises(ValueError, match=message) as caught:
        session.command(line)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert session.to_dict() == before and not session.over and say(session, "Hi") == ANSWER


def test_every_command_is_in_the_help_and_a_switch_switches(session):
    assert all(name in session.command("/help") for name in session.commands)
    session.command("/show")
    assert session.show_steps
    session.command("/show off")
    session.command("/debug on")
    assert session.debug and not session.show_steps


def test_system_replaces_the_instruction_and_default_brings_it_back(session):
    session.command("/system Be brief.")
    session.ask("Hi")
    assert TOKENIZER.decode(session.prompt_ids).startswith("Be brief.\n\nHuman: Hi")
    session.command("/system none")
    session.ask("Hi")
    assert TOKENIZER.decode(session.prompt_ids).startswith("Human: Hi")
    session.command("/system default")
    assert session.settings.instruction == INSTRUCTION


def test_clear_begins_anew_and_quit_leaves(session):
    say(session, "Hi")
    session.command("/clear")
    assert session.history == [] and session.cache.ids(0) == [] and say(session, "Hi") == ANSWER
    session.command("/QUIT")
    assert session.over


def test_stats_tell_turns_window_speed_steps_and_memory(session, model):
    session.command("/hrm 2")
    events = list(session.ask("Hi"))
    shown = session.command("/stats")
    assert "turns    1" in shown and f"of {model.config.block_size} tokens" in shown and "mean 2.00" in shown
    assert f"{len(events)} tokens in" in shown and f"{session.cache.nbytes / 2**20:.1f} MiB" in shown
    bars = [line.split() for line in shown.splitlines()[-3:]]
    assert bars == [["1", "0", "0.0%"], ["2", "#" * 30, str(len(events)), "100.0%"], ["3", "0", "0.0%"]]


# Files


def test_a_saved_conversation_goes_on_as_the_session_would_have(model, tmp_path):
    session, other = varied(model, seed=3, force_steps=2), ChatSession(model, TOKENIZER)
    say(session, "Hi\nthere 🙂")
    session.command(f"/save {tmp_path / 'c.json'}")
    other.command(f"/load {tmp_path / 'c.json'}")
    assert other.history == session.history and other.settings == session.settings
    assert say(other, "Go on") == say(session, "Go on")


def test_saving_never_replaces_a_file_unless_asked_to(session, tmp_path):
    path = tmp_path / "c.json"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"exists; choose another name, or replace it with /save! "):
        session.command(f"/save {path}")
    assert path.read_text() == "mine"
    assert session.command(f"/save! {path}").endswith(f" to {path}")
    assert json.loads(path.read_text())["messages"] == [] and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_is_called_as_it_was(session, tmp_path):
    (tmp_path / "file.json").write_text("mine")
    link = tmp_path / "link.json"
    link.symlink_to("file.json")
    with pytest.raises(ValueError, match=rf"^{link} exists"):
        session.command(f"/save {link}")
    assert session.command(f"/save! {link}").endswith(f" to {link}")
    assert link.is_symlink() and json.loads((tmp_path / "file.json").read_text())["messages"] == []


def test_what_appears_while_it_is_saved_is_not_replaced_and_ctrl_c_leaves_nothing(session, tmp_path, monkeypatch):
    path, sync = tmp_path / "c.json", os.fsync

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.command(f"/save {path}")
    assert not list(tmp_path.iterdir())

    def meanwhile(handle):
        path.write_text("theirs")
        sync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(ValueError, match="exists; choose another name"):
        session.command(f"/save {path}")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "theirs"


@pytest.mark.parametrize("where", ["", "none/c.json", "c.json/d.json", "\0", "x" * 5000])
def test_a_place_that_cannot_be_written_is_named(session, tmp_path, where):
    (tmp_path / "c.json").write_text("mine")
    with pytest.raises((ValueError, OSError), match=r"folder|no regular file|cannot be|too long"):
        session.command(f"/save! {tmp_path}/{where}")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def change(**changes):
    return lambda content: content | changes


def change_setting(name: str, value):
    return lambda content: content | {"settings": content["settings"] | {name: value}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: "{", "is not JSON"),
        (lambda c: "[" * 100_000, "is not JSON"),
        (lambda c: b"\xff\xfe\xfa", "is not JSON"),
        (lambda c: " " * (MAX_BYTES + 1), "over the limit of 16,777,216"),
        (lambda c: [], 'has no "format": "hrm-chat"'),
        (change(format="other"), 'has no "format"'),
        (change(version=99), "version 99, this program reads 1"),
        (change(settings=None), "has no settings"),
        (change(messages={}), "has no list of messages"),
        (change(messages=["x"]), "it must have a role"),
        (change(messages=turn("a", "b")[::-1]), "has the role 'assistant', expected 'user'"),
        (change(messages=turn("a", "b")[:1]), "do not begin with a question and end with an answer"),
        (change(messages=turn("a", "b\ud800")), "message 2 is not UTF-8"),
        (change_setting("max_new_tokens", 0), "max_new_tokens 0 must be an integer of at least 1"),
        (change_setting("max_new_tokens", True), "max_new_tokens True must be"),
        (change_setting("seed", None), "seed None must be"),
        (change_setting("seed", "1"), "seed '1' must be"),
        (change_setting("force_steps", 4), "does not fit this model: 4 steps are more than the 3"),
        (change_setting("instruction", 7), "instruction 7 is no text"),
        (change_setting("labels", ["Human:"]), "labels .* must be two texts"),
        (change_setting("labels", ["", "A:"]), "is no label"),
        (change_setting("halt_bias", float("nan")), "halt_bias nan must be a number"),
        (change_setting("depth_update", []), "depth_update .* is none of token, turn"),
        (change_setting("colour", "red"), "unknown in settings: 'colour'"),
        (change_setting("sampling", {}), "missing in sampling"),
        (change_setting("sampling", None), "sampling are a NoneType, not an object"),
        (
            lambda c: change_setting("sampling", c["settings"]["sampling"] | {"temperature": "hot"})(c),
            "temperature 'hot' is no number",
        ),
        (
            lambda c: change_setting("sampling", c["settings"]["sampling"] | {"top_p": None})(c),
            "top_p None is outside",
        ),
    ],
)
def test_a_file_that_is_no_chat_is_named_in_one_line_and_changes_nothing(session, tmp_path, spoil, message):
    say(session, "Hi")
    path = tmp_path / "c.json"
    session.command(f"/save {path}")
    spoiled = spoil(json.loads(path.read_text()))
    text = spoiled if isinstance(spoiled, (str, bytes)) else json.dumps(spoiled)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = session.to_dict()
    with pytest.raises(ValueError, match=message) as caught:
        session.command(f"/load {path}")
    assert "\n" not in str(caught.value) and session.to_dict() == before


def test_what_is_no_file_is_not_loaded(session, tmp_path):
    for path, message in (
        (tmp_path, "a folder"),
        (tmp_path / "none", "No such file"),
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            session.command(f"/load {path}")


# The command, as a person uses it


@pytest.fixture
def person(learned, request):
    people = []

    def sit_down(*arguments: str, **environment: str) -> Person:
        people.append(Person(str(learned), "--temperature", "0", *arguments, **environment))
        return people[-1]

    yield sit_down
    for one in people:
        one.close()


def test_a_person_talks_saves_loads_and_leaves(person, tmp_path):
    p = person("--force-hrm-steps", "3")
    assert "/help lists the commands" in plain(p.see("Human: "))
    assert f"Assistant: {ANSWER}\n" in p.ask("Hi")
    assert p.ask("").strip() == "Human:", "an empty line does nothing"
    assert "unknown command '/hlep'; did you mean /help?" in p.ask("/hlep")
    p.type(b"a\xff\n")
    assert "not UTF-8: byte 0xff at byte 1" in plain(p.see("Human: "))
    p.type('"""\n/help is\nno command here"""\n')
    p.see("Assistant: ")
    assert ANSWER in plain(p.see("Human: "))
    p.type("one \\\n")
    p.see("... ")
    assert ANSWER in p.ask("two")
    assert "steps: 1 2 3" in p.ask("/show")
    p.type("\x1b[A\x1b[A\n")  # the line before the last again: "two"
    assert "\x1b[38;5;" in p.see("Human: "), "an answer in colours"
    path = tmp_path / "c.json"
    assert "saved 4 turns" in p.ask(f"/save {path}")
    assert "exists" in p.ask(f"/save {path}")
    assert "conversation cleared" in p.ask("/clear")
    assert "turns    0" in p.ask("/stats")
    assert "loaded 4 turns" in p.ask(f"/load {path}")
    p.leave("/exit\n")
    assert p.process.returncode == 0
    questions = [m["content"] for m in json.loads(path.read_text())["messages"][::2]]
    assert questions == ["Hi", "/help is\nno command here", "one \ntwo", "two"]


def test_ctrl_c_stops_an_answer_and_twice_at_an_empty_line_leaves(person):
    p = person("--min-tokens", "5000", "--max_tokens", "5000", NO_COLOR="1")
    p.see("Human: ")
    p.type("Hi\n")
    p.see("Hello")
    p.type("\x03")
    shown = p.see("Human: ")
    assert "stopped; what there is stays in the conversation" in shown and "\x1b[2m" not in shown, "NO_COLOR"
    assert "turns    1" in p.ask("/stats")
    p.type("half a line")
    p.see("half a line")
    assert "once more" not in p.interrupt(), "it only cleared the line"
    assert "Ctrl-C once more leaves" in p.interrupt()
    p.interrupt(leaves=True)
    assert p.process.returncode == 0


def test_ctrl_d_leaves(person):
    p = person()
    p.see("Human: ")
    p.leave("\x04")
    assert p.process.returncode == 0


def test_a_pipe_gets_answers_alone(learned):
    done = subprocess.run(
        [sys.executable, "-m", "hrm_model", "chat", str(learned), "--temperature", "0", "--max_tokens", "3"],
        cwd=ROOT,
        input=b'Hi\n/nothing\n\nHow \xff?\n"""\nnever\nended',
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout.decode().splitlines() == ["Hello to you"] * 2
    errors = done.stderr.decode().splitlines()
    assert [line.split(";")[0] for line in errors if line.startswith("error: ")] == [
        "error: unknown command '/nothing'",
        "error: the message is not UTF-8: byte 0xff at byte 4",
    ]
    assert "(cut after 3 tokens; /tokens N allows more)" in errors
