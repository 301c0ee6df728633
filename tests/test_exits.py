"""Every exit of every prefix from one unroll: held against the model at each depth, and on each prefix alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from golden_files import relative_error
from parity import model_tiles
from small_models import S, thinker
from torch import Tensor

import hrm_kernels as ops
import hrm_model.exits
from hrm_model import HRMForCausalLM
from hrm_model.exits import Exits, cumulative_mean, exits
from hrm_model.halting import executed_steps
from hrm_model.prefixes import prefixes

ROWS, T = 4, 12
LENGTHS = [12, 1, 7, 5]
SEED = 2
"""Of a thinker whose prefixes of these rows take 1, 2, 3, 4 and 5 steps, no margin nearer to 0 than 0.0006."""


def integers(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


IDS, TARGETS = integers(61, ROWS, T), integers(61, ROWS, T, seed=2)
TARGETS[0, 3], TARGETS[2, 6], TARGETS[3] = -1, -1, -1


@pytest.fixture(scope="module", params=["rotary", "learned positions"])
def model(request) -> HRMForCausalLM:
    return thinker(SEED, use_rotary=request.param == "rotary", hrm_H_cycles=2)


@torch.no_grad()
def token_losses(model: HRMForCausalLM, ids: Tensor, targets: Tensor, **options) -> Tensor:
    """[B, T] float64 nats by the model's own logits, 0 without a target."""
    logits = model(ids, **options).logits.double()
    losses = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return losses.masked_fill(targets < 0, 0.0)


@torch.no_grad()
def states(model: HRMForCausalLM, ids: Tensor) -> list[Tensor]:
    """z_H before the first step and after each, on whole rows."""
    rotary, x = model.rotary(ids.shape[1]), model.embed(ids)
    for block in model.input_blocks:
        x = block(x, rotary, None)
    z_H, z_L = model.hrm_core.initial_state(x)
    found = [z_H]
    for _ in range(S):
        z_H, z_L = model.hrm_core.step(x, z_H, z_L, rotary, None)
        found.append(z_H)
    return found


def assert_same(found: Exits, expected: Exits, limit: float = 0.0) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if value is None:
            assert other is None, name
        else:
            torch.testing.assert_close(other, value, rtol=limit, atol=limit, msg=lambda m, name=name: f"{name}: {m}")


# -- what an exit is ---------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_model_at_each_depth(model):
    found = exits(model, IDS, TARGETS)
    expected = torch.stack([token_losses(model, IDS, TARGETS, force_steps=s) for s in range(1, S + 1)], 2)
    torch.testing.assert_close(found.losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert (expected.diff(dim=2).abs() > 1e-3).sum() > 0.9 * 4 * expected[TARGETS >= 0][:, 0].numel(), "depths differ"


@torch.no_grad()
def test_q_is_what_the_head_says_of_each_prefix_alone_at_each_depth(model):
    found = exits(model, IDS[:2], TARGETS[:2])
    for t in range(T):
        for s in range(1, S + 1):
            alone = model(IDS[:2, : t + 1], force_steps=s).q_logits
            torch.testing.assert_close(found.q[:, t, s - 1], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, 0.2, -0.2, math.inf, -math.inf])
def test_margins_decide_as_the_model_does_on_each_prefix(bias):
    model = thinker(SEED)
    executed = executed_steps(exits(model, IDS, TARGETS).margins(bias))
    alone = [model(IDS[:, : t + 1], halt_bias=bias).executed_steps for t in range(T)]
    assert torch.equal(executed, torch.stack(alone, 1))
    assert set(executed.flatten().tolist()) == ({1, 2, 3, 4, 5} if math.isfinite(bias) else {1 if bias > 0 else S})


@torch.no_grad()
def test_a_prefix_scores_as_it_generates(model):
    """At its own depth: the loss of its next token is the model's on the prefix alone."""
    found = exits(model, IDS, TARGETS)
    own = found.losses.gather(2, executed_steps(found.margins())[..., None] - 1)[..., 0]
    for t in range(T):
        alone = token_losses(model, IDS[:, : t + 1], TARGETS[:, : t + 1])[:, -1]
        torch.testing.assert_close(own[:, t].double(), alone, rtol=1e-6, atol=1e-6)


