"""The halting head's own training step: one quotient for the whole batch, however it was cut, on however many ranks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_models import S, thinker
from torch import Tensor

import hrm_model.training.head
from hrm_model import HRMForCausalLM
from hrm_model.exits import exits
from hrm_model.halting import OBJECTIVES, Price, advantages, head_loss
from hrm_model.training.head import HeadStep, HeadTraining

ROWS, T, PRICE, SEED = 4, 8, 0.05, 2
LENGTHS = torch.tensor([8, 1, 5, 6])


def integers(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


IDS, TARGETS = integers(61, ROWS, T), integers(61, ROWS, T, seed=2)
TARGETS[0, 3], TARGETS[3, 5] = -1, -1


def taken(model: HRMForCausalLM) -> list[Tensor]:
    """The head's gradient, taken away."""
    head = model.hrm_core.q_head
    found = [head.weight.grad, head.bias.grad]
    head.weight.grad = head.bias.grad = None
    return found


def step(
    model: HRMForCausalLM, *batches: tuple, objective: str = "policy", norm: float = 0.0, price: float = PRICE,
    decisions: str = "prefix",
) -> tuple[HeadStep, list[Tensor]]:  # fmt: skip
    """(HeadStep, gradient) of one step over these (ids, targets, lengths)."""
    training = HeadTraining(model, objective, Price(price), decisions)
    for batch in batches:
        training.add(*batch)
    found = training.finish(norm)
    return found, taken(model)


def cut(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    return IDS[rows], TARGETS[rows], LENGTHS[rows]


WHOLE = cut(slice(ROWS))


@torch.no_grad()
def every_exit(model: HRMForCausalLM, decisions: str) -> tuple[Tensor, Tensor]:
    """(losses [N, S], what the head sees [N, S, C]) of decisions with a target, from rows that run alone."""
    losses, means = [], []
    core = model.hrm_core
    for row, n in enumerate(LENGTHS.tolist()):
        ids, targets = IDS[row : row + 1, :n], TARGETS[row, :n]
        rotary, x = model.rotary(n), model.embed(ids)
        for block in model.input_blocks:
            x = block(x, rotary, None)
        z_H, z_L = core.initial_state(x)
        of_tokens, seen = [], []
        for _ in range(S):
            z_H, z_L = core.step(x, z_H, z_L, rotary, None)
            log_probs = model.lm_head(model.decode(z_H, rotary, None))[0].log_softmax(-1)
            of_tokens.append(-log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0])
            seen.append(torch.stack([z_H[0, : t + 1].mean(0) for t in range(n)]))
        real = targets >= 0
        of_tokens, seen = torch.stack(of_tokens, 1)[real], torch.stack(seen, 1)
        losses.append(of_tokens.mean(0, keepdim=True) if decisions == "row" else of_tokens)
        means.append(seen[-1:] if decisions == "row" else seen[real])
    return torch.cat(losses), torch.cat(means)


