"""Sampling: greedy and random, filters, stops, rows apart from each other, bad options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from small_models import S, speaker, thinker

from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer
from hrm_model.cache import HRMCache
from hrm_model.generate import Event, Generated, generate, stream
from hrm_model.sampling import N_GPT2_IDS, Sampling, draw

SHAPE = dict(vocab_size=50, n_embd=16, block_size=8, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=3)


@pytest.fixture(scope="module")
def model() -> HRMForCausalLM:
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0 if p.dim() > 1 else 1.0)
    return model


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_greedy_takes_the_likeliest_token_of_the_whole_window(model):
    """Twelve tokens with block_size 8: from the ninth on, the window is the last eight."""
    row = [3, 7, 11]
    out = model.generate(ids(row), 9, temperature=0).tolist()[0]
    for _ in range(9):
        row.append(int(model.eval()(ids(row[-8:])).logits[0, -1].argmax()))
    assert out == row


def test_what_a_row_says_does_not_depend_on_its_neighbours(model):
    prompts = torch.tensor([[3, 7, 11], [5, 2, 0]])
    both = model.generate(prompts, 6, temperature=1.0, seed=4, lengths=[3, 2]).tolist()
    alone = model.generate(prompts[:1], 6, temperature=1.0, seed=4).tolist()
    assert both[0] == alone[0]
    assert both[1][:2] == [5, 2] and len(both[1]) == len(both[0])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="products depend on the number of rows")
def test_a_rows_bits_do_not_depend_on_its_batch(monkeypatch):
    """In float32, whatever the others' lengths, with prompts of several passes."""
    monkeypatch.setattr("hrm_model.rows.READ_AT_ONCE", 8)
    model = thinker(dtype=torch.float32, vocab_size=50304)
    prompts = [[n, *range(n, n + size)] for n, size in ((5, 1), (90, 20), (40, 7), (700, 9))]
    events = list(stream(model, prompts, 9, seed=[3] * 4, sampling=Sampling(0.9)))
    for number, ids in enumerate(prompts):
        together = [(e.token, e.logprob, e.steps) for e in events if e.row == number]
        assert together == [
            (e.token, e.logprob, e.steps) for e in stream(model, [ids], 9, seed=3, sampling=Sampling(0.9))
        ]


def test_a_seed_repeats_and_another_does_not(model):
    draw = [model.generate(ids([1, 2]), 20, temperature=2.0, seed=s).tolist() for s in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model):
    greedy = model.generate(ids([4, 9]), 8, temperature=0).tolist()
    assert model.generate(ids([4, 9]), 8, temperature=5.0, top_k=1).tolist() == greedy
    assert model.generate(ids([4, 9]), 8, temperature=5.0, top_p=1e-9).tolist() == greedy


def test_top_k_draws_only_from_the_k_likeliest(model):
    best = set(model.eval()(ids([4, 9])).logits[0, -1].topk(3).indices.tolist())
    drawn = {model.generate(ids([4, 9]), 1, temperature=50.0, top_k=3, seed=s)[0, -1].item() for s in range(60)}
    assert drawn == best


def test_repetition_penalty_always_lowers_a_seen_token():
    for sign in (1.0, -1.0):
        logits = torch.full((1, 5), sign * 2.0)
        logits[0, 2] += 0.1
        seen = torch.tensor([[False, False, True, False, False]])
        assert draw(logits, None, Sampling(0.0), seen)[0].item() == 2
        assert draw(logits, None, Sampling(0.0, repetition_penalty=2.0), seen)[0].item() != 2


def test_a_stop_token_ends_its_row_only(model):
    free = model.generate(ids([1, 2], [3, 4]), 12, temperature=1.5, seed=1, stop_tokens=None).tolist()
    stop = next(t for t in free[0][3:8] if t not in free[1])
    end = free[0].index(stop, 2)
    out = model.generate(ids([1, 2], [3, 4]), 12, temperature=1.5, seed=1, stop_tokens=stop).tolist()
    assert out[0][: end + 1] == free[0][: end + 1] and set(out[0][end + 1 :]) <= {50256}
    assert out[1] == free[1]


def test_each_row_keeps_its_own_forced_depth_when_another_ends(model):
    prompts = ids([1, 2], [3, 4], [5, 6])
    free = model.generate(prompts, 8, temperature=1.5, seed=1, force_steps=[1, 2, 3], stop_tokens=None).tolist()
    stop = free[0][2]
    out = model.generate(prompts, 8, temperature=1.5, seed=1, force_steps=[1, 2, 3], stop_tokens=stop).tolist()
    assert out[0][:3] == free[0][:3]
    for row in (1, 2):
        end = free[row].index(stop, 2) + 1 if stop in free[row][2:] else None
        assert out[row][:end] == free[row][:end]


