"""Rows that grow in a cache: every number is that of a forward pass over the whole row, whatever happened before."""

from __future__ import annotations

import copy
import math
import random
from itertools import pairwise

import pytest
import torch
from golden_files import NAMES, load, relative_error
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_models import SHAPE, S, thinker
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.cache import HRMCache, bytes_per_token
from hrm_model.halting import halt_margin
from hrm_model.incremental import Extended, extend

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
"""dtype -> relative error of a row's logits that is allowed."""
NEAR = 1e-4
"""So near its threshold no decision of these tests is, that rounding could turn it."""
NEVER, AT_ONCE = -math.inf, math.inf
"""Halting biases that decide by themselves."""
PACKED = dict(n_embd=64, mlp_hidden=2048)
"""The smallest matrices of which a CPU keeps packed copies."""

VARIANTS = {
    "grouped heads": (3, {}),
    "cycles and layers": (5, dict(hrm_H_cycles=2, hrm_L_cycles=3, hrm_H_layers=2, hrm_L_layers=2)),
    "no rope, gelu, biases, all heads": (5, dict(use_rotary=False, use_swiglu=False, bias=True, use_gqa=False)),
    "head size 14": (1, dict(n_embd=56)),
    "head size 56": (5, dict(n_embd=112, n_head=2, n_kv_head=1)),
    "head size 7": (0, dict(n_embd=28, use_rotary=False)),
    "no input blocks": (3, dict(n_input_layers=0)),
    "no output blocks": (1, dict(n_output_layers=0)),
    "neither": (2, dict(n_input_layers=0, n_output_layers=0)),
    "no fast blocks": (4, dict(hrm_L_layers=0)),
    "no slow blocks": (1, dict(hrm_H_layers=0)),
    "two of each": (0, dict(n_input_layers=2, n_output_layers=2, hrm_H_layers=2, hrm_L_layers=2)),
    "packed": (0, PACKED),
    "scaled embedding, own head": (0, dict(embed_scale=2.0, tie_embeddings=False)),
}
"""Name -> seed of the weights, at which depth goes up and down; what differs from SHAPE."""


def tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(SHAPE["vocab_size"]), k=n)


@torch.no_grad()
def whole(model: HRMForCausalLM, rows: list[list[int]], **options) -> Extended:
    """The same from a forward pass over whole rows."""
    sizes = [len(row) for row in rows]
    padded = torch.tensor([row + [0] * (max(sizes) - len(row)) for row in rows])
    out = model(padded, lengths=sizes, **options)
    executed, taken = out.executed_steps.tolist(), out.steps_taken.tolist()
    last = out.logits[torch.arange(len(rows)), torch.tensor(sizes) - 1]
    return Extended(last, executed, [n > m for n, m in zip(executed, taken, strict=True)])


def assert_exact(model: HRMForCausalLM, cache: HRMCache, new: dict[int, list[int]], **options) -> Extended:
    """Extend, and hold all that comes back to a forward pass."""
    rows = [cache.ids(row) + list(ids) for row, ids in new.items()]
    found, expected = extend(model, cache, new, **options), whole(model, rows, **options)
    assert [cache.ids(row) for row in new] == rows
    assert found.executed_steps == expected.executed_steps and found.halted == expected.halted
    assert found.logits.dtype == expected.logits.dtype and found.logits.shape == expected.logits.shape
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert relative_error(a, b) <= LIMIT[a.dtype]
    return found


def margin(model: HRMForCausalLM, cache: HRMCache, row: int, depth: int, halt_bias: float = 0.0) -> float:
    """The least distance from the threshold of what the head says of a row after steps 1..depth."""
    means = (cache.sums[:depth, row] / cache.length(row)).to(model.wte.weight.dtype)
    with torch.no_grad():
        q = model.hrm_core.q_head(means)
    return halt_margin(q, halt_bias).abs().min().item()


def rises(depths: list[int]) -> int:
    """How often a row went deeper than ever before: each time its tokens are run through the steps that they lack."""
    return sum(new > max(depths[:i]) for i, new in enumerate(depths) if i)


