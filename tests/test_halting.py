"""When a row stops: the rule, the objectives held to plain Python, the price, exploration."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_model.halting import (
    OBJECTIVES,
    Exploration,
    Price,
    advantages,
    executed_by,
    executed_steps,
    halt_margin,
    head_loss,
    price_faults,
    price_rate,
    target_fault,
)

N, S, PRICE = 30, 5, 0.07


def decisions(seed: int = 0, n: int = N, n_steps: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N, S], q [N, S, 2] with gradient, and weights [N] of which some are 0; float64."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(n, n_steps, generator=generator, dtype=torch.float64) * 3
    q = torch.randn(n, n_steps, 2, generator=generator, dtype=torch.float64).requires_grad_()
    weights = (torch.rand(n, generator=generator) < 0.8).double()
    assert 0 < weights.sum() < n
    return losses, q, weights


def quotient(objective: str, losses: Tensor, q: Tensor, weights: Tensor, price: float) -> Tensor:
    total, normaliser = head_loss(objective, losses, q, weights, price)
    return total / normaliser


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margins", "steps"),
    [
        ([-1.0, 0.5, 2.0, -1.0], 2),
        ([0.1, -1.0, -1.0, -1.0], 1),
        ([0.0, 0.0, 0.0, 0.0], 4),  # a margin of exactly 0 goes on
        ([0.0, 1e-30, 0.0, 0.0], 2),
        ([-1.0, -1.0, -1.0, -1.0], 4),
        ([-1.0, -1.0, -1.0, 5.0], 4),  # what is said after the last step counts for nothing
        ([math.inf] * 4, 1),
        ([-math.inf] * 4, 4),
        ([-1.0, -1.0, 1.0, -1.0], 3),
        ([-5.0], 1),
    ],
)
def test_a_row_stops_at_the_first_margin_above_zero_and_at_s_without_one(margins, steps):
    given, kept = torch.tensor(margins), torch.tensor(margins)
    assert executed_steps(given).item() == steps
    assert torch.equal(given, kept), "margins are only read"


def test_rows_of_any_leading_shape_stop_each_for_themselves():
    margins = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = executed_steps(margins)
    expected = [[executed_steps(row).item() for row in rows] for rows in margins]
    assert found.tolist() == expected and len(set(found.flatten().tolist())) > 3


def test_an_infinite_bias_decides_alone_and_a_finite_one_moves_the_threshold():
    q = torch.tensor([[[1.0, 1.5], [2.0, 1.75], [0.0, 9.0]]])
    assert [executed_steps(halt_margin(q, bias)).item() for bias in (math.inf, -math.inf, 0.0, 0.5)] == [1, 3, 2, 2]
    assert executed_steps(halt_margin(q, 0.5 + 1e-6)).item() == 1, "at a bias of 0.5 the first margin is exactly 0"


def test_the_untrained_rule_stops_after_the_first_small_change():
    change = torch.tensor([[math.inf, 0.5, 0.1, 0.2], [0.05, 0.5, 0.1, 0.2], [0.3, 0.3, 0.3, 0.3]])

    def by(rule: str) -> list[int]:
        return executed_by(rule, torch.ones(3, 4), change).tolist()

    assert by("settled:0.15") == [3, 1, 4]
    assert by("settled:0.1") == [4, 1, 4], "a change of the threshold itself is not below it"
    assert by("settled:0") == [4, 4, 4]
    assert by("fixed:2") == [2, 2, 2] and by("head") == [1, 1, 1]
    for wrong in ("fixed:5", "fixed:0", "fixed:x", "settled:-1", "settled:", "heads"):
        with pytest.raises(ValueError, match=r"none of head, fixed:N \(N in 1..4\), settled:X"):
            by(wrong)


def test_a_price_is_steered_slower_the_longer_a_run_is():
    rates = [price_rate(n) for n in (1, 300, 600, 2000, 10**6)]
    assert rates == [0.02, 0.02, 0.01, 0.003, 0.003]


# -- objectives, against loops in plain Python -------------------------------------------------------------------------


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def going_on_costs(losses: list[float], d: list[float], s: int, price: float) -> float:
    """What a row that goes on after step s (from 0) pays from there, when it then follows its decisions d."""
    for paid, k in enumerate(range(s + 1, len(losses)), 1):
        if d[k] <= 0 or k == len(losses) - 1:
            return losses[k] + price * paid
    raise AssertionError("nothing follows the last step")


def test_the_policy_objective_pays_what_following_the_head_would_cost():
    losses, q, weights = decisions()
    total = size = 0.0
    for row, scores, weight in zip(losses.tolist(), q.tolist(), weights.tolist(), strict=True):
        d = [go - halt for halt, go in scores]
        for s in range(S - 1):
            gain = row[s] - going_on_costs(row, d, s, PRICE)
            total += weight * abs(gain) * softplus(-math.copysign(1, gain) * d[s])
            size += weight * abs(gain)
    found = head_loss("policy", losses, q, weights, PRICE)
    assert [t.item() for t in found] == pytest.approx([total, size], rel=1e-12)


def test_an_advantage_is_what_is_saved_by_going_on_under_later_decisions():
    losses, q, _ = decisions(1)
    d = (q[..., 1] - q[..., 0]).detach()
    expected = [
        [row[s] - going_on_costs(row, d_row, s, PRICE) for s in range(S - 1)]
        for row, d_row in zip(losses.tolist(), d.tolist(), strict=True)
    ]
    torch.testing.assert_close(advantages(losses, d > 0, PRICE), torch.tensor(expected, dtype=torch.float64))


def test_the_gain_objective_looks_one_step_ahead():
    losses, q, weights = decisions()
    total = size = 0.0
    for row, scores, weight in zip(losses.tolist(), q.tolist(), weights.tolist(), strict=True):
        for s in range(S - 1):
            gain = row[s] - row[s + 1] - PRICE
            total += weight * abs(gain) * softplus(-math.copysign(1, gain) * (scores[s][1] - scores[s][0]))
            size += weight * abs(gain)
    found = head_loss("gain", losses, q, weights, PRICE)
    assert [t.item() for t in found] == pytest.approx([total, size], rel=1e-12)


def stop_probabilities(scores: list[list[float]]) -> list[float]:
    """Of a row that stops at random: after a step with probability sigmoid(q_halt - q_continue), surely after S."""
    left, found = 1.0, []
    for halt, go in scores[:-1]:
        stop = 1 / (1 + math.exp(go - halt))
        found.append(left * stop)
        left *= 1 - stop
    return [*found, left]


def test_the_expected_objective_is_the_sum_over_where_a_row_may_stop():
    losses, q, weights = decisions()
    total = 0.0
    for row, scores, weight in zip(losses.tolist(), q.tolist(), weights.tolist(), strict=True):
        p = stop_probabilities(scores)
        total += weight * sum(p[s] * (row[s] + PRICE * (s + 1)) for s in range(S))
    found = head_loss("expected", losses, q, weights, PRICE)
    assert [t.item() for t in found] == pytest.approx([total, weights.sum().item()], rel=1e-8)


def test_the_expected_objectives_probabilities_sum_to_one():
    """A loss of 3 everywhere costs 3, wherever a row stops, and nothing moves the head; also when it is very sure."""
    q = decisions()[1].detach() * 40
    q.requires_grad_()
    total, normaliser = head_loss("expected", torch.full((N, S), 3.0), q, torch.ones(N), 0.0)
    assert (total / normaliser).item() == pytest.approx(3.0, rel=1e-6)
    (gradient,) = torch.autograd.grad(total, q)
    assert gradient.abs().max() < 1e-5


def test_q_targets_by_hand():
    """Halting is worth exp(-l); going on the better of the next step's two values, after the last step but one that of
    halting, as nothing follows; a step discounts by exp(-price)."""
    losses = torch.tensor([[0.5, 2.0, 0.1]], dtype=torch.float64)
    q = torch.tensor([[[0.3, -0.2], [-1.0, 0.7], [0.4, 5.0]]], dtype=torch.float64, requires_grad=True)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def entropy(logit: float, target: float) -> float:
        return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))

    discount = math.exp(-0.2)
    expected = sum(entropy(logit, math.exp(-loss)) for logit, loss in ((0.3, 0.5), (-1.0, 2.0), (0.4, 0.1)))
    expected += entropy(-0.2, sigmoid(0.7) * discount) + entropy(0.7, sigmoid(0.4) * discount)
    total, normaliser = head_loss("q", losses, q, torch.ones(1), 0.2)
    assert total.item() == pytest.approx(expected, rel=1e-12) and normaliser.item() == 5
    (gradient,) = torch.autograd.grad(total, q)
    assert gradient[0, 0, 0].item() == pytest.approx(sigmoid(0.3) - math.exp(-0.5)), "targets carry no gradient"
    assert gradient[0, 1, 1].item() == pytest.approx(sigmoid(0.7) - sigmoid(0.4) * discount)
    assert gradient[0, 2, 1].item() == 0, "after the last step nothing goes on"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_terms_of_parts_of_a_batch_add_up_to_those_of_the_whole(objective):
    losses, q, weights = decisions()
    whole = head_loss(objective, losses, q, weights, PRICE)
    parts = [head_loss(objective, losses[cut], q[cut], weights[cut], PRICE) for cut in (slice(11), slice(11, N))]
    assert [sum(t).item() for t in zip(*parts, strict=True)] == pytest.approx([t.item() for t in whole], rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_weight_of_zero_removes_a_decision(objective):
    losses, q, weights = decisions()
    real = weights > 0
    found = head_loss(objective, losses, q, weights, PRICE)
    expected = head_loss(objective, losses[real], q[real], weights[real], PRICE)
    assert [t.item() for t in found] == pytest.approx([t.item() for t in expected], rel=1e-12)
    (gradient,) = torch.autograd.grad(found[0], q)
    assert not gradient[~real].any() and gradient[real].flatten(1).any(1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_get_no_gradient_and_the_last_margin_gets_none(objective):
    losses, q, weights = decisions()
    (gradient,) = torch.autograd.grad(head_loss(objective, losses, q, weights, PRICE)[0], q)
    assert gradient[weights > 0, :-1].all()
    if objective != "q":  # its two numbers are values, also after the last step
        assert not gradient[:, -1].any()
        torch.testing.assert_close(gradient[..., 0], -gradient[..., 1]), "only the difference decides"


@pytest.mark.parametrize("objective", ["policy", "gain"])
def test_the_unit_of_the_losses_plays_no_part(objective):
    losses, q, weights = decisions()
    found = quotient(objective, losses, q, weights, PRICE)
    scaled = quotient(objective, 7 * losses, q, weights, 7 * PRICE)
    assert scaled.item() == pytest.approx(found.item(), rel=1e-12)
    shifted = quotient(objective, losses + 3, q, weights, PRICE)
    assert shifted.item() == pytest.approx(found.item(), rel=1e-12), "only differences of losses count"
    assert quotient(objective, losses, q, weights, 7 * PRICE).item() != pytest.approx(found.item(), rel=1e-2)


# -- what minimising them leads to -------------------------------------------------------------------------------------


def minimised(objective: str, losses: Tensor, price: float, start: float) -> Tensor:
    """d [S] of a head that sees nothing, which has one number a step for all decisions; Adam on L_q."""
    d = torch.full((losses.shape[1],), start, dtype=torch.float64, requires_grad=True)
    optimizer, n = torch.optim.Adam([d], lr=0.2), 150
    for i in range(n):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - i / n)
        q = torch.stack([torch.zeros_like(d), d], -1).expand(len(losses), -1, -1)
        loss = quotient(objective, losses, q, torch.ones(len(losses)), price)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return d.detach()


@pytest.mark.parametrize("mean", [-0.2, -0.05, 0.05, 0.2])
def test_the_minimiser_has_the_sign_of_the_mean_advantage_under_noise(mean):
    """Two steps, advantages normal with a standard deviation of 1: a fifth of it or less is signal."""
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    advantage = mean + noise - noise.mean()
    losses = torch.stack([advantage, torch.zeros_like(noise)], 1) + 2.0
    losses[:, 0] += PRICE
    d = minimised("policy", losses, PRICE, start=-0.3 * math.copysign(1, mean))[0].item()
    assert d * mean > 0
    plus, minus = advantage.clamp(min=0).sum(), (-advantage).clamp(min=0).sum()
    assert d == pytest.approx(math.log(plus / minus), abs=1e-3)


def test_seldom_but_large_gains_outweigh_a_majority():
    """Nine decisions of ten lose 0.05 by going on, the tenth gains 1. A vote of signs would stop."""
    advantage = torch.tensor([-0.05] * 9 + [1.0], dtype=torch.float64)
    losses = torch.stack([advantage + PRICE, torch.zeros(10, dtype=torch.float64)], 1)
    d = minimised("policy", losses, PRICE, start=-1.0)[0].item()
    assert d == pytest.approx(math.log(1.0 / 0.45), abs=1e-3) and d > 0


@pytest.mark.parametrize("start", [1.0, -1.0], ids=["from a head that goes on", "from a head that stops"])
def test_a_gain_that_comes_late_is_seen_by_policy_iteration_and_not_by_one_step(start):
    """Three steps gain nothing and the fourth gains 1, at a price of 0.1 each: going on is worth 0.7 from the start."""
    losses = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    found = {name: minimised(name, losses, 0.1, start) for name in ("policy", "gain")}
    assert executed_steps(-found["policy"]).item() == 4
    assert executed_steps(-found["gain"]).item() == 1
    assert (found["gain"] > 0).tolist()[:3] == [False, False, True]


def test_advantages_of_a_late_gain_by_hand():
    losses = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    for goes_on, expected in (
        ([True] * 4, [0.7, 0.8, 0.9]),
        ([False] * 4, [-0.1, -0.1, 0.9]),
        ([False, False, True, True], [-0.1, 0.8, 0.9]),
    ):
        found = advantages(losses, torch.tensor([goes_on]), 0.1)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("objective", ["policy", "gain", "expected"])
def test_a_higher_price_makes_a_row_stop_earlier(objective):
    """Losses that halve: a step is worth 1/2, 1/4, 1/8, 1/16, so the best stop is where the price exceeds that."""
    losses = torch.tensor([[1.0, 0.5, 0.25, 0.125, 0.0625]], dtype=torch.float64)
    depths = [executed_steps(-minimised(objective, losses, price, 1.0)).item() for price in (0.03, 0.09, 0.2, 0.4, 0.7)]
    assert depths == [5, 4, 3, 2, 1]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_leaves_nothing_to_decide(objective):
    with pytest.raises(ValueError, match="one step there is nothing to decide; use hrm_max_steps of at least 2, or"):
        head_loss(objective, torch.ones(3, 1), torch.zeros(3, 1, 2), torch.ones(3), 0.01)


def test_an_unknown_objective_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="objective 'ponder' is none of policy, gain, expected, q"):
        head_loss("ponder", torch.ones(3, 4), torch.zeros(3, 4, 2), torch.ones(3), 0.01)


# -- the price ---------------------------------------------------------------------------------------------------------


def test_a_price_without_a_target_is_constant():
    price = Price(0.01)
    for mean in (1.0, 4.0, 16.0):
        price.steer(mean)
    assert price.value == 0.01


@pytest.mark.parametrize(
    ("mean", "factor"), [(5.0, 1.0), (6.0, math.exp(0.003)), (4.5, math.exp(-0.0015)), (7.0, math.exp(0.006))]
)
def test_a_price_rises_when_rows_go_deeper_than_asked_and_falls_otherwise(mean, factor):
    price = Price(0.02, target=5.0)
    price.steer(mean)
    assert price.value == pytest.approx(0.02 * factor, rel=1e-12)


def test_far_off_counts_as_two_steps_off():
    for far, near in ((16.0, 7.0), (1.0, 3.0)):
        steered = [Price(0.02, target=5.0), Price(0.02, target=5.0)]
        for price, mean in zip(steered, (far, near), strict=True):
            price.steer(mean)
        assert steered[0].value == steered[1].value != 0.02


def test_a_price_stays_within_its_limits():
    low, high = Price(2e-6, target=5.0, rate=1.0), Price(5.0, target=5.0, rate=1.0)
    for _ in range(3):
        low.steer(1.0), high.steer(16.0)
    assert (low.value, high.value) == (Price.LEAST, Price.MOST)
    low.steer(6.0), high.steer(4.0)
    assert low.value > Price.LEAST and high.value < Price.MOST, "and comes back"


@pytest.mark.parametrize("start", [0.0001, 1.0])
def test_the_controller_finds_the_price_of_the_depth_asked_for(start):
    """A model whose mean depth falls from 8 to 1 as the price rises, and follows it with a delay."""

    def wanted(price: float) -> float:
        return 1 + 7 / (1 + price / 0.02)

    price, depth, seen = Price(start, target=4.0), 8.0, []
    for _ in range(4000):
        depth += 0.05 * (wanted(price.value) - depth)
        price.steer(depth)
        seen.append(depth)
    assert seen[-1] == pytest.approx(4.0, abs=1e-3)
    assert price.value == pytest.approx(0.02 * 4 / 3, rel=1e-2)
    assert max(abs(mean - 4) for mean in seen[-500:]) < 0.01, "it does not swing"


@pytest.mark.parametrize(
    ("price", "target", "messages"),
    [
        (0.01, None, []),
        (0.0, None, []),
        (0.01, 1.0, []),
        (-0.1, None, ["--step-price -0.1 is not a finite number of at least 0"]),
        (math.inf, None, ["--step-price inf is not a finite number"]),
        (math.nan, None, ["--step-price nan is not a finite number"]),
        (0.01, 0.5, ["--target-steps 0.5 is not a number of at least 1"]),
        (0.01, math.nan, ["--target-steps nan is not a number"]),
        (0.01, math.inf, ["--target-steps inf is not a number"]),
        (0.0, 4.0, ["--step-price 0 leaves at 0; start at 0.01"]),
        (-1.0, 0.0, ["--step-price -1.0", "--target-steps 0.0"]),
    ],
)
def test_what_is_wrong_with_a_price_is_said_sentence_by_sentence(price, target, messages):
    faults = price_faults(price, target)
    assert len(faults) == len(messages)
    assert all(message in fault for message, fault in zip(messages, faults, strict=True))


def test_a_target_lies_within_the_models_steps():
    assert target_fault(None, 4) is None and target_fault(4, 4) is None and target_fault(1.5, 4) is None
    fault = target_fault(4.5, 4)
    assert "--target-steps 4.5 is over hrm_max_steps 4 of the model" in fault and "1..4" in fault


# -- who explores ------------------------------------------------------------------------------------------------------

MANY = range(20_000)
EXPLORING = Exploration(seed=7, max_steps=8, share=0.125, warmup=100)


@pytest.mark.parametrize(
    "draw",
    [
        EXPLORING.explorers,
        EXPLORING.random_depths,
        lambda samples: EXPLORING.depths(samples, 3),
        lambda samples: EXPLORING.depths(samples, 100),
        lambda samples: EXPLORING.pooled(samples, 512),
    ],
    ids=["explorers", "random depths", "depths in the warm-up", "depths after it", "pooled"],
)
def test_a_draw_depends_on_the_samples_number_alone(draw: Callable):
    """Whatever else is in the batch, in whatever order, wherever the numbers start."""
    whole = list(draw(range(3000, 3400)))
    assert len(set(whole)) > 1
    assert [x for first in range(3000, 3400, 8) for x in draw(range(first, first + 8))] == whole
    order = np.random.default_rng(0).permutation(400)
    assert list(draw(3000 + order)) == [whole[i] for i in order]
    assert [draw([n])[0] for n in range(3000, 3020)] == whole[:20]
    by_rank = [list(draw(range(3000 + rank, 3400, 3))) for rank in range(3)]
    assert by_rank == [whole[rank::3] for rank in range(3)]


def test_another_seed_draws_others():
    other = Exploration(seed=8, max_steps=8, share=0.125, warmup=100)
    assert other.random_depths(MANY[:100]) != EXPLORING.random_depths(MANY[:100])
    assert other.explorers(MANY[:100]).tolist() != EXPLORING.explorers(MANY[:100]).tolist()
    assert other.pooled(MANY[:100], 512) != EXPLORING.pooled(MANY[:100], 512)


@pytest.mark.parametrize("share", [0.0, 1 / 16, 0.125, 0.5, 1.0])
def test_the_share_of_explorers_is_what_was_asked_for(share):
    explorers = Exploration(7, 8, share, 0).explorers(MANY)
    deviation = math.sqrt(share * (1 - share) / len(MANY))
    assert abs(explorers.mean() - share) <= 4 * deviation


def test_in_the_warm_up_all_depths_are_random_and_then_only_those_of_explorers():
    samples = MANY[:400]
    depths, explorers = EXPLORING.random_depths(samples), EXPLORING.explorers(samples)
    assert EXPLORING.depths(samples, 0) == EXPLORING.depths(samples, 99) == depths
    after = EXPLORING.depths(samples, 100)
    assert after == [d if e else 0 for d, e in zip(depths, explorers, strict=True)] == EXPLORING.depths(samples, 9999)
    assert 0 < sum(d > 0 for d in after) < 400
    without = Exploration(seed=7, max_steps=8, share=0.125, warmup=0)
    assert without.depths(samples, 0) == after


def assert_uniform(values: np.ndarray, low: int, high: int) -> None:
    n, k = len(values), high - low + 1
    counts = np.bincount(values - low, minlength=k)
    assert len(counts) == k and values.min() >= low
    assert np.abs(counts - n / k).max() <= 4.5 * math.sqrt(n / k * (1 - 1 / k))


def test_depths_and_prefixes_are_uniform_also_among_explorers():
    depths, explorers = np.array(EXPLORING.random_depths(MANY)), EXPLORING.explorers(MANY)
    prefixes = np.array(EXPLORING.pooled(MANY, 12))
    assert_uniform(depths, 1, 8), assert_uniform(depths[explorers], 1, 8)
    assert_uniform(prefixes, 1, 12), assert_uniform(prefixes[~explorers], 1, 12)
    assert set(EXPLORING.pooled(MANY[:50], 1)) == {1}


def test_draws_for_different_purposes_have_nothing_to_do_with_each_other():
    draws = np.stack(
        [EXPLORING.explorers(MANY), EXPLORING.random_depths(MANY), EXPLORING.pooled(MANY, 512)], dtype=np.float64
    )
    for lag in (0, 1):
        rolled = np.roll(draws, lag, axis=1)
        found = np.corrcoef(draws, rolled)[:3, 3:]
        assert np.abs(found - np.eye(3) * (lag == 0)).max() < 4 / math.sqrt(len(MANY))
