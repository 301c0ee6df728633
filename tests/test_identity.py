"""The identity set: what a persona's file may be, what is composed of it, what train/identity.py makes of it."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import pytest

from hrm_model import get_tokenizer
from hrm_model.template import INSTRUCTION
from hrm_model.training.identity import IdentityChat, dataset_path, ensure_default_identity, prepare_identity
from hrm_model.training.identity_check import validation_pairs
from hrm_model.training.identity_pairs import PROPORTIONS, identity_pairs, is_right, parse_proportions, shares
from hrm_model.training.identity_phrases import CATEGORIES
from hrm_model.training.persona import DEFAULT_PERSONA, Persona, PersonaError, read_persona
from hrm_model.training.shards import open_dataset
from train.identity import main

OTHERS = r"chatgpt|gpt|claude|gemini|siri|alexa|copilot|llama|openai|google|anthropic|meta|apple"


@pytest.fixture(scope="module")
def pairs():
    return identity_pairs(DEFAULT_PERSONA, 2800, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return ensure_default_identity(tmp_path_factory.mktemp("data") / "identity")


def texts(dataset, split: str) -> list[str]:
    rows, tokenizer = dataset.conversations(split), get_tokenizer()
    found = [tokenizer.decode(rows.row(i)[0].tolist()[:-1]) for i in range(len(rows))]
    return [text.removeprefix(INSTRUCTION).strip() for text in found]


def turns(text: str) -> list[tuple[str, str]]:
    """Questions and answers of a conversation's text."""
    parts = re.split(r"(?:\A|\n\n)(?:Human|Assistant): ", text)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_categories_have_exactly_the_published_shares(pairs):
    assert Counter(pair.category for pair in pairs) == dict(greetings=840, identity=700, help=700, small_talk=560)
    assert shares(PROPORTIONS, 2800) == dict(greetings=840, identity=700, help=700, small_talk=560)


@pytest.mark.parametrize("n", [1, 7, 99, 1001])
def test_shares_of_any_number_add_up_and_are_within_one(n):
    found = shares(PROPORTIONS, n)
    assert sum(found.values()) == n
    assert all(abs(found[name] - n * share) < 1 for name, share in PROPORTIONS.items())


def test_pairs_are_a_function_of_persona_number_and_seed(pairs):
    assert identity_pairs(DEFAULT_PERSONA, 2800, 0) == pairs
    assert identity_pairs(DEFAULT_PERSONA, 2800, 1) != pairs
    assert identity_pairs(Persona(name="Another"), 100, 0) != identity_pairs(DEFAULT_PERSONA, 100, 0)


def test_no_pair_comes_twice_and_questions_are_varied(pairs):
    assert len({(" ".join(pair.question.split()), pair.answer) for pair in pairs}) == len(pairs)
    questions = [pair.question for pair in pairs]
    assert len(set(questions)) > 2400
    assert sum(question.islower() for question in questions) > 200 and any(question.isupper() for question in questions)
    assert len({question[-1] for question in questions} & set("?!.")) == 3


def test_answers_say_what_their_topic_has_to(pairs):
    for pair in pairs:
        assert is_right(pair, pair.answer, DEFAULT_PERSONA), pair
    assert not is_right(next(p for p in pairs if p.topic == "name"), "My name is Bob.", DEFAULT_PERSONA)


@pytest.mark.parametrize(
    "persona", [DEFAULT_PERSONA, Persona(name="Claude Junior", maker="Google fans"), Persona("X", tone="formal")]
)
def test_no_answer_claims_what_the_persona_does_not_say(persona):
    allowed = " ".join(map(str, persona.as_dict().values())).lower()
    for pair in identity_pairs(persona, 1400, 3):
        for other in re.findall(rf"\b(?:{OTHERS})\b", pair.answer.lower()):
            assert other in allowed, pair
        if pair.topic == "human":
            assert "language model" in pair.answer
        if not persona.maker:
            assert "made by" not in pair.answer or "don't know" in pair.answer or "do not know" in pair.answer
        assert not re.search(r"[\[\]{}|]", pair.question + pair.answer), "every form is filled in"


def test_a_formal_persona_has_no_contractions_and_does_not_exclaim():
    answers = {pair.answer for pair in identity_pairs(Persona(name="X", tone="formal"), 700, 0)}
    assert not [a for a in answers if re.search(r"n't|I'm|I'd|'re|!", a)]


# -- the dataset -------------------------------------------------------------------------------------------------------


def test_conversations_have_one_to_three_turns_and_none_comes_twice(dataset):
    found = texts(dataset, "train") + texts(dataset, "val")
    assert len(set(found)) == len(found)
    by_turns = Counter(len(turns(text)) for text in found)
    assert set(by_turns) == {1, 2, 3} and by_turns[2] > 150 and by_turns[3] > 20
    assert sum(n * count for n, count in by_turns.items()) == 2800
    assert max(dataset.conversations("train").lengths) <= 129, "the smallest recipe's model can read it"