def falls(depths: list[int]) -> int:
    """How often a row went less deep than at the token before."""
    return sum(new < old for old, new in pairwise(depths))


def assert_nothing_ran_twice(cache: HRMCache) -> None:
    """Of rows that only grew: each block saw each token once at each step or depth that was needed."""
    config, rows = cache.config, range(cache.rows)
    assert cache.work.input == sum(cache.length(row) for row in rows) * config.n_input_layers
    assert cache.work.core == sum(sum(cache.done[row]) for row in rows) * config.blocks_per_step
    assert cache.work.output == sum(sum(cache.decoded[row]) for row in rows) * config.n_output_layers
    assert cache.work.total == cache.work.input + cache.work.core + cache.work.output


def assert_books_are_right(cache: HRMCache) -> None:
    """What rows have run and its sums agree with each other and with the rows' lengths."""
    cache.settle(range(cache.rows))
    for row in range(cache.rows):
        done = cache.done[row]
        assert done == sorted(done, reverse=True) and done[0] <= cache.length(row)
        assert all(0 <= n <= ran for n, ran in zip(cache.decoded[row], done, strict=True))
        for s, n in enumerate(done):
            expected = cache.z_H[s, row, :n].sum(0, dtype=torch.float64)
            assert torch.allclose(cache.sums[s, row].double(), expected, rtol=0, atol=1e-9)


def spoil(cache: HRMCache, value: float) -> None:
    """Write over every place that holds nothing."""
    for row in range(cache.rows):
        n = cache.length(row)
        for t in (cache.x[row], cache.z_L[row], *cache.kv_input[:, row]):
            t[n:] = value
        for s in range(cache.max_steps):
            done, decoded = cache.done[row][s], cache.decoded[row][s]
            for t in (cache.z_H[s, row], *cache.kv_core[s, :, row]):
                t[done:] = value
            cache.kv_output[:, s * cache.rows + row, decoded:] = value


# -- the numbers of a forward pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "float64"])
@pytest.mark.parametrize("seed, shape", VARIANTS.values(), ids=VARIANTS)
def test_every_token_is_that_of_a_forward_pass(seed, shape, dtype):
    """Rows of different lengths and depths, the head decides; now one token each, now several, now some rows only."""
    model = thinker(seed, dtype, **shape)
    cache, ids = HRMCache(model, rows=3), iter(tokens(99, seed))
    depths: list[list[int]] = [[], [], []]
    one_each = {0: 1, 1: 1, 2: 1}
    several = [{0: 1, 1: 4, 2: 2}, *[one_each] * 5, {2: 3, 0: 2}, {1: 1}, {2: 2, 1: 3, 0: 1}, *[{2: 1, 0: 1, 1: 1}] * 4]
    for sizes in several:
        new = {row: [next(ids) for _ in range(n)] for row, n in sizes.items()}
        for row, depth in zip(new, assert_exact(model, cache, new).executed_steps, strict=True):
            depths[row].append(depth)
            assert margin(model, cache, row, depth) > NEAR
    assert sum(map(rises, depths)) and sum(map(falls, depths))
    assert_nothing_ran_twice(cache)


@pytest.mark.parametrize("seed, shape", VARIANTS.values(), ids=VARIANTS)
def test_a_row_may_be_forced_to_any_depth_at_every_token(seed, shape):
    model = thinker(seed, **shape)
    cache = HRMCache(model, rows=2, positions=24)
    schedule, ids = [1, 4, 2, 5, 1, 1, 3, 5, 4], iter(tokens(99, seed))
    for i, depth in enumerate(schedule):
        forced = [depth, schedule[-1 - i]]
        new = {1: [next(ids)], 0: [next(ids) for _ in range(1 + i % 3)]}
        assert assert_exact(model, cache, new, force_steps=forced).executed_steps == forced
    assert rises(schedule) >= 2 and falls(schedule) >= 2
    assert_nothing_ran_twice(cache)


