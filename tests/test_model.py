"""The model's behaviour: depth per row, frozen rows, gradients, every configuration, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden_files import load, relative_error
from parity import model_tiles
from small_models import thinker
from torch import Tensor

import hrm_kernels as ops
from hrm_model import HRMConfig, HRMForCausalLM

TINY = dict(vocab_size=97, n_embd=16, block_size=12, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
TINY |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=4)


def build(**changes) -> HRMForCausalLM:
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():  # wide weights, so that depths and rows differ visibly
        for p in model.parameters():
            p.mul_(8.0 if p.dim() > 1 else 1.0)
    return model


def batch(n_rows: int = 4, n_tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 97, (n_rows, n_tokens), generator=torch.Generator().manual_seed(1))


def test_base_model_has_the_published_parameters():
    model = HRMForCausalLM(HRMConfig.preset("base"))
    assert model.num_parameters() == 82_767_554
    assert len(list(model.named_parameters())) == 186
    assert len(model.state_dict()) == 187
    assert model.lm_head.weight is model.wte.weight


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**{**TINY, "n_embd": 128, "n_head": 4, "bias": True}))
    layers = 4
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.input_blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.input_blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / (2 * layers) ** 0.5, rel=0.05)
    assert model.hrm_core.L_level.layers[0].attn.c_proj.weight.std().item() == pytest.approx(0.00707, rel=0.05)
    assert model.hrm_core.H_init.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.hrm_core.q_head.bias.tolist() == [0.0, 0.0]
    assert model.ln_f.weight.tolist() == [1.0] * 128


# -- depth -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forced_rows_run_exactly_their_steps():
    model, ids = build(), batch()
    mixed = model(ids, force_steps=[3, 1, 4, 2])
    assert mixed.executed_steps.tolist() == mixed.steps_taken.tolist() == [3, 1, 4, 2]
    for row, n in enumerate([3, 1, 4, 2]):
        alone = model(ids[row : row + 1], force_steps=n)
        assert relative_error(mixed.logits[row], alone.logits[0]) <= 1e-5
        assert relative_error(mixed.q_logits[row], alone.q_logits[0]) <= 1e-5


@torch.no_grad()
def test_a_zero_in_force_steps_lets_the_head_decide():
    model, ids = build(), batch()
    free = model(ids)
    mixed = model(ids, force_steps=torch.tensor([0, 2, 0, 4]))
    assert mixed.executed_steps[[1, 3]].tolist() == [2, 4]
    assert torch.equal(mixed.executed_steps[[0, 2]], free.executed_steps[[0, 2]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_gqa", "head_dim_56", "no_rope_mha_gelu_bias"])
def test_a_row_that_decides_equals_the_same_row_forced_to_its_depth(name):
    golden = load(name)
    model, ids = golden.model(), golden.numbers["input_ids"]
    free = model(ids)
    assert len(set(free.executed_steps.tolist())) > 1, "the golden rows must stop at different steps"
    forced = model(ids, force_steps=free.executed_steps)
    assert relative_error(forced.logits, free.logits) <= 1e-5
    assert relative_error(forced.q_logits, free.q_logits) <= 1e-5
    halted = free.executed_steps - free.steps_taken
    assert set(halted.tolist()) <= {0, 1} and halted.sum() > 0
    assert forced.steps_taken.tolist() == free.executed_steps.tolist(), "a forced row did not decide"


@torch.no_grad()
def test_state_of_a_halted_row_is_bitwise_what_it_was_when_it_halted():
    model, ids = build(), batch(3)
    states = []
    step = model.hrm_core.step
    model.hrm_core.step = lambda *a, **k: states.append(step(*a, **k)) or states[-1]
    seen = {}
    decode = model.decode
    model.decode = lambda z_H, *a: seen.update(z_H=z_H) or decode(z_H, *a)
    model(ids, force_steps=[1, 4, 2])
    assert torch.equal(seen["z_H"][0], states[0][0][0])
    assert torch.equal(seen["z_H"][2], states[1][0][1])
    assert [len(z_H) for z_H, _ in states] == [3, 2, 1, 1], "rows that are done must not be computed"


@torch.no_grad()
def test_halt_bias_moves_depth_from_one_step_to_all():
    model, ids = build(), batch()
    assert model(ids, halt_bias=1e9).executed_steps.tolist() == [1] * 4
    assert model(ids, halt_bias=1e9).steps_taken.tolist() == [0] * 4
    never = model(ids, halt_bias=-1e9)
    assert never.executed_steps.tolist() == never.steps_taken.tolist() == [4] * 4


@torch.no_grad()
def test_halting_is_strict():
    model = build()
    model.hrm_core.q_head.weight.zero_()
    model.hrm_core.q_head.bias.copy_(torch.tensor([0.0, 0.5]))
    assert model(batch(), halt_bias=0.5).executed_steps.tolist() == [4] * 4
    assert model(batch(), halt_bias=0.500001).executed_steps.tolist() == [1] * 4


@torch.no_grad()
def test_max_steps_of_a_call_acts_as_the_configured_one():
    shallow, ids = build(hrm_max_steps=2), batch()
    out = build(hrm_max_steps=4)(ids, max_steps=2, halt_bias=-1e9)
    expected = shallow(ids, halt_bias=-1e9)
    assert torch.equal(out.logits, expected.logits)
    assert out.steps_taken.tolist() == [2] * 4
    deeper = build()(ids, max_steps=6, force_steps=6)
    assert deeper.executed_steps.tolist() == [6] * 4


@torch.no_grad()
def test_nothing_is_decided_when_max_steps_is_one():
    out = build(hrm_max_steps=1)(batch(), halt_bias=1e9)
    assert out.executed_steps.tolist() == out.steps_taken.tolist() == [1] * 4


@torch.no_grad()
def test_training_mode_decides_without_bias_and_eval_mode_with_the_configured_one():
    model = build(halt_bias=1e9)
    model.hrm_core.q_head.weight.zero_()
    model.hrm_core.q_head.bias.copy_(torch.tensor([0.0, 1.0]))
    assert model(batch()).executed_steps.tolist() == [1] * 4
    assert model.train()(batch()).executed_steps.tolist() == [4] * 4


# -- lengths and targets -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_changes_nothing_and_counts_for_nothing():
    model, ids = build(), batch(1, 6)
    padded = torch.cat([ids, torch.full((1, 4), 5)], dim=1)
    alone, beside = model(ids), model(padded, lengths=[6])
    assert alone.executed_steps.equal(beside.executed_steps)
    assert relative_error(beside.logits[:, :6], alone.logits) <= 1e-5
    targets = torch.randint(0, 97, (1, 10))
    assert model(padded, targets, lengths=[6]).loss.item() == pytest.approx(
        model(ids, targets[:, :6]).loss.item(), rel=1e-5
    )


@torch.no_grad()
def test_loss_is_the_cross_entropy_over_targets_that_count():
    model, ids = build(), batch()
    targets = torch.randint(0, 97, ids.shape)
    targets[:, ::2] = -1
    out = model(ids, targets, return_logits=True)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(ids, targets).logits is None


# -- gradients ---------------------------------------------------------------------------------------------------------

NO_LOSS = {"hrm_core.q_head.weight", "hrm_core.q_head.bias"}
INIT = {"hrm_core.H_init", "hrm_core.L_init"}


def zero_gradients(model: HRMForCausalLM) -> set[str]:
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient at all: {missing}"
    return {name for name, p in model.named_parameters() if not p.grad.any()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [[2, 3, 4, 2], [4, 4, 4, 4], [3, 1, 4, 2], [1, 1, 1, 1]])
def test_every_parameter_gets_a_gradient_whatever_stopped_when(steps, dtype):
    model, ids = build().train(), batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(ids, ids, force_steps=steps).loss.backward()
    assert zero_gradients(model) == NO_LOSS | (set() if 1 in steps else INIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [1e9, 0.0, -1e9])
def test_every_parameter_gets_a_gradient_when_the_head_decides(bias, dtype):
    model, ids = build().train(), batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(ids, ids, halt_bias=bias)
        out.loss.backward()
    assert zero_gradients(model) == NO_LOSS | (set() if 1 in out.executed_steps else INIT)


def gradients(model: HRMForCausalLM) -> dict[str, Tensor]:
    """Every parameter's gradient, taken away."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float, absolute: float):
    for name, truth in expected.items():
        error = (found[name] - truth).norm()
        assert error <= relative * truth.norm() + absolute, f"{name}: off by {error}"


