"""The batched-halting loop on kernels, held to the loop that the host runs (hrm_model/host_loop.py)."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from dataclasses import replace

import pytest
import torch
from golden_files import relative_error
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from parity import DEVICE, WHOLE, model_tiles
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels.kernels.hrm_step import Sizes, Space, step
from hrm_kernels.kernels.launch import record
from hrm_kernels.scratch import Scratch
from hrm_kernels.tuning import use_tiles
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.core import HRMCore
from hrm_model.host_loop import Batch, host_loop

S = 4
ONE_OF_EACH = dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1)
NEVER, AT_ONCE = -1e9, 1e9
"""Halting biases that decide by themselves."""

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
DRIVERS = ["host", pytest.param("graph", marks=needs_gpu), pytest.param("while", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def tiles():
    with model_tiles():
        yield


def core(seed: int = 0, **shape) -> HRMCore:
    """A small core whose states and scores differ between rows and steps. Its matrices are small enough that errors of
    rounding do not grow from block to block (at 0.3 of standard deviation they grow a thousandfold in 20 blocks)."""
    shape = (
        dict(n_embd=16, n_head=2, n_kv_head=1, hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1) | shape
    )
    torch.manual_seed(seed)
    made = HRMCore(HRMConfig(vocab_size=97, block_size=64, hrm_max_steps=S, **shape))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "ln_" in name:
                p.normal_(1, 0.1)
            else:
                p.normal_(0, 1 if "init" in name or "q_head" in name else 0.6 / made.config.n_embd**0.5)
    return made.to(DEVICE).eval()


def batch(core: HRMCore, n_rows: int, n_tokens: int, seed: int = 1, **options) -> Batch:
    """Random inputs; every row decides within S steps unless `options` say otherwise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, n_tokens, core.config.n_embd, generator=generator).to(DEVICE)
    rotary = ops.rope_table(torch.arange(n_tokens, device=DEVICE), core.config.head_dim)
    rotary = rotary if core.config.use_rotary else None
    defaults = dict(lengths=None, limit=[S] * n_rows, may_halt=[True] * n_rows, halt_bias=0.0)
    return Batch(x, rotary, **(defaults | options))


def in_kernels(
    core: HRMCore, b: Batch, before_last: bool = False, driver: str = "host", dropout_p=0.0
) -> ops.LoopResult:
    return core.kernels.run(
        core.weights(), b.x, core.H_init, core.L_init, b.rotary, b.lengths, b.limit, b.may_halt, b.halt_bias,
        keep_before=before_last, dropout_p=dropout_p, driver=driver,
    )  # fmt: skip


def on_host(core: HRMCore, b: Batch, before_last: bool = False) -> ops.LoopResult:
    with torch.no_grad(), ops.use_backend("reference"):
        return host_loop(core, b, before_last)


def real(state: Tensor, lengths: Tensor | None) -> Tensor:
    """The state of real tokens [., C]."""
    n_tokens = state.shape[1]
    lengths = torch.full((len(state),), n_tokens, device=state.device) if lengths is None else lengths
    return state[torch.arange(n_tokens, device=state.device) < lengths[:, None]]


def assert_same(found: ops.LoopResult, expected: ops.LoopResult, lengths: Tensor | None = None, limit: float = 1e-5):
    assert torch.equal(found.executed, expected.executed) and torch.equal(found.halted, expected.halted)
    for name in ("z_H", "z_L"):
        a, b = (real(getattr(r, name), lengths) for r in (found, expected))
        assert relative_error(a, b) <= limit, name
        assert getattr(found, name).isfinite().all(), "padding too"
    assert found.q.dtype == torch.float32 and (found.q - expected.q).norm() <= limit * expected.q.norm()


def margin(core: HRMCore, b: Batch) -> float:
    """The least distance of any decision in these steps from its threshold."""
    scores = [
        on_host(core, Batch(b.x, b.rotary, b.lengths, [s] * len(b.x), b.may_halt, NEVER)).q for s in range(1, S + 1)
    ]
    return min((q[:, 0] + b.halt_bias - q[:, 1]).abs().min().item() for q in scores)


# -- the same numbers --------------------------------------------------------------------------------------------------