def test_forced_and_deciding_rows_share_a_call():
    model = thinker(0)
    cache = HRMCache(model, rows=3)
    for i, token in enumerate(tokens(12)):
        found = assert_exact(model, cache, {r: [token ^ r] for r in range(3)}, force_steps=[0, 1 + i % S, 0])
        assert found.executed_steps[1] == 1 + i % S and not found.halted[1]


def test_bias_and_limit_may_change_from_call_to_call():
    """The cache has room for more steps than the model usually takes."""
    model = thinker(0)
    cache = HRMCache(model, rows=2, max_steps=S + 3)
    depths = []
    changes = [
        dict(max_steps=1), dict(halt_bias=AT_ONCE), dict(max_steps=2, halt_bias=NEVER), dict(), dict(halt_bias=0.3),
        dict(halt_bias=NEVER), dict(max_steps=1, halt_bias=NEVER), dict(force_steps=S + 2, max_steps=S + 3),
        dict(halt_bias=-0.3), dict(halt_bias=NEVER, max_steps=S + 3), dict(max_steps=2), dict(max_steps=S + 3),
    ]  # fmt: skip
    for i, options in enumerate(changes * 2):
        depths.append(assert_exact(model, cache, {0: [i], 1: [2 * i]}, **options).executed_steps[0])
    assert {1, 2, S, S + 2, S + 3} <= set(depths) and rises(depths) >= 3 and falls(depths) >= 3
    assert_nothing_ran_twice(cache)


def test_the_models_own_bias_counts_by_default():
    model = thinker(0, halt_bias=1e9)
    assert assert_exact(model, HRMCache(model), {0: [1, 2, 3]}).executed_steps == [1]


@pytest.mark.parametrize("bias", [NEVER, 0.0, AT_ONCE])
def test_with_a_limit_of_one_step_nothing_is_decided(bias):
    model = thinker(0, hrm_max_steps=1)
    cache = HRMCache(model, rows=2)
    for i in range(4):
        found = assert_exact(model, cache, {0: [i], 1: [i, i + 1]}, halt_bias=bias)
        assert found.executed_steps == [1, 1] and not any(found.halted)


