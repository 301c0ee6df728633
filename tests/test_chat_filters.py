"""Which conversations are left out, which forms they may have, and how long ones become rows."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_model import get_tokenizer
from hrm_model.template import INSTRUCTION, encode
from hrm_model.training.chat_filters import Filter, read_words
from hrm_model.training.chat_fit import fit
from hrm_model.training.chat_forms import messages_of, oasst_conversations

TOKENIZER = get_tokenizer()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def reason(answer: str, words=(), question: str = "Who?") -> str | None:
    found = Filter(words).reason(turns(question, answer))
    return found and found[0]


# --- filters --------------------------------------------------------------------------------------


def test_words_are_whole_words():
    words = ["Alexa", "Bard", "Claude"]
    for kept in ("Alexander the Great", "Lombardy", "the bards of Bardot", "Claudette, claude2", "bard_1"):
        assert reason(kept, words) is None
    for dropped in ("Ask Alexa.", "ALEXA's voice", "(bard)", "Claude"):
        assert reason(dropped, words).startswith("word ")
    assert reason("fine", words, question="What is Alexa?") == "word 'alexa'"


def test_names_are_no_reason_without_a_claim_to_be_one():
    for kept in ("Claude Monet painted it.", "I am Claude Monet, a painter.", "Alexander", "Lombardy", "I'm a Gemini."):
        assert reason(kept) is None
    for kept in (
        "ChatGPT is a model by OpenAI.",
        '"I am Siri," said the phone.',
        "I am a bard.",
        "a phone made by Apple",
    ):
        assert reason(kept) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I'm ChatGPT, how can I help?",
        "I\u2019m actually chat gpt",
        "Hello! My name is\nClaude.",
        "As ChatGPT, I have no body.",
        "I am a GPT-4 based model",
        "I cannot do that as an AI language model developed by OpenAI.",
        "I was trained by Google.",
        "I'm an assistant created and maintained by Anthropic",
        "I am Open Assistant",
    ],
)
def test_an_answer_that_claims_to_be_another_assistant_is_dropped(answer):
    assert reason(answer) == "another assistant"
    assert Filter(claims=False).reason(turns("Who?", answer)) is None
    assert reason("Perhaps.", question=answer) is None, "a human may say what they like"


def test_phrases_match_over_white_space_and_accents_belong_to_their_letters():
    assert reason("New \n York", ["new york"]) == "word 'new york'"
    assert reason("Newyork, New-York", ["new york"]) is None
    assert reason("re\u0301sume\u0301", ["resume", "re"]) is None
    assert reason("re\u0301sume\u0301", ["r\u00e9sum\u00e9"]) is not None
    assert reason("c'est C++ ici", ["c++"]) is not None and reason("c'est c+", ["c++"]) is None


@settings(max_examples=150, deadline=None)
@given(st.text("ab \u00e9-", min_size=1, max_size=12), st.text("ab", min_size=1, max_size=3))
def test_a_word_is_found_exactly_where_it_stands_alone(text, word):
    alone = word in text.replace("-", " ").split()
    assert (Filter([word]).reason(turns("Who?", text + ".")) is not None) == alone or not text.strip()


def test_duplicates_and_empty_answers_are_dropped():
    keep = Filter()
    assert keep.reason(turns("a", "b")) is None
    assert keep.reason(turns(" a ", "b\n"))[0] == "duplicate"
    assert keep.reason(turns("a", "c")) is None
    assert keep.reason([{"role": "system", "content": "x"}, *turns("a", "b")]) is None
    assert keep.reason(turns("a", " "))[0] == keep.reason(turns("a", "b", "c", ""))[0] == "empty answer"
    everything = Filter(claims=False, duplicates=False)
    assert everything.reason(turns("a", "b")) is everything.reason(turns("a", "b")) is None


def test_words_of_a_file_are_read_line_by_line(tmp_path):
    (tmp_path / "words").write_text("\ufeffAlexa\n# a comment\n\n  as an AI \n", encoding="utf-8")
    assert read_words(tmp_path / "words") == ["Alexa", "as an AI"]
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, message in (("latin", "not UTF-8"), ("none", "No such file")):
        with pytest.raises(ValueError, match=rf"--drop-words .*{name}.*{message}"):
            read_words(tmp_path / name)
    for word in ("", "!?"):
        with pytest.raises(ValueError, match="has no letter and no digit"):
            Filter([word])


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"messages": turns("Hi", "Yo")},
        {"messages": turns("Hi", "Yo", "Bye")},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"conversations": turns("Hi", "Yo")},
        {"conversations": ["Hi", "Yo"], "source": "web"},
        {"instruction": "Hi", "input": "", "output": "Yo", "text": "all of it"},
        {"instruction": "Hi", "context": "", "response": "Yo", "category": "chat"},
        {"prompt": "Hi", "response": "Yo"},
        {"prompt": "Hi", "completion": "Yo"},
        {"question": "Hi", "answer": "Yo"},
    ],
)
def test_every_form_becomes_the_same_messages(value):
    assert messages_of(value) == turns("Hi", "Yo")


def test_what_an_instruction_is_about_follows_it():
    assert (
        messages_of({"instruction": "Sum up.", "input": "A text.", "output": "Text."})[0]["content"]
        == "Sum up.\n\nA text."
    )
    assert messages_of({"instruction": "Who?", "context": "Ann.", "response": "Ann."})[0]["content"] == "Who?\n\nAnn."


def test_a_system_message_comes_first():
    system = {"role": "system", "content": "Be brief."}
    assert messages_of({"system": "Be brief.", "prompt": "Hi", "response": "Yo"}) == [system, *turns("Hi", "Yo")]
    assert messages_of({"messages": [system, *turns("Hi", "Yo")]}) == [system, *turns("Hi", "Yo")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], "a JSON list is no object"),
        ({"text": "a"}, r"no known form: its keys are \['text'\]; give messages"),
        ({"messages": "a"}, "'messages' is a str, not a list"),
        ({"messages": [3]}, "entry 1 of 'messages' is a int"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "entry 1 of 'messages' has the role 'tool'"),
        ({"conversations": [{"from": "human", "value": None}]}, "'value' is a NoneType, not a string"),
        ({"messages": turns("a")}, "no answer in it"),
        ({"messages": []}, "no answer in it"),
        ({"messages": turns("x", "a", "b")[1:] + turns("c", "d")}, "message 1 of 4 has the role 'assistant'"),
        ({"question": "", "answer": "a"}, "an empty question"),
        ({"question": "a", "answer": 1}, "'answer' is a int"),
    ],
)
def test_a_line_that_fits_nothing_says_why(value, message):
    with pytest.raises(ValueError, match=message):
        messages_of(value)


def test_trees_become_conversations_along_the_best_ranked_english_replies():
    def row(name, parent, role, rank=None, lang="en", **more):
        return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, "lang": lang} | more

    rows = [
        row("worse", "q", "assistant", 1),
        row("q", None, "prompter"),
        row("unranked", "q", "assistant"),
        row("best", "q", "assistant", 0),
        row("deleted", "best", "prompter", 0, deleted=True),
        row("q2", "best", "prompter"),
        row("a2", "q2", "assistant", 0),
        row("q3", "a2", "prompter"),
        row("frage", None, "prompter", lang="de"),
        row("antwort", "frage", "assistant", 0, lang="de"),
        row("unanswered", None, "prompter"),
    ]
    problems = []
    assert list(oasst_conversations(rows, problems.append)) == [turns("q", "best", "q2", "a2")]
    assert problems == ["tree unanswered: there is no answer in it"]


def test_trees_of_damaged_data_end():
    def row(name, parent, role):
        return {"message_id": name, "parent_id": parent, "role": role, "text": role, "lang": "en"}

    rows = [row("q", None, "prompter"), row("q", "q", "assistant")]  # a message that answers itself
    assert list(oasst_conversations(rows, print)) == [turns("prompter", "assistant")]


# --- lengths --------------------------------------------------------------------------------------


def test_what_fits_is_one_row_as_the_template_encodes_it():
    messages = turns("Hi", "Yo", "Bye", "Bye")
    ids, is_answer = encode(messages, TOKENIZER)
    fitted = fit(messages, TOKENIZER, len(ids) - 1)
    assert (fitted.cut, fitted.dropped, len(fitted.rows)) == (0, 0, 1)
    assert fitted.rows[0] == (ids, is_answer)
    assert len(fit(messages, TOKENIZER, len(ids) - 2).rows) == 2


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_a_long_conversation_is_split_at_turns_as_many_in_a_part_as_fit(system):
    head = [] if system is None else [{"role": "system", "content": system}]
    talk = turns(*(f"text {i} " * (i % 4 + 1) for i in range(16)))
    pairs = [talk[i : i + 2] for i in range(0, 16, 2)]
    parts, rest = [], pairs
    while rest:
        n = len(rest)
        while len(encode([*head, *chain(*rest[:n])], TOKENIZER)[0]) > 81:
            n -= 1
        parts.append([*head, *chain(*rest[:n])])
        rest = rest[n:]
    fitted = fit([*head, *talk], TOKENIZER, 80)
    assert fitted.rows == [tuple(encode(part, TOKENIZER)) for part in parts]
    assert len(parts) > 1 and fitted.cut == fitted.dropped == 0


def test_the_work_of_a_split_does_not_grow_with_the_first_turn_times_the_others():
    class Counting:
        eot, chars = TOKENIZER.eot, 0

        def encode(self, text):
            self.chars += len(text)
            return TOKENIZER.encode(text)

    messages = turns("word " * 4000, "a", *(f"text {i}" for i in range(60)))
    counting = Counting()
    assert fit(messages, counting, 100) == fit(messages, TOKENIZER, 100)
    assert counting.chars < 4 * 20_000  # once as a whole, once alone; what it stands before is short


def test_an_answer_too_long_alone_loses_its_end_and_no_loss_looks_at_where_it_ends():
    messages = turns("first", "short", "second", "long " * 100, "third", "short")
    fitted = fit(messages, TOKENIZER, 60)
    assert (len(fitted.rows), fitted.cut, fitted.dropped) == (3, 1, 0)
    ids, is_answer = fitted.rows[1]
    assert len(ids) == 61 and ids[-1] == TOKENIZER.eot and not is_answer[-1] and is_answer[-2]
    assert TOKENIZER.decode(ids[:-1]).startswith(f"{INSTRUCTION}\n\nHuman: second\n\nAssistant: long long")
    assert TOKENIZER.decode(fitted.rows[2].ids).startswith(f"{INSTRUCTION}\n\nHuman: third")


def test_a_question_too_long_alone_is_left_out():
    fitted = fit(turns("long " * 100, "a", "b", "c"), TOKENIZER, 60)
    assert (len(fitted.rows), fitted.cut, fitted.dropped) == (1, 0, 1)
    assert fit(turns("long " * 100, "a"), TOKENIZER, 60) == ([], 0, 1)


def test_marks_belong_to_the_word_that_they_stand_in():
    keep = Filter(["कम", "म"])
    assert keep.reason(turns("a", "यह कम है"))[0] == "word 'कम'"
    assert not keep.reason(turns("b", "कमी है"))  # a vowel sign after it
    assert not keep.reason(turns("c", "कीम"))  # and before it
    assert keep.reason(turns("d", "कमी कम"))[0] == "word 'कम'"  # one further on


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=10), st.integers(35, 90))
def test_rows_fit_and_every_turn_is_accounted_for(sizes, block_size):
    messages = turns(*("word " * size for size in sizes[: len(sizes) // 2 * 2]))
    fitted = fit(messages, TOKENIZER, block_size)
    label = TOKENIZER.encode("Assistant:")
    begun = sum(TOKENIZER.decode(row.ids[25:]).count("Assistant:") for row in fitted.rows)
    assert label and begun + fitted.dropped == len(messages) // 2
    for row in fitted.rows:
        assert len(row.ids) == len(row.is_answer) <= block_size + 1 and row.ids[-1] == TOKENIZER.eot
        assert any(row.is_answer) and not row.is_answer[0]
