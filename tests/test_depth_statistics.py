"""hrm_model/depth_statistics.py: spread, ranks, rivals within the same compute, intervals, block applications."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from small_models import thinker

from hrm_model import HRMConfig
from hrm_model.cache import HRMCache
from hrm_model.depth_statistics import (
    Costs,
    DepthStatistics,
    bootstrap,
    rank_correlation,
    ranks,
    shuffled,
    within,
)
from hrm_model.incremental import extend
from hrm_model.training.validation import Reading


def test_mean_variance_and_dispersion_are_those_of_the_executed_steps():
    executed = np.random.default_rng(0).integers(1, 6, (7, 9))
    found = DepthStatistics.of(executed, 6)
    assert found.histogram == [int((executed == s).sum()) for s in range(1, 7)] and found.histogram[5] == 0
    assert found.mean == pytest.approx(executed.mean()) and found.variance == pytest.approx(executed.var())
    assert found.dispersion == pytest.approx(executed.var() / ((executed.mean() - 1) * (6 - executed.mean())))
    assert str(found) == f"mean {executed.mean():.2f}, sd {executed.std():.2f}, D {found.dispersion:.3f}"


@pytest.mark.parametrize(
    ("histogram", "dispersion"),
    [
        ([3, 0, 0, 1], 1.0),  # only ever 1 or S
        ([1, 0, 0, 9], 1.0),
        ([0, 5, 0, 0], 0.0),  # the same for all
        ([0, 1, 1, 0], 0.25 / (1.5 * 1.5)),
        ([5, 0, 0, 0], None),
        ([0, 0, 0, 5], None),
    ],
)
def test_dispersion_is_one_for_a_coin_toss_between_extremes_and_zero_for_a_constant(histogram, dispersion):
    found = DepthStatistics(histogram)
    assert found.dispersion == (None if dispersion is None else pytest.approx(dispersion))
    assert ("D constant" in str(found)) == (dispersion is None)


def test_equal_values_share_their_ranks():
    assert ranks(np.array([5.0, 1.0, 5.0, 2.0, 5.0])).tolist() == [4, 1, 4, 2, 4]


def test_rank_correlation_by_hand():
    """Ranks 1.5 1.5 3.5 3.5 and 1 3 2 4: r = 2 / sqrt(4 x 5)."""
    assert rank_correlation(np.array([1, 1, 2, 2]), np.array([0.1, 0.3, 0.2, 0.4])) == pytest.approx(2 / math.sqrt(20))
    x = np.array([[0.1, 5.0], [0.2, -7.0]])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1) and rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert rank_correlation(np.ones(4), np.arange(4)) is None and rank_correlation(np.array([1]), np.array([2])) is None


def test_between_two_depths_fixed_depths_are_mixed():
    by_depth = np.array([4.0, 2.0, 1.0])
    assert [within(by_depth, n) for n in (1, 1.5, 2.25, 3)] == pytest.approx([4.0, 3.0, 1.75, 1.0])
    assert within(by_depth, 9.0) == 1.0, "deeper than S there is nothing"


def test_a_rival_may_be_shallower_than_the_steps_it_may_take():
    assert [within(np.array([3.0, 3.1, 2.9, 3.2]), n) for n in (1, 2, 2.5, 3, 4)] == pytest.approx(
        [3, 3, 2.95, 2.9, 2.9]
    )
    assert within(np.array([0.5, 0.4]), 2.0, np.maximum) == 0.5, "of scores, the highest"


def test_shuffled_is_the_mean_over_all_deals():
    losses, executed = np.random.default_rng(1).random((5, 4)), np.array([1, 4, 2, 2, 3])
    deals = [losses[range(5), np.array(deal) - 1].mean() for deal in itertools.permutations(executed)]
    assert np.std(deals) > 0.01
    found = shuffled(losses.mean(0), DepthStatistics.of(executed, 4).histogram)
    assert found == pytest.approx(np.mean(deals), rel=1e-12)


def reading(losses: np.ndarray) -> Reading:
    return Reading(losses.astype(np.float32), np.zeros(losses.shape, np.float32), np.zeros(losses.shape, np.float32))


def test_a_depth_that_knows_is_better_than_fixed_and_shuffled_ones():
    """Half the decisions need one step and half need three; each pays 1 until it has had its steps."""
    losses = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]] * 10)[None]
    executed = np.array([[1, 3] * 10])
    found = reading(losses).comparing(executed)(slice(None))
    assert (found.learned, found.fixed, found.shuffled, found.mean_steps) == (0.0, 0.5, 0.25, 2.0)


def test_a_depth_that_hurts_does_not_beat_its_rivals():
    """Deeper is worse: no steps are the rival of any, and depth that is better than the mean depth is not good."""
    rng = np.random.default_rng(0)
    losses = np.array([3.0, 3.05, 3.1, 3.15]) + rng.normal(0, 0.05, (40, 8, 4))
    executed = losses[..., 1:].argmin(-1) + 2  # the best of the bad
    costs = Costs(per_step=3, outer=(1, 1))
    rivals = reading(losses).rivals(executed, costs, draws=50)
    assert rivals["shuffled"].is_beaten()
    fixed = rivals["fixed_at_equal_steps"]
    assert (
        fixed.loss == pytest.approx(losses[..., 0].mean(), abs=1e-6) and fixed.difference > 0 and not fixed.is_beaten()
    )
    assert not rivals["fixed_at_equal_blocks"].is_beaten()


def test_the_interval_is_that_of_the_normal_approximation_and_a_function_of_the_seed():
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda i: values[i].mean(), 400, draws=2000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03) and high == pytest.approx(
        values.mean() + half, abs=0.03
    )
    again, other = (bootstrap(lambda i: values[i].mean(), 400, draws=2000, seed=seed) for seed in (0, 1))
    assert again == (low, high) != other
    narrow = bootstrap(lambda i: values[i].mean(), 400, draws=2000, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * values.std() / 20, rel=0.1)


# -- what depths cost --------------------------------------------------------------------------------------------------


def test_block_applications_by_hand():
    """Two blocks a step, one before, three after. The last token's depth of 2 makes those before it at least 2 deep,
    and the output blocks run once for every depth in use from a position on: 3 and 1 and 2; 1 and 2; 2."""
    costs = Costs(per_step=2, outer=(1, 3))
    assert costs.applications(np.array([3, 1, 2])).tolist() == [1 + 6 + 9, 1 + 4 + 6, 1 + 4 + 3]
    rows = np.array([[3, 1, 2], [1, 1, 1]])
    assert costs.applications(rows).tolist() == [[16, 11, 8], [6, 6, 6]], "rows do not know of each other"


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_the_count_is_what_the_cache_runs_token_by_token(seed):
    model = thinker(seed, hrm_H_cycles=2)
    ids = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    costs = Costs.of(model.config)
    generator = np.random.default_rng(seed)
    for forced in (None, generator.integers(1, 6, 12).tolist()):
        cache, executed = HRMCache(model), []
        for t, token in enumerate(ids):
            steps = None if forced is None else forced[t]
            executed += extend(model, cache, {0: [token]}, force_steps=steps).executed_steps
        assert forced is None or executed == forced
        assert cache.work.total == costs.applications(np.array(executed)).sum()
    assert len(set(executed)) > 2


def test_fixed_depths_cost_their_steps_and_depths_that_change_cost_more():
    costs = Costs.of(HRMConfig.preset("base"))
    assert costs.of_fixed(7) == 6 + 7 * 24 + 6
    for depth in (1, 7, 16):
        fixed = np.full((2, 512), depth)
        assert (costs.applications(fixed) == costs.of_fixed(depth)).all()
        assert costs.equal_steps(fixed) == depth
    rng = np.random.default_rng(0)
    mixed, extremes = rng.integers(1, 8, (8, 512)), rng.choice([1, 16], (8, 512))
    # without the input blocks, at T = 512: 209 for depths of 1..7 and 174 for always 7, 395 for 1 or 16, 390 for 16
    assert costs.applications(mixed).mean() - 6 == pytest.approx(209, abs=1)
    assert costs.applications(extremes).mean() - 6 == pytest.approx(395, abs=1)
    assert costs.equal_steps(mixed) > 7 and costs.equal_steps(extremes) > 16


def test_equal_compute_is_the_depth_that_costs_as_much():
    costs, by_depth = Costs(per_step=2, outer=(1, 3)), np.array([4.0, 2.0, 1.0, 0.5])
    executed = np.array([1, 1, 3])  # 1 + 6 + 6, 1 + 6 + 6, 1 + 6 + 3: 12 on average, that of 4 steps
    assert costs.of_fixed(4) == 12 and costs.equal_steps(executed) == pytest.approx(4.0)
    same = reading(np.tile(by_depth, (1, 3, 1)))
    by_steps, by_blocks = (same.comparing(executed[None], c)(slice(None)) for c in (None, costs))
    assert by_steps.fixed == pytest.approx(within(by_depth, 5 / 3)) and by_blocks.fixed == 0.5
    assert by_steps.shuffled == by_blocks.shuffled == pytest.approx((4 + 4 + 1) / 3)
