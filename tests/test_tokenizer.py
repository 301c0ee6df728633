"""GPT-2 ids, their text, and what happens to text and ids that are out of the ordinary."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from hrm_model.tokenizer import RANKS_FILE, IncrementalDecoder, Tokenizer, get_tokenizer, read_ranks

ROOT = Path(__file__).resolve().parents[1]
# As in the GPT-2 release; ours is written differently for the engine's sake.
RELEASED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world", [31373, 995]),
        ("Hello, world!", [15496, 11, 995, 0]),
        ("The quick brown fox jumps over the lazy dog",
         [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
        ("\n", [198]),
        ("\n\n", [628]),
        ("", []),
    ],
)  # fmt: skip
def test_ids_are_those_of_gpt2(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_ids_equal_those_of_the_released_pattern_on_random_text(tokenizer):
    released = tiktoken.Encoding(
        "released", pat_str=RELEASED_PATTERN, mergeable_ranks=read_ranks(RANKS_FILE), special_tokens={}
    )
    draw = random.Random(0)
    alphabet = "abÉ 1'\n\t\r \u3000\x85\xa0\x1c\u200b.=é😀 \n'stll"
    for _ in range(20_000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(20)))
        assert tokenizer.encode(text) == released.encode_ordinary(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧‍👦 flags 🇦🇷🇯🇵, 漢字, عربى, हिन्दी, e\u0301",
        "   leading,\t\ttabs \r\n\r\n  and trailing   \n",
        "def f(x):\n    if x:\n        return {'a': [1, 2], \"b\": x ** 2}  # done\n",
        "\x00\x01\x7f\u2028\ufeff",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_end_of_text_in_a_users_text_is_text_unless_asked_for(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert tokenizer.encode_batch(["<|endoftext|>"], allow_special=True) == [[50256]]
    assert (tokenizer.eot, tokenizer.n_vocab, tokenizer.name) == (50256, 50257, "gpt2")


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_white_space_longer_than_the_regex_engine_can_bear(tokenizer):
    text = "x" + "\n" * 1_200_000 + "y" + " " * 1_100_000 + "z"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1:] == tokenizer.encode(" z")


def test_a_batch_is_encoded_like_its_texts(tokenizer):
    texts = ["one", "", "two\n\nthree", "<|endoftext|>", "\udfff"] * 20
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("wrong", [50257, 50303, -1])
def test_an_id_that_is_no_token_is_named_with_the_limit(tokenizer, wrong):
    with pytest.raises(ValueError, match=rf"id {wrong} is outside 0\.\.50256"):
        tokenizer.decode([31373, wrong, 995])
    with pytest.raises(ValueError, match=rf"id {wrong} is outside 0\.\.50256"):
        IncrementalDecoder(tokenizer).push(wrong)


def test_ids_may_be_numpy_integers_but_not_floats(tokenizer):
    assert tokenizer.decode(np.array([31373, 995], dtype=np.uint16)) == "hello world"
    assert tokenizer.decode([50256]) == "<|endoftext|>"
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


def test_invalid_utf8_is_replaced_not_raised(tokenizer):
    half = tokenizer.encode("😀")[:1]
    assert tokenizer.decode(half) == "\ufffd"


def test_token_bytes_add_up_to_the_length_of_the_text(tokenizer):
    lengths = tokenizer.token_bytes()
    text = RANKS_FILE.read_text()[:20_000] + "é漢😀\n  \n"
    assert lengths.shape == (50257,)
    assert np.issubdtype(lengths.dtype, np.integer)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[:-1].min() == 1
    assert lengths[tokenizer.eot] == 0


def test_incremental_text_joins_to_the_decoded_text(tokenizer):
    draw = random.Random(0)
    beyond_ascii = [i for i in range(50256) if max(tokenizer.decode_bytes([i])) > 127]
    decoder = IncrementalDecoder(tokenizer)
    for _ in range(5_000):
        ids = [
            draw.choice(beyond_ascii) if draw.random() < 0.9 else draw.randrange(50257)
            for _ in range(draw.randrange(12))
        ]
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == tokenizer.decode(ids), ids


def test_incremental_text_never_splits_a_character(tokenizer):
    text = "naïve 😀👍🏽 漢字"
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert "" in parts  # some ids hold no complete character
    assert decoder.finish() == ""


def test_a_missing_or_damaged_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tiktoken is missing; restore"):
        Tokenizer(tmp_path / "gone.tiktoken")
    data = RANKS_FILE.read_bytes()
    (tmp_path / "bad.tiktoken").write_bytes(data[:-2] + b"9\n")
    with pytest.raises(ValueError, match=r"bad\.tiktoken .* sha256 [0-9a-f]{64}, expected 306cd27f.*restore"):
        Tokenizer(tmp_path / "bad.tiktoken")


def test_the_tokenizer_and_the_data_tools_start_without_torch():
    code = "import sys, hrm_model.tokenizer, hrm_model.training.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
