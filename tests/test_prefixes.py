"""One unroll says what every prefix decides: held against the model on each prefix alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.config import END_OF_TEXT
from hrm_model.prefixes import Prefixes, Reading, Window, prefixes

SHAPE = dict(vocab_size=50, n_embd=16, block_size=24, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=4, halt_bias=0.0)
# Seeds whose prefixes take 1, 2, 3 and 4 steps, no decision nearer than 0.004 to the other.
SEEDS = {"rotary": 7, "learned positions": 9}


def scaled(seed: int, **changes) -> tuple[HRMForCausalLM, torch.Tensor]:
    torch.manual_seed(seed)
    model = HRMForCausalLM(HRMConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0 if p.dim() > 1 else 1.0)
    return model.eval(), torch.randint(0, 50, (24,))


@pytest.fixture(scope="module", params=SEEDS)
def case(request) -> tuple[HRMForCausalLM, torch.Tensor]:
    return scaled(SEEDS[request.param], use_rotary=request.param == "rotary")


@torch.no_grad()
def held_to_each_prefix_alone(model: HRMForCausalLM, ids: torch.Tensor, found: Prefixes, **options) -> None:
    bias = options.get("halt_bias", model.config.halt_bias)
    for t in range(len(ids)):
        alone = model(ids[None, : t + 1], **options)
        steps = int(alone.executed_steps)
        assert found.executed[t] == steps
        assert bool(found.halted[t]) == (int(alone.steps_taken) < steps)
        halt, go_on = alone.q_logits[0].tolist()
        assert found.margins[t, steps - 1] == pytest.approx(halt + bias - go_on, abs=1e-5)
        log_probs = alone.logits[0, -1].log_softmax(-1)
        if t + 1 < len(ids):
            assert found.nll[t] == pytest.approx(-float(log_probs[ids[t + 1]]), abs=1e-5)
        else:
            torch.testing.assert_close(found.next_log_probs, log_probs, atol=1e-5, rtol=0)


def test_every_prefix_decides_as_it_does_alone(case):
    model, ids = case
    found = prefixes(model, ids)
    assert set(found.executed.tolist()) == {1, 2, 3, 4}
    held_to_each_prefix_alone(model, ids, found)
    assert found.margins.shape == (24, 4) and found.nll.shape == (23,)


def test_the_sign_of_a_margin_is_the_decision(case):
    model, ids = case
    found = prefixes(model, ids)
    for margins, steps, halted in zip(found.margins, found.executed.tolist(), found.halted.tolist(), strict=True):
        assert (margins[: steps - 1] <= 0).all()
        assert bool(margins[steps - 1] > 0) == halted


@pytest.mark.parametrize("options", [dict(halt_bias=0.3), dict(halt_bias=-0.3), dict(max_steps=2), dict(max_steps=7)])
def test_options_mean_what_they_mean_to_the_model(case, options):
    model, ids = case
    found = prefixes(model, ids, **options)
    assert found.margins.shape[1] == options.get("max_steps", 4)
    held_to_each_prefix_alone(model, ids, found, **options)


def test_an_infinite_bias_halts_all_or_none(case):
    model, ids = case
    at_once, never = (prefixes(model, ids, halt_bias=sign * math.inf) for sign in (1, -1))
    assert at_once.executed.unique().tolist() == [1] and at_once.halted.all()
    assert never.executed.unique().tolist() == [4] and not never.halted.any()
    assert at_once.margins.eq(math.inf).all() and never.margins.eq(-math.inf).all()
    for found, steps in ((at_once, 1), (never, 4)):
        whole = model(ids[None], force_steps=steps).logits[0].log_softmax(-1)
        expected = -whole[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(found.nll, expected, atol=1e-5, rtol=0)


def test_one_step_decides_nothing(case):
    model, ids = case
    found = prefixes(model, ids, max_steps=1, halt_bias=math.inf)
    assert found.executed.unique().tolist() == [1] and not found.halted.any()


def test_a_single_token(case):
    model, ids = case
    found = prefixes(model, ids[:1])
    assert found.nll.shape == (0,)
    held_to_each_prefix_alone(model, ids[:1], found)


def test_what_follows_changes_nothing_before_it(case):
    model, ids = case
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % 50
    first, second = prefixes(model, ids), prefixes(model, changed)
    assert torch.equal(first.executed[:-1], second.executed[:-1])
    torch.testing.assert_close(first.nll[:-1], second.nll[:-1], atol=1e-6, rtol=0)


def test_ids_that_only_pad_the_vocabulary_get_no_probability():
    model, ids = scaled(0, vocab_size=50304)
    plain = prefixes(model, ids)
    assert plain.next_log_probs.shape == (END_OF_TEXT + 1,)
    assert float(plain.next_log_probs.logsumexp(0)) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.wte.weight[END_OF_TEXT + 1 :] *= 100.0
    torch.testing.assert_close(prefixes(model, ids).nll, plain.nll)


def test_training_mode_is_restored_and_nothing_is_dropped():
    model, ids = scaled(SEEDS["rotary"], dropout=0.5)
    quiet = prefixes(model, ids)
    model.train()
    found = prefixes(model, ids)
    assert model.training and model.hrm_core.training
    assert torch.equal(found.executed, quiet.executed) and torch.equal(found.nll, quiet.nll)
    assert not found.nll.requires_grad


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), {}, r"ids must be \[T\] int64, one text; got \(2, 3\)"),
        (torch.zeros(3), {}, r"ids must be \[T\] int64"),
        (torch.zeros(0, dtype=torch.int64), {}, "no tokens"),
        (torch.zeros(25, dtype=torch.int64), {}, "25 tokens is over block_size 24"),
        (torch.tensor([1, 50]), {}, r"token id 50 is outside 0\.\.49"),
        (torch.tensor([1, -2]), {}, r"token id -2 is outside 0\.\.49"),
        (torch.tensor([1]), dict(max_steps=0), "max_steps 0 must be an integer of at least 1"),
        (torch.tensor([1]), dict(max_steps=True), "max_steps True"),
        (torch.tensor([1]), dict(halt_bias=math.nan), "halt_bias is nan"),
    ],
)
def test_bad_arguments_are_named(ids, options, message):
    model, _ = scaled(0)
    with pytest.raises(ValueError, match=message):
        prefixes(model, ids, **options)


def made_up(executed: list[int], nll: list[float], n_steps: int = 4) -> Window:
    n = len(executed)
    margins = torch.arange(n * n_steps, dtype=torch.float32).reshape(n, n_steps)
    told = torch.tensor(executed), torch.zeros(n, dtype=torch.bool), margins, torch.tensor(nll), torch.zeros(50)
    return Window(list(range(n)), Prefixes(*told))


def test_a_reading_counts_what_was_predicted():
    """The last prefix of a window predicts nothing, as the next window's first token is given; the text's last does."""
    reading = Reading([made_up([1, 2, 4], [1.0, 2.0]), made_up([3, 3], [9.0])], max_steps=4, halt_bias=0.0)
    assert reading.depths().tolist() == [1, 2, 3, 3]
    assert reading.histogram().tolist() == [1, 1, 2, 0]
    assert reading.surprisal().tolist() == [1.0, 2.0, 9.0]
    assert reading.rank_correlation() == pytest.approx(1.0)
    rows = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]])
    mean, low, high = reading.margin_band()
    assert mean.tolist() == rows.mean(0).tolist()
    assert low.tolist() == np.percentile(rows, 10, axis=0).tolist()
    assert high.tolist() == np.percentile(rows, 90, axis=0).tolist()


def test_ranks_of_equal_values_are_shared():
    """Spearman by hand: depths 1 1 2 2 have ranks 1.5 1.5 3.5 3.5, the surprisals 1 3 2 4: r = 2 / sqrt(4 x 5)."""
    reading = Reading([made_up([1, 1, 2, 2, 1], [0.1, 0.3, 0.2, 0.4])], max_steps=4, halt_bias=0.0)
    assert reading.rank_correlation() == pytest.approx(2 / math.sqrt(20))


def test_what_is_constant_has_no_correlation():
    for executed, nll in (([2, 2, 2], [1.0, 2.0]), ([1, 2, 1], [1.0, 1.0]), ([1, 2], [1.0]), ([1], [])):
        assert Reading([made_up(executed, nll)], max_steps=4, halt_bias=0.0).rank_correlation() is None
    assert Reading([made_up([1], [])], max_steps=4, halt_bias=math.inf).margin_band() is None