def through_the_last_steps(model: HRMForCausalLM, ids: Tensor, steps: list[int], n: int) -> dict[str, Tensor]:
    """Autograd through the last n steps of each row, the steps before them detached by hand."""
    rotary, core = model.rotary(ids.shape[1]), model.hrm_core
    losses = []
    for row, depth in enumerate(steps):
        x = model.embed(ids[row : row + 1])
        for block in model.input_blocks:
            x = block(x, rotary, None)
        z_H, z_L = core.initial_state(x)
        for left in range(depth, 0, -1):
            if left == n and depth > n:
                z_H, z_L = z_H.detach(), z_L.detach()
            z_H, z_L = core.step(x if left <= n else x.detach(), z_H, z_L, rotary, None)
        losses.append(model.loss(model.decode(z_H, rotary, None), ids[row : row + 1], None))
    torch.stack(losses).mean().backward()
    return gradients(model)


def test_replayed_gradient_is_the_gradient_of_the_last_step_alone():
    model, ids = build().train(), batch(3)
    steps = [1, 3, 2]
    model(ids, ids, force_steps=steps).loss.backward()
    found = gradients(model)
    assert_same_gradients(found, through_the_last_steps(model, ids, steps, 1), 1e-4, 1e-7)


def test_halted_rows_have_the_gradient_of_the_same_rows_forced():
    golden = load("tiny_gqa")
    model, ids = golden.model(), golden.numbers["input_ids"]
    out = model(ids, ids)
    assert len(set(out.executed_steps.tolist())) > 1
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, ids, force_steps=out.executed_steps).loss.backward()
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-8, name


