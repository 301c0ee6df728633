"""Which token is drawn, and what text is certain: distributions, filters, extremes, stop strings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from hrm_model import get_tokenizer
from hrm_model.keyed import TOKEN_STREAM, keyed_uniform
from hrm_model.sampling import N_GPT2_IDS, Sampling, draw
from hrm_model.stops import StoppedText

N = 4000
UNIFORM = [keyed_uniform(7, i, TOKEN_STREAM) for i in range(N)]
JUST_BELOW_1 = 1 - 2**-53
LOGITS = torch.tensor([1.5, -0.3, 0.2, 2.0, -1.0, 0.9, -4.0, 1.1])

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


def drawn(*arguments, **options) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities)."""
    tokens, logprobs = draw(*arguments, **options).tolist()
    assert all(token.is_integer() for token in tokens)
    return [int(token) for token in tokens], logprobs


def counts(logits: torch.Tensor, sampling: Sampling, **options) -> list[int]:
    """How often each token comes in N draws from the same logits."""
    tokens, _ = drawn(logits.expand(N, -1), UNIFORM, sampling, **options)
    return [tokens.count(token) for token in range(len(logits))]


def assert_distributed(found: list[int], probabilities: torch.Tensor) -> None:
    """Pearson's chi-square stays below a bound that the right distribution exceeds once in 10^5 or more seeds; what has
    no probability never comes."""
    p = (probabilities.double() / probabilities.double().sum()).tolist()
    assert all(n == 0 for n, share in zip(found, p, strict=True) if share == 0)
    some = [(n, N * share) for n, share in zip(found, p, strict=True) if share > 0]
    statistic = sum((n - expected) ** 2 / expected for n, expected in some)
    freedom = max(len(some) - 1, 1)
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom) + 12


# -- the distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_come_as_often_as_softmax_says(temperature):
    assert_distributed(counts(LOGITS, Sampling(temperature)), (LOGITS / temperature).softmax(0))


def test_a_wrong_distribution_would_be_seen():
    """The bound is of use: half a temperature more is beyond it."""
    with pytest.raises(AssertionError):
        assert_distributed(counts(LOGITS, Sampling(1.5)), LOGITS.softmax(0))


def test_a_number_falls_on_its_token_among_as_many_as_gpt_2_has():
    """All are alike, so each has 1/50257 of the line. Sums in float32 may be off by a token or two."""
    tokens, logprobs = drawn(torch.zeros(60, 50304), UNIFORM[:60], Sampling())
    assert max(abs(token + 0.5 - u * N_GPT2_IDS) for token, u in zip(tokens, UNIFORM, strict=False)) < 3
    assert logprobs == pytest.approx([-math.log(N_GPT2_IDS)] * 60, abs=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k_draws_from_the_k_likeliest_as_before(k):
    kept = torch.zeros(8).index_fill_(0, LOGITS.topk(k).indices, 1.0)
    assert_distributed(counts(LOGITS, Sampling(top_k=k)), LOGITS.softmax(0) * kept)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_keeps_exactly_k_of_tokens_that_are_alike(k):
    assert sum(n > 0 for n in counts(torch.zeros(8), Sampling(top_k=k))) == k
    assert sum(n > 0 for n in counts(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, -9.0]), Sampling(9.0, top_k=k))) == k