@pytest.mark.parametrize("name", NAMES)
def test_golden_rows_token_by_token(name):
    """Weights, bias and depths are those of the published code's numbers, which each row's last token must meet."""
    golden = load(name)
    model, ids, numbers = golden.model(), golden.numbers["input_ids"], golden.numbers
    rows, n_tokens = range(len(ids))[-4:], ids.shape[1]
    cache, depths = HRMCache(model, len(ids), n_tokens), {row: [] for row in rows}
    new = {row: ids[row, : n_tokens // 3 + i].tolist() for i, row in enumerate(rows)}
    while new:
        found = assert_exact(model, cache, new)
        for i, row in enumerate(new):
            depths[row].append(found.executed_steps[i])
            assert margin(model, cache, row, found.executed_steps[i], golden.config.halt_bias) > NEAR
            if cache.length(row) == n_tokens:
                assert found.executed_steps[i] - found.halted[i] == numbers["steps_taken"][row]
                assert relative_error(found.logits[i], numbers["logits"][row, -1]) <= 1e-5
        new = {row: [int(ids[row, cache.length(row)])] for row in new if cache.length(row) < n_tokens}
    assert sum(map(rises, depths.values())) and sum(map(falls, depths.values()))
    assert_nothing_ran_twice(cache)


@settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(st.data())
def test_whatever_is_done_to_the_rows_the_next_token_is_exact(data):
    """Extended, cut, copied, emptied in any order, decided and forced; places without content hold rubbish."""
    draw = data.draw
    seed, shape = draw(st.sampled_from(list(VARIANTS.values())))
    model = thinker(seed, **shape)
    cache = HRMCache(model, rows=3, positions=14, max_steps=S + 1)
    row, n = st.integers(0, 2), st.integers(0, 14)
    for _ in range(9):
        spoil(cache, 1e4)
        what = draw(st.sampled_from(["extend", "extend", "extend", "truncate", "copy", "clear"]))
        if what == "truncate":
            cache.truncate(draw(row), draw(n))
        elif what == "clear":
            cache.clear(draw(row))
        elif what == "copy":
            source, targets, n_kept = draw(row), draw(st.lists(row, max_size=2)), draw(st.none() | n)
            expected = cache.ids(source)[:n_kept]
            cache.copy(source, targets, n_kept)
            assert all(cache.ids(target) == expected for target in targets if target != source)
        else:
            new = {}
            for r in draw(st.permutations(range(3)))[: draw(st.integers(1, 3))]:
                free = cache.positions - cache.length(r)
                if free:
                    ids = st.integers(0, SHAPE["vocab_size"] - 1)
                    new[r] = draw(st.lists(ids, min_size=1, max_size=min(free, 4)))
            options = dict(halt_bias=draw(st.sampled_from([0.0, 0.0, -0.5, 0.5, NEVER, AT_ONCE])))
            options |= dict(max_steps=draw(st.sampled_from([None, None, 1, 2, S + 1])))
            if draw(st.booleans()):
                limit = options["max_steps"] or S
                options |= dict(force_steps=[draw(st.integers(0, limit)) for _ in new])
            if new:
                assert_exact(model, cache, new, **options)
        assert_books_are_right(cache)


# -- backfill and refill, counted --------------------------------------------------------------------------------------


def test_a_deeper_token_runs_the_missing_steps_of_those_before_it_once():
    model = thinker(0)
    per_step = model.config.blocks_per_step
    cache = HRMCache(model)

    def cost(ids: list[int], depth: int) -> tuple[int, int, int]:
        before = cache.work.input, cache.work.core, cache.work.output
        assert_exact(model, cache, {0: ids}, force_steps=depth)
        after = cache.work.input, cache.work.core, cache.work.output
        return tuple(b - a for a, b in zip(before, after, strict=True))

    assert cost(tokens(10), 1) == (10, 10 * per_step, 10)
    assert cost([1], 3) == (1, (1 + 11 + 11) * per_step, 11), "steps 2 and 3 and depth 3, of all eleven"
    assert cost([2], 3) == (1, 3 * per_step, 1)
    assert cost([3], 1) == (1, per_step, 3), "two tokens were not yet seen at depth 1"
    assert cost([4], 3) == (1, (1 + 2 + 2) * per_step, 2)
    assert cost([5], S) == (1, (3 + 2 * 15) * per_step, 15)
    assert_nothing_ran_twice(cache)


# -- rows that are cut, copied, given away -----------------------------------------------------------------------------


# The case "nan" fails: a row beside a longer one has weights of 0 on what lies beyond its end, and 0 times nan is nan.
# So a row whose numbers overflowed once spoils every later one in its place, until that has written over them.
@pytest.mark.parametrize("rubbish", [1e4, math.nan], ids=["stale numbers", "nan"])
def test_what_lies_beyond_a_rows_end_is_never_looked_at(rubbish):
    """Rows of different lengths, one token each: every row is looked at as far as the longest goes."""
    model = thinker(0)
    cache = HRMCache(model, rows=3)
    assert_exact(model, cache, {0: tokens(9), 1: tokens(2, 1), 2: tokens(5, 2)})
    spoil(cache, rubbish)
    assert_exact(model, cache, {0: [1], 1: [2], 2: [3]}, force_steps=S)
    spoil(cache, rubbish)
    assert_exact(model, cache, {0: [1], 1: [2, 3], 2: [3]}, force_steps=[1, S, 2])
    cache.truncate(0, 3)
    cache.clear(1)
    cache.copy(2, [1], 4)
    spoil(cache, rubbish)
    assert_exact(model, cache, {0: [1], 1: [2], 2: [3]}, force_steps=S)


def test_a_cut_row_goes_on_as_if_nothing_had_followed():
    model = thinker(0)
    cache, ids = HRMCache(model, rows=2), tokens(12)
    assert_exact(model, cache, {0: ids[:4], 1: ids}, force_steps=2)
    for n, depth in ((8, S), (5, 1), (5, 3), (1, S), (4, 2)):
        assert_exact(model, cache, {0: tokens(6, n)}, force_steps=depth)
        cache.truncate(0, n)
        assert cache.length(0) == min(n, 10)
        assert_exact(model, cache, {0: [depth]})
    assert cache.ids(1) == ids
    assert_exact(model, cache, {1: [3]})


def test_cutting_at_or_beyond_the_end_changes_nothing():
    model = thinker(0)
    cache = HRMCache(model)
    extend(model, cache, {0: tokens(5)})
    before = state(cache)
    for n in (5, 6, 99):
        cache.truncate(0, n)
    assert same(state(cache), before)


def test_copies_go_their_own_ways():
    """One prompt, run once, continued otherwise in each row, at other depths; the rows' memory is their own."""
    model = thinker(0)
    cache, prompt = HRMCache(model, rows=4), tokens(7)
    extend(model, cache, {3: tokens(12, 1)}, force_steps=S)
    extend(model, cache, {1: prompt}, force_steps=2)
    cost = cache.work.total
    cache.copy(1, [0, 3])
    cache.copy(1, [2], 4)
    assert cache.work.total == cost
    assert [cache.ids(row) for row in range(4)] == [prompt, prompt, prompt[:4], prompt]
    for i in range(3):
        new = {row: [5 * row + i] for row in (2, 0, 3, 1)}
        assert_exact(model, cache, new, force_steps=[1 + i, S - i, 2, 3])
    cache.clear(1)
    assert_exact(model, cache, {0: [1], 1: [2], 2: [3], 3: [4]})


def test_a_row_may_be_copied_onto_itself_or_nowhere():
    model = thinker(0)
    cache = HRMCache(model, rows=2)
    extend(model, cache, {0: tokens(5), 1: tokens(3, 1)})
    before = state(cache)
    cache.copy(0, [0])
    cache.copy(0, [])
    assert same(state(cache), before)


def test_another_sequence_in_the_same_place_finds_nothing_of_the_first():
    model = thinker(0)
    cache = HRMCache(model, rows=2)
    assert_exact(model, cache, {0: tokens(14), 1: tokens(3, 5)}, force_steps=S)
    cache.clear(0)
    assert cache.length(0) == 0 and cache.ids(0) == []
    for i, token in enumerate(tokens(6, 1)):
        assert_exact(model, cache, {0: [token]}, force_steps=[1, 3, 2, S, 1, 4][i])


def test_a_rows_ids_are_a_copy():
    model = thinker(0)
    cache, given = HRMCache(model), [1, 2]
    extend(model, cache, {0: given})
    cache.ids(0).append(9)
    given.append(8)
    assert cache.ids(0) == [1, 2]


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input_blocks.0", 1),
        ("hrm_core.L_level.layers.0", 1),
        ("hrm_core.L_level.layers.0.attn.c_proj", 5),
        ("hrm_core.H_level.layers.0", 3),
        ("output_blocks.0.mlp", 1),
        ("lm_head", 1),
    ],
)
def test_an_interrupted_call_leaves_its_rows_empty_and_the_others_whole(name, call):
    model = thinker(0).train()
    cache, ids = HRMCache(model, rows=3), [tokens(6, row) for row in range(3)]
    extend(model, cache, dict(enumerate(ids)), force_steps=2)
    calls = iter(range(1, 99))

    def interrupt(*_):
        if next(calls) == call:
            raise KeyboardInterrupt

    hook = model.get_submodule(name).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        extend(model, cache, {0: [1], 2: [2, 3]}, force_steps=[S, 4])
    hook.remove()
    assert model.training
    model.eval()
    assert [cache.length(row) for row in range(3)] == [0, 6, 0]
    spoil(cache, 1e4)
    assert_exact(model, cache, {1: [7]}, force_steps=4)
    for i in range(3):
        assert_exact(model, cache, {0: [i], 1: [1, i], 2: [2]}, force_steps=[S - i, 3, 1 + i])