def assert_close(found: list[Tensor], expected: list[Tensor], limit: float = 1e-5) -> None:
    """Losses are float32."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= limit * b.norm(), f"relative error {(a - b).norm() / b.norm():.1e}"
        assert b.any()


def assert_same_step(found: HeadStep, expected: HeadStep) -> None:
    for name, value in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name


# -- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decisions", ["prefix", "row"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_that_of_the_quotient_over_all_decisions_at_once(objective, decisions):
    model = thinker(SEED)
    found, gradient = step(model, WHOLE, objective=objective, decisions=decisions)
    losses, means = every_exit(model, decisions)
    head = model.hrm_core.q_head
    total, normaliser = head_loss(objective, losses, head(means), torch.ones(len(losses)), PRICE)
    expected = torch.autograd.grad(total / normaliser, (head.weight, head.bias))
    assert_close(gradient, list(expected))
    assert found.loss == pytest.approx((total / normaliser).item(), rel=1e-6)
    assert found.normaliser == pytest.approx(normaliser.item(), rel=1e-6)
    assert found.n == len(losses) == (ROWS if decisions == "row" else 8 + 1 + 5 + 6 - 2)


def test_a_decision_without_a_target_counts_for_nothing():
    """Whatever the padding holds. (Position 5 of the last row has no target either.)"""
    model = thinker(SEED)
    ids, targets = IDS.clone(), TARGETS.clone()
    padding = torch.arange(T) >= LENGTHS[:, None]
    ids[padding], targets[padding] = 3, 4
    expected, gradient = step(model, WHOLE)
    found, other = step(model, (ids, targets, LENGTHS))
    assert_same_step(found, expected)
    assert_close(other, gradient, 1e-12)


CUTS = {
    "two halves": [slice(0, 2), slice(2, 4)],
    "unequal": [slice(0, 1), slice(1, 4)],
    "row by row, backwards": [slice(3, 4), slice(2, 3), slice(1, 2), slice(0, 1)],
    "one of them empty": [slice(0, 0), slice(0, 4)],
}


@pytest.mark.parametrize("decisions", ["prefix", "row"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_how_a_batch_is_cut_into_micro_batches_plays_no_part(cuts, decisions):
    model = thinker(SEED)
    expected, gradient = step(model, WHOLE, decisions=decisions)
    found, other = step(model, *map(cut, cuts), decisions=decisions)
    assert_close(other, gradient)
    assert_same_step(found, expected)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_nor_how_many_rows_are_unrolled_at_once(monkeypatch, rows_at_once):
    model = thinker(SEED)
    expected, gradient = step(model, WHOLE)
    of_a_row = T * S * model.config.n_embd * 4
    monkeypatch.setattr(hrm_model.training.head, "MEANS_BYTES", rows_at_once * of_a_row + 1)
    groups = []
    forward = model.hrm_core.unroll
    model.hrm_core.unroll = lambda x, *rest: groups.append(len(x)) or forward(x, *rest)
    found, other = step(model, WHOLE)
    assert groups == {1: [1, 1, 1, 1], 3: [3, 1]}[rows_at_once]
    assert_close(other, gradient)
    assert_same_step(found, expected)


def test_decisions_that_were_unrolled_already_give_the_same():
    model = thinker(SEED)
    expected, gradient = step(model, WHOLE)
    training = HeadTraining(model, "policy", Price(PRICE))
    with torch.no_grad():  # the caller's mode plays no part
        training.add_exits(exits(model, *WHOLE, keep_means=True))
        assert_same_step(training.finish(0.0), expected)
    assert_close(taken(model), gradient)


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    model = thinker(SEED)
    _, whole = step(model, WHOLE)
    size = torch.cat([g.flatten() for g in whole]).norm().item()
    for largest, scale in ((0.0, 1.0), (2 * size, 1.0), (0.5 * size, 0.5), (0.001 * size, 0.001)):
        found, clipped = step(model, WHOLE, norm=largest)
        assert_close(clipped, [g * scale for g in whole], limit=1e-4)
        assert found.loss == pytest.approx(step(model, WHOLE)[0].loss), "the loss is not"


@pytest.mark.parametrize("batches", [[], [(IDS, torch.full_like(TARGETS, -1))], [cut(slice(0, 0))]])
def test_where_nobody_explored_the_gradient_is_what_it_was(batches):
    model = thinker(SEED)
    price = Price(PRICE, target=2.0)
    training = HeadTraining(model, "policy", price)
    head = model.hrm_core.q_head
    for kept in (None, torch.full_like(head.weight, 3.0)):
        head.weight.grad = kept
        for batch in batches:
            training.add(*batch)
        assert training.finish(1.0) is None
        assert head.bias.grad is None and price.value == PRICE
        assert head.weight.grad is kept and (kept is None or kept.eq(3.0).all())


@pytest.mark.parametrize("broken", ["ln_f.weight", "hrm_core.H_init"])
def test_a_loss_that_is_not_finite_is_reported_and_moves_nothing(broken):
    """Neither the head nor the price, and the next step knows nothing of it."""
    model, price = thinker(SEED), Price(PRICE, target=1.0)
    head, weight = model.hrm_core.q_head, model.get_parameter(broken)
    training = HeadTraining(model, "policy", price)
    kept, whole = torch.full_like(head.weight, 3.0), weight.detach().clone()
    head.weight.grad = kept
    with torch.no_grad():
        weight[0] = math.nan
    training.add(*WHOLE)
    found = training.finish(1.0)
    assert math.isnan(found.loss) and found.n == 18
    assert head.weight.grad is kept and kept.eq(3.0).all() and head.bias.grad is None and price.value == PRICE
    with torch.no_grad():
        weight.copy_(whole)
    training.add(*WHOLE)
    assert_same_step(training.finish(0.0), step(model, WHOLE)[0])
    assert price.value > PRICE


def test_each_step_begins_anew():
    model = thinker(SEED)
    training = HeadTraining(model, "policy", Price(PRICE))
    training.add(*cut(slice(0, 2)))
    training.finish(0.0)
    taken(model)
    assert training.finish(0.0) is None
    training.add(*cut(slice(2, 4)))
    found = training.finish(0.0)
    expected, gradient = step(model, cut(slice(2, 4)))
    training.add(*cut(slice(2, 4)))
    training.finish(0.0)
    assert_same_step(found, expected)
    assert_close(taken(model), gradient)


def test_only_the_head_is_trained_and_gets_nothing_from_the_models_own_loss():
    model = thinker(SEED).train()
    model(IDS, TARGETS, LENGTHS).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = HeadTraining(model, "policy", Price(PRICE))
    training.add(*WHOLE)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters()), "before finish, nothing"
    training.finish(0.0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])}
    assert changed == {"hrm_core.q_head.weight", "hrm_core.q_head.bias"}
    assert not any(before[name].any() for name in changed)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()) and model.training


def test_a_model_in_half_precision_or_under_autocast_gets_a_gradient_of_its_heads_type():
    _, exact = step(thinker(SEED), WHOLE)
    model = thinker(SEED, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, autocast = step(model, WHOLE)
    _, narrow = step(thinker(SEED, dtype=torch.bfloat16), WHOLE)
    for gradient, dtype in ((autocast, torch.float32), (narrow, torch.bfloat16)):
        assert all(g.dtype == dtype for g in gradient)
        similarity = torch.cosine_similarity(gradient[0].double().flatten(), exact[0].flatten(), 0)
        assert similarity > 0.5


def test_following_the_gradient_makes_decisions_cost_less():
    """Of every exit, over the same rows: loss and price of the steps that the head decides."""
    model = thinker(SEED)
    training, head = HeadTraining(model, "policy", Price(PRICE)), model.hrm_core.q_head
    found = exits(model, *WHOLE, keep_means=True)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    seen = []
    for _ in range(100):
        training.add_exits(found)
        seen.append(training.finish(1.0))
        optimizer.step()
    costs = [s.own + PRICE * s.depths().mean for s in (seen[0], seen[-1])]
    losses, _ = every_exit(model, "prefix")
    best_fixed = (losses.mean(0) + PRICE * torch.arange(1, S + 1)).min().item()
    assert costs[1] < min(costs[0], best_fixed) - 0.2
    assert seen[-1].loss < 0.6 * seen[0].loss and seen[-1].agreement > seen[0].agreement + 0.1


# -- what a step reports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("price", [PRICE, 1.0])
@pytest.mark.parametrize("decisions", ["prefix", "row"])
def test_histogram_own_loss_and_agreement_by_hand(decisions, price):
    model = thinker(SEED)
    found, _ = step(model, WHOLE, decisions=decisions, price=price)
    losses, means = every_exit(model, decisions)
    with torch.no_grad():
        q = model.hrm_core.q_head(means)
    histogram, own, agree, gains = [0] * S, 0.0, 0, torch.zeros(S - 1, dtype=torch.float64)
    for loss, scores in zip(losses.tolist(), q.tolist(), strict=True):
        margins = [halt - go for halt, go in scores]
        executed = next((s for s in range(1, S) if margins[s - 1] > 0), S)
        costs = [x + price * s for s, x in enumerate(loss, 1)]
        histogram[executed - 1] += 1
        own += loss[executed - 1]
        agree += costs.index(min(costs)) + 1 == executed
        gains += advantages(torch.tensor([loss]).double(), torch.tensor([margins]) < 0, price)[0]
    n = len(losses)
    assert found.histogram == histogram and len([x for x in histogram if x]) > 2 and sum(histogram) == found.n == n
    assert found.own == pytest.approx(own / n, rel=1e-6)
    assert agree < n and found.agreement == pytest.approx(agree / n) and (agree > 0 or decisions == "row")
    assert found.exit_losses == pytest.approx(losses.mean(0).tolist(), rel=1e-6)
    assert found.advantages == pytest.approx((gains / n).tolist(), rel=1e-5)
    assert found.price == price


def test_two_steps_added_are_the_step_over_both():
    model = thinker(SEED)
    whole, _ = step(model, WHOLE)
    first, second = (step(model, cut(rows))[0] for rows in (slice(0, 1), slice(1, 4)))
    assert first.n != second.n and first.histogram != second.histogram
    assert_same_step(first + second, whole)
    assert_same_step(second + first, whole)
    assert (first + replace(second, price=0.5)).price == 0.5, "the price is the last step's"


def test_added_steps_without_anything_to_gain_have_no_loss():
    """A normaliser of 0: every advantage is 0, and so is the loss."""
    made = HeadStep(3, 0.0, 0.0, PRICE, [1.0, 1.0], [0.0], [3, 0], 1.0, 1.0)
    assert (made + made).loss == 0.0 and (made + made).n == 6
    other = HeadStep(3, 0.7, 2.0, PRICE, [1.0, 1.0], [0.5], [0, 3], 1.0, 0.0)
    assert (made + other).loss == pytest.approx(0.7), "weighed by the normaliser, not by the number of decisions"


def test_the_price_in_force_is_reported_and_then_steered_by_the_depth_that_the_head_decides():
    model = thinker(SEED)
    price = Price(PRICE, target=1.0)
    training = HeadTraining(model, "policy", price)
    training.add(*WHOLE)
    found = training.finish(0.0)
    mean = found.depths().mean
    assert mean == sum(s * n for s, n in enumerate(found.histogram, 1)) / found.n and 1.5 < mean < 3
    steered = price.value
    assert found.price == PRICE and steered == pytest.approx(PRICE * math.exp(0.003 * (mean - 1)))
    training.add(*WHOLE)
    assert training.finish(0.0).price == steered < price.value


def test_what_metrics_keep_says_it_all_in_json():
    found, _ = step(thinker(SEED), WHOLE)
    kept = json.loads(json.dumps(found.record()))
    assert kept["head_depths"] == {str(s): n for s, n in enumerate(found.histogram, 1)}
    assert kept["exit_losses"] == {str(s): x for s, x in enumerate(found.exit_losses, 1)}
    assert kept["advantages"] == {str(s): x for s, x in enumerate(found.advantages, 1)} and len(kept["advantages"]) == 4
    assert (kept["head_loss"], kept["price"], kept["head_own_loss"]) == (found.loss, PRICE, found.own)
    assert kept["head_steps"] == found.depths().mean and kept["oracle_agreement"] == found.agreement
    assert 0 < kept["head_dispersion"] == found.depths().dispersion < 1


# -- ranks -------------------------------------------------------------------------------------------------------------

SHARES = {
    "halves": (slice(0, 2), slice(2, 4)),
    "unequal": (slice(0, 1), slice(1, 4)),
    "one without explorers": (slice(0, 4), slice(0, 0)),
    "nobody explored": (slice(0, 0), slice(0, 0)),
}


def one_rank(rank: int, folder: str) -> None:
    """A process of two: finish a step for each of SHARES, in float64 and in bfloat16."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for name, shares in SHARES.items():
        for dtype in (torch.float64, torch.bfloat16):
            model = thinker(SEED, dtype=dtype)
            price = Price(PRICE, target=1.0)
            training = HeadTraining(model, "policy", price)
            if len(IDS[shares[rank]]):
                training.add(*cut(shares[rank]))
            found = training.finish(0.01)
            results[name, dtype] = found and asdict(found), taken(model), price.value
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("shares", [name for name in SHARES if name != "nobody explored"])
def test_ranks_with_parts_of_the_rows_get_the_gradient_of_one_process_with_all(ranks, shares):
    model = thinker(SEED)
    price = Price(PRICE, target=1.0)
    training = HeadTraining(model, "policy", price)
    training.add(*WHOLE)
    expected, gradient = training.finish(0.01), taken(model)
    for found, other, steered in (results[shares, torch.float64] for results in ranks):
        assert_close(other, gradient)
        assert_same_step(HeadStep(**found), expected)
        assert steered == pytest.approx(price.value, rel=1e-12) and steered != PRICE


@pytest.mark.parametrize("shares", [name for name in SHARES if name != "nobody explored"])
def test_ranks_agree_to_the_bit_in_half_precision_too(ranks, shares):
    (first, gradient, price), (second, other, other_price) = (results[shares, torch.bfloat16] for results in ranks)
    assert first == second and first["n"] == 18 and price == other_price
    assert all(torch.equal(a, b) and a.any() for a, b in zip(gradient, other, strict=True))


def test_where_no_rank_explored_all_ranks_go_on_as_they_were(ranks):
    for results in ranks:
        for dtype in (torch.float64, torch.bfloat16):
            assert results["nobody explored", dtype] == (None, [None, None], PRICE)