@pytest.mark.parametrize("prompt", [torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3), torch.zeros(0, 2)])
def test_a_prompt_without_tokens_is_named(model, prompt):
    with pytest.raises(ValueError, match=r"ids must be \[B, T\] int64 with at least one token"):
        model.generate(prompt, 1)


def test_ids_that_no_text_has_are_never_drawn():
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**{**SHAPE, "vocab_size": 50304}))
    with torch.no_grad():
        model.wte.weight[N_GPT2_IDS:] *= 100.0
    out = model.generate(ids([1, 2]), 4, temperature=0)
    assert out.max() < N_GPT2_IDS


def test_training_mode_is_restored(model):
    model.train()
    model.generate(ids([1]), 1)
    assert model.training
    model.eval()


def test_no_new_tokens_gives_the_prompt_back(model):
    assert model.generate(ids([1, 2]), 0).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature -1.0 must be finite and at least 0"),
        (dict(temperature=float("inf")), "temperature inf"),
        (dict(top_k=0), "top_k 0 must be an integer of at least 1"),
        (dict(top_p=0.0), "top_p 0.0 is outside"),
        (dict(top_p=1.5), "top_p 1.5 is outside"),
        (dict(repetition_penalty=0.5), "repetition_penalty 0.5 must be at least 1"),
        (dict(lengths=[3]), r"lengths \[3\] must be 1 numbers in 1\.\.2"),
        (dict(max_new_tokens=-1), "max_new_tokens -1 must be an integer of at least 0"),
        (dict(force_steps=9), "force_steps 9 is outside 1..3"),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids([1, 2]), **{"max_new_tokens": 1, **options})


# -- with a cache and without ------------------------------------------------------------------------------------------

PROMPTS = [[3, 14, 15, 9, 26], [5], [35, 8, 9, 7, 9, 3, 2, 38, 46]]


def generated(model: HRMForCausalLM, prompts: Sequence[Sequence[int]], n: int, **options) -> Generated:
    longest = max(map(len, prompts))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts])
    return generate(model, padded, n, lengths=[len(row) for row in prompts], details=True, **options)


def assert_same(a: Generated, b: Generated) -> None:
    for name in ("tokens", "texts", "executed_steps", "finish", "recomputed"):
        assert getattr(a, name) == getattr(b, name), name
    assert torch.equal(a.ids, b.ids)
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert x == pytest.approx(y, abs=1e-5)


def with_and_without(model: HRMForCausalLM, prompts: Sequence[Sequence[int]], n: int, **options) -> Generated:
    """With a cache, held to a forward pass over every window."""
    found = generated(model, prompts, n, **options)
    assert_same(found, generated(model, prompts, n, use_cache=False, **options))
    return found


def depths_move(found: Generated) -> bool:
    """Whether a row went deeper, and one less deep, from one token to the next."""
    pairs = [pair for row in found.executed_steps for pair in pairwise(row)]
    return any(a < b for a, b in pairs) and any(a > b for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.0),
        dict(temperature=1.0, seed=3),
        dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=[5, 6, 5]),
        dict(temperature=0.0, repetition_penalty=1.2, halt_bias=0.2),
        dict(temperature=2.0, seed=2, max_steps=3),
        dict(temperature=2.0, seed=4, max_steps=S + 2, halt_bias=-0.2),
    ],
    ids=["greedy", "sampled", "filtered", "penalty", "few steps", "more steps than usual"],
)
def test_a_cache_changes_no_token_and_no_log_probability(options):
    found = with_and_without(thinker(3, torch.float32), PROMPTS, 20, **options)
    assert depths_move(found) and not any(found.recomputed)
    assert found.finish == ["length"] * 3


def test_log_probabilities_are_those_of_the_model_for_the_row_so_far():
    """Of all 61 ids, whatever penalty, temperature and filters did to the draw."""
    model = thinker(3, torch.float32)
    found = generated(model, PROMPTS, 8, temperature=2.0, top_k=30, repetition_penalty=1.5)
    for prompt, tokens, logprobs in zip(PROMPTS, found.tokens, found.logprobs, strict=True):
        for i, token in enumerate(tokens):
            with torch.no_grad():
                own = model(ids(prompt + tokens[:i])).logits[0, -1].double().log_softmax(0)
            assert logprobs[i] == pytest.approx(own[token].item(), abs=1e-5)


