"""Sampling: greedy and random, filters, stops, rows apart from each other, bad options."""

from __future__ import annotations

import pytest
import torch

from hrm_model import HRMConfig, HRMForCausalLM
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
