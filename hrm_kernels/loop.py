"""The batched-halting loop on kernels: every row of a batch to its own depth, the list of those that go on kept on the
device. What a step is, is kernels/hrm_step.py; who starts the steps, drivers.py.

The two levels are from Wang et al., "Hierarchical Reasoning Model", 2025.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import backend, checks, drivers, tuning
from .autocast import compute_dtype
from .scratch import Scratch

if TYPE_CHECKING:
    from .past import StepPast

MOST_SHAPES = 8
"""Shapes of batches whose captured graphs a loop keeps, the latest. They share one piece of memory."""

MOST_GRAPHS = 6
"""Graphs of one shape: for other weights, halting biases, numbers of steps."""


class BlockWeights(NamedTuple):
    """Parameters of one post-norm block; biases all None, or all there."""

    norm_1: Tensor
    """[C]"""
    q: Tensor
    """[H D, C]"""
    k: Tensor
    """[K D, C]"""
    v: Tensor
    """[K D, C]"""
    o: Tensor
    """[C, H D]"""
    norm_2: Tensor
    """[C]"""
    gate: Tensor | None
    """[F, C]; None where the MLP is Linear, GELU, Linear."""
    up: Tensor
    """[F, C]"""
    down: Tensor
    """[C, F]"""
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class LoopWeights(NamedTuple):
    """Parameters of a core."""

    L: tuple[BlockWeights, ...]
    H: tuple[BlockWeights, ...]
    q: Tensor
    """[2, C]"""
    q_bias: Tensor
    """[2]"""


class LoopResult(NamedTuple):
    """What the loop did. B rows, T positions, C channels."""

    z_H: Tensor
    """[B, T, C] of each row after its last step; with keep_before, of a row that halted by decision before it. From a
    row's length on: finite if the states that were given are, otherwise unspecified."""
    z_L: Tensor
    """[B, T, C], likewise."""
    q: Tensor
    """[B, 2] float32, [halt, continue] after each row's last step; 0 of rows that ran none."""
    executed: Tensor
    """[B] int64, steps run."""
    halted: Tensor
    """[B] bool, whether the row stopped by the head's decision."""