def test_the_penalty_lowers_tokens_of_the_prompt_and_those_drawn_since():
    """Written out, greedy, token by token. What has left the window counts on."""
    model, penalty = thinker(3, torch.float32, block_size=12), 2.5
    found = with_and_without(model, PROMPTS, 16, temperature=0.0, repetition_penalty=penalty)
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        for i, token in enumerate(tokens):
            row = prompt + tokens[:i]
            with torch.no_grad():
                scores = model(ids(row[-12:])).logits[0, -1].tolist()
            for seen in set(row):
                scores[seen] = scores[seen] / penalty if scores[seen] > 0 else scores[seen] * penalty
            assert token == max(range(61), key=scores.__getitem__)
    unpunished = generated(model, PROMPTS, 16, temperature=0.0)
    assert sum(len(set(row)) for row in found.tokens) > sum(len(set(row)) for row in unpunished.tokens) + 6


def test_padded_vocabulary_ids_are_never_drawn_and_have_no_probability():
    """However likely: they stand 40 nats above the others."""
    model = speaker([1, 2, 3])
    with torch.no_grad():
        model.lm_head.weight[N_GPT2_IDS:] = 70.0 / model.config.n_embd**0.5
    for options in (dict(temperature=0.0), dict(temperature=1.0), dict(temperature=30.0), dict(top_k=2)):
        for use_cache in (True, False):
            found = generated(model, [[0]], 3, use_cache=use_cache, **options)
            assert max(found.tokens[0]) < N_GPT2_IDS
    assert generated(model, [[0]], 3, temperature=0.0).logprobs[0] == pytest.approx([0.0] * 3, abs=1e-5)
    with pytest.raises(ValueError, match=r"token id 50257 is outside 0\.\.50256"):
        get_tokenizer().decode([11, N_GPT2_IDS])


def test_a_bfloat16_model_generates():
    """To the cache and to whole windows rounding is another, so that tokens part; at the start they agree."""
    model = thinker(3, torch.bfloat16)
    cached, plain = (generated(model, PROMPTS, 12, temperature=0.0, use_cache=u, force_steps=2) for u in (True, False))
    for a, b in zip(cached.logprobs, plain.logprobs, strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.05) and len(a) == len(b) == 12
    assert [row[0] for row in cached.tokens] == [row[0] for row in plain.tokens]