# -- gradients of several steps ----------------------------------------------------------------------------------------


def thinking(dtype: torch.dtype = torch.float64) -> tuple[HRMForCausalLM, Tensor]:
    """A model and rows that stop after 1, 2 and 5 steps: at other depths if only some of their tokens decide."""
    return thinker(3, dtype), torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(36))


def test_one_gradient_step_is_the_default_bit_for_bit():
    model, ids = thinking(torch.float32)
    model.train()
    for steps in (None, [1, 3, 5, 2]):
        outs = [model(ids, ids, force_steps=steps, **options) for options in ({}, dict(gradient_steps=1))]
        assert torch.equal(outs[0].loss, outs[1].loss) and torch.equal(outs[0].row_steps, outs[1].row_steps)
        found = []
        for out in outs:
            out.loss.backward()
            found.append(gradients(model))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("n", [2, 3, 4, 9])
@pytest.mark.parametrize("steps", [[1, 3, 2], [4, 4, 4], [2, 2, 2], [1, 1, 1], [4, 1, 3]])
def test_gradient_of_several_steps_is_that_of_each_rows_last_ones(steps, n):
    """Of all steps where a row runs no more than that, the states that it starts from included."""
    model, ids = build().double().train(), batch(3)
    out = model(ids, ids, force_steps=steps, gradient_steps=n)
    out.loss.backward()
    found, one_less = gradients(model), through_the_last_steps(model, ids, steps, n - 1)
    assert_same_gradients(found, through_the_last_steps(model, ids, steps, n), 1e-9, 1e-14)
    if max(steps) >= n:
        name = "hrm_core.L_level.layers.0.attn.q_proj.weight"
        assert (found[name] - one_less[name]).norm() > 1e-3 * found[name].norm(), "every step has its share"
    with torch.no_grad():
        alone = model(ids, ids, force_steps=steps)
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-12)
    assert out.executed_steps.tolist() == out.steps_taken.tolist() == steps
    torch.testing.assert_close(out.q_logits, alone.q_logits)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("bias", [0.0, 0.3, 1e9, -1e9])
