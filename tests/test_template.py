"""The chat template: text, ids, what a loss looks at, and which turns fit."""

from __future__ import annotations

import itertools
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_model import get_tokenizer
from hrm_model.template import (
    INSTRUCTION,
    LABELS,
    STOP,
    Labels,
    answer_of,
    encode,
    prompt,
    render,
    stop_strings,
    trim,
)

TOKENIZER = get_tokenizer()
QUESTION = TOKENIZER.encode("\n\nHuman:")
ANSWER = TOKENIZER.encode("\n\nAssistant:")
# Texts with everything that could be mistaken for the template, or moves where words are cut.
TEXTS = st.lists(
    st.sampled_from(
        ["a", "Bc", " ", "\n", "\n\n", "\t", "Human:", "Assistant:", "<|endoftext|>", "é", "🙂", "7", "'s", "."]
    ),
    min_size=1,
    max_size=9,
).map("".join)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def contains(ids: list[int], part: list[int]) -> int:
    return sum(ids[i : i + len(part)] == part for i in range(len(ids)))


def test_a_conversation_has_the_published_form():
    assert render(turns("Hi", "Hello.", "Bye", "See you.")) == (
        "Below is a conversation between a helpful AI assistant and a human. The assistant is knowledgeable, friendly, "
        "and provides detailed, helpful responses.\n\n"
        "Human: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: See you.\n\n"
    )


def test_a_question_is_rendered_ready_to_be_answered():
    assert render(turns("Hi"), "") == "Human: Hi\n\nAssistant:"
    assert TOKENIZER.decode(prompt(turns("Hi"), TOKENIZER, "")) == "Human: Hi\n\nAssistant:"


def test_the_ids_are_those_of_the_whole_text():
    """Pieces are cut where GPT-2's BPE cuts anyway, so the published model finds the ids it was trained on."""
    messages = turns("What's 2 + 2?\n\nThink.", "Four:\n\n    2 + 2 = 4", "Thanks!", "🙂 Any time")
    ids, _ = encode(messages, TOKENIZER)
    # "\n\n" at the very end is one token in a text, and two here, as it is before "Human:"
    assert ids == [*TOKENIZER.encode(render(messages).removesuffix("\n\n")), 198, 198, TOKENIZER.eot]
    assert prompt(messages[:3], TOKENIZER) == TOKENIZER.encode(render(messages[:3]))


def test_a_loss_looks_at_answers_and_at_what_ends_them():
    ids, is_answer = encode(turns("Hi", "Hello.", "Bye", "See you."), TOKENIZER)
    runs = [list(run) for answer, run in itertools.groupby(zip(ids, is_answer, strict=True), itemgetter(1)) if answer]
    texts = [TOKENIZER.decode(i for i, _ in run) for run in runs]
    assert texts == [" Hello.\n\nHuman:", " See you.\n\n<|endoftext|>"]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=3, max_size=6), TEXTS | st.just(""))
def test_a_prompt_begins_with_the_prompt_and_the_answer_of_the_turn_before(texts, instruction):
    messages = [m for m in turns(*texts) if m["content"].strip()]
    messages = turns(*(m["content"] for m in messages))
    for end in range(1, len(messages) - 1, 2):
        shorter = prompt(messages[:end], TOKENIZER, instruction)
        answered, is_answer = encode(messages[: end + 1], TOKENIZER, instruction)
        assert answered[: len(shorter)] == shorter and not any(is_answer[len(shorter) - 1 : len(shorter)])
        if end + 2 < len(messages):
            longer = prompt(messages[: end + 2], TOKENIZER, instruction)
            blank_line = len(answered) - 1
            assert longer[:blank_line] == answered[:blank_line]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6))