class HRMLoop:
    """Runs every row of a batch for as long as it needs, forward only. One for each core: it holds scratch memory and
    captured graphs, which a copy of the core does not share.

    Args:
        n_head: H. n_kv_head: K. H_cycles, L_cycles: of one step. eps: the norms'.
    """

    def __init__(self, n_head: int, n_kv_head: int, H_cycles: int, L_cycles: int, eps: float):
        self._arguments = n_head, n_kv_head, H_cycles, L_cycles, eps
        self._lock = threading.Lock()
        self.release()

    def __deepcopy__(self, memo) -> HRMLoop:
        return HRMLoop(*self._arguments)

    def __reduce__(self):
        return HRMLoop, self._arguments

    def release(self) -> None:
        """Give scratch memory and captured graphs back."""
        with self._lock:
            self._scratch, self._copies = Scratch(), Scratch()
            self._shapes: OrderedDict[tuple, _Shape] = OrderedDict()
            self._done: torch.cuda.Event | None = None

    def driver(self, weights: LoopWeights | None, x: Tensor, why_not: str | None = None) -> str | None:
        """Who would start the steps over x, a name of drivers.py; None where the model's own loop is to run.
        `why_not` is a reason of the caller's against kernels, for which it may have no weights to show.

        Raises:
            BackendError: kernels, or a driver, were asked for by name and cannot run; the message says why.
        """
        return backend.loop_driver(x, weights, *self._arguments[:2], why_not)

    @torch._disable_dynamo  # torch.compiler.disable would import Triton with this module
    def run(
        self,
        weights: LoopWeights,
        x: Tensor,
        init_H: Tensor,
        init_L: Tensor,
        rotary: Tensor | None,
        lengths: Tensor | None,
        limit: Sequence[int],
        may_halt: Sequence[bool],
        halt_bias: float = 0.0,
        *,
        keep_before: bool = False,
        dropout_p: float = 0.0,
        driver: str = "host",
        past: StepPast | None = None,
        pooled: Tensor | None = None,
    ) -> LoopResult:
        """Step row r until its decision or limit[r] steps.

        Args:
            weights: of any float dtype; under autocast, and where their dtype is not x's, copies are made once a call.
            x: [B, T, C] float32, bfloat16 or float16: output of the input blocks.
            init_H, init_L: [C] of any float dtype, where every position starts; or [B, T, C] of x's dtype or float32,
                states that rows go on from (calls of one step each give what one call of as many steps gives).
            rotary: as for hrm_kernels.qkv_rope. lengths: [B] integers or None; looked at where that costs no waiting.
            limit: B integers, at least 0. may_halt: B flags: whether the head's decision counts for the row.
            halt_bias: added to q_halt. dropout_p: of attention weights and branch outputs, drawn anew in every step.
            keep_before: of rows that halt by decision return the state before their last step, to run it again.
            driver: "host", "graph" or "while"; see drivers.py. All give the same bits.
            past: x [R, 1, C] are new tokens, one a row of this cache, which is read and written in place; a row whose
                limit is 0 has none. Neither pooled nor states [B, T, C] go with it.
            pooled: [B] integers in 1..T, at most lengths, or None for lengths (without those T): leading tokens over
                which the head's mean runs; nothing else changes. Looked at where that costs no waiting.

        Raises:
            ValueError: an argument of the wrong shape or out of range, before anything is launched.
        """
        checks.hrm_loop(
            weights, x, init_H, init_L, rotary, lengths, limit, may_halt, halt_bias, dropout_p, *self._arguments[:2],
            pooled, past,
        )  # fmt: skip
        if driver not in drivers.DRIVERS:
            raise ValueError(f"driver {driver!r} is none of {', '.join(drivers.DRIVERS)}")
        if max(limit) == 0:
            return _at_the_start(x, init_H, init_L)
        from .kernels.hrm_step import Sizes

        sizes = Sizes(*self._arguments, halt_bias, dropout_p)
        keep_before = keep_before and any(may_halt)  # a row that ends at its limit has run only what it was to run
        # memory made within inference mode could not be written to outside it
        with self._lock, torch.inference_mode(False), torch.no_grad():  # the former switches gradients on
            if self._done is not None and x.is_cuda:  # the last call may have been on another stream
                torch.cuda.current_stream(x.device).wait_event(self._done)
            try:
                return self._run(
                    weights, x, init_H, init_L, rotary, lengths, limit, may_halt, sizes, keep_before, driver, past,
                    pooled,
                )  # fmt: skip
            finally:
                if x.is_cuda:
                    stream = torch.cuda.current_stream(x.device)
                    self._scratch.used_on(stream)
                    self._copies.used_on(stream)
                    self._done = stream.record_event()

    def _run(
        self, weights, x, init_H, init_L, rotary, lengths, limit, may_halt, sizes, keep_before, driver, past, pooled
    ) -> LoopResult:
        from .kernels.hrm_step import step

        weights = self._in_one_type(weights, compute_dtype(x))
        shape = self._shape(weights, x, rotary, lengths, keep_before, pooled)
        space = shape.space
        space.fill(x, init_H, init_L, rotary, lengths, sizes.dropout_p, pooled)
        books = space.books
        steps = drivers.Steps(lambda: step(space, weights, sizes, past), books.n_active, max(limit), any(may_halt))
        if driver == "host":
            books.open(limit, may_halt)
            drivers.host(steps)
        else:
            graph = shape.graph(driver, steps, weights, sizes, past)
            books.open(limit, may_halt)
            graph.run()
        halted = books.halted.bool()
        z_H, z_L = space.z_H, space.z_L
        if keep_before:
            decided = halted[:, None, None]
            z_H, z_L = torch.where(decided, space.before_H, z_H), torch.where(decided, space.before_L, z_L)
        else:
            z_H, z_L = z_H.clone(), z_L.clone()
        return LoopResult(z_H, z_L, books.q.clone(), books.executed.long(), halted)

    def _in_one_type(self, weights: LoopWeights, dtype: torch.dtype) -> LoopWeights:
        """`weights` dense, matrices and biases in `dtype`: the parameters themselves where they are so, else copies,
        filled anew by every call in memory that stays in its place: graphs hold addresses."""
        blocks = [b._asdict() for b in (*weights.L, *weights.H)]
        places = [(block, name) for block in blocks for name, t in block.items() if t is not None]
        places += [(head := {"q": weights.q, "q_bias": weights.q_bias}, "q"), (head, "q_bias")]
        sizes = {}
        for i, (owner, name) in enumerate(places):
            t = owner[name]
            wanted = t.dtype if name in ("norm_1", "norm_2") or owner is head else dtype
            if t.dtype != wanted or not t.is_contiguous():
                sizes[i] = tuple(t.shape), wanted
        if not sizes:
            return weights
        if not self._copies.has_room(sizes, weights.q.device):
            self._copies.grow(sizes, weights.q.device)
        copies = self._copies.carve(sizes)
        torch._foreach_copy_(list(copies.values()), [places[i][0][places[i][1]].detach() for i in copies])
        for i, copy in copies.items():
            places[i][0][places[i][1]] = copy
        made = tuple(BlockWeights(**b) for b in blocks)
        return LoopWeights(made[: len(weights.L)], made[len(weights.L) :], head["q"], head["q_bias"])

    def _shape(self, weights: LoopWeights, x: Tensor, rotary, lengths, keep_before: bool, pooled) -> _Shape:
        from .kernels.hrm_step import Space

        block = weights.L[0]
        given = [None if t is None else t.shape for t in (x, rotary, lengths, pooled, block.q, block.k, block.up)]
        key = (*given, x.dtype, x.device, block.up.dtype, keep_before, tuning.overrides())
        if key not in self._shapes:
            sizes = Space.sizes(x, block.up.dtype, block, rotary, lengths, keep_before, pooled)
            if not self._scratch.has_room(sizes, x.device):
                self._shapes.clear()  # graphs hold addresses, and views hold memory
                self._scratch.grow(sizes, x.device)
            self._shapes[key] = _Shape(Space.of(self._scratch.carve(sizes), x))
        self._shapes.move_to_end(key)
        while len(self._shapes) > MOST_SHAPES:
            self._shapes.popitem(last=False)
        return self._shapes[key]