def test_generation_under_autocast_makes_its_own_cache():
    model = thinker(3, torch.float32)
    exact = generated(model, PROMPTS, 1, temperature=0.0, force_steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        for use_cache in (True, False):
            found = generated(model, PROMPTS, 6, temperature=0.0, force_steps=3, use_cache=use_cache)
            assert [len(row) for row in found.tokens] == [6] * 3
            for a, b in zip(found.logprobs, exact.logprobs, strict=True):
                assert a[0] == pytest.approx(b[0], abs=0.1)


# -- rows that come and go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
def test_fewer_places_than_prompts_change_nothing(use_cache):
    """Rows end at different tokens, and others take their places, which hold what was there before."""
    model = thinker(3, torch.float32)
    prompts = [[*PROMPTS[i % 3][: 1 + 2 * i], i] for i in range(7)]
    options = dict(temperature=5.0, seed=list(range(7)), stop_tokens=list(range(0, 61, 7)), use_cache=use_cache)
    at_once = generated(model, prompts, 14, **options)
    assert len({len(row) for row in at_once.tokens}) >= 4, "they end at different tokens"
    assert set(at_once.finish) == {"stop_token", "length"}
    for size in (1, 2, 3):
        assert_same(generated(model, prompts, 14, batch_size=size, **options), at_once)
    for number, prompt in enumerate(prompts):
        alone = generated(model, [prompt], 14, **options | dict(seed=number))
        assert alone.tokens == at_once.tokens[number : number + 1]
        assert alone.logprobs[0] == pytest.approx(at_once.logprobs[number], abs=1e-5)


def test_one_seed_gives_each_row_draws_of_its_own_and_seeds_in_a_list_are_the_rows():
    model = thinker(3, torch.float32)
    alike = [[1, 2, 3]] * 3
    of_one = generated(model, alike, 10, temperature=2.0, seed=7).tokens
    assert of_one[0] != of_one[1] != of_one[2] != of_one[0]
    of_many = generated(model, alike, 10, temperature=2.0, seed=[7, 8, 7]).tokens
    assert of_many[0] == of_many[2] != of_many[1]


def per_token(model: HRMForCausalLM, steps: int) -> int:
    """Block applications for one token at one depth."""
    config = model.config
    return config.n_input_layers + steps * config.blocks_per_step + config.n_output_layers


def test_prompts_that_are_alike_are_run_once():
    """Of each copy only the last token is run again: its logits are what is wanted."""
    model, prompt = thinker(3, torch.float32), list(range(12))
    found = with_and_without(model, [prompt] * 4, 1, force_steps=2, temperature=20.0)
    assert found.work.total == (12 + 3) * per_token(model, 2)
    assert len({row[0] for row in found.tokens}) > 1
    begin = with_and_without(model, [[*prompt, 20], [*prompt, 21, 22], [*prompt[:11], 23]], 1, force_steps=2)
    assert begin.work.total == (13 + 2 + 1) * per_token(model, 2)
    apart = with_and_without(model, [[*prompt[:7], 20], [*prompt[:7], 21]], 1, force_steps=2)
    assert apart.work.total == 16 * per_token(model, 2), "too little in common to be worth a copy"


def test_a_row_that_comes_later_takes_what_it_has_in_common_with_any_place():
    model, prompt = thinker(3, torch.float32), list(range(12))
    prompts = [[*prompt, 30], [40, 41], [*prompt, 50], [40, 42]]
    found = generated(model, prompts, 1, batch_size=2, force_steps=2)
    assert found.work.total == (13 + 2 + 1 + 1) * per_token(model, 2)
    assert_same(found, generated(model, prompts, 1, force_steps=2, use_cache=False))


def test_a_given_cache_is_used_again():
    """A conversation: each prompt begins with all that was said, and only what is new is run."""
    model = thinker(3, torch.float32)
    cache, said, cost = HRMCache(model, rows=2), list(range(6)), 0
    for turn in range(3):
        found = generated(model, [said], 4, temperature=1.0, seed=turn, force_steps=3, cache=cache)
        assert_same(found, generated(model, [said], 4, temperature=1.0, seed=turn, force_steps=3, use_cache=False))
        # the last token drawn was not read yet
        n_new = len(said) + 3 if turn == 0 else 1 + 2 + 3
        assert cache.work.total - cost == n_new * per_token(model, 3)
        cost = cache.work.total
        said = [*said, *found.tokens[0], 50 + turn, 40 + turn]
    again = said[:9]
    generated(model, [again], 1, force_steps=3, cache=cache)
    assert cache.work.total - cost == per_token(model, 3), "an earlier place in the same text: its last token alone"


def test_an_empty_place_is_taken_before_one_that_holds_another_text():
    model = thinker(3, torch.float32)
    cache = HRMCache(model, rows=2)
    for prompt in (list(range(9)), list(range(30, 40))):
        generated(model, [prompt], 1, force_steps=2, cache=cache)
    assert sorted([cache.ids(0)[:1], cache.ids(1)[:1]]) == [[0], [30]]


def test_a_given_cache_may_have_served_deeper_and_longer_rows():
    model = thinker(3, torch.float32)
    cache = HRMCache(model, rows=2)
    generated(model, [list(range(30)), list(range(20))], 2, force_steps=S, cache=cache)
    for options in (dict(halt_bias=0.3), dict(force_steps=1), dict(), dict(max_steps=2)):
        prompts = [list(range(8)), [*range(10), 3, 1]]
        found = generated(model, prompts, 9, temperature=1.0, cache=cache, **options)
        assert_same(found, generated(model, prompts, 9, temperature=1.0, use_cache=False, **options))


# -- the window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_oldest", [1, 4, 11])
def test_a_full_window_drops_the_oldest_tokens(drop_oldest):
    """Prompts below, at and above block_size 12; the window is written out here, token by token."""
    model = thinker(3, torch.float32, block_size=12)
    prompts = [list(range(7)), list(range(20, 32)), list(range(10, 40))]
    found = with_and_without(model, prompts, 16, temperature=0.0, drop_oldest=drop_oldest)
    for prompt, tokens, steps, recomputed in zip(
        prompts, found.tokens, found.executed_steps, found.recomputed, strict=True
    ):
        window, dropped = prompt[-12:], int(len(prompt) > 12)
        for token, executed in zip(tokens, steps, strict=True):
            if len(window) > 12:
                window, dropped = window[drop_oldest:], dropped + 1
            with torch.no_grad():
                out = model(ids(window))
            assert (int(out.logits[0, -1].argmax()), out.executed_steps.item()) == (token, executed)
            window = [*window, token]
        assert recomputed == dropped > 0


def test_an_event_says_that_its_window_was_cut():
    model = thinker(3, torch.float32, block_size=12)
    events = list(stream(model, [list(range(10))], 7, drop_oldest=2))
    assert [event.recomputed for event in events] == [False, False, False, True, False, True, False]
    events = list(stream(model, [list(range(15))], 3))
    assert [event.recomputed for event in events] == [True, True, True]


def test_a_small_cache_is_a_small_window():
    model = thinker(3, torch.float32)
    found = generated(model, [list(range(20))], 5, temperature=0.0, cache=HRMCache(model, positions=12))
    narrow = thinker(3, torch.float32, block_size=12)
    assert_same(found, generated(narrow, [list(range(20))], 5, temperature=0.0))


def test_more_tokens_may_be_dropped_than_a_short_text_has():
    model = thinker(3, torch.float32)
    plain = generated(model, [[1, 2, 3]], 2, drop_oldest=8, use_cache=False)
    assert_same(generated(model, [[1, 2, 3]], 2, drop_oldest=8), plain)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
@pytest.mark.parametrize("drop_oldest", [1, 2])
def test_a_window_of_one_token_is_the_newest(drop_oldest, use_cache):
    model = thinker(3, torch.float32, block_size=1)
    if drop_oldest > 1:
        with pytest.raises(ValueError, match="drop_oldest 2 must be below the window of 1"):
            generated(model, [[4]], 3, drop_oldest=drop_oldest, use_cache=use_cache)
    else:
        found = generated(model, [[4]], 3, temperature=0.0, use_cache=use_cache)
        assert found.recomputed == [2] and len(found.tokens[0]) == 3


# -- depth -------------------------------------------------------------------------------------------------------------


def test_a_depth_that_is_kept_is_that_of_the_prompt():
    """The numbers of forcing it, and nothing is run twice: no token needs a step that those before it lack."""
    model = thinker(3, torch.float32)
    options = dict(temperature=1.5, seed=2)
    found = with_and_without(model, PROMPTS, 15, depth_update="turn", **options)
    first = [row[0] for row in found.executed_steps]
    assert found.executed_steps == [[depth] * 15 for depth in first] and len(set(first)) > 1
    assert depths_move(generated(model, PROMPTS, 15, **options)), "which else it would not be"
    forced = generated(model, PROMPTS, 15, force_steps=first, **options)
    assert_same(found, forced)
    assert (
        found.work.total
        == forced.work.total
        == sum((len(prompt) + 14) * per_token(model, depth) for prompt, depth in zip(PROMPTS, first, strict=True))
    )


@pytest.mark.parametrize(
    ("force_steps", "expected"),
    [
        (2, [[2] * 6] * 3),
        ([1, 3, 5], [[1] * 6, [3] * 6, [5] * 6]),
        ([[1, 4], [2], [5, 1, 3, 3, 1, 5, 5, 5]], [[1, 4, 4, 4, 4, 4], [2] * 6, [5, 1, 3, 3, 1, 5]]),
        (torch.tensor([1, 3, 5]), [[1] * 6, [3] * 6, [5] * 6]),
        ([(1, 2), (2, 1), (3,)], [[1, 2, 2, 2, 2, 2], [2, 1, 1, 1, 1, 1], [3] * 6]),
    ],
    ids=["one", "a row", "a token", "tensor", "tuples"],
)
def test_forced_depth_for_all_for_each_row_or_for_each_token(force_steps, expected):
    found = with_and_without(thinker(3, torch.float32), PROMPTS, 6, force_steps=force_steps)
    assert found.executed_steps == expected


def test_a_zero_among_forced_depths_lets_the_head_decide():
    model = thinker(3, torch.float32)
    free = generated(model, PROMPTS, 8, temperature=0.0)
    some = with_and_without(model, PROMPTS, 8, temperature=0.0, force_steps=[0, 4, 0])
    assert some.tokens[0] == free.tokens[0] and some.executed_steps[2] == free.executed_steps[2]
    assert some.executed_steps[1] == [4] * 8
    back = with_and_without(model, PROMPTS[:1], 8, temperature=0.0, force_steps=[[1, 5, 0]])
    assert back.executed_steps[0][:2] == [1, 5] and len(set(back.executed_steps[0][2:])) > 1


# -- text and stops ----------------------------------------------------------------------------------------------------

TEXT = "The USA: large. Grüße 👍🏽 日本!\n\nHuman: and now"


def said(text: str) -> HRMForCausalLM:
    return speaker(get_tokenizer().encode(text))


def by_row(events: Sequence[Event], n_rows: int) -> list[list[Event]]:
    return [[event for event in events if event.row == row] for row in range(n_rows)]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
def test_text_ends_before_a_stop_string_that_tokens_cut_anywhere(use_cache):
    tokens = get_tokenizer().encode(TEXT)
    for stop in ("\n\nHuman:", "\nHum", "n: a", "!\n"):
        found = generated(said(TEXT), [[0]], 60, temperature=0.0, stop=stop, use_cache=use_cache)
        assert found.texts == [TEXT[: TEXT.index(stop)]] and found.finish == ["stop"]
        n = len(found.tokens[0])
        assert found.tokens[0] == tokens[:n]
        assert stop in get_tokenizer().decode(tokens[:n]) and stop not in get_tokenizer().decode(tokens[: n - 1])
        assert found.ids.tolist() == [[0, *found.tokens[0]]]


def test_the_end_of_usa_does_not_stop_at_a_turns_label():
    stop = ["\n\nA:", "\n\nHuman:", "\nA:"]
    found = generated(said(TEXT), [[0]], 60, temperature=0.0, stop=stop)
    assert found.texts == ["The USA: large. Grüße 👍🏽 日本!"] and found.finish == ["stop"]


def test_pieces_of_a_stream_are_whole_characters_and_no_beginning_of_a_stop_string():
    model, stop = said(TEXT), "\n\nHuman:"
    pieces = [event.text for event in stream(model, [[0]], 60, sampling=Sampling(0.0), stop=stop)]
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]
    assert not any("\ufffd" in piece or "\n" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces) >= 5, "some wait: for the rest of a character, of a stop string"