def test_means_are_what_the_head_saw(model):
    found = exits(model, IDS, TARGETS, keep_means=True)
    by_hand = torch.stack(
        [torch.stack([z[:, : t + 1].mean(1) for t in range(T)], 1) for z in states(model, IDS)[1:]], 2
    )
    torch.testing.assert_close(found.means, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.hrm_core.q_head(found.means), found.q, rtol=0, atol=1e-12)
    without = exits(model, IDS, TARGETS)
    assert without.means is None and torch.equal(without.q, found.q)


def test_change_is_that_of_the_prefixs_own_state(model):
    found, after = exits(model, IDS, TARGETS).change, states(model, IDS)
    for s in range(S):
        for t in range(T):
            before, now = (z[:, : t + 1].flatten(1) for z in after[s : s + 2])
            expected = (now - before).norm(dim=1) / before.norm(dim=1)
            torch.testing.assert_close(found[:, t, s].double(), expected, rtol=1e-5, atol=0)


def test_a_state_that_starts_at_zero_changes_infinitely():
    model = thinker(SEED)
    with torch.no_grad():
        model.hrm_core.H_init.zero_()
    change = exits(model, IDS, TARGETS).change
    assert change[..., 0].eq(math.inf).all() and change[..., 1:].isfinite().all() and (change[..., 1:] > 0).all()


def test_a_cumulative_mean_does_not_blur():
    """A float32 sum of 4096 terms around 1000 has lost several bits; this one is right to the last."""
    z = torch.randn(2, 4096, 3, generator=torch.Generator().manual_seed(0)) + 1000
    exact = z.double().cumsum(1) / torch.arange(1, 4097)[:, None]
    assert torch.equal(cumulative_mean(z), exact.float())
    blurred = z.cumsum(1) / torch.arange(1, 4097)[:, None]
    assert not torch.equal(blurred, exact.float())
    assert cumulative_mean(z.bfloat16()).dtype == torch.float32


# -- rows, padding, targets --------------------------------------------------------------------------------------------


def test_a_rows_decision_is_that_of_its_last_prefix(model):
    lengths = torch.tensor(LENGTHS)
    by_prefix = exits(model, IDS, TARGETS, lengths, keep_means=True)
    by_row = exits(model, IDS, TARGETS, lengths, keep_means=True, decisions="row")
    for name in ("q", "change", "means"):
        last = getattr(by_prefix, name)[torch.arange(ROWS), lengths - 1]
        assert torch.equal(getattr(by_row, name)[:, 0], last), name
    assert by_row.weights.tolist() == [[1.0], [1.0], [1.0], [0.0]], "the last row has no target"
    assert not by_row.losses[3].any()
    for row in range(3):
        real = [t for t in range(LENGTHS[row]) if TARGETS[row, t] >= 0]
        torch.testing.assert_close(by_row.losses[row, 0], by_prefix.losses[row, real].mean(0))


@torch.no_grad()
def test_the_row_form_is_the_models_pass_over_the_row(model):
    lengths = torch.tensor(LENGTHS)
    found = exits(model, IDS, TARGETS, lengths, decisions="row")
    whole = model(IDS, lengths=lengths)
    assert torch.equal(executed_steps(found.margins())[:, 0], whole.executed_steps)
    for row in range(3):
        for s in range(1, S + 1):
            loss = model(IDS[row : row + 1], TARGETS[row : row + 1], LENGTHS[row : row + 1], force_steps=s).loss
            assert found.losses[row, 0, s - 1].item() == pytest.approx(loss.item(), rel=1e-6)


def test_without_lengths_a_row_is_whole(model):
    for decisions in ("prefix", "row"):
        given = exits(model, IDS, TARGETS, torch.full((ROWS,), T), decisions=decisions)
        assert_same(exits(model, IDS, TARGETS, decisions=decisions), given, limit=1e-12)