def test_no_phrasing_validates_and_trains(dataset, pairs):
    """Not in another casing or with a typo either: families of phrasings are on one side."""
    family = {(pair.question, pair.answer): pair.family for pair in pairs}
    sides = {
        split: {family[turn] for text in texts(dataset, split) for turn in turns(text)} for split in ("train", "val")
    }
    assert sides["val"] and not sides["train"] & sides["val"]
    assert 0.03 < dataset.manifest["counts"]["val_share"] < 0.07
    persona, found = validation_pairs(dataset.path)
    assert persona == DEFAULT_PERSONA and {pair.family for pair in found} == sides["val"]


def test_a_persona_called_like_another_assistant_keeps_its_answers(tmp_path):
    persona = Persona(name="Claude", maker="Google", kind="an AI assistant, a language model")
    summary = prepare_identity(tmp_path / "d", persona, 300)
    assert summary["dropped"] == {} and summary["pairs"] == 300


def test_long_texts_of_a_persona_are_kept_within_the_block(tmp_path):
    persona = Persona(name="Long", description="I work " + "very " * 70 + "slowly.")
    prepare_identity(tmp_path / "d", persona, 200)
    assert open_dataset(tmp_path / "d").conversations("train").lengths.max() <= 129


def test_the_manifest_says_what_it_was_made_of(dataset):
    about = dataset.manifest["source"]["parts"][0]
    assert about["persona"] == DEFAULT_PERSONA.as_dict() and about["pairs"] == 2800
    assert about["distinct_questions"] > 2400 and about["distinct_answers"] > 40


def test_every_topic_has_answers_for_a_persona_of_a_name_alone():
    source = IdentityChat(Persona(name="X"), 400, 0, PROPORTIONS, 128)
    assert source.description["pairs"] == 400
    assert all(topic.unknown for topics in CATEGORIES.values() for topic in topics.values() if topic.needs)


# -- personas of files -------------------------------------------------------------------------------------------------


def test_a_persona_is_read_from_json(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"name": "Fin", "abilities": ["swim"], "tone": "formal"}))
    assert read_persona(path) == Persona(name="Fin", abilities=("swim",), tone="formal")
    assert dataset_path(str(path)) == "data/identity-fin"


def test_a_persona_is_read_from_yaml_or_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "p.yaml"
    path.write_text("name: Fin\nlimits: [fly]\n")
    try:
        import yaml  # noqa: F401
    except ImportError:
        pass
    else:
        assert read_persona(path) == Persona(name="Fin", limits=("fly",))
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(PersonaError, match="pip install pyyaml"):
        read_persona(path)


def test_everything_that_is_wrong_with_a_persona_is_one_error(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"kin": 1, "maker": 3, "abilities": "x", "limits": ["", 2], "tone": "loud"}))
    with pytest.raises(PersonaError) as caught:
        read_persona(path)
    message = str(caught.value)
    for fault in (
        str(path), "unknown key 'kin'", "name is missing", "maker is a int", "abilities is a str",
        "entry 1 of limits is empty", "entry 2 of limits is a int", "tone 'loud'", "keys are name (required), kind",
    ):  # fmt: skip
        assert fault in message, fault


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "{}", "neither .json"),
        ("p.json", "{", "no JSON"),
        ("p.json", "[]", "holds a list"),
        ("missing.json", None, "cannot read"),
        ("p.json", '{"name": "' + "x" * 500 + '"}', "at most 400"),
        ("p.json", '{"name": "a\\nb"}', "several lines"),
        ("p.json", '{"name": "a\\u2028b"}', "several lines"),
        ("p.json", '{"name": "a\\u0000b"}', r"name has control characters or half ones: 'a\\x00b'"),
        ("p.json", '{"name": "\\ud83d"}', r"name has control characters or half ones: '\\ud83d'"),
        ("p.yaml", "name: Fin\ncutoff: 2024-13-01", r"p\.yaml is no YAML: month must be"),
        ("p.yaml", "[" * 1000, r"p\.yaml is no YAML: maximum recursion"),
    ],
)
def test_a_file_that_is_no_persona_says_why(tmp_path, name, content, message):
    if name.endswith(".yaml"):
        pytest.importorskip("yaml")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PersonaError, match=message):
        read_persona(tmp_path / name)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_set_alone_is_written_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text('{"name": "Fin Two"}')
    line = "--persona p.json --data-only --pairs 100 --proportions identity=1,greetings=3"
    assert main(line.split()) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["out"] == "data/identity-fin-two"
    assert summary["categories"] == {"greetings": 75, "identity": 25}
    assert main(line.split()) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["up_to_date"]
    assert main("--persona p.json --data-only --pairs 90".split()) == 1
    assert "made from another persona or with other options" in capsys.readouterr().err
    assert main("--persona p.json --data-only --pairs 90 --overwrite".split()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pairs 0", "--pairs 0 is below 1"),
        ("--pairs 900000", "different ones can be made"),
        ("--proportions greetings", "expected NAME=SHARE"),
        ("--proportions smalltalk=1", "there are greetings, identity, help, small_talk"),
        ("--proportions greetings=0", "all 0"),
        ("--proportions greetings=-1", "not a finite number"),
        ("--persona missing.json", "cannot read persona"),
        ("--data somewhere", "leave out --persona"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments.split(), "--data-only"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and not list(tmp_path.iterdir())


def test_proportions_are_read():
    assert parse_proportions("greetings=0.3, identity=0.7") == {"greetings": 0.3, "identity": 0.7}