def test_top_p_keeps_the_token_that_crosses_it():
    """Probabilities 0.5, 0.3, 0.15, 0.05 in a mixed order."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    for top_p, kept in (
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 3, 0]),
        (0.96, [0, 1, 2, 3]),
    ):
        mask = torch.zeros(4).index_fill_(0, torch.tensor(kept), 1.0)
        assert_distributed(counts(p.log(), Sampling(top_p=top_p)), p * mask)


def test_min_p_is_a_share_of_the_likeliests_probability():
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    for min_p, kept in ((0.09, [0, 1, 2, 3]), (0.11, [0, 1, 3]), (0.31, [1, 3]), (0.61, [1]), (1.0, [1])):
        mask = torch.zeros(4).index_fill_(0, torch.tensor(kept), 1.0)
        assert_distributed(counts(p.log(), Sampling(min_p=min_p)), p * mask)


def test_min_p_of_one_keeps_all_that_are_likeliest():
    assert_distributed(counts(torch.tensor([1.0, 2.0, 2.0, 0.0]), Sampling(min_p=1.0)), torch.tensor([0, 1.0, 1.0, 0]))


def test_filters_follow_each_other_each_on_what_is_left():
    """Of 0.4, 0.3, 0.2, 0.1 the first three are 4/9, 3/9, 2/9; 0.7 of them is reached by the second."""
    p = torch.tensor([0.3, 0.1, 0.4, 0.2])
    assert_distributed(counts(p.log(), Sampling(top_k=3, top_p=0.7)), p * torch.tensor([1, 0, 1, 0]))
    assert_distributed(counts(p.log(), Sampling(top_k=3, top_p=0.8)), p * torch.tensor([1, 0, 1, 1]))
    assert_distributed(counts(p.log(), Sampling(top_k=3, top_p=0.8, min_p=0.6)), p * torch.tensor([1, 0, 1, 0]))
    assert_distributed(counts(p.log(), Sampling(top_k=3, top_p=0.75)), p * torch.tensor([1, 0, 1, 0]))
    hot = (p.log() / 2).softmax(0)  # temperature first: the two then have less than 0.73 of what is left
    assert_distributed(counts(p.log(), Sampling(2.0, top_k=3, top_p=0.75)), hot * torch.tensor([1, 0, 1, 1]))


def test_forbidden_tokens_leave_their_share_to_the_others():
    forbidden = torch.zeros(N, 8, dtype=torch.bool)
    forbidden[:, [3, 0]] = True
    kept = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1])
    for sampling in (Sampling(), Sampling(top_k=8), Sampling(top_p=0.9999999)):
        assert_distributed(counts(LOGITS, sampling, forbidden=forbidden), LOGITS.softmax(0) * kept)
    assert drawn(LOGITS[None], None, Sampling(0.0), forbidden=forbidden[:1])[0] == [7]


# -- extremes ----------------------------------------------------------------------------------------------------------


# The cases 1e-46 and below and, with a token forbidden, 1e39 and above fail: in float32 the temperature is 0 or
# infinite there, 0 / 0 and inf / inf are nan, and of nan the first token comes, even if it is forbidden.
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-40, 1e-30, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = torch.tensor([[5.0, 7.0, 4.0, 6.5]] * 3)
    forbidden = torch.tensor([[False, True, False, False]] * 3)
    for options in (dict(), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.1)):
        sampling = Sampling(temperature, **options)
        assert drawn(logits, [0.0, 0.5, JUST_BELOW_1], sampling)[0] == [1, 1, 1]
        assert drawn(logits, [0.0, 0.5, JUST_BELOW_1], sampling, forbidden=forbidden)[0] == [3, 3, 3]


@pytest.mark.parametrize("temperature", [1e6, 1e30, 1e39, 1e308])
def test_the_largest_temperatures_are_even(temperature):
    found = counts(LOGITS, Sampling(temperature))
    assert_distributed(found, torch.ones(8))
    forbidden = torch.zeros(N, 8, dtype=torch.bool)
    forbidden[:, 0] = True
    assert_distributed(counts(LOGITS, Sampling(temperature), forbidden=forbidden), torch.tensor([0.0] + [1.0] * 7))


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_large_logits_overflow_nowhere(scale):
    for temperature in (0.0, 1e-3, 1.0, 1e3):
        tokens, logprobs = drawn(torch.tensor([[-scale, 0.0, scale]]), [0.9], Sampling(temperature))
        assert tokens == [2] and logprobs == [0.0]


@pytest.mark.parametrize("uniform", [0.0, 2**-53, 0.5, 1 - 2**-24, JUST_BELOW_1])
def test_a_token_without_probability_never_comes(uniform):
    """At either end of the vocabulary, in the middle, and where a filter took it away."""
    logits = torch.full((1, 9), -math.inf)
    logits[0, [2, 3, 6]] = torch.tensor([1.0, 0.0, 0.5])
    for options in (dict(), dict(top_k=8), dict(top_p=0.99), dict(min_p=0.01), dict(top_k=7, top_p=0.99, min_p=0.01)):
        assert drawn(logits, [uniform], Sampling(**options))[0][0] in (2, 3, 6)
    underflow = torch.tensor([[-200.0, 0.0, 0.0, -200.0]])
    assert drawn(underflow, [uniform], Sampling())[0][0] in (1, 2)


@pytest.mark.parametrize("uniform", [1 - 2**-26, JUST_BELOW_1])
def test_the_last_number_is_no_door_for_an_improbable_token(uniform):
    logits = torch.tensor([[0.0, -60.0], [-60.0, 0.0]])
    assert drawn(logits, [uniform, uniform], Sampling())[0] == [0, 1]


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_token():
    logits = torch.zeros(2, 50)
    assert drawn(logits, [0.0, JUST_BELOW_1], Sampling())[0] == [0, 49]


@quick
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.none() | st.integers(1, 9),
    st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([1.0, 1.3, 5.0]),
    st.floats(0, JUST_BELOW_1),
)
def test_a_draw_is_the_formula_written_out(seed, temperature, top_k, top_p, min_p, penalty, uniform):
    """Token by token in float64, with Python's numbers."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, generator=generator) * 2
    seen, forbidden = (torch.rand(9, generator=generator) < 0.3 for _ in range(2))
    forbidden[seed % 9] = False
    sampling = Sampling(temperature, top_k, top_p, penalty, min_p)
    scores = logits.double().tolist()
    scores = [(s / penalty if s > 0 else s * penalty) if met else s for s, met in zip(scores, seen, strict=True)]
    order = sorted((i for i in range(9) if not forbidden[i]), key=lambda i: -scores[i])
    if temperature == 0:
        allowed = order[:1]
    else:
        order = order[:top_k]
        weight = {i: math.exp((scores[i] - scores[order[0]]) / temperature) for i in order}
        total, reached, allowed = sum(weight.values()), 0.0, []
        for i in order:
            if reached / total < top_p and weight[i] >= min_p:
                allowed.append(i)
            reached += weight[i]
        by_order = top_k is not None or top_p < 1
        allowed = allowed if by_order else sorted(allowed)
        whole, reached, near = sum(weight[i] for i in allowed), 0.0, []
        for i in allowed:  # the one whose share of the line the number falls on, or its neighbour at a border
            if reached / whole - 1e-5 <= uniform <= (reached + weight[i]) / whole + 1e-5:
                near.append(i)
            reached += weight[i]
        allowed = near
    tokens, logprobs = drawn(logits[None], [uniform], sampling, seen[None], forbidden[None])
    assert tokens[0] in allowed
    assert logprobs[0] == pytest.approx(logits.double().log_softmax(0)[tokens[0]].item(), abs=1e-5)