def test_what_was_held_back_comes_with_the_last_token():
    tokens = get_tokenizer().encode(TEXT)
    cut = tokens.index(get_tokenizer().encode("Human")[0])
    whole = get_tokenizer().decode(tokens[:cut])
    assert whole.endswith("\n\n")
    events = list(stream(said(TEXT), [[0]], cut, sampling=Sampling(0.0), stop="\n\nHuman:"))
    assert [event.finish for event in events] == [None] * (cut - 1) + ["length"]
    assert "".join(event.text for event in events) == whole and events[-1].text.endswith("\n\n")
    half = next(n for n in range(len(tokens)) if get_tokenizer().decode(tokens[:n]).endswith("\ufffd"))
    assert generated(said(TEXT), [[0]], half, temperature=0.0).texts[0].endswith("\ufffd")


def test_a_stream_has_what_the_result_has():
    model = thinker(3, torch.float32)
    options = dict(min_new_tokens=2, stop_tokens=list(range(0, 61, 6)), seed=[1, 2, 3], batch_size=2)
    whole = generated(model, PROMPTS, 12, temperature=5.0, **options)
    events = list(stream(model, PROMPTS, 12, sampling=Sampling(5.0), **options))
    rows = by_row(events, 3)
    assert [[event.token for event in row] for row in rows] == whole.tokens
    assert ["".join(event.text for event in row) for row in rows] == whole.texts
    assert [[event.logprob for event in row] for row in rows] == whole.logprobs
    assert [[event.steps for event in row] for row in rows] == whole.executed_steps
    assert [row[-1].finish for row in rows] == whole.finish
    assert not any(event.finish for row in rows for event in row[:-1])
    assert set(whole.finish) == {"stop_token", "length"}
    assert min(i for i, event in enumerate(events) if event.row == 2) > min(len(rows[0]), len(rows[1]))
    longest = max(len(p) + len(t) for p, t in zip(PROMPTS, whole.tokens, strict=True))
    for ids_of_row, prompt, tokens in zip(whole.ids.tolist(), PROMPTS, whole.tokens, strict=True):
        assert ids_of_row == [*prompt, *tokens, *[50256] * (longest - len(prompt) - len(tokens))]


