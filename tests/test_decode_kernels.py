"""Decoding on kernels, held to the reference: attention over a cache, and the newest tokens of rows through a model."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from golden_files import relative_error
from parity import DEVICE, TOLERANCE, model_tiles, small_tiles
from parity import random as numbers

import hrm_kernels as ops
from hrm_kernels import BackendError, NewestTokens, Span, Tokens, reference
from hrm_kernels.kernels.launch import record
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.cache import HRMCache
from hrm_model.incremental import Extending, extend

ROWS, POSITIONS = 4, 40
SPANS = {
    "newest tokens": [Span(0, 5, 6), Span(1, 33, 34), Span(2, 0, 1)],
    "stretches": [Span(0, 3, 9), Span(3, 7, 8)],
    "whole rows of different lengths": [Span(1, 0, 20), Span(2, 0, 18)],
    "whole rows of one length": [Span(1, 0, 20), Span(3, 0, 20)],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
S, BLOCK = 4, 24
SHAPE = dict(vocab_size=50, n_embd=16, block_size=BLOCK, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=S)
PLAIN = dict(use_rotary=False, use_swiglu=False, use_gqa=False, bias=True)


def attention_inputs(spans, dtype, n_head, n_kv_head, head_dim):
    tokens = Tokens.of(spans, POSITIONS, DEVICE)
    kv = numbers(ROWS, POSITIONS, 2, n_kv_head, head_dim, seed=1).to(dtype)
    return numbers(1, tokens.size, (n_head + 2 * n_kv_head) * head_dim, seed=2).to(dtype), kv, tokens


@pytest.mark.parametrize("heads", [(4, 2, 8), (8, 4, 56), (3, 3, 16), (4, 1, 24), (2, 1, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", SPANS)
def test_cached_attention_agrees_with_float64(spans, dtype, heads):
    n_head, n_kv_head, _ = heads
    qkv, kv, tokens = attention_inputs(SPANS[spans], dtype, *heads)
    wide = kv.double()
    truth = reference.cached_attention(qkv.double(), wide, tokens, n_head, n_kv_head)
    with small_tiles(), ops.use_backend("triton"):
        found = ops.cached_attention(qkv, kv, tokens, n_head, n_kv_head)
    assert found.dtype == dtype and relative_error(found, truth) <= TOLERANCE[dtype][0]
    assert torch.equal(kv.double(), wide), "keys and values at the tokens' places, and nothing else"


def test_tokens_that_only_the_device_knows_are_added_and_absent_ones_leave_no_trace():
    qkv, kv, tokens = attention_inputs(SPANS["newest tokens"], torch.float32, 4, 2, 8)
    expected_kv = kv.clone()
    truth = reference.cached_attention(qkv, expected_kv, tokens, 4, 2)
    absent = torch.full((1, 1, qkv.shape[-1]), float("nan"), device=DEVICE)
    newest = NewestTokens(
        torch.tensor([0, 1, 2, 3], device=DEVICE), torch.tensor([5, 33, 0, -1], device=DEVICE), POSITIONS
    )
    with small_tiles(), ops.use_backend("triton"):
        found = ops.cached_attention(torch.cat((qkv, absent), 1), kv, newest, 4, 2)
    assert relative_error(found[:, :3], truth) <= 1e-6 and torch.equal(kv, expected_kv)


def test_tokens_that_only_the_device_knows_are_for_the_kernel():
    qkv, kv, _ = attention_inputs(SPANS["newest tokens"], torch.float32, 4, 2, 8)
    newest = NewestTokens(torch.arange(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), POSITIONS)
    with ops.use_backend("reference"), pytest.raises(ValueError, match="NewestTokens"):
        ops.cached_attention(qkv, kv, newest, 4, 2)


@pytest.fixture
def tiles():
    with model_tiles():
        yield


def model(seed: int = 0, **shape) -> HRMForCausalLM:
    """Small, with decided depths that differ between prefixes."""
    torch.manual_seed(seed)
    made = HRMForCausalLM(HRMConfig(**SHAPE | shape)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(6.0 if p.dim() > 1 else 1.0)
    return made.to(DEVICE)


def whole(model: HRMForCausalLM, ids: list[int], **options):
    with torch.no_grad(), ops.use_backend("reference"):
        return model(torch.tensor([ids], device=DEVICE), **options)


@pytest.mark.parametrize("shape", [{}, PLAIN], ids=["rotary, grouped, SwiGLU", "learned positions, GELU, biases"])
def test_the_newest_tokens_on_kernels_equal_a_pass_over_the_whole_rows(tiles, shape):
    """Depth decided and forced, up and down; now these rows, now those; biases that change from token to token."""
    net, draw = model(**shape), random.Random(1)
    rows: list[list[int]] = [[] for _ in range(3)]
    deepened = refilled = 0
    with ops.use_backend("triton"):
        cache = HRMCache(net, rows=3)
        assert cache.decoder().driver in ("host", "graph", "while")
    for t in range(9):
        new = {
            row: [draw.randrange(50) for _ in range(1 if t else 3)]
            for row in (draw.sample(range(3), draw.randint(2, 3)) if t else range(3))
        }
        forced = [draw.choice([0, 0, 0, 1, 2, S]) for _ in new]
        bias = draw.choice([0.35, 0.0, -0.3, 0.5])
        with ops.use_backend("triton"):
            work = Extending(net, cache, new, force_steps=forced, halt_bias=bias)
            assert (work._done is None) == (t > 0), "one token each: nothing waits before finish()"
            before = cache.work.core
            found, beside, again = work.finish(torch.arange(float(len(new)), device=DEVICE)[None])
        assert beside in ([[*range(len(new))]], None if t else beside)
        deepened += cache.work.core - before > sum(found.executed_steps) * net.config.blocks_per_step
        refilled += len(again)
        for i, (row, ids) in enumerate(new.items()):
            rows[row] += ids
            truth = whole(net, rows[row], force_steps=[forced[i]], halt_bias=bias)
            assert found.executed_steps[i] == truth.executed_steps.item()
            assert found.halted[i] == (truth.executed_steps != truth.steps_taken).item()
            assert (found.logits[i] - truth.logits[0, -1]).abs().max() <= 1e-5
    assert deepened and refilled, "rows must have gone deeper than their earlier tokens, and been decoded anew"
    assert [cache.ids(row) for row in range(3)] == rows


def test_kernels_continue_where_the_reference_stopped_and_the_other_way_round(tiles):
    net, ids = model(), [3, 7, 11, 5, 2]
    cache = HRMCache(net, rows=1)
    with ops.use_backend("reference"):
        extend(net, cache, {0: ids[:3]}, force_steps=3)
    with ops.use_backend("triton"):
        found = extend(net, cache, {0: ids[3:4]}, force_steps=3)
    assert (found.logits[0] - whole(net, ids[:4], force_steps=3).logits[0, -1]).abs().max() <= 1e-5
    with ops.use_backend("reference"):
        found = extend(net, cache, {0: ids[4:]}, force_steps=4)
    assert (found.logits[0] - whole(net, ids, force_steps=4).logits[0, -1]).abs().max() <= 1e-5


def test_generation_on_kernels_says_what_the_reference_says(tiles):
    net = model(2)
    prompts = torch.tensor([[3, 7, 11], [5, 2, 9]], device=DEVICE)
    options = dict(details=True, temperature=1.0, seed=3, stop_tokens=None)
    with ops.use_backend("triton"):
        found = net.generate(prompts, 5, **options)
    with ops.use_backend("reference"):
        truth = net.generate(prompts, 5, use_cache=False, **options)
    assert found.tokens == truth.tokens and found.executed_steps == truth.executed_steps
    assert torch.allclose(torch.tensor(found.logprobs), torch.tensor(truth.logprobs), atol=1e-5)


def test_a_step_of_one_token_a_row_is_one_kernel_more_than_a_step_of_whole_rows(tiles):
    """Nothing but the cache's upkeep is added: 24 blocks of 7 kernels and 3 more at the base size."""
    from hrm_kernels.kernels.hrm_step import Sizes, Space, step

    net = model(n_embd=16, hrm_H_layers=4, hrm_L_layers=4, hrm_H_cycles=2, hrm_L_cycles=2)
    cache, weights = HRMCache(net, rows=2), net.hrm_core.weights()
    x, rotary = torch.zeros(2, 1, 16, device=DEVICE), cache.rotary[:2, None]
    needs = Space.sizes(x, x.dtype, weights.L[0], rotary, None, False)
    space = Space.of({name: torch.zeros(*size, dtype=of, device=DEVICE) for name, (size, of) in needs.items()}, x)
    position = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    past = ops.StepPast(cache.kv_core, cache.z_H, cache.z_L, cache.sums, position)
    counts = []
    for given in (None, past):
        with record() as launches:
            step(space, weights, Sizes(4, 2, 2, 2, 1e-5, 0.0, 0.0), given)
        counts.append(len(launches))
    assert counts == [170, 171]


