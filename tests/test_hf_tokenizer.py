"""tokenizer.json gives the ids of our own tokenizer, and its chat template the texts of our own template."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from hrm_model import get_tokenizer
from hrm_model.hf.tokenizer import make_tokenizer
from hrm_model.template import prompt, render

OURS = get_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tokenizer from a folder, as users load it."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(512).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def texts_of(kind: str) -> list[str]:
    draw = random.Random(kind)
    if kind == "unicode":  # every plane, without surrogates, which are no characters

        def character():
            code = draw.choice((draw.randrange(0x110000), draw.randrange(0x3000), draw.randrange(0x100)))
            return "" if 0xD800 <= code < 0xE000 else chr(code)

        return ["".join(character() for _ in range(draw.randrange(1, 200))) for _ in range(400)]
    if kind == "spaces":
        pieces = (
            " ",
            "\n",
            "\t",
            "\r",
            "\xa0",
            "\u2003",
            "\u3000",
            "\x85",
            "\x1c",
            "a",
            "'s",
            "'LL",
            "12",
            "!?",
            "é",
            "\u017f",
        )
        return ["".join(draw.choices(pieces, k=draw.randrange(1, 60))) for _ in range(1500)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in draw.sample(files, 30)]


@pytest.mark.parametrize("kind", ["unicode", "spaces", "standard library"])
def test_ids_and_texts_are_those_of_our_own_tokenizer(saved, kind):
    for text in texts_of(kind):
        ids = OURS.encode(text)
        assert saved(text)["input_ids"] == ids, repr(text[:80])
        assert saved.decode(ids) == OURS.decode(ids) == text


def test_the_vocabulary_is_the_same(saved):
    assert len(saved) == OURS.n_vocab and saved.model_max_length == 512
    single = [i for i in range(OURS.eot) if saved.decode([i]) != OURS.decode([i])]
    assert not single


def test_end_of_text_is_an_id_that_no_text_has(saved):
    text = "before <|endoftext|> after"
    assert saved(text)["input_ids"] == OURS.encode(text) and OURS.eot not in OURS.encode(text)
    assert saved.eos_token_id == saved.pad_token_id == saved.bos_token_id == OURS.eot
    assert saved.convert_tokens_to_ids("<|endoftext|>") == OURS.eot
    ids = [*OURS.encode("over"), OURS.eot]
    assert saved.decode(ids) == "over<|endoftext|>" and saved.decode(ids, skip_special_tokens=True) == "over"


def test_batches_are_padded_on_the_left(saved):
    batch = saved(["one two three", "four"], padding=True)
    assert batch["input_ids"][1] == [OURS.eot, OURS.eot, *OURS.encode("four")]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


CONVERSATIONS = [
    [{"role": "user", "content": "What is a list?"}],
    [{"role": "user", "content": "  Hi \n"}, {"role": "assistant", "content": "\n \n  def f():\n    pass\n\n"}],
    [{"role": "system", "content": " Answer in one word.\n"}, {"role": "user", "content": "Is 7 prime?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": ""}],
    [
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "\n\n four"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_chat_template_is_ours(saved, messages):
    is_prompt = messages[-1]["role"] == "user"
    found = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
    assert found == render(messages)
    if is_prompt:
        told = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert told["input_ids"] == prompt(messages, OURS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty conversation|no messages|out of range"),  # transformers' own look comes first
        ([{"role": "system", "content": "x"}], "system message alone"),
        ([{"role": "assistant", "content": "x"}], "role assistant, expected user"),
        ([{"role": "user", "content": " \n"}], "a question is empty"),
    ],
)
def test_conversations_that_are_none_are_refused(saved, messages, message):
    with pytest.raises(Exception, match=message):
        saved.apply_chat_template(messages, tokenize=False)