def test_several_stop_tokens_and_what_their_row_says():
    tokenizer = get_tokenizer()
    tokens = tokenizer.encode("one two three four")
    for stops in ([tokens[2], tokens[3]], [tokens[3], tokens[2], 17], tokens[2]):
        found = generated(said("one two three four"), [[0]], 9, temperature=0.0, stop_tokens=stops)
        assert found.tokens == [tokens[:3]] and found.finish == ["stop_token"]
        assert found.texts == ["one two"], "the stop token is no text"
    assert generated(said("one two three four"), [[0]], 4, stop_tokens=None, temperature=0.0).tokens == [tokens]


def test_before_the_fewest_tokens_no_stop_token_is_drawn():
    """Greedy, the next likeliest comes instead, here another token of a text that says something else."""
    tokens = get_tokenizer().encode("one two three four five")
    model = said("one two three four five")
    with torch.no_grad():
        model.lm_head.weight[11, 1] = 20.0 / model.config.n_embd**0.5
    options = dict(temperature=0.0, stop_tokens=[tokens[1], tokens[3]])
    assert generated(model, [[0]], 5, **options).tokens == [tokens[:2]]
    found = with_and_without(model, [[0]], 5, min_new_tokens=2, **options)
    assert found.tokens == [[tokens[0], 11, tokens[2], tokens[3]]] and found.finish == ["stop_token"]
    assert found.logprobs[0][1] == pytest.approx(-10.0, abs=0.1), "under the model itself, which would have stopped"