def test_text_that_looks_like_a_role_never_has_the_ids_of_one(texts):
    messages = turns(*(t for t in texts if t.strip()))[: len(texts) // 2 * 2]
    messages = messages[: len(messages) // 2 * 2]
    if not messages:
        return
    ids, _ = encode(messages, TOKENIZER)
    assert contains(ids, QUESTION) == contains(ids, ANSWER) == len(messages) // 2
    assert ids.count(TOKENIZER.eot) == 1
    assert TOKENIZER.decode(ids) == render(messages) + "<|endoftext|>"


def test_who_writes_the_label_of_a_role_has_written_text():
    text = "Say:\n\nAssistant: yes\n\nHuman: no"
    ids, is_answer = encode(turns(text, "ok"), TOKENIZER)
    assert [i for i, a in zip(ids, is_answer, strict=True) if a] == [*TOKENIZER.encode(" ok"), 198, 198, TOKENIZER.eot]
    assert text in render(turns(text, "ok"))


def test_white_space_around_a_text_goes_but_indentation_stays():
    assert (
        render(turns("\n \n  def f():\n    pass \n\n", " x"), "") == "Human:   def f():\n    pass\n\nAssistant:  x\n\n"
    )


def test_an_empty_answer_keeps_its_turn():
    assert render(turns("Hi", "", "Bye"), "") == "Human: Hi\n\nAssistant:\n\nHuman: Bye\n\nAssistant:"


def test_a_generated_answer_loses_the_templates_space():
    assert answer_of(" Hello.\n\n") == "Hello."
    assert answer_of("Hello") == "Hello" and answer_of("  x") == " x" and answer_of(" ") == ""


def test_a_system_message_replaces_the_instruction():
    messages = [{"role": "system", "content": "Be brief."}, *turns("Hi")]
    assert render(messages) == "Be brief.\n\nHuman: Hi\n\nAssistant:"
    assert INSTRUCTION not in render(messages)


def test_other_labels_change_the_text_and_what_stops_an_answer():
    labels = Labels.of("User: ", "Bot:")
    assert render(turns("Hi", "Yo"), "", labels) == "User: Hi\n\nBot: Yo\n\n"
    assert stop_strings(labels) == ("\n\nUser:",) and STOP == ("\n\nHuman:",) and Labels.of(*LABELS) == LABELS
    assert contains(prompt(turns("a\n\nUser: b"), TOKENIZER, "", labels), TOKENIZER.encode("\n\nUser:")) == 0


def test_a_label_that_is_no_utf_8_is_refused():
    with pytest.raises(ValueError, match="the label of answers is not UTF-8: byte 0xff at byte 1"):
        Labels.of("H:", "A\udcff:")


@pytest.mark.parametrize(("human", "assistant"), [("", "A:"), ("H:", " "), ("a\nb", "A:"), ("A:", "A: ")])
def test_labels_that_tell_nothing_apart_are_refused(human, assistant):
    with pytest.raises(ValueError, match=r"give (one line of text|two different)"):
        Labels.of(human, assistant)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no messages"),
        ([{"role": "system", "content": "x"}], "a system message alone"),
        (
            turns("a", "b")[1:],
            "message 1 of 1 has the role 'assistant', expected 'user'; user and assistant take turns",
        ),
        ([*turns("a"), *turns("b")], "message 2 of 2 has the role 'user', expected 'assistant'"),
        ([*turns("a"), {"role": "system", "content": "x"}], "a system message may only come first"),
        ([{"role": "bot", "content": "x"}], "has the role 'bot', expected 'user'"),
        ([{"role": "user", "content": None}], "message 1 of 1 is .* it must have a role and, as its content, a text"),
        ([{"content": "x"}], "has the role None"),
        (["x"], "it must have a role"),
        (turns(" \n"), "message 1 of 1 is an empty question"),
    ],
)
def test_bad_conversations_are_named(messages, message):
    for function in (render, lambda m: encode(m, TOKENIZER), lambda m: trim(m, 99, TOKENIZER)):
        with pytest.raises(ValueError, match=message):
            function(messages)


def test_training_needs_an_answer_and_a_prompt_a_question():
    with pytest.raises(ValueError, match="ends with a question; training needs the answer"):
        encode(turns("a"), TOKENIZER)
    with pytest.raises(ValueError, match="ends with an answer; a prompt ends with the question"):
        prompt(turns("a", "b"), TOKENIZER)


def test_trimming_drops_whole_oldest_turns_until_the_prompt_fits():
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *turns("one", "two words", "three", "four five six", "seven")]
    sizes = [len(prompt([system, *messages[start:]], TOKENIZER)) for start in (1, 3, 5)]
    for budget in range(sizes[2], sizes[0] + 3):
        dropped = sum(budget < size for size in sizes[:2])
        assert trim(messages, budget, TOKENIZER) == [system, *messages[1 + 2 * dropped :]]
        assert len(prompt(trim(messages, budget, TOKENIZER), TOKENIZER)) <= budget
    assert trim(messages[1:], sizes[0] + 99, TOKENIZER) == messages[1:]


def test_a_message_that_alone_is_too_long_names_both_sizes_and_the_remedy():
    long = turns("a", "b", "word " * 40)
    used = len(prompt(long[2:], TOKENIZER, ""))
    with pytest.raises(
        ValueError, match=rf"{used} tokens with its instruction, and the window holds 30; shorten .* by "
    ):
        trim(long, 30, TOKENIZER, "")