def test_an_exception_between_the_two_parts_leaves_rows_whole_or_empty(tiles):
    net = model()
    with ops.use_backend("triton"):
        cache = HRMCache(net, rows=2)
        extend(net, cache, {0: [1, 2], 1: [3, 4]}, force_steps=2)
        events = net.generate(torch.tensor([[1, 2]], device=DEVICE), 4, stream=True, cache=cache, force_steps=2)
        next(events)
        handle = net.ln_f.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(events)
        handle.remove()
        assert cache.length(0) == 0 and cache.ids(1) == [3, 4]
        found = extend(net, cache, {0: [1, 2, 5]}, force_steps=2)
    assert (found.logits[0] - whole(net, [1, 2, 5], force_steps=2).logits[0, -1]).abs().max() <= 1e-5


def test_a_model_with_other_modules_decodes_without_the_loop_on_kernels(tiles):
    """A hook's work must not be left out: the cache then runs the model's own modules."""
    net, seen = model(), []
    net.hrm_core.L_level.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with ops.use_backend("auto"):
        assert HRMCache(net, rows=1).decoder() is None
    with ops.use_backend("triton"), pytest.raises(BackendError, match="forward hook"):
        HRMCache(net, rows=1).decoder()


def test_a_graph_is_not_that_of_another_cache_at_the_same_address(monkeypatch):
    """Sizes are part of what a kernel was started with; memory that was given back is handed out again."""
    from types import SimpleNamespace

    from hrm_kernels import drivers
    from hrm_kernels.loop import _Shape

    net, captured = model(), []
    monkeypatch.setattr(drivers, "capture", lambda driver, steps: captured.append(steps) or len(captured))
    shape = _Shape(SimpleNamespace(qkv=torch.zeros(1)))
    steps = drivers.Steps(lambda: None, torch.ones(1, dtype=torch.int32), 4, True)
    memory, rest = torch.zeros(2 * 24 * 16), [torch.zeros(1)] * 4
    graphs = {
        positions: shape.graph(
            "while", steps, net.hrm_core.weights(), None,
            ops.StepPast(memory[: 2 * positions * 16].view(2, positions, 16), *rest),
        )
        for positions in (24, 23, 24)
    }  # fmt: skip
    assert len(captured) == 2 and graphs[24] != graphs[23]


def test_a_cache_that_nobody_holds_is_given_back_at_once(tiles):
    net = model()
    gc.disable()
    try:
        with ops.use_backend("triton"):
            cache = HRMCache(net, rows=1)
            extend(net, cache, {0: [1, 2]}, force_steps=1)
            extend(net, cache, {0: [3]}, force_steps=1)
        seen = weakref.ref(cache)
        del cache
        assert seen() is None
    finally:
        gc.enable()


def test_a_model_that_was_moved_gets_another_decoder(tiles):
    net = model()
    with ops.use_backend("triton"):
        cache = HRMCache(net, rows=1)
        before = cache.decoder()
        assert cache.decoder() is before
        net.lm_head.weight.data = net.lm_head.weight.data.clone()
        assert cache.decoder() is not before
