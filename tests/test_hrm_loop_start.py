"""The loop on kernels from states that a caller gives, and with a head that looks at a row's first tokens only."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from parity import DEVICE, model_tiles
from test_hrm_loop import AT_ONCE, DRIVERS, S, assert_same, batch, core, laid_out, needs_gpu
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels.kernels.hrm_step import step
from hrm_kernels.kernels.launch import record
from hrm_model.core import HRMCore
from hrm_model.host_loop import Batch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
RAGGED = pytest.mark.parametrize("lengths", [None, [7, 1, 5, 6, 3]], ids=["whole", "lengths"])
ROWS, T, SEED = 5, 7, 22
POOLED = [3, 1, 5, 2, 1]
"""Leading tokens, at most RAGGED's."""


@pytest.fixture(autouse=True)
def tiles():
    with model_tiles():
        yield


def integers(values: list[int] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=DEVICE)


def rows(core: HRMCore, n_rows: int, n_tokens: int, seed: int = 1, **options) -> Batch:
    """As `batch`, of the core's dtype."""
    b = batch(core, n_rows, n_tokens, seed, **options)
    return replace(b, x=b.x.to(core.H_init.dtype))


def forced(b: Batch, limit: list[int] | int) -> Batch:
    """b with rows that run to these limits whatever they decide."""
    n = len(b.x)
    return replace(b, limit=[limit] * n if isinstance(limit, int) else limit, may_halt=[False] * n)


def loop(core: HRMCore, b: Batch, init=None, **options) -> ops.LoopResult:
    """One call on b, from `init` (z_H, z_L) where it is given."""
    return core.kernels.run(
        core.weights(), b.x, *(init or (core.H_init, core.L_init)), b.rotary, b.lengths, b.limit, b.may_halt,
        b.halt_bias, **options,
    )  # fmt: skip