def test_each_row_counts_its_own_fewest_tokens():
    """A row that comes when others are further along may not stop before it has its own."""
    model = thinker(3, torch.float32)
    stops = list(range(0, 61, 2))
    options = dict(temperature=1.5, stop_tokens=stops, min_new_tokens=4, seed=list(range(6)))
    found = generated(model, PROMPTS * 2, 12, batch_size=2, **options)
    assert_same(found, generated(model, PROMPTS * 2, 12, **options))
    for tokens in found.tokens:
        assert len(tokens) > 4 and not set(tokens[:4]) & set(stops)
    assert set(found.finish) >= {"stop_token"}


def test_before_the_fewest_tokens_a_stop_string_is_text():
    text = "a stop b stop c stop d"
    tokens = get_tokenizer().encode(text)
    for fewest, expected in ((0, "a "), (2, "a "), (3, "a stop b "), (4, "a stop b "), (5, "a stop b stop c ")):
        found = generated(said(text), [[0]], 9, temperature=0.0, stop="stop", min_new_tokens=fewest)
        assert (found.texts, found.finish) == ([expected], ["stop"]), fewest
        assert len(found.tokens[0]) >= max(fewest, 2) and found.tokens[0] == tokens[: len(found.tokens[0])]


def test_a_small_vocabulary_has_no_end_of_text_to_forbid():
    model = thinker(3, torch.float32)
    found = generated(model, PROMPTS, 4, temperature=1.0, min_new_tokens=2)
    assert_same(found, generated(model, PROMPTS, 4, temperature=1.0))


# -- leaving early, damage, several at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
def test_leaving_a_stream_early_restores_training_mode_and_leaves_the_cache_usable(use_cache):
    model = thinker(3, torch.float32, dropout=0.3).train()
    options = dict(use_cache=use_cache)
    if use_cache:
        options["cache"] = HRMCache(model, rows=3)
    running = stream(model, PROMPTS, 10, sampling=Sampling(0.0), **options)
    for _ in range(4):
        next(running)
        assert model.training, "between two tokens too"
    del running
    assert model.training and all(module.training for module in model.modules())
    found = generated(model, PROMPTS, 6, temperature=0.0, **options)
    assert model.training
    assert_same(found, generated(model.eval(), PROMPTS, 6, temperature=0.0, use_cache=False))