def test_padding_and_missing_targets_weigh_nothing_and_change_nothing(model):
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(T) >= lengths[:, None]
    found = exits(model, IDS, TARGETS, lengths, keep_means=True)
    real = ~padding & (TARGETS >= 0)
    assert torch.equal(found.weights, real.float()) and 0 < real.sum() < real.numel()
    assert not found.losses[~real].any() and (found.losses[real] > 0).all()

    others, targets = IDS.clone(), TARGETS.clone()
    others[padding], targets[padding] = 7, 9
    changed = exits(model, others, targets, lengths, keep_means=True)
    assert torch.equal(changed.weights, found.weights) and torch.equal(changed.losses, found.losses)
    for name in ("q", "change", "means"):
        assert torch.equal(getattr(changed, name)[~padding], getattr(found, name)[~padding]), name

    for row, n in enumerate(LENGTHS):
        alone = exits(model, IDS[row : row + 1, :n], TARGETS[row : row + 1, :n], keep_means=True)
        for name in ("losses", "q", "change", "means", "weights"):
            torch.testing.assert_close(getattr(found, name)[row, :n], getattr(alone, name)[0], rtol=1e-5, atol=1e-9)


def test_what_follows_changes_nothing_before_it(model):
    changed = IDS.clone()
    changed[:, -1] = (IDS[:, -1] + 1) % 61
    first, second = (exits(model, ids, TARGETS) for ids in (IDS, changed))
    torch.testing.assert_close(first.losses[:, :-1], second.losses[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(first.q[:, :-1], second.q[:, :-1], rtol=0, atol=1e-10)
    assert (first.q[:, -1] - second.q[:, -1]).abs().min() > 1e-6


# -- options, and what is left as it was -------------------------------------------------------------------------------


def test_more_and_fewer_steps_than_the_models_are_the_same_steps(model):
    found = exits(model, IDS, TARGETS)
    for n in (1, 3, 7):
        other = exits(model, IDS, TARGETS, max_steps=n)
        assert other.losses.shape[2] == other.q.shape[2] == other.change.shape[2] == n
        least = min(n, S)
        for name in ("losses", "q", "change"):
            assert torch.equal(getattr(other, name)[:, :, :least], getattr(found, name)[:, :, :least]), name


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_how_many_means_are_scored_at_once_changes_nothing(monkeypatch, rows):
    model = thinker(SEED)
    whole = exits(model, IDS, TARGETS)
    monkeypatch.setattr(hrm_model.exits, "HEAD_ROWS", rows)
    assert_same(exits(model, IDS, TARGETS), whole, limit=1e-12)


def test_training_mode_dropout_and_random_numbers_are_left_alone():
    model = thinker(SEED, dropout=0.5)
    quiet = exits(model, IDS, TARGETS)
    model.train()
    model.output_blocks.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = exits(model, IDS, TARGETS, keep_means=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(found.losses, quiet.losses) and torch.equal(found.q, quiet.q), "nothing is dropped"
    assert not any(t.requires_grad for t in vars(found).values()) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_training_in_the_same_autocast_region_still_reaches_every_parameter():
    """Low-precision copies of weights that an unroll without gradient made must not serve a pass with one."""
    model = thinker(SEED, dtype=torch.float32)
    gradients = []
    for unrolled_before in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if unrolled_before:
                found = exits(model, IDS, TARGETS)
            model(IDS, TARGETS, force_steps=[1, 2, 3, 4]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
        assert expected.any() or "q_head" in name, name
    exact = exits(model, IDS, TARGETS)
    assert found.losses.dtype == found.q.dtype == found.change.dtype == torch.float32
    assert 1e-4 < relative_error(found.losses, exact.losses) < 0.05 and relative_error(found.q, exact.q) < 0.05


def test_the_unroll_agrees_with_prefixes(model):
    for row in range(ROWS):
        ids = IDS[row]
        expected = prefixes(model, ids)
        found = exits(model, ids[None, :-1], ids[None, 1:])
        executed = executed_steps(found.margins())[0]
        assert torch.equal(executed, expected.executed[:-1])
        own = found.losses[0].gather(1, executed[:, None] - 1)[:, 0]
        torch.testing.assert_close(own, expected.nll, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.margins()[0].float(), expected.margins[:-1], rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_of_decision_is_refused():
    with pytest.raises(ValueError, match=r"decisions .token. is none of prefix, row"):
        exits(thinker(SEED), IDS, TARGETS, decisions="token")


# -- the unroll, and kernels -------------------------------------------------------------------------------------------


def entered(model: HRMForCausalLM, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the core gets: x, rotary, lengths."""
    rotary = model.rotary(T)
    with torch.no_grad():
        x = model.embed(IDS)
        for block in model.input_blocks:
            x = block(x, rotary, lengths)
    return x, rotary, lengths


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_an_unroll_gives_the_states_of_rows_forced_to_each_depth(model, lengths):
    x, rotary, lengths = entered(model, None if lengths is None else torch.tensor(lengths))
    unrolled = list(model.hrm_core.unroll(x, rotary, lengths, S))
    assert len(unrolled) == S
    for s, z_H in enumerate(unrolled, 1):
        with torch.no_grad():
            forced = model.hrm_core(x, rotary, lengths, [s] * ROWS, S, 0.0)
        assert torch.equal(z_H, forced.z_H) and not z_H.requires_grad


def test_between_steps_the_callers_mode_is_its_own_and_states_stay():
    model = thinker(SEED)
    x, rotary, _ = entered(model, None)
    kept = []
    for z_H in model.hrm_core.unroll(x, rotary, None, 3):
        assert torch.is_grad_enabled()
        with torch.no_grad():
            kept.append((z_H, z_H.clone()))
    assert torch.is_grad_enabled()
    assert all(torch.equal(z_H, copied) for z_H, copied in kept), "later steps do not write to earlier states"
    with torch.no_grad():
        for _ in model.hrm_core.unroll(x, rotary, None, 2):
            assert not torch.is_grad_enabled()


@pytest.fixture(scope="module")
def small() -> HRMForCausalLM:
    return thinker(SEED, dtype=torch.float32)


@pytest.mark.parametrize("lengths", [None, [5, 1, 4, 3]], ids=["whole", "lengths"])
def test_an_unroll_on_kernels_equals_the_hosts(small, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    x, rotary, _ = entered(small, None)
    x, rotary = x[:, :5], rotary[:5]
    with ops.use_backend("reference"):
        expected = list(small.hrm_core.unroll(x, rotary, lengths, 2))
    with model_tiles(), ops.use_backend("triton"):
        found = list(small.hrm_core.unroll(x, rotary, lengths, 2))
    real = torch.arange(5) < (torch.full((ROWS,), 5) if lengths is None else lengths)[:, None]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a[real], b[real]) <= 1e-5 and a.isfinite().all()


@pytest.mark.parametrize("decisions", ["prefix", "row"])
def test_exits_on_kernels_equal_the_references(small, decisions):
    ids, targets, lengths = IDS[:, :5], TARGETS[:, :5], torch.tensor([5, 1, 4, 3])
    real = slice(None) if decisions == "row" else torch.arange(5) < lengths[:, None]
    model = copy.deepcopy(small)
    options = dict(decisions=decisions, max_steps=2, keep_means=True)
    with ops.use_backend("reference"):
        expected = exits(model, ids, targets, lengths, **options)
    with model_tiles(), ops.use_backend("triton"):
        found = exits(model, ids, targets, lengths, **options)
    assert torch.equal(found.weights, expected.weights)
    for name in ("losses", "q", "change", "means"):
        a, b = getattr(found, name)[real], getattr(expected, name)[real]
        assert relative_error(a, b) <= 1e-5, name
    assert not found.losses[found.weights == 0].any()