def _at_the_start(x: Tensor, init_H: Tensor, init_L: Tensor) -> LoopResult:
    """The result of no step at all."""
    n = x.shape[0]
    z_H, z_L = (init.detach().to(x.dtype).expand_as(x).clone() for init in (init_H, init_L))
    q = torch.zeros((n, 2), dtype=torch.float32, device=x.device)
    return LoopResult(z_H, z_L, q, *(torch.zeros(n, dtype=of, device=x.device) for of in (torch.int64, torch.bool)))


class _Shape:
    """One shape of batch: its views of the scratch memory, and what was captured for it."""

    def __init__(self, space):
        self.space = space
        self._graphs: OrderedDict[tuple, drivers.Graph] = OrderedDict()

    def graph(self, driver: str, steps: drivers.Steps, weights: LoopWeights, sizes, past) -> drivers.Graph:
        """The graph of `steps`, captured if there is none with these addresses of weights and cache yet."""
        from .kernels.launch import power_of_2, precision

        tensors = [t for block in (*weights.L, *weights.H) for t in block if t is not None]
        addresses = tuple(t.data_ptr() for t in (*tensors, weights.q, weights.q_bias))
        # of a cache the sizes too: another one may lie at the same address
        cached = tuple((t.data_ptr(), t.shape, t.dtype) for t in past or ())
        most = None
        if driver == "graph":
            most = power_of_2(steps.most)  # so that calls of changing depth share one
            steps = replace(steps, most=most)
        # whatever a kernel was started with and no memory holds
        key = driver, sizes, addresses, cached, precision(self.space.qkv.dtype), most
        if key not in self._graphs:
            self._graphs[key] = drivers.capture(driver, steps)
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]