class Interrupt(TorchDispatchMode):
    """Ctrl-C before the n-th operation on tensors."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["extend", "truncate", "copy"])
def test_wherever_ctrl_c_strikes_what_a_row_says_it_holds_is_right(what):
    model = thinker(0, hrm_L_cycles=1)
    made = HRMCache(model, rows=3, positions=12)
    extend(model, made, {0: tokens(3), 1: tokens(5, 1), 2: tokens(3, 2)}, force_steps=[3, 2, 1])
    act = {
        "extend": lambda cache: extend(model, cache, {0: [1], 1: [2]}, force_steps=[1, 3]),
        "truncate": lambda cache: (cache.truncate(1, 2), cache.settle([1])),
        "copy": lambda cache: cache.copy(1, [0]),
    }[what]
    for n in (*range(1, 12), *range(12, 400, 23)):
        cache = copy.deepcopy(made, {id(model): model})
        try:
            with Interrupt(n):
                act(cache)
        except KeyboardInterrupt:
            pass
        else:
            break
        assert cache.ids(2) == made.ids(2)
        assert_books_are_right(cache)
        assert_exact(model, cache, {0: [3], 1: [4], 2: [5]}, force_steps=3)
    assert n > 5, "something was interrupted"


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model = thinker(0, dropout=0.5)
    cache = HRMCache(model)
    model.train()
    found = extend(model, cache, {0: tokens(5)}).logits
    assert model.training and all(module.training for module in model.modules())
    assert relative_error(found, whole(model.eval(), [tokens(5)]).logits) <= 1e-10


@pytest.mark.parametrize("how", ["in place", "loaded", "replaced"])
def test_weights_that_change_are_seen_by_rows_that_begin_anew(how):
    model = thinker(0, torch.float32, **PACKED)
    cache = HRMCache(model, rows=2)
    assert_exact(model, cache, {0: tokens(4), 1: [1]})
    assert cache.packed.nbytes or not torch.backends.mkldnn.is_available()
    weights = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if how == "in place":
            with torch.no_grad():
                p.copy_(weights[name])
        elif how == "replaced" and p.dim() == 2:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, torch.nn.Parameter(weights[name]))
    if how == "loaded":
        model.load_state_dict(weights, strict=False)
    cache.clear(0)
    cache.clear(1)
    for i in range(3):
        assert_exact(model, cache, {0: tokens(3, i), 1: [i]})


def test_a_model_made_in_inference_mode_decodes():
    with torch.inference_mode():
        model = thinker(0, torch.float32, **PACKED)
        cache = HRMCache(model)
        for i in range(3):
            assert_exact(model, cache, {0: tokens(2, i)})


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, shape", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("max_steps", [None, 1, 7])
def test_bytes_per_token_is_what_a_cache_takes(seed, shape, max_steps):
    model = HRMForCausalLM(HRMConfig(**SHAPE | shape)).bfloat16()
    cache = HRMCache(model, rows=3, positions=11, max_steps=max_steps)
    assert (cache.nbytes - cache.sums.nbytes) / (3 * 11) == cache.bytes_per_token
    assert cache.bytes_per_token == bytes_per_token(model.config, max_steps, torch.bfloat16)


def test_under_autocast_keys_and_values_are_narrow_and_states_are_not():
    model = thinker(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cache = HRMCache(model, rows=2, positions=5)
    assert {cache.kv_input.dtype, cache.kv_core.dtype, cache.kv_output.dtype} == {torch.bfloat16}
    assert {cache.x.dtype, cache.z_L.dtype, cache.z_H.dtype} == {torch.float32}
    assert (cache.nbytes - cache.sums.nbytes) / 10 == cache.bytes_per_token
    assert cache.bytes_per_token == bytes_per_token(model.config, S, torch.float32, torch.bfloat16)


def test_the_published_model_takes_168_MiB_for_the_keys_and_values_of_its_core():
    """bfloat16, 512 tokens, 16 steps; and 5 MiB for input blocks and for output blocks at one depth."""
    config = HRMConfig.preset("base")
    block = 2 * config.kv_heads * config.head_dim * 2
    core, ends = 16 * config.blocks_per_step * block, (config.n_input_layers + config.n_output_layers) * block
    assert 512 * core == 168 * 2**20 and 5 <= 512 * ends / 2**20 < 5.5
    states, other_depths = (2 + 16) * config.n_embd * 2, 15 * config.n_output_layers * block
    assert bytes_per_token(config, 16, torch.bfloat16) == core + ends + other_depths + states


def test_a_cache_that_does_not_fit_is_refused_with_what_would():
    model = thinker(0, torch.float32)
    with pytest.raises(ValueError) as error:
        HRMCache(model, rows=10**9)
    message = str(error.value)
    wanted = f"{10**9 * 32 * bytes_per_token(model.config) / 1e6:,.1f} MB"
    for part in ("1000000000 rows x 32 positions x 5 steps", wanted, "free on cpu", "fewer rows"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rows=0), "rows 0 must be an integer of at least 1"),
        (dict(rows=True), "rows True must be an integer"),
        (dict(rows=1.5), "rows 1.5 must be an integer"),
        (dict(positions=0), "positions 0 must be an integer of at least 1"),
        (dict(positions=33), "positions 33 are more than block_size 32"),
        (dict(max_steps=0), "max_steps 0 must be an integer of at least 1"),
        (dict(max_steps=-2), "max_steps -2 must be an integer of at least 1"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        HRMCache(thinker(0, torch.float32), **options)


# -- what cannot be ----------------------------------------------------------------------------------------------------


def state(cache: HRMCache) -> dict:
    tensors = dict(x=cache.x, z_L=cache.z_L, z_H=cache.z_H, sums=cache.sums)
    tensors |= dict(kv_input=cache.kv_input, kv_core=cache.kv_core, kv_output=cache.kv_output)
    books = dict(ids=[cache.ids(r) for r in range(cache.rows)], done=[list(d) for d in cache.done])
    books |= dict(decoded=[list(d) for d in cache.decoded], work=cache.work.total)
    return books | {name: t.clone() for name, t in tensors.items()}


def same(a: dict, b: dict) -> bool:
    """Memory that nobody wrote may hold nan."""
    return all(
        torch.allclose(a[k], b[k], rtol=0, atol=0, equal_nan=True) if isinstance(a[k], torch.Tensor) else a[k] == b[k]
        for k in a
    )


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        ({}, {}, "no rows to extend; give at least one"),
        ({2: [1]}, {}, r"row 2 is outside 0\.\.1, the cache's rows"),
        ({-1: [1]}, {}, r"row -1 is outside 0\.\.1"),
        ({0: [1], 1: []}, {}, "row 1 gets no token; give at least one, or leave it out"),
        ({0: [1], 1: [61]}, {}, r"token id 61 is outside 0\.\.60 \(vocab_size 61\)"),
        ({0: [1, -1, 2]}, {}, r"token id -1 is outside 0\.\.60"),
        ({1: [1], 0: [1] * 6}, {}, "row 0 holds 5 tokens and gets 6 more; the cache has 10 positions"),
        ({0: [1]}, dict(max_steps=S + 1), f"{S + 1} steps are more than the cache's max_steps {S}; make it with more"),
        ({0: [1]}, dict(max_steps=9, force_steps=9), f"9 steps are more than the cache's max_steps {S}"),
        ({0: [1]}, dict(force_steps=S + 1), rf"force_steps {S + 1} is outside 1\.\.{S}"),
        ({0: [1]}, dict(force_steps=0), rf"force_steps 0 is outside 1\.\.{S}"),
        ({0: [1], 1: [1]}, dict(force_steps=[1]), "force_steps has 1 entries for 2 rows"),
        ({0: [1]}, dict(max_steps=0), "max_steps 0 must be an integer of at least 1"),
        ({0: [1]}, dict(halt_bias=math.nan), "halt_bias is nan"),
        ({0: [1.5]}, {}, "token id 1.5"),
    ],
)
def test_what_cannot_be_added_is_named_and_changes_nothing(new, options, message):
    model = thinker(0)
    cache = HRMCache(model, rows=2, positions=10)
    extend(model, cache, {0: tokens(5), 1: tokens(3, 1)}, force_steps=2)
    before = state(cache)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        extend(model, cache, new, **options)
    assert "\n" not in str(error.value)
    assert same(state(cache), before)
    assert_exact(model, cache, {1: [4], 0: [5]})


def test_a_forced_depth_may_be_above_what_deciding_rows_have_room_for():
    """What counts is the steps that rows can take, not the model's own limit."""
    model = thinker(0)
    cache = HRMCache(model, max_steps=2)
    assert assert_exact(model, cache, {0: [1, 2]}, force_steps=2).executed_steps == [2]
    assert assert_exact(model, cache, {0: [3]}, max_steps=2, halt_bias=NEVER).executed_steps == [2]
    with pytest.raises(ValueError, match="5 steps are more than the cache's max_steps 2"):
        extend(model, cache, {0: [1]})