def test_rows_that_decide_keep_their_decision_when_several_steps_are_replayed(n, bias):
    model, ids = thinking()
    lengths = [9, 1, 5, 7]
    options = dict(lengths=lengths, halt_bias=bias)
    with torch.no_grad():
        expected = model(ids, ids, **options)
    out = model(ids, ids, gradient_steps=n, **options)
    assert torch.equal(out.executed_steps, expected.executed_steps)
    assert torch.equal(out.steps_taken, expected.steps_taken)
    assert abs(bias) > 1 or len(set(out.executed_steps.tolist())) > 2
    torch.testing.assert_close(out.q_logits, expected.q_logits)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    out.loss.backward()
    found = gradients(model)
    model(ids, ids, lengths, force_steps=out.executed_steps, gradient_steps=n).loss.backward()
    assert_same_gradients(found, gradients(model), 1e-9, 1e-14)


def test_rows_that_decide_and_rows_that_do_not_stand_side_by_side():
    model, ids = thinking()
    depths = model(ids).executed_steps.tolist()
    forced = [0, 4, 0, 2]
    out = model(ids, ids, force_steps=forced, gradient_steps=2)
    steps = [n or decided for n, decided in zip(forced, depths, strict=True)]
    assert out.executed_steps.tolist() == steps
    assert (out.executed_steps - out.steps_taken)[[1, 3]].tolist() == [0, 0], "a forced row did not decide"
    out.loss.backward()
    assert_same_gradients(gradients(model), through_the_last_steps(model, ids, steps, 2), 1e-9, 1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("steps", [[4, 2, 5, 3], [1, 1, 2, 1], None])
def test_row_steps_count_what_was_computed(steps, n):
    """Held against the calls of a step that really were made, rows of each."""
    model, ids = thinking()
    ran, step = [0, 0], model.hrm_core.step

    def counted(x, *rest, **options):
        ran[torch.is_grad_enabled()] += len(x)
        return step(x, *rest, **options)

    model.hrm_core.step = counted
    out = model(ids, ids, force_steps=steps, gradient_steps=n)
    assert out.row_steps.tolist() == ran
    assert ran[1] == 4 * min(n, int(out.executed_steps.max()))
    if steps is not None:
        assert ran[0] == sum(max(depth - n, 0) for depth in steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [[2, 3, 4, 2], [4, 4, 4, 4], [3, 1, 4, 2], [1, 1, 1, 1], None])
@pytest.mark.parametrize("n", [2, 3])
def test_every_parameter_gets_a_gradient_from_several_steps(n, steps, dtype):
    model, ids = build().train(), batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(ids, ids, force_steps=steps, gradient_steps=n)
        out.loss.backward()
    reaches_the_start = any(depth <= n for depth in out.executed_steps.tolist())
    assert zero_gradients(model) == NO_LOSS | (set() if reaches_the_start else INIT)


def test_recomputed_activations_change_no_gradient_of_several_steps():
    model, ids = build().train(), batch()
    found = []
    for recompute in (False, True):
        model.recompute_activations(recompute)
        model(ids, ids, force_steps=[4, 2, 3, 1], gradient_steps=3).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(*found, 1e-6, 1e-9)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in unread padding
def test_gradient_of_several_steps_on_kernels_is_the_references():
    model, ids = thinking(torch.float32)
    ids = ids[:3, :4]
    found = []
    for backend in ("reference", "triton"):
        with model_tiles(), ops.use_backend(backend):
            out = model(ids, ids, [4, 1, 3], force_steps=[3, 0, 1], gradient_steps=2, max_steps=3)
            out.loss.backward()
        found.append((out, gradients(model)))
    assert torch.equal(found[0][0].executed_steps, found[1][0].executed_steps)
    assert torch.equal(found[0][0].row_steps, found[1][0].row_steps)
    assert_same_gradients(found[1][1], found[0][1], 1e-4, 1e-7)


# -- the published gradient --------------------------------------------------------------------------------------------


def test_published_gradient_reaches_only_rows_that_run_all_steps():
    model, ids = build().train(), batch()
    model(ids, ids, force_steps=[1, 2, 3, 3], gradient="published").loss.backward()
    reached = {name for name, _ in model.named_parameters()} - zero_gradients(model)
    assert reached == {n for n, _ in model.named_parameters() if n.startswith(("wte", "output_blocks", "ln_f"))}

    model.zero_grad()
    model(ids, ids, force_steps=[1, 4, 3, 3], gradient="published").loss.backward()
    assert zero_gradients(model) == NO_LOSS | INIT


def test_published_exploration_forbids_halting_before_a_random_step():
    ids = batch()
    for probability, depths in ((0.0, {1}), (1.0, {1, 2, 3, 4})):
        model = build(hrm_exploration_prob=probability).train()
        torch.manual_seed(3)
        outs = [model(ids, halt_bias=1e9, gradient="published").executed_steps for _ in range(40)]
        assert {int(n) for out in outs for n in out} <= depths
        assert any(int(out[0]) > 1 for out in outs) == (probability > 0)
        assert all(len(set(out.tolist())) == 1 for out in outs), "one draw for the whole batch"


def test_dropout_acts_in_training_only():
    model, ids = build(dropout=0.5), batch()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert not torch.equal(model.train()(ids).logits, model(ids).logits)


# -- the tokens that a decision looks at -------------------------------------------------------------------------------

POOLED = [3, 9, 1, 6]


@pytest.fixture(scope="module")
def decided() -> tuple[HRMForCausalLM, Tensor]:
    """A model and rows that go to other depths by their first tokens than by all."""
    model, ids = thinking()
    with torch.no_grad():
        whole, first = model(ids).executed_steps.tolist(), model(ids, pooled=POOLED).executed_steps.tolist()
    assert whole != first and whole[1] == first[1] and len(set(first)) > 2
    return model, ids


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("lengths", [None, [5, 9, 2, 8]], ids=["whole", "lengths"])
def test_a_row_decides_as_the_row_cut_to_its_first_tokens(decided, lengths, bias):
    """Its state is that of the whole row at this depth."""
    model, ids = decided
    together = model(ids, lengths=lengths, pooled=torch.tensor(POOLED), halt_bias=bias)
    for row, n in enumerate(POOLED):
        cut = model(ids[row : row + 1, :n], halt_bias=bias)
        steps = int(cut.executed_steps)
        assert together.executed_steps[row] == steps and together.steps_taken[row] == cut.steps_taken
        torch.testing.assert_close(together.q_logits[row], cut.q_logits[0], rtol=0, atol=1e-10)
        end = 9 if lengths is None else lengths[row]
        forced = model(ids[row : row + 1, :end], force_steps=steps)
        torch.testing.assert_close(together.logits[row, :end], forced.logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_mean_over_all_of_a_row_is_the_default(decided):
    model, ids = decided
    for lengths in (None, [5, 9, 2, 8]):
        expected = model(ids, lengths=lengths)
        found = model(ids, lengths=lengths, pooled=lengths or [9] * 4)
        assert torch.equal(found.executed_steps, expected.executed_steps)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_decision_tells_early_positions_nothing_about_late_tokens(decided):
    """Over texts that end differently: depth and logits of the first tokens stay as they are; by the whole row's mean
    some change."""
    model, ids = decided
    expected, changed = model(ids, pooled=[6] * 4), []
    for shift in range(1, 9):
        other = ids.clone()
        other[:, 6:] = (ids[:, 6:] + shift) % 61
        found = model(other, pooled=[6] * 4)
        assert torch.equal(found.executed_steps, expected.executed_steps)
        torch.testing.assert_close(found.logits[:, :6], expected.logits[:, :6], rtol=0, atol=1e-9)
        changed.append(not torch.equal(model(other).executed_steps, model(ids).executed_steps))
    assert any(changed)


@pytest.mark.parametrize("options", [{}, dict(gradient_steps=2), dict(gradient="published")], ids=str)
def test_training_takes_the_same_decision(decided, options):
    model, ids = decided
    with torch.no_grad():
        expected = model(ids, pooled=POOLED)
    out = model(ids, ids, pooled=POOLED, **options)
    assert torch.equal(out.executed_steps, expected.executed_steps)
    assert torch.equal(out.steps_taken, expected.steps_taken)
    torch.testing.assert_close(out.q_logits, expected.q_logits)
    out.loss.backward()
    found = gradients(model)
    if "gradient" not in options:  # published, a row that decides to halt at S has none, and one forced to S has
        model(ids, ids, force_steps=expected.executed_steps, **options).loss.backward()
        assert_same_gradients(found, gradients(model), 1e-9, 1e-14)


@torch.no_grad()
def test_forced_rows_are_scored_over_their_first_tokens(decided):
    model, ids = decided
    steps = [2, 5, 1, 3]
    found, whole = model(ids, force_steps=steps, pooled=POOLED), model(ids, force_steps=steps)
    assert torch.equal(found.logits, whole.logits) and found.executed_steps.tolist() == steps
    for row, (n, depth) in enumerate(zip(POOLED, steps, strict=True)):
        cut = model(ids[row : row + 1, :n], force_steps=depth).q_logits[0]
        torch.testing.assert_close(found.q_logits[row], cut, rtol=0, atol=1e-10)
    assert (found.q_logits - whole.q_logits)[[0, 2, 3]].abs().min() > 1e-6
    for n in (1, 2):
        with torch.enable_grad():
            trained = model(ids, ids, force_steps=steps, pooled=POOLED, gradient_steps=n)
        torch.testing.assert_close(trained.q_logits, found.q_logits)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # in unread padding
@pytest.mark.parametrize("training", [False, True])
def test_decisions_over_first_tokens_on_kernels_are_the_hosts(training):
    model, ids = thinking(torch.float32)
    ids, pooled, lengths = ids[:, :6], [3, 6, 1, 4], [4, 6, 2, 6]
    found = []
    for backend in ("reference", "triton"):
        with torch.set_grad_enabled(training), model_tiles(), ops.use_backend(backend):
            found.append(model(ids, lengths=lengths, pooled=pooled, max_steps=3))
    expected, kernels = found
    assert torch.equal(kernels.executed_steps, expected.executed_steps)
    assert torch.equal(kernels.steps_taken, expected.steps_taken)
    assert len(set(expected.executed_steps.tolist())) > 1
    assert relative_error(kernels.q_logits, expected.q_logits) <= 1e-5
    with torch.no_grad():
        by_all = model(ids, lengths=lengths, max_steps=3)
    assert not torch.equal(by_all.executed_steps, expected.executed_steps)


# -- configurations ----------------------------------------------------------------------------------------------------

VARIANTS = [
    dict(use_gqa=gqa, use_rotary=rotary, use_swiglu=swiglu, bias=bias)
    for gqa, rotary, swiglu, bias in itertools.product([True, False], repeat=4)
]
VARIANTS += [dict(n_input_layers=0, n_output_layers=0), dict(hrm_H_layers=0), dict(hrm_L_layers=0)]
VARIANTS += [dict(hrm_H_layers=0, hrm_L_layers=0, n_input_layers=0, n_output_layers=0), dict(hrm_max_steps=1)]
VARIANTS += [dict(tie_embeddings=False), dict(mlp_hidden=24), dict(embed_scale=4.0), dict(n_kv_head=1)]
VARIANTS += [dict(n_embd=12, n_head=2, n_kv_head=1), dict(dropout=0.3, bias=True)]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
def test_every_configuration_runs_trains_and_keeps_rows_apart(changes):
    model, ids = build(**changes), batch()
    with torch.no_grad():
        together = model(ids, lengths=[9, 3, 1, 7])
        for row, n in enumerate([9, 3, 1, 7]):
            alone = model(ids[row : row + 1, :n])
            assert relative_error(together.logits[row, :n], alone.logits[0]) <= 1e-5
    model.train()
    out = model(ids, ids)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ids=torch.zeros(2, 13, dtype=torch.int64)), r"13 tokens is over block_size 12"),
        (dict(ids=torch.zeros(0, 5, dtype=torch.int64)), r"batch is empty.*0 x 5"),
        (dict(ids=torch.zeros(2, 0, dtype=torch.int64)), r"batch is empty.*2 x 0"),
        (dict(ids=torch.zeros(5, dtype=torch.int64)), r"ids must be \[B, T\]"),
        (dict(ids=torch.zeros(2, 5)), r"int64.*float32"),
        (dict(ids=torch.full((2, 5), 97)), r"token id 97 is outside 0\.\.96"),
        (dict(ids=torch.full((2, 5), -3)), r"token id -3 is outside 0\.\.96"),
        (dict(targets=torch.full((4, 9), 97)), r"target 97 is outside 0\.\.96"),
        (dict(targets=torch.full((4, 9), -2)), r"target -2 is outside"),
        (dict(targets=torch.zeros(4, 8, dtype=torch.int64)), r"targets have shape \(4, 8\)"),
        (dict(lengths=[9, 0, 3, 4]), r"lengths \[9, 0, 3, 4\] must lie in 1\.\.9"),
        (dict(lengths=[10, 1, 3, 4]), r"must lie in 1\.\.9"),
        (dict(lengths=[9, 1]), r"4 integers, one per row"),
        (dict(lengths=[1.5, 1.0, 1.0, 1.0]), r"4 integers"),
        (dict(force_steps=5), r"force_steps 5 is outside 1\.\.4; to go deeper pass max_steps"),
        (dict(force_steps=0), r"force_steps 0 is outside 1\.\.4"),
        (dict(force_steps=[1, 2, -1, 3]), r"force_steps -1 is outside 0\.\.4"),
        (dict(force_steps=[1, 2]), r"2 entries for 4 rows"),
        (dict(force_steps=[1.9, 1, 1, 1]), r"must be an integer, or one for each row"),
        (dict(force_steps=1.5), r"force_steps 1.5 must be an integer"),
        (dict(halt_bias=float("nan")), r"halt_bias is nan"),
        (dict(targets=torch.zeros(4, 9)), r"targets must be int64; got torch.float32"),
        (dict(max_steps=0), r"max_steps 0 must be an integer of at least 1"),
        (dict(gradient="all"), r"gradient 'all' is none of replay, published"),
        (dict(gradient_steps=0), r"gradient_steps 0 must be an integer of at least 1"),
        (dict(gradient_steps=-2), r"gradient_steps -2 must be an integer of at least 1"),
        (dict(gradient_steps=1.5), r"gradient_steps 1.5 must be an integer"),
        (dict(gradient_steps="2"), r"gradient_steps '2' must be an integer"),
        (dict(gradient_steps=2, gradient="published"), r"gradient_steps 2 must be .* and 1 unless replayed"),
        (dict(pooled=[9, 0, 3, 4]), r"pooled \[9, 0, 3, 4\] must lie in 1\.\.9"),
        (dict(pooled=[10, 1, 3, 4]), r"pooled \[10, 1, 3, 4\] must lie in 1\.\.9"),
        (dict(pooled=[9, 1]), r"pooled must be 4 integers, one per row"),
        (dict(pooled=torch.ones(4, 1, dtype=torch.int64)), r"pooled must be 4 integers"),
        (dict(pooled=[1.0, 2.0, 3.0, 4.0]), r"pooled must be 4 integers"),
        (dict(pooled=[True] * 4), r"pooled must be 4 integers"),
        (
            dict(pooled=[3, 3, 3, 4], lengths=[9, 3, 2, 4]),
            r"pooled \[3, 3, 3, 4\] must not go beyond lengths \[9, 3, 2",
        ),
    ],
)
def test_bad_input_is_named_with_its_limit(arguments, message):
    ids = arguments.pop("ids", batch())
    with pytest.raises(ValueError, match=message):
        build()(ids, **arguments)