def equal(found: ops.LoopResult, expected: ops.LoopResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def some_states(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randn(x.shape, generator=generator).to(DEVICE, dtype) for _ in range(2))


# -- states of the caller's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@RAGGED
@DTYPES
def test_one_step_at_a_time_is_one_call_of_as_many_steps_bit_for_bit(dtype, lengths, driver):
    """Of every number of steps: so the calls of one step give each step's states."""
    model = core(hrm_H_cycles=2).to(dtype)
    b, states = rows(model, ROWS, T, lengths=integers(lengths)), None
    for n in range(1, S):
        found, expected = loop(model, forced(b, 1), states, driver=driver), loop(model, forced(b, n), driver=driver)
        assert expected.executed.tolist() == [n] * ROWS and found.executed.tolist() == [1] * ROWS
        assert found.z_H.dtype == dtype and equal(found._replace(executed=expected.executed), expected)
        states = found.z_H, found.z_L


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_rows_go_on_to_their_own_decisions(autocast):
    """Two calls, the second of which runs the rows that the first left, are one."""
    model = core(seed=56)
    b = rows(model, 8, 6, seed=3)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        whole = loop(model, b)
        first = loop(model, replace(b, limit=[1] * 8))
        left = [0 if halted else S - 1 for halted in first.halted.tolist()]
        rest = loop(model, replace(b, limit=left), (first.z_H, first.z_L))
    assert len(set(whole.executed.tolist())) > 2 and 0 in left
    assert torch.equal(first.executed + rest.executed, whole.executed)
    assert torch.equal(first.halted | rest.halted, whole.halted)
    assert torch.equal(rest.z_H, whole.z_H) and torch.equal(rest.z_L, whole.z_L)
    ran = rest.executed > 0
    assert torch.equal(torch.where(ran[:, None], rest.q, first.q), whole.q)


@DTYPES
def test_rows_that_run_no_step_keep_their_states(dtype):
    """Alone or beside others, before or after the last step; what comes back is the caller's own."""
    model = core().to(dtype)
    b = rows(model, 3, 4, limit=[0, 2, 0], halt_bias=AT_ONCE)
    states = some_states(b.x, torch.float32)
    narrow = tuple(z.to(dtype) for z in states)
    for keep_before in (False, True):
        found = loop(model, b, states, keep_before=keep_before)
        assert found.executed.tolist() == [0, 1, 0] and found.halted.tolist() == [False, True, False]
        for z, given in zip(found[:2], narrow, strict=True):
            assert [torch.equal(z[row], given[row]) for row in range(3)] == [True, keep_before, True]
    found = loop(model, forced(b, 0), narrow)
    assert torch.equal(found.z_H, narrow[0]) and torch.equal(found.z_L, narrow[1]) and not found.executed.any()
    kept = [z.clone() for z in narrow]
    found.z_H.zero_(), found.z_L.zero_()
    assert torch.equal(narrow[0], kept[0]) and torch.equal(narrow[1], kept[1])


def test_states_are_only_read_and_may_be_strided_want_gradients_or_stand_beside_a_vector():
    model = core()
    b = forced(rows(model, 3, 4), [2, 1, 2])
    z_H, z_L = some_states(b.x, torch.float32)
    kept = z_H.clone(), z_L.clone()
    expected = loop(model, b, (z_H, z_L))
    assert torch.equal(z_H, kept[0]) and torch.equal(z_L, kept[1])
    strided = z_H.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = loop(model, b, (strided, z_L))
    assert equal(found, expected) and not found.z_H.requires_grad
    vector = loop(model, b, (model.H_init, z_L))
    assert equal(vector, loop(model, b, (model.H_init.detach().expand_as(z_H), z_L)))
    assert not torch.equal(vector.z_H, expected.z_H)


def test_what_padding_holds_is_not_looked_at():
    model = core()
    lengths = integers([4, 1, 3])
    b = forced(rows(model, 3, 4, lengths=lengths), [2, 1, 2])
    states = some_states(b.x, torch.float32)
    expected = loop(model, b, states)
    real = torch.arange(4, device=DEVICE)[None] < lengths[:, None]
    found = loop(model, b, tuple(z.masked_fill(~real[..., None], float("nan")) for z in states))
    assert torch.equal(found.z_H[real], expected.z_H[real]) and torch.equal(found.z_L[real], expected.z_L[real])
    assert torch.equal(found.q, expected.q)


# -- a mean over leading tokens ----------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(core: HRMCore, b: Batch, pooled: Tensor | None, keep_before: bool = False) -> ops.LoopResult:
    """Every row alone in plain PyTorch, with the op `halting` over its first `pooled` tokens."""
    results = []
    for row, limit in enumerate(b.limit):
        x, one = b.x[row : row + 1], slice(row, row + 1)
        lengths, count = (None if t is None else t[one] for t in (b.lengths, pooled))
        (z_H, z_L), q, halted, n = core.initial_state(x), torch.zeros(1, 2, device=DEVICE), False, 0
        with ops.use_backend("reference"):
            while n < limit and not halted:
                before, n = (z_H, z_L), n + 1
                z_H, z_L = core.step(x, z_H, z_L, b.rotary, lengths)
                q, halt = ops.halting(z_H, core.q_head.weight, core.q_head.bias, b.halt_bias, count)
                halted = b.may_halt[row] and halt.item()
        z_H, z_L = before if halted and keep_before else (z_H, z_L)
        results.append((z_H, z_L, q, torch.tensor([n], device=DEVICE), torch.tensor([halted], device=DEVICE)))
    return ops.LoopResult(*(torch.cat(part) for part in zip(*results, strict=True)))


def margin(core: HRMCore, b: Batch, pooled: Tensor | None) -> float:
    """The least distance of any row's decision from its threshold, in any of S steps."""
    scores = [by_hand(core, forced(b, n), pooled).q for n in range(1, S + 1)]
    return min((q[:, 0] + b.halt_bias - q[:, 1]).abs().min().item() for q in scores)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("keep_before", [False, True], ids=["after", "before"])
@RAGGED
def test_rows_halt_by_the_mean_over_their_first_tokens(lengths, keep_before, driver):
    """Rows of this seed decide at different steps, and the mean over all their tokens would decide otherwise."""
    model, pooled = core(seed=SEED), integers(POOLED)
    b = rows(model, ROWS, T, lengths=integers(lengths))
    expected = by_hand(model, b, pooled, keep_before)
    assert margin(model, b, pooled) > 1e-4
    assert len(set(expected.executed.tolist())) > 2
    assert expected.executed.tolist() != by_hand(model, b, b.lengths).executed.tolist()
    assert_same(loop(model, b, pooled=pooled, keep_before=keep_before, driver=driver), expected, b.lengths)


@DTYPES
def test_scores_are_those_of_the_op_halting_over_the_states_of_that_step(dtype):
    """And nothing but the scores depends on pooled, of either type of integers."""
    model = core().to(dtype)
    b = forced(rows(model, ROWS, T, lengths=integers([7, 1, 5, 6, 3])), [1, 2, 3, 4, 2])
    plain = loop(model, b)
    for pooled in (integers(POOLED), integers(POOLED).int()):
        found = loop(model, b, pooled=pooled)
        head = model.q_head.weight, model.q_head.bias
        with torch.no_grad(), ops.use_backend("reference"):
            q, _ = ops.halting(found.z_H, *head, 0.0, pooled)
        assert (found.q - q).norm() <= 1e-5 * q.norm()
        assert equal(found._replace(q=plain.q), plain) and not torch.equal(found.q, plain.q)
        with torch.no_grad(), ops.use_backend("triton"):
            assert torch.equal(found.q, ops.halting(found.z_H, *head, 0.0, pooled)[0])


@RAGGED
@DTYPES
def test_decisions_are_those_of_a_host_that_looks_at_every_step(dtype, lengths):
    """It starts one step of the rows that go on, scores it with the op over their first tokens, and so on: bit for bit
    what a call gives that decides for itself, rows that were done at a step left as they were in both."""
    model, pooled = core(seed=SEED).to(dtype), integers(POOLED)
    b, states = rows(model, ROWS, T, lengths=integers(lengths)), None
    goes_on, executed, halted = [1] * ROWS, [0] * ROWS, [False] * ROWS
    for _ in range(S):
        states = loop(model, forced(b, goes_on), states)[:2]
        with torch.no_grad(), ops.use_backend("reference"):
            q, halt = ops.halting(states[0], model.q_head.weight, model.q_head.bias, b.halt_bias, pooled)
        assert (q[:, 0] + b.halt_bias - q[:, 1]).abs().min() > 1e-4
        executed = [n + more for n, more in zip(executed, goes_on, strict=True)]
        halted = halt.tolist()  # of a row that is done: as it was, for its state is
        goes_on = [int(not done) for done in halted]
    found = loop(model, b, pooled=pooled)
    assert found.executed.tolist() == executed and found.halted.tolist() == halted and len({*executed}) > 2
    assert torch.equal(found.z_H, states[0]) and torch.equal(found.z_L, states[1])


def test_a_row_goes_as_deep_as_its_first_tokens_would_alone():
    """Attention is causal, so what follows them cannot change their mind."""
    model = core(seed=SEED)
    b = rows(model, ROWS, T, lengths=integers([7, 1, 5, 6, 3]))
    found = loop(model, b, pooled=integers(POOLED))
    for row, n in enumerate(POOLED):
        one = Batch(b.x[row : row + 1, :n], b.rotary[:n], None, [S], [True], b.halt_bias)
        alone = loop(model, one)
        assert (alone.executed, alone.halted) == (found.executed[row], found.halted[row])
        assert torch.allclose(alone.q[0], found.q[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("driver", DRIVERS)
def test_pooled_over_everything_is_the_default_and_calls_without_it_forget_it(driver):
    model = core(seed=SEED)
    for lengths in (None, integers([7, 1, 5, 6, 3])):
        b = rows(model, ROWS, T, lengths=lengths)
        expected = loop(model, b, driver=driver)
        assert not torch.equal(loop(model, b, pooled=integers(POOLED), driver=driver).q, expected.q)
        everything = integers([T] * ROWS) if lengths is None else lengths
        assert equal(loop(model, b, pooled=everything, driver=driver), expected)
        assert equal(loop(model, b, driver=driver), expected)


def test_a_row_of_more_programs_than_hold_its_first_tokens():
    """A program of the head sums some 16 positions; here those beyond the first have nothing to sum."""
    model = core()
    b = forced(rows(model, 3, 40), 1)
    pooled = integers([3, 17, 40])
    assert_same(loop(model, b, pooled=pooled), by_hand(model, b, pooled))


@torch.no_grad()
def test_a_row_that_its_first_tokens_stopped_is_neither_read_nor_written():
    """Its place is filled with nan when it is done, stays so, and no other row sees it."""
    model, pooled = core(seed=SEED), integers(POOLED)
    b = rows(model, ROWS, T, lengths=integers([7, 1, 5, 6, 3]))
    expected = by_hand(model, b, pooled)
    space, weights, sizes = laid_out(model, b.x, b)
    space.pooled = torch.empty_like(pooled)
    space.fill(b.x, model.H_init, model.L_init, b.rotary, b.lengths, 0.0, pooled)
    space.books.open(b.limit, b.may_halt)
    done = {}
    while space.books.n_active.item():
        step(space, weights, sizes)
        going_on = space.books.active[: space.books.n_active.item()].tolist()
        for row in set(range(ROWS)) - {*going_on, *done}:
            done[row] = space.z_H[row, : b.lengths[row]].clone()
            for t in (space.x, space.z_H, space.z_L, space.u, space.v, space.qkv, space.heads):
                t[row] = float("nan")
        assert all(space.z_H[row].isnan().all() and space.z_L[row].isnan().all() for row in done)
    assert space.books.executed.tolist() == expected.executed.tolist() and len(set(expected.executed.tolist())) > 1
    for row, z_H in done.items():
        assert torch.allclose(z_H, expected.z_H[row, : len(z_H)], rtol=1e-4, atol=1e-5)


# -- memory and graphs -------------------------------------------------------------------------------------------------


def test_nothing_is_laid_out_anew_for_the_next_step():
    """Not even another carving of the scratch memory: vectors and states, one step after another, are one shape."""
    model = core()
    b = forced(rows(model, 2, 5), 1)
    loop(model, b, pooled=integers([2, 3]))  # memory for both
    found = loop(model, b)
    assert len(model.kernels._shapes) == 2
    with record() as first:
        loop(model, b)
    nbytes = model.kernels._scratch.nbytes
    for _ in range(3):
        with record() as launches:
            found = loop(model, b, (found.z_H, found.z_L))
        assert len(launches) == len(first) and len(model.kernels._shapes) == 2
    assert model.kernels._scratch.nbytes == nbytes


@needs_gpu
@pytest.mark.parametrize("driver", ["graph", "while"])
def test_one_graph_serves_every_step_and_nobody_waits(driver):
    model, pooled = core(), integers(POOLED)
    b = forced(rows(model, ROWS, T), 1)
    found = loop(model, b, pooled=pooled, driver=driver)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(S - 1):
            found = loop(model, b, (found.z_H, found.z_L), pooled=pooled, driver=driver)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (shape,) = model.kernels._shapes.values()
    assert len(shape._graphs) == 1
    assert torch.equal(found.z_H, loop(model, forced(b, S), pooled=pooled, driver=driver).z_H)


# -- what may not go wrong ---------------------------------------------------------------------------------------------

STATES = torch.zeros(2, 5, 16)
WRONG = {
    "no tokens": (dict(pooled=[5, 0]), "pooled [5, 0] must lie in 1..5, the positions of x; give a number of leading"),
    "more than there are": (dict(pooled=[6, 1]), "pooled [6, 1] must lie in 1..5, the positions of x"),
    "more than are real": (dict(pooled=[5, 4], lengths=[5, 3]), "pooled [5, 4] must lie in 1..lengths [5, 3]"),
    "pooled of another batch": (dict(pooled=[1, 1, 1]), "pooled has shape (3,); one for each row, it must be (2,)"),
    "a mask": (dict(pooled=[True, True]), "pooled is torch.bool; it must be int32 or int64"),
    "shares": (dict(pooled=[0.5, 1.0]), "pooled is torch.float32; it must be int32 or int64"),
    "states of other rows": (
        dict(init=(STATES, STATES[:1])),
        "init_L has shape (1, 5, 16); for this x it must be (16,), where every position starts, or (2, 5, 16), states",
    ),
    "a vector a row": (dict(init=(STATES[:, 0], STATES)), "init_H has shape (2, 16); for this x it must be (16,)"),
    "other channels": (dict(init=(torch.zeros(8), STATES)), "init_H has shape (8,); for this x it must be (16,)"),
    "states of another type": (
        dict(init=(STATES, STATES.double())),
        "init_L is torch.float64 and x torch.float32; convert these states to torch.float32",
    ),
    "states of half the width": (
        dict(init=(STATES.bfloat16(), STATES)),
        "init_H is torch.bfloat16 and x torch.float32; convert these states to torch.float32 or",
    ),
}


@pytest.mark.parametrize("wrong, message", WRONG.values(), ids=WRONG)
def test_bad_input_is_one_clear_error_before_anything_is_launched(wrong, message):
    if DEVICE.type == "cuda" and "must lie in" in message:
        pytest.skip("on a GPU what integers hold is not looked at: that would wait")
    model, wrong = core(), dict(wrong)
    b = rows(model, 2, 5, lengths=integers(wrong.pop("lengths", None)))
    if "pooled" in wrong:
        wrong["pooled"] = integers(wrong["pooled"])
    if "init" in wrong:
        wrong["init"] = tuple(t.to(DEVICE) for t in wrong["init"])
    with pytest.raises(ValueError, match=re.escape(message)), record() as launches:
        loop(model, b, **wrong)
    assert not launches


def test_tokens_over_a_cache_start_at_the_beginning_and_are_scored_as_a_whole():
    model = core()
    b = rows(model, 2, 1)
    past = ops.StepPast(*(torch.zeros(1, device=DEVICE) for _ in range(4)), integers([0, 0]))
    for wrong, message in (
        (dict(pooled=integers([1, 1])), "pooled was given with past, whose mean runs over all positions of a row"),
        (dict(init=some_states(b.x, torch.float32)), "init_H has shape (2, 1, 16); with past, tokens are new: give"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)), record() as launches:
            loop(model, b, past=past, **wrong)
        assert not launches