def test_a_token_is_there_before_the_next_is_computed():
    model = thinker(3, torch.float32)
    running = stream(model, [list(range(10))], 5, force_steps=2)
    assert running.work.total == 0
    costs = []
    for _ in running:
        costs.append(running.work.total // per_token(model, 2))
    assert costs == [10, 11, 12, 13, 14]


def test_two_streams_over_one_cache_do_not_disturb_each_other():
    model = thinker(3, torch.float32)
    cache = HRMCache(model)
    prompts = [[1, 2, 3, 4], [9, 8, 7, 6]]
    alone = [generated(model, [prompt], 6, temperature=0.0).tokens[0] for prompt in prompts]
    running = [stream(model, [prompt], 6, sampling=Sampling(0.0), cache=cache) for prompt in prompts]
    found = [[a.token, b.token] for a, b in zip(*running, strict=True)]
    assert [list(row) for row in zip(*found, strict=True)] == alone


def test_a_results_work_stays_what_it_was():
    model = thinker(3, torch.float32)
    cache = HRMCache(model)
    first = generated(model, [[1, 2, 3]], 2, cache=cache)
    work = first.work.total
    generated(model, [[4, 5, 6]], 2, cache=cache)
    assert first.work.total == work


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=1.0, top_k=5, top_p=0.5)])
def test_damaged_weights_are_one_clear_error(use_cache, options):
    model = thinker(3, torch.float32)
    with torch.no_grad():
        model.ln_f.weight[3] = math.nan
    with pytest.raises(
        ValueError, match=r"^the model's logits are not finite \(row \d\): its weights are damaged"
    ) as error:
        generated(model.train(), PROMPTS, 3, use_cache=use_cache, **options)
    assert "\n" not in str(error.value) and model.training


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "windows"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens -1 must be an integer of at least 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens 2.0 must be an integer"),
        (dict(max_new_tokens=True), "max_new_tokens True must be an integer"),
        (dict(min_new_tokens=-1), "min_new_tokens -1 must be an integer of at least 0"),
        (dict(batch_size=0), "batch_size 0 must be an integer of at least 1"),
        (dict(batch_size=1.5), "batch_size 1.5 must be an integer"),
        (dict(drop_oldest=0), "drop_oldest 0 must be an integer of at least 1"),
        (dict(drop_oldest=32), "drop_oldest 32 must be below the window of"),
        (dict(stop=""), "a stop string is empty"),
        (dict(stop=["a", ""]), "a stop string is empty"),
        (dict(depth_update="never"), "depth_update 'never' is none of token, turn"),
        (dict(seed=[1]), "seed has 1 entries for 2 rows; give one each, or one number"),
        (dict(seed=[1, 2, 3]), "seed has 3 entries for 2 rows"),
        (dict(max_steps=0), "max_steps 0 must be an integer of at least 1"),
        (dict(force_steps=0), r"force_steps 0 is outside 1\.\.5"),
        (dict(force_steps=9999), r"force_steps 9999 is outside 1\.\.5; to go deeper pass max_steps too"),
        (dict(force_steps=[1]), "force_steps has 1 entries for 2 rows"),
        (dict(force_steps=[1, 6]), r"force_steps 6 is outside 0\.\.5"),
        (dict(force_steps=[[1, 2], [3, 6]]), r"force_steps 6 is outside 0\.\.5"),
        (dict(force_steps=[[1, 2]]), "force_steps must have a list of at least one number for each of 2 rows"),
        (dict(force_steps=[[1, 2], []]), "force_steps must have a list of at least one number for each of 2 rows"),
        (dict(force_steps=[[1, 2], 3]), "force_steps must have a list of at least one number for each of 2 rows"),
        (dict(force_steps="deep"), "force_steps "),
        (dict(prompts=[[1], []]), "prompt 1 is empty; give at least one token, such as 50256"),
        (dict(prompts=[[1], [2, 61]]), r"prompt 1: token id 61 is outside 0\.\.60"),
        (dict(prompts=[[-1], [2]]), r"prompt 0: token id -1 is outside 0\.\.60"),
        (dict(sampling=Sampling(top_k=62)), "top_k 62 is above 61, the tokens there are"),
        (dict(prompts=[]), "no prompts"),
        (dict(halt_bias=math.nan), "halt_bias is nan"),
        (dict(halt_bias="a"), "halt_bias 'a' is no number"),
        (dict(min_new_tokens=3), "min_new_tokens 3 is more than max_new_tokens 2"),
        (dict(stop_tokens=True), "stop token True is no id"),
        (dict(stop=[7]), "stop 7|stop string 7"),
        (dict(stop_tokens=-1), "stop token -1|stop_tokens -1"),
        (dict(seed=1.5), "seed 1.5"),
        (dict(prompts=[[1.5], [2]]), "prompt 0: token id 1.5"),
    ],
)
def test_an_option_out_of_range_is_named_at_the_call(options, message, use_cache):
    model = thinker(3, torch.float32)
    given = dict(prompts=[[1, 2], [3]], max_new_tokens=2, use_cache=use_cache) | options
    with pytest.raises(ValueError, match=f"^({message})") as error:
        stream(model, given.pop("prompts"), given.pop("max_new_tokens"), **given)
    assert "\n" not in str(error.value)


def test_more_steps_than_a_given_cache_has_are_named_at_the_call():
    model = thinker(3, torch.float32)
    cache = HRMCache(model, max_steps=2)
    generated(model, [[7, 8, 9]], 1, max_steps=2, cache=cache)
    with pytest.raises(ValueError, match="5 steps are more than the cache's max_steps 2"):
        stream(model, [[1, 2]], 2, cache=cache)
    assert cache.ids(0) == [7, 8, 9]


def test_a_row_that_was_not_finite_leaves_nothing_in_its_place():
    """A place beside it, and the next row in its own, compute as if it had never been."""
    model = thinker(3, torch.float32)
    cache, sound = HRMCache(model, rows=2), [5, 6, 7]
    alone = generated(model, [sound], 3, temperature=0.0)
    with torch.no_grad():
        whole = model.wte.weight[9].clone()
        model.wte.weight[9] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            generated(model, [[9, 9, 9, 9, 9, 9], [1, 2]], 2, temperature=0.0, cache=cache)
        model.wte.weight[9] = whole
    assert all(torch.isfinite(t).all() for t in (cache.x, cache.z_H, cache.z_L, cache.kv_core, cache.kv_output))
    assert_same(generated(model, [sound], 3, temperature=0.0, cache=cache), alone)