def test_greedy_looks_at_no_number():
    assert drawn(LOGITS[None], None, Sampling(0.0))[0] == [3]


def test_each_row_is_drawn_for_itself():
    """Every row of a batch gets what it gets alone, with its own logits, number, and tokens seen and forbidden."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 12, generator=generator) * 3
    seen, forbidden = (torch.rand(40, 12, generator=generator) < 0.3 for _ in range(2))
    forbidden[:, 4] = False
    for options in (dict(), dict(temperature=0.0), dict(top_k=4, top_p=0.8), dict(min_p=0.2)):
        sampling = Sampling(**{"temperature": 1.3, "repetition_penalty": 1.4, **options})
        tokens, logprobs = drawn(logits, UNIFORM[:40], sampling, seen, forbidden)
        alone = [
            drawn(logits[i : i + 1], UNIFORM[i : i + 1], sampling, seen[i : i + 1], forbidden[i : i + 1])
            for i in range(40)
        ]
        assert tokens == [one[0][0] for one in alone]
        assert logprobs == pytest.approx([one[1][0] for one in alone], abs=1e-6)
        assert not any(forbidden[i, token] for i, token in enumerate(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_dtype_are_drawn_from_in_float32(dtype):
    logits = (LOGITS * 2).to(dtype)
    tokens, logprobs = drawn(logits.expand(50, -1), UNIFORM[:50], Sampling(0.9, top_k=5))
    wide, _ = drawn(logits.float().expand(50, -1), UNIFORM[:50], Sampling(0.9, top_k=5))
    assert tokens == wide
    assert logprobs == pytest.approx(logits.double().log_softmax(0)[tokens].tolist(), abs=1e-5)


# -- penalty, log-probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.01, 1.5, 20.0])
@pytest.mark.parametrize("logit", [3.0, 0.5, 0.0, -0.5, -3.0])
def test_the_penalty_lowers_what_was_seen_whatever_its_sign(logit, penalty):
    """Of nine tokens that are alike one was seen: it comes as often as its lowered logit says."""
    logits = torch.full((9,), logit)
    seen = torch.zeros(N, 9, dtype=torch.bool)
    seen[:, 4] = True
    lowered = logits.clone()
    lowered[4] = logit / penalty if logit > 0 else logit * penalty
    assert lowered[4] <= logits[4] and (logit == 0 or lowered[4] < logits[4])
    assert_distributed(counts(logits, Sampling(repetition_penalty=penalty), seen=seen), lowered.softmax(0))


def test_without_penalty_what_was_seen_counts_for_nothing():
    seen = torch.ones(N, 8, dtype=torch.bool)
    assert counts(LOGITS, Sampling(), seen=seen) == counts(LOGITS, Sampling())


def test_log_probabilities_are_the_models_own():
    """Over the ids that text can have, before penalty, temperature, filters and what is forbidden."""
    logits = torch.randn(6, 50304, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, N_GPT2_IDS:] = 50.0
    seen = torch.ones(6, 50304, dtype=torch.bool)
    forbidden = torch.zeros(6, 50304, dtype=torch.bool)
    forbidden[:, :100] = True
    own = logits[:, :N_GPT2_IDS].double().log_softmax(-1)
    for options in (dict(), dict(temperature=0.0), dict(temperature=9.0, top_k=40), dict(repetition_penalty=2.0)):
        tokens, logprobs = drawn(logits, UNIFORM[:6], Sampling(**options), seen, forbidden)
        assert all(100 <= token < N_GPT2_IDS for token in tokens)
        assert logprobs == pytest.approx([own[i, token].item() for i, token in enumerate(tokens)], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_show_in_their_rows_log_probability(bad, temperature):
    logits = torch.zeros(3, 7)
    logits[1, 4] = bad
    for options in (dict(), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.5)):
        tokens, logprobs = drawn(logits, [0.1, 0.5, 0.9], Sampling(temperature, **options))
        assert [math.isfinite(value) for value in logprobs] == [True, False, True]
        assert all(0 <= token < 7 for token in tokens)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "temperature -0.1 must be finite and at least 0"),
        (dict(temperature=math.nan), "temperature nan must be finite"),
        (dict(temperature=math.inf), "temperature inf must be finite"),
        (dict(temperature=True), "temperature True must be finite"),
        (dict(temperature="1"), "temperature '1' must be finite"),
        (dict(temperature=None), "temperature None must be finite"),
        (dict(top_k=0), "top_k 0 must be an integer of at least 1, or None for all"),
        (dict(top_k=-3), "top_k -3 must be"),
        (dict(top_k=2.0), "top_k 2.0 must be"),
        (dict(top_k=True), "top_k True must be"),
        (dict(top_p=0), r"top_p 0 is outside 0 < top_p <= 1 \(1 keeps all\)"),
        (dict(top_p=-0.5), "top_p -0.5 is outside"),
        (dict(top_p=1.5), "top_p 1.5 is outside"),
        (dict(top_p=math.nan), "top_p nan is outside"),
        (dict(top_p=True), "top_p True is outside"),
        (dict(min_p=-0.1), r"min_p -0.1 is outside 0 <= min_p <= 1 \(0 keeps all\)"),
        (dict(min_p=1.1), "min_p 1.1 is outside"),
        (dict(min_p=math.nan), "min_p nan is outside"),
        (dict(repetition_penalty=0.9), "repetition_penalty 0.9 must be at least 1"),
        (dict(repetition_penalty=math.nan), "repetition_penalty nan must be"),
        (dict(repetition_penalty=math.inf), "repetition_penalty inf must be"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_limit(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Sampling(**options)
    assert "\n" not in str(error.value)


def test_top_k_above_the_vocabulary_is_named_with_the_ids_there_are():
    with pytest.raises(ValueError, match=r"^top_k 50258 is above 50257, the tokens there are"):
        Sampling(top_k=50258).check_vocabulary(50304)
    with pytest.raises(ValueError, match=r"^top_k 41 is above 40"):
        Sampling(top_k=41).check_vocabulary(40)
    Sampling(top_k=50257).check_vocabulary(50304)


# -- stop strings ------------------------------------------------------------------------------------------------------


def say(text: str, *stop: str) -> tuple[str, bool, list[str]]:
    """(text, whether it was stopped, its pieces), token by token."""
    tokenizer = get_tokenizer()
    stopped, pieces = StoppedText(tokenizer, stop), []
    for token in tokenizer.encode(text):
        piece, found = stopped.push(token)
        pieces.append(piece)
        if found:
            return "".join(pieces), True, pieces
    pieces.append(stopped.finish())
    return "".join(pieces), False, pieces


def test_a_stop_string_may_begin_and_end_inside_tokens():
    tokenizer = get_tokenizer()
    for text, stop in (("One two.\n\nHuman: three", "\n\nHuman:"), ("abc def ghi", "c de"), ("under_score", "er_sc")):
        tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert stop not in tokens and any(len(token) > 1 for token in tokens)
        assert say(text, stop)[:2] == (text[: text.index(stop)], True)


def test_the_end_of_a_longer_word_is_no_stop_string():
    text = "The USA: a country.\nIn the USA: large.\n\nUSA: end"
    assert say(text, "\n\nA:", "\n\nHuman:")[:2] == (text, False)
    assert say(text + "\n\nA: yes", "\n\nA:")[:2] == (text, True)


def test_of_several_stop_strings_the_earliest_counts():
    assert say("one two three", "three", "two", "wo t")[0] == "one "
    assert say("one two three", "e two", "one two")[0] == ""


def test_a_beginning_that_comes_to_nothing_is_given_back():
    text, found, pieces = say("a b c d e\n\nHum", "\n\nHuman:")
    assert (text, found) == ("a b c d e\n\nHum", False)
    assert "Hum" in pieces[-1], "held back until no more tokens came"
    assert say("\n\n\nHuman: x", "\n\nHuman:")[:2] == ("\n", True)
    assert say("aaab", "aab")[:2] == ("a", True)


def test_a_character_of_several_tokens_comes_whole():
    text = "é 👍🏽 日本語 🤖 ok"
    tokenizer = get_tokenizer()
    assert len(tokenizer.encode(text)) > len(text)
    whole, _, pieces = say(text, "\n\n")
    assert whole == text and not any("\ufffd" in piece for piece in pieces)
    assert say(text, "本")[:2] == ("é 👍🏽 日", True)


def test_what_never_becomes_a_character_is_a_replacement_at_the_end():
    tokenizer = get_tokenizer()
    stopped, (first, *_) = StoppedText(tokenizer, ()), tokenizer.encode("👍")
    assert stopped.push(first) == ("", False)
    assert stopped.finish() == "\ufffd"


def test_before_it_may_stop_a_stop_string_is_text_and_a_begun_one_is_not():
    tokenizer = get_tokenizer()
    stopped = StoppedText(tokenizer, ["END"])
    pieces = [stopped.push(token, may_stop=False)[0] for token in tokenizer.encode("an END, and an EN")]
    assert "".join(pieces) == "an END, and an "
    assert stopped.push(tokenizer.encode("D")[0]) == ("", True)


LETTERS = st.text(st.sampled_from("ab\n: Aé👍"), max_size=24)


@quick
@given(LETTERS, st.lists(st.text(st.sampled_from("ab\n: Aé👍"), min_size=1, max_size=4), max_size=3), st.data())
@example("aab", ["ab", "aab"], None)
def test_text_is_all_before_the_stop_string_and_no_more_is_held_back_than_might_begin_one(text, stop, data):
    """Whatever the text, its stop strings and its division into tokens."""
    tokenizer, ids = get_tokenizer(), []
    at = 0
    while at < len(text):
        size = 1 if data is None else data.draw(st.integers(1, 4))
        ids += tokenizer.encode(text[at : at + size])
        at += size
    stopped, given_out = StoppedText(tokenizer, stop), ""
    for i, token in enumerate(ids):
        piece, found = stopped.push(token)
        given_out += piece
        whole = tokenizer.decode_bytes(ids[: i + 1]).decode("utf-8", errors="ignore")  # unfinished characters left out
        begin = min((whole.index(s) for s in stop if s in whole), default=None)
        assert found == (begin is not None)
        if found:
            assert given_out == whole[:begin]
            return
        ends = [n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])]
        assert given_out == whole[: len(whole) - max(ends, default=0)]
    assert given_out + stopped.finish() == text