SHAPES = {
    "a block each": {},
    "all that follows a level": dict(hrm_H_cycles=2, hrm_L_cycles=3, hrm_L_layers=2),
    "gelu, biases, no rope": dict(use_swiglu=False, bias=True, use_rotary=False, use_gqa=False),
    "swiglu with biases": dict(bias=True),
    "head size 56": dict(n_embd=112),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_every_step_gives_the_references_states(shape, dtype):
    """Truth is float64, from the same state. In bfloat16 the error may be 1.2 times that of the reference's step."""
    model = core(**shape).to(dtype)
    wide = copy.deepcopy(model).double()
    b = batch(model, 6, 11)
    x = b.x.to(dtype)
    space, weights, sizes = laid_out(model, x, b)
    space.fill(x, model.H_init, model.L_init, b.rotary, None, 0.0)
    space.books.open([S] * 6, [False] * 6)
    for n in range(1, S):
        before = space.z_H.clone(), space.z_L.clone()
        step(space, weights, sizes)
        with ops.use_backend("reference"):
            theirs = model.step(x, *before, b.rotary, None)
            truth = wide.step(x.double(), *(z.double() for z in before), b.rotary, None)
            q, _ = wide.q_values(space.z_H.double(), 0.0, None)
        for found, rounded, expected in zip((space.z_H, space.z_L), theirs, truth, strict=True):
            limit = 1e-5 if dtype == torch.float32 else 1.2 * relative_error(rounded, expected)
            assert relative_error(found, expected) <= limit, f"step {n}"
        assert relative_error(space.books.q, q) <= 1e-5


def laid_out(core: HRMCore, x: Tensor, b: Batch, keep_before: bool = False) -> tuple[Space, ops.LoopWeights, Sizes]:
    """Memory for single steps, full of nan, and what a step needs besides."""
    weights, c = core.weights(), core.config
    needs = Space.sizes(x, weights.L[0].up.dtype, weights.L[0], b.rotary, b.lengths, keep_before)
    scratch = Scratch()
    scratch.grow(needs, x.device)
    scratch._bytes.fill_(0xFF)
    space = Space.of(scratch.carve(needs), x)
    assert space.z_H.isnan().all() and space.hidden.isnan().all()
    return space, weights, Sizes(c.n_head, c.kv_heads, c.hrm_H_cycles, c.hrm_L_cycles, c.eps, b.halt_bias, 0.0)


PATTERNS = {
    "at every step": [1, 2, 3, 4, 2],
    "none before the last": [S] * 5,
    "all at the first": [1] * 5,
    "all at once": [3] * 5,
    "some not at all": [0, 2, 0, 1, 4],
    "the first long, the rest short": [4, 1, 1, 1, 1],
    "nobody": [0] * 5,
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("lengths", [None, [7, 1, 3, 6, 2]], ids=["whole", "lengths"])
@pytest.mark.parametrize("limit", PATTERNS.values(), ids=PATTERNS)
def test_rows_end_at_their_limits(limit, lengths, driver):
    model = core()
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    may_halt, bias = ([True] * 5, NEVER) if lengths is None else ([False] * 5, AT_ONCE)  # neither decides
    b = batch(model, 5, 7, lengths=lengths, limit=limit, may_halt=may_halt, halt_bias=bias)
    assert_same(in_kernels(model, b, driver=driver), on_host(model, b), lengths)


@pytest.mark.parametrize("before_last", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_rows_end_by_decision(driver, before_last):
    """Scores of this seed decide at every step; one row may not decide, and one has a limit below its decision."""
    model = core(seed=56)
    b = batch(model, 8, 6, seed=3, may_halt=[True] * 7 + [False], limit=[S] * 6 + [1, 3])
    expected = on_host(model, b.one_less() if before_last else b, before_last)
    b = b.one_less() if before_last else b
    assert margin(model, b) > 1e-4
    if not before_last:
        assert set(expected.executed[:6].tolist()) == {1, 2, 3, S} and expected.halted[:6].tolist().count(False) == 1
    assert_same(in_kernels(model, b, before_last, driver), expected)


@pytest.mark.parametrize("bias, executed", [(AT_ONCE, 1), (NEVER, S)])
def test_all_decide_alike(bias, executed):
    model = core()
    b = batch(model, 3, 5, halt_bias=bias)
    found = in_kernels(model, b)
    assert found.executed.tolist() == [executed] * 3 and found.halted.all() == (bias == AT_ONCE)
    assert_same(found, on_host(model, b))


@settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(st.data())
def test_random_configurations_and_patterns(data):
    """Whatever the shapes: sizes that no tile divides, decisions, limits, lengths, states from before the last step."""
    draw = data.draw
    n_kv_head, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = n_kv_head * groups
    shape = dict(
        n_head=heads, n_kv_head=n_kv_head, n_embd=heads * 2 * draw(st.integers(1, 9)),
        mlp_hidden=draw(st.integers(1, 40)), hrm_L_layers=draw(st.integers(1, 2)),
        hrm_H_cycles=draw(st.integers(1, 2)), bias=draw(st.booleans()), use_swiglu=draw(st.booleans()),
    )  # fmt: skip
    model = core(seed=draw(st.integers(0, 99)), **shape)
    n_rows, n_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    lengths = None
    if draw(st.booleans()):
        lengths = torch.tensor([draw(st.integers(1, n_tokens)) for _ in range(n_rows)], device=DEVICE)
    b = batch(
        model, n_rows, n_tokens, seed=draw(st.integers(0, 99)), lengths=lengths, halt_bias=draw(st.floats(-1, 1)),
        limit=[draw(st.integers(0, S)) for _ in range(n_rows)], may_halt=[draw(st.booleans()) for _ in range(n_rows)],
    )  # fmt: skip
    assume(margin(model, b) > 1e-4)
    before_last = draw(st.booleans())
    assert_same(in_kernels(model, b, before_last), on_host(model, b, before_last), lengths)


def test_one_row_of_one_token():
    model = core()
    b = batch(model, 1, 1, halt_bias=NEVER)
    assert_same(in_kernels(model, b), on_host(model, b))


# -- rows that are done, and neighbours --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_row_that_is_done_is_neither_read_nor_written():
    """Bit for bit, while the others go on; what lies in its place is nan from then on, and no other row sees it."""
    model = core(hrm_H_cycles=2)
    b = batch(model, 5, 7, lengths=torch.tensor([7, 4, 7, 1, 6], device=DEVICE), limit=[3, 1, 4, 2, 3], halt_bias=NEVER)
    space, weights, sizes = laid_out(model, b.x, b, keep_before=True)
    space.fill(b.x, model.H_init, model.L_init, b.rotary, b.lengths, 0.0)
    space.books.open(b.limit, b.may_halt)
    at_the_end, everything = (
        {},
        [t for name, t in vars(space).items() if name not in ("books", "rotary", "lengths", "pooled", "seed")],
    )
    while space.books.n_active.item():
        step(space, weights, sizes)
        going_on = set(space.books.active[: space.books.n_active.item()].tolist())
        for row in set(range(5)) - going_on:
            if row not in at_the_end:
                at_the_end[row] = {name: getattr(space, name)[row].clone() for name in ("z_H", "z_L", "before_H")}
                for t in everything:
                    t[row] = float("nan")
            for t in everything:
                assert t[row].isnan().all()
    expected, before = on_host(model, b), on_host(model, b.one_less())
    for row, states in at_the_end.items():
        n = b.lengths[row]
        for name, truth in (("z_H", expected.z_H), ("z_L", expected.z_L), ("before_H", before.z_H)):
            assert relative_error(states[name][:n], truth[row, :n]) <= 1e-5, (row, name)
    assert len(at_the_end) == 5 and space.books.executed.tolist() == b.limit


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_row_does_not_depend_on_its_neighbours(tokens):
    """Tiles of 16 tokens hold tokens of several rows; another order, and other rows, change nothing."""
    model = core()
    with use_tiles(
        **{op: t._replace(M=16) for op, t in WHOLE.items() if op in ("qkv", "swiglu", "linear", "rms_norm")}
    ):
        b = batch(model, 7, tokens, limit=[1, 4, 2, 3, 4, 1, 2], may_halt=[False] * 7)
        together = in_kernels(model, b)
        order = [3, 1, 5, 0]
        some = in_kernels(model, Batch(b.x[order], b.rotary, None, [b.limit[i] for i in order], [False] * 4, 0.0))
    assert relative_error(some.z_H, together.z_H[order]) <= 1e-6 and relative_error(some.q, together.q[order]) <= 1e-6


def test_a_padded_row_equals_itself_alone():
    model = core()
    lengths = [3, 7, 1]
    b = batch(model, 3, 7, lengths=torch.tensor(lengths, device=DEVICE), limit=[2, 3, 4])
    together = in_kernels(model, b)
    for row, n in enumerate(lengths):
        alone = Batch(b.x[row : row + 1, :n], b.rotary[:n], None, b.limit[row : row + 1], [True], 0.0)
        assert relative_error(in_kernels(model, alone).z_H[0], together.z_H[row, :n]) <= 1e-5


# -- precision, dropout ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_under_autocast_the_state_stays_float32():
    model = core()
    b = batch(model, 3, 5, halt_bias=NEVER)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, theirs = in_kernels(model, b), on_host(model, b)
    truth = on_host(model, b)
    assert found.z_H.dtype == torch.float32
    assert 1e-4 < relative_error(found.z_H, truth.z_H) <= 1.2 * relative_error(theirs.z_H, truth.z_H)
    model.L_level.layers[0].mlp.up.weight.mul_(2)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert not torch.equal(in_kernels(model, b).z_H, found.z_H), "copies of weights are made anew"


def test_dropout_follows_torchs_seed_and_is_drawn_anew_in_every_step_and_block():
    from hrm_kernels.kernels.hrm_step import _start_add_norm
    from hrm_kernels.kernels.launch import Rows

    model = core()
    b = batch(model, 3, 40, may_halt=[False] * 3, limit=[2] * 3)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(in_kernels(model, b, dropout_p=0.3).z_H)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert relative_error(in_kernels(model, b, dropout_p=1e-9).z_H, on_host(model, b).z_H) <= 1e-5

    space, weights, sizes = laid_out(model, b.x, b)
    space.fill(b.x, model.H_init, model.L_init, b.rotary, None, 0.25)
    space.books.open([S] * 3, [False] * 3)

    def kept(application: int, executed: int) -> Tensor:
        """Which elements of a branch outlive dropout: those of norm(0 + branch) that are not 0."""
        space.books.executed.fill_(executed)
        zero, ones, y = (
            torch.zeros(120, 16, device=DEVICE),
            torch.ones(120, 16, device=DEVICE),
            torch.empty(120, 16, device=DEVICE),
        )
        which = Rows(None, space.books.active, space.books.n_active)
        _start_add_norm(
            space, zero, ones, weights.L[0].norm_1.detach(), y, sizes._replace(dropout_p=0.25), which,
            lambda: (application, 6),
        )  # fmt: skip
        return y != 0

    masks = [kept(a, e) for a, e in ((0, 0), (1, 0), (0, 1), (5, 3))]
    assert torch.equal(masks[0], kept(0, 0))
    for i, mask in enumerate(masks):
        assert 0.70 < mask.double().mean() < 0.80, "3 of 4 are kept; five deviations of 1920 draws are 0.05"
        for other in masks[:i]:
            assert 0.55 < (mask == other).double().mean() < 0.70, "independent masks agree on 5 of 8"


# -- memory, copies, modes ---------------------------------------------------------------------------------------------


def test_scratch_memory_is_allocated_once_and_shared_by_shapes():
    model = core()
    loop, sizes = model.kernels, [(3, 9), (2, 5), (3, 9), (1, 1), (2, 5)]
    expected = {size: on_host(model, batch(model, *size)) for size in sizes}
    addresses = set()
    for size in sizes:
        assert_same(in_kernels(model, batch(model, *size)), expected[size])
        addresses.add((loop._scratch._bytes.data_ptr(), loop._scratch.nbytes))
    assert len(addresses) == 1
    in_kernels(model, batch(model, 4, 9))
    assert loop._scratch.nbytes > addresses.pop()[1]
    loop.release()
    assert loop._scratch.nbytes == 0
    assert_same(in_kernels(model, batch(model, 2, 5)), expected[2, 5])


def test_memory_that_grows_is_given_back_before_more_is_asked_for(monkeypatch):
    model, moved, grow = core(), [], Scratch.grow

    def watched(self, sizes, device):
        old = None if self._bytes is None else weakref.ref(self._bytes.untyped_storage())
        gc.collect()  # the interpreter leaves cycles behind that hold a kernel's arguments
        grow(self, sizes, device)
        moved.append(old is None or old() is None)

    monkeypatch.setattr(Scratch, "grow", watched)
    for tokens in range(2, 9):
        in_kernels(model, batch(model, 1, tokens, limit=[1]))
    assert all(moved) and 1 < len(moved) < 5, "not with every token that comes"


def test_strided_parameters_are_made_dense():
    model = core(bias=True)
    expected = in_kernels(model, batch(model, 2, 5))
    for p in (*model.L_level.parameters(), *model.q_head.parameters()):
        strided = torch.stack([p.detach(), torch.full_like(p, float("nan"))], -1)[..., 0]
        assert not strided.is_contiguous()
        p.data = strided
    assert_same(in_kernels(model, batch(model, 2, 5)), expected)


def test_results_are_the_callers_own():
    model = core()
    first = in_kernels(model, batch(model, 2, 5, seed=1))
    kept = [t.clone() for t in first]
    in_kernels(model, batch(model, 2, 5, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_model_is_copied_and_pickled_without_its_loops_memory():
    model = core()
    b = batch(model, 2, 5)
    expected = in_kernels(model, b)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.kernels._scratch.nbytes == 0 and not any("kernels" in key for key in other.state_dict())
        assert_same(in_kernels(other, b), expected)


def test_inference_mode_leaves_nothing_behind_that_training_could_not_use():
    model = core().train()
    b = batch(model, 2, 5)
    with torch.inference_mode():
        in_kernels(model, b)
    found = in_kernels(model, b)
    assert not any(t.requires_grad or t.is_inference() for t in found)


# -- whole models ------------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=97, n_embd=16, block_size=16, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
TINY |= ONE_OF_EACH | dict(hrm_max_steps=3, halt_bias=0.0)


def language_model(**options) -> HRMForCausalLM:
    torch.manual_seed(0)
    return HRMForCausalLM(HRMConfig(**(TINY | options))).to(DEVICE)


IDS = torch.arange(15, device=DEVICE).view(3, 5)


@pytest.mark.parametrize("options", [dict(force_steps=[1, 2, 3]), dict(halt_bias=AT_ONCE), dict(max_steps=1), {}])
def test_training_replays_the_same_step_from_the_same_state(options):
    """Loss, every gradient and what is counted, against the reference; H_init's comes from rows that stop at step 1."""
    model, found = language_model(), {}
    for mode in ("reference", "triton"):
        with ops.use_backend(mode):
            out = model(IDS, IDS, lengths=[5, 2, 4], **options)
            out.loss.backward()
        counts = out.executed_steps.tolist(), out.steps_taken.tolist(), out.row_steps.tolist()
        found[mode] = out.loss, out.q_logits, counts, {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
    (loss, q, counts, gradients), (their_loss, their_q, their_counts, theirs) = found["triton"], found["reference"]
    assert counts == their_counts
    assert torch.allclose(loss, their_loss, rtol=1e-5) and torch.allclose(q, their_q, rtol=1e-4, atol=1e-6)
    for name, g in theirs.items():
        assert (gradients[name] - g).norm() <= 1e-4 * g.norm() + 1e-8, name


def test_the_loop_is_chosen_like_an_op(monkeypatch):
    model = language_model().eval()
    ran = []
    run = ops.HRMLoop.run
    monkeypatch.setattr(ops.HRMLoop, "run", lambda *a, **k: ran.append(k["driver"]) or run(*a, **k))
    with torch.no_grad():
        for mode, override in (("reference", {}), ("triton", {}), ("triton", {"hrm_loop": "reference"})):
            with ops.use_backend(mode, **override):
                model(IDS)
        with ops.use_backend("triton", hrm_loop="host"):
            model(IDS)
    first = "host" if DEVICE.type == "cpu" else "while"
    assert ran == [first, "host"]
    assert ops.describe(torch.device("cpu"))["hrm_loop"] == "reference"


def test_another_implementation_of_an_op_that_a_step_is_made_of_is_not_overruled(monkeypatch):
    model = language_model().eval()
    ran = []
    monkeypatch.setattr(ops.HRMLoop, "run", lambda *a, **k: ran.append(k["driver"]))
    with torch.no_grad(), ops.use_backend("triton", attention="sdpa"):
        model(IDS)
    with torch.no_grad(), ops.use_backend("triton", swiglu="reference"):
        model(IDS)
    assert not ran


def test_what_is_attached_to_modules_is_not_left_out():
    """A hook, or a module of another kind: the model's own loop runs, or kernels by name are an error that says so."""
    for attach in (
        lambda core: core.L_level.layers[0].mlp.down.register_forward_hook(lambda m, args, out: out * 1.5),
        lambda core: setattr(
            core.H_level.layers[0].attn, "c_proj", torch.nn.Sequential(core.H_level.layers[0].attn.c_proj)
        ),
    ):
        model = language_model().eval()
        attach(model.hrm_core)
        with torch.no_grad(), ops.use_backend("reference"):
            expected = model(IDS).logits
        with torch.no_grad(), ops.use_backend("triton", hrm_loop="reference"):
            assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        with torch.no_grad(), ops.use_backend("triton"), pytest.raises(ops.BackendError, match=r"hrm_loop=reference"):
            model(IDS)


def test_under_torch_compile_the_loop_is_called_as_it_is():
    torch.compiler.reset()
    model = language_model().eval()
    with torch.no_grad(), ops.use_backend("triton"):
        expected = model(IDS, force_steps=2).logits
        assert torch.equal(torch.compile(model, backend="eager")(IDS, force_steps=2).logits, expected)


def test_where_the_device_cannot_drive_the_host_does_and_says_so(monkeypatch):
    from hrm_kernels import backend, while_graph

    monkeypatch.setattr(while_graph, "why_not", lambda device: "nvcc is nowhere")
    backend._say_once.cache_clear()
    with pytest.warns(UserWarning, match="the host starts the steps of the HRM loop, not the device: nvcc is nowhere"):
        assert backend._driver("auto", torch.device("cuda")) == "host"
    assert backend._driver("graph", torch.device("cuda")) == "graph"
    with pytest.raises(ops.BackendError, match="hrm_loop=while was asked for, but nvcc is nowhere; use hrm_loop=host"):
        backend._driver("while", torch.device("cuda"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for where there is no GPU")
@pytest.mark.parametrize("driver", ["graph", "while"])
def test_a_driver_that_was_asked_for_by_name_and_cannot_run_is_an_error(driver):
    with ops.use_backend("triton", hrm_loop=driver), pytest.raises(ops.BackendError) as error:
        language_model()(IDS)
    assert f"hrm_loop={driver} was asked for, but x is on cpu" in str(error.value) and "hrm_loop=host" in str(
        error.value
    )


def test_what_the_kernels_do_not_cover_is_said():
    model = language_model().double()
    with (
        ops.use_backend("auto", hrm_loop="host"),
        pytest.raises(ops.BackendError, match=r"torch\.float64; kernels take"),
    ):
        model(IDS)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_recomputed_activations_give_the_same_gradients_and_keep_less(mode):
    model, found = language_model(dropout=0.2).train(), []
    for recompute in (False, True):
        model.recompute_activations(recompute)
        kept = set()

        def keep(t: Tensor, kept=kept) -> Tensor:
            kept.add((t.data_ptr(), t.numel() * t.element_size()))
            return t

        torch.manual_seed(3)
        with ops.use_backend(mode), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(IDS, IDS, force_steps=[1, 2, 3])
        out.loss.backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, sum(size for _, size in kept)))
        model.zero_grad(set_to_none=True)
    (gradients, kept), (again, kept_less) = found
    for name, g in gradients.items():
        assert torch.equal(again[name], g), name
    assert kept_less < 0.7 * kept


# -- what may not go wrong ---------------------------------------------------------------------------------------------

WRONG = {
    "a row of length 0": (dict(lengths=torch.tensor([5, 0])), r"lengths [5, 0] must lie in 1..5, the padded length"),
    "lengths over T": (dict(lengths=torch.tensor([5, 6])), r"lengths [5, 6] must lie in 1..5"),
    "lengths of another batch": (dict(lengths=torch.tensor([5, 5, 5])), "lengths has shape (3,); one for each row, it"),
    "a limit too few": (dict(limit=[2]), "limit has 1 entries for 2 rows"),
    "a mask too long": (dict(may_halt=[True] * 3), "may_halt has 3 entries for 2 rows"),
    "a limit below 0": (dict(limit=[2, -1]), "limit -1 is outside 0..2147483647"),
    "another table": (
        dict(rotary=torch.zeros(4, 4, 2)),
        "rotary has shape (4, 4, 2); for this x and these weights it must be (5, 4, 2)",
    ),
    "a bias that is no number": (dict(halt_bias=float("nan")), "halt_bias is nan"),
    "no rows": (dict(x=torch.zeros(0, 5, 16), limit=[], may_halt=[]), "x has shape (0, 5, 16); give at least one row"),
}


@pytest.mark.parametrize("wrong, message", WRONG.values(), ids=WRONG)
def test_bad_input_is_one_clear_error_before_anything_is_launched(wrong, message):
    model = core()
    b = batch(model, 2, 5)
    wrong = {name: t.to(DEVICE) if isinstance(t, Tensor) and name != "lengths" else t for name, t in wrong.items()}
    with pytest.raises(ValueError, match=re.escape(message)), record() as launches:
        in_kernels(model, replace(b, **wrong))
    assert not launches


@pytest.mark.parametrize(
    "name, size", [("o", (12, 16)), ("down", (16, 3)), ("norm_1", (8,)), ("q_bias", (1,)), ("v", (8, 4))]
)
def test_weights_that_do_not_fit_are_refused(name, size):
    """A kernel would read beyond their end, or write beyond another's, without a word."""
    model = core(bias=True)
    good = model.weights()
    weights = good._replace(H=(good.H[0]._replace(**{name: torch.zeros(size, device=DEVICE)}),))
    b = batch(model, 2, 5)
    arguments = b.x, model.H_init, model.L_init, b.rotary, None, b.limit, b.may_halt
    with record() as launches, pytest.raises(ValueError, match=f"a block's {name} has shape {re.escape(str(size))}"):
        model.kernels.run(weights, *arguments)
    with pytest.raises(ValueError, match="a block's k_bias is missing"):
        model.kernels.run(good._replace(L=(good.L[0]._replace(k_bias=None),)), *arguments)
    with pytest.raises(ValueError, match="driver 'device' is none of host, graph, while"):
        model.kernels.run(good, *arguments, driver="device")
    assert not launches


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(force_steps=0), "force_steps 0 is outside 1..3"),
        (dict(force_steps=4), "force_steps 4 is outside 1..3; to go deeper pass max_steps too"),
        (dict(max_steps=0), "max_steps 0 must be an integer of at least 1"),
        (dict(lengths=[0, 1, 2]), "lengths [0, 1, 2] must lie in 1..5"),
        (dict(lengths=torch.tensor([5, 6, 5], device=DEVICE)), "lengths [5, 6, 5] must lie in 1..5"),
    ],
)
def test_a_model_with_kernels_refuses_the_same(options, message):
    with ops.use_backend("triton"), pytest.raises(ValueError, match=re.escape(message)):
        language_model()(IDS, **options)


# -- drivers -----------------------------------------------------------------------------------------------------------


def test_a_step_of_the_base_model_starts_170_kernels():
    """24 blocks of 7 and 2 more: what a driver has to start, and what one without the host need not wait for."""
    c = HRMConfig()
    with torch.device("meta"):
        model = HRMCore(c)
        x, rotary = torch.empty(2, 8, c.n_embd), torch.empty(8, c.head_dim // 2, 2)
        weights = model.weights()
        needs = Space.sizes(x, torch.float32, weights.L[0], rotary, None, False)
        space = Space.of({name: torch.empty(shape, dtype=of) for name, (shape, of) in needs.items()}, x)
    with record() as launches:
        step(space, weights, Sizes(c.n_head, c.kv_heads, c.hrm_H_cycles, c.hrm_L_cycles, c.eps, 0.0, 0.0))
    assert len(launches) == 24 * 7 + 2 == 170


@needs_gpu
@pytest.mark.parametrize("driver", ["graph", "while"])
def test_the_host_does_not_wait_between_the_first_and_the_last_step(driver):
    model = core()
    b = batch(model, 5, 7, limit=[1, 4, 2, 3, 4], halt_bias=NEVER)
    in_kernels(model, b, driver=driver)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = in_kernels(model, b, driver=driver)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, on_host(model, b))


@needs_gpu
def test_drivers_agree_to_the_last_bit_and_weights_may_change_in_place():
    model = core()
    b = batch(model, 5, 7, limit=[1, 4, 2, 3, 4], halt_bias=NEVER)
    for _ in range(2):
        results = [in_kernels(model, b, driver=driver) for driver in ("host", "graph", "while")]
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
        assert_same(results[0], on_host(model, b))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