# All of these fail: Python's own indices are taken, so that -1 is the last row, or cut from the end.
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.copy(0, [-1]), "row -1 is outside"),
        (lambda cache: cache.copy(0, [2]), "row 2 is outside"),
        (lambda cache: cache.copy(-1, [0]), "row -1 is outside"),
        (lambda cache: cache.copy(0, [1], -1), "-1"),
        (lambda cache: cache.truncate(-1, 0), "row -1 is outside"),
        (lambda cache: cache.truncate(0, -1), "-1"),
        (lambda cache: cache.clear(2), "row 2 is outside"),
        (lambda cache: cache.length(2), "row 2 is outside"),
        (lambda cache: cache.ids(-1), "row -1 is outside"),
    ],
)
def test_a_row_that_is_not_there_is_named_and_changes_nothing(call, message):
    model = thinker(0)
    cache = HRMCache(model, rows=2)
    extend(model, cache, {0: tokens(5), 1: tokens(3, 1)}, force_steps=2)
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert same(state(cache), before)


@pytest.mark.parametrize("shape", [{}, dict(n_embd=56), dict(n_output_layers=0)], ids=["weights", "size", "depth"])
def test_a_cache_of_another_model_is_refused(shape):
    model = thinker(0)
    cache = HRMCache(model)
    extend(model, cache, {0: [1, 2, 3]})
    with pytest.raises(ValueError, match="model"):
        extend(thinker(1, **shape), cache, {0: [4]})


def test_a_cache_made_outside_autocast_is_refused_inside():
    model = thinker(0, torch.float32)
    cache = HRMCache(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        extend(model, cache, {0: [1, 2]})
    assert cache.length(0) == 0
    assert_exact(model, cache, {0: [1, 2]})


# -- low precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bfloat16_the_cache_rounds_no_worse_than_a_forward_pass(how):
    """Rounding differs, so does the result. Truth is float64 with the same weights; over 48 tokens at forced depth the
    cache's error may be a fifth above that of whole passes (measured: less than a twentieth apart, either way)."""
    model = thinker(0, torch.float32, hrm_H_layers=2, hrm_L_layers=2)
    model = model.bfloat16() if how == "weights" else model
    wide = thinker(0, hrm_H_layers=2, hrm_L_layers=2)
    wide.load_state_dict(model.state_dict())
    found, passes, truth = [], [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        cache = HRMCache(model, rows=3)
        for i in range(16):
            new, forced = {row: [(7 * row + 3 * i) % 61] for row in range(3)}, [1 + i % S, S - i % S, 2]
            found.append(extend(model, cache, new, force_steps=forced).logits.double())
            rows = [cache.ids(row) for row in range(3)]
            passes.append(whole(model, rows, force_steps=forced).logits.double())
            truth.append((rows, forced))
    truth = torch.stack([whole(wide, rows, force_steps=forced).logits for rows, forced in truth])
    error, usual = (relative_error(torch.stack(logits), truth) for logits in (found, passes))
    assert 1e-4 < usual < 0.05 and error <= 1.2 * usual


def test_a_cache_made_in_inference_mode_serves_outside_it():
    model = thinker(0)
    with torch.inference_mode():
        cache = HRMCache(model)
        extend(model, cache, {0: [1, 2]})
    assert_exact(model, cache, {0: [3]})
