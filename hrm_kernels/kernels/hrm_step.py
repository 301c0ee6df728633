"""One HRM step for the rows of a batch that go on, forward only.

    begin:    u = z_L + (z_H + x)
    H_cycles times:
        L_cycles times:  u through the L blocks;  not the last time: u = u + (z_H + x)
        z_L = u;         u = z_H + z_L
        u through the H blocks
        z_H = u;         not the last time: u = z_L + (z_H + x)
    books:    pool, score, count, decide, rewrite the list of rows that go on

    a block:  v = norm_1(u + W_o attention(rope(W_qkv u)));   u = norm_2(v + W_down (silu(W_up v) * W_gate v))

Every kernel reads the device's list of rows that go on. Rows that are not on it are neither read nor written, and
nothing is moved to make room: a row's tensors stay in their place. The end of a level, with the sum that the next level
starts from, is part of its last block's second norm. A step of the base model is 24 blocks of 7 kernels, and 2 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..loop import BlockWeights, LoopWeights
from ..past import StepPast
from ..tuning import tile
from .attention import start_attention
from .cached_attention import start_step_attention
from .halting import Books, keep_books
from .launch import Rows, cdiv, launch, power_of_2
from .linear import start_linear
from .parts import how_many, seed_of, tokens_of
from .qkv_rope import start_projection
from .swiglu import start_swiglu


@triton.jit
def _elements(
    index, count, T, channel, lengths_ptr, active_ptr, C: tl.constexpr, ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """(place of each token, address of each element, whether it is there) of tokens `index`, whole channels."""
    place, _, _, real = tokens_of(index, count, T, lengths_ptr, active_ptr, ACTIVE, HAS_LENGTHS)
    return place, place[:, None] * C + channel, real[:, None] & (channel < C)


@triton.jit
def _begin(
    x_ptr, z_H_ptr, z_L_ptr, u_ptr, before_H_ptr, before_L_ptr, lengths_ptr, active_ptr, n_active_ptr, M, T,
    C: tl.constexpr, KEEP_BEFORE: tl.constexpr, ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    count = how_many(M, T, n_active_ptr, ACTIVE)
    channel = tl.arange(0, BLOCK_C)[None, :]
    for tile_m in range(tl.program_id(0), tl.cdiv(count, BLOCK_M), tl.num_programs(0)):
        index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        _, at, mask = _elements(index, count, T, channel, lengths_ptr, active_ptr, C, ACTIVE, HAS_LENGTHS)
        z_H = tl.load(z_H_ptr + at, mask, other=0.0)
        z_L = tl.load(z_L_ptr + at, mask, other=0.0)
        if KEEP_BEFORE:
            tl.store(before_H_ptr + at, z_H, mask)
            tl.store(before_L_ptr + at, z_L, mask)
        tl.store(u_ptr + at, _sum(z_L, _sum(z_H, tl.load(x_ptr + at, mask, other=0.0))), mask)


@triton.jit
def _sum(a, b):
    """a + b, rounded to their type: where torch would round."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


IN_BLOCK, L_AGAIN, L_TO_H, H_TO_L, DONE = range(5)
"""What follows a block's second norm: the next block of its level (also what follows the first norm); the L level
again; the H level; the L level after it; nothing."""


@triton.jit(do_not_specialize=["application"])
def _add_norm(
    x_ptr, branch_ptr, w_ptr, next_ptr, state_ptr, other_ptr, entry_ptr, seed_ptr, executed_ptr,
    lengths_ptr, active_ptr, n_active_ptr, M, T, eps, dropout_p, application, applications,
    C: tl.constexpr, THEN: tl.constexpr, DROPOUT: tl.constexpr, ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = norm(x + dropout(branch)); state = y where a level ends; next = what the next block starts from."""
    count = how_many(M, T, n_active_ptr, ACTIVE)
    channel = tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(w_ptr + channel, channel < C, other=0.0).to(tl.float32)
    for tile_m in range(tl.program_id(0), tl.cdiv(count, BLOCK_M), tl.num_programs(0)):
        index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        place, at, mask = _elements(index, count, T, channel, lengths_ptr, active_ptr, C, ACTIVE, HAS_LENGTHS)
        x = tl.load(x_ptr + at, mask, other=0.0)
        branch = tl.load(branch_ptr + at, mask, other=0.0)
        if DROPOUT:
            seed = seed_of(seed_ptr, executed_ptr, active_ptr, application, applications, ACTIVE)
            token = place.to(tl.int32)[:, None] + 0 * channel
            random, _, _, _ = tl.philox(seed, token, channel + 0 * token, 0 * token, 0 * token)
            kept = tl.uint_to_uniform_float(random) >= dropout_p
            branch = tl.where(kept, branch.to(tl.float32) / (1 - dropout_p), 0.0).to(branch.dtype)
        s = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
        y = (s * rstd[:, None] * w).to(x.dtype)
        if THEN == 0:  # IN_BLOCK
            tl.store(next_ptr + at, y, mask)
        else:
            if THEN != 1:
                tl.store(state_ptr + at, y, mask)
            if THEN != 4:
                other = tl.load(other_ptr + at, mask, other=0.0)
                if THEN == 1:  # L_AGAIN: z_L + (z_H + x)
                    following = _sum(y, _sum(other, tl.load(entry_ptr + at, mask, other=0.0)))
                elif THEN == 2:  # L_TO_H: z_H + z_L
                    following = _sum(other, y)
                else:  # H_TO_L: z_L + (z_H + x)
                    following = _sum(other, _sum(y, tl.load(entry_ptr + at, mask, other=0.0)))
                tl.store(next_ptr + at, following, mask)


PROGRAMS = 2048
"""Most programs of a kernel without a product: they take turns at the tiles, so that what starts for nothing where few
rows go on does not grow with the batch. Sixteen warps for each of an H200's 132 multiprocessors, each with two tokens
of two tensors on their way, are 57 KB in flight; 4.3 TB/s need about 20 (at 600 ns; arithmetic, not measured)."""


class Sizes(NamedTuple):
    """What shapes a step besides its weights."""

    n_head: int
    n_kv_head: int
    H_cycles: int
    L_cycles: int
    eps: float
    halt_bias: float
    dropout_p: float


@dataclass
class Space:
    """Memory of a batch on its way through the steps, allocated once and used by every step. B rows, T positions, C
    channels, F MLP hidden. What padding positions hold after the first is finite at the start and never looked at."""

    books: Books
    x: Tensor
    """[B, T, C] output of the input blocks."""
    z_H: Tensor
    """[B, T, C]; so are the three that follow."""
    z_L: Tensor
    u: Tensor
    """What the next block starts from."""
    v: Tensor
    """What lies between a block's halves."""
    qkv: Tensor
    """[B, T, (H + 2K) D]"""
    heads: Tensor
    """[B, T, H D]"""
    branch: Tensor
    """[B, T, C]"""
    hidden: Tensor
    """[B, T, F]"""
    seed: Tensor
    """[1] int64, of this call's dropout."""
    mean: Tensor
    """[B, 1, C] float32, what the head scores where most of a row is in a cache."""
    before_H: Tensor | None = None
    """[B, T, C] state of each row before the last step that it ran, if that is to be kept."""
    before_L: Tensor | None = None
    rotary: Tensor | None = None
    """float32 [T, D/2, 2] or [B, T, D/2, 2]"""
    lengths: Tensor | None = None
    """[B] int64"""
    pooled: Tensor | None = None
    """[B] int64, leading tokens that the head scores, where those are not all of a row's."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], x: Tensor) -> Space:
        """A batch like x in memory of `sizes`."""
        books = {name: tensors.pop(name) for name in Books.sizes(x)}
        return cls(books=Books(**books), **tensors)

    @staticmethod
    def sizes(
        x: Tensor, dtype: torch.dtype, block: BlockWeights, rotary: Tensor | None, lengths: Tensor | None,
        keep_before: bool, pooled: Tensor | None = None,
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:  # fmt: skip
        """Field -> (shape, type) of what a batch like x needs; `dtype` is what products compute in."""
        n_rows, n_tokens, c = x.shape
        heads, hidden = block.q.shape[0], block.up.shape[0]
        qkv_width = heads + 2 * block.k.shape[0]
        names = ["x", "z_H", "z_L", "u", "v", *(("before_H", "before_L") if keep_before else ())]
        sizes = {name: ((n_rows, n_tokens, c), x.dtype) for name in names}
        widths = {"qkv": qkv_width, "heads": heads, "branch": c, "hidden": hidden}
        sizes |= {name: ((n_rows, n_tokens, width), dtype) for name, width in widths.items()}
        if rotary is not None:
            sizes["rotary"] = tuple(rotary.shape), torch.float32
        counts = {"lengths": lengths, "pooled": pooled}
        sizes |= {name: ((n_rows,), torch.int64) for name, given in counts.items() if given is not None}
        sizes |= {"seed": ((1,), torch.int64), "mean": ((n_rows, 1, c), torch.float32)}
        return sizes | Books.sizes(x)

    def fill(self, x, init_H, init_L, rotary, lengths, dropout_p: float, pooled=None) -> None:
        """A new batch: every position at the initial states [C], or at its own of [B, T, C]."""
        self.x.copy_(x)
        for state, init in ((self.z_H, init_H), (self.z_L, init_L), (self.before_H, init_H), (self.before_L, init_L)):
            if state is not None:
                state.copy_(init.expand_as(state))
        for own, given in ((self.rotary, rotary), (self.lengths, lengths), (self.pooled, pooled)):
            if own is not None:
                own.copy_(given)
        if dropout_p > 0:
            self.seed.random_(2**31 - 1)


@triton.jit
def _keep(
    z_H_ptr, z_L_ptr, all_H_ptr, all_L_ptr, sums_ptr, mean_ptr, position_ptr, active_ptr, n_active_ptr, executed_ptr,
    R, P, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a row's newest state in the cache; mean = of z_H over all positions of the row after this step."""
    if tl.program_id(0) >= tl.load(n_active_ptr):
        return
    row = tl.load(active_ptr + tl.program_id(0)).to(tl.int64)
    plane = tl.load(executed_ptr + row) * R + row
    position = tl.load(position_ptr + row)
    channel = tl.arange(0, BLOCK_C)
    mask = channel < C
    z_H = tl.load(z_H_ptr + row * C + channel, mask, other=0.0)
    z_L = tl.load(z_L_ptr + row * C + channel, mask, other=0.0)
    tl.store(all_H_ptr + (plane * P + position) * C + channel, z_H, mask)
    tl.store(all_L_ptr + (row * P + position) * C + channel, z_L, mask)
    total = tl.load(sums_ptr + plane * C + channel, mask, other=0.0)
    total += z_H.to(total.dtype)
    tl.store(sums_ptr + plane * C + channel, total, mask)
    tl.store(mean_ptr + row * C + channel, (total / (position + 1).to(total.dtype)).to(tl.float32), mask)


def step(space: Space, weights: LoopWeights, sizes: Sizes, past: StepPast | None = None) -> None:
    """One step of every row that goes on. Nothing is allocated and nobody waits: a CUDA graph can capture it. With
    `past` a row is its newest token, T is 1, and what precedes it comes from the cache, which is kept up."""
    books = space.books
    which = Rows(space.lengths, books.active, books.n_active)
    n_rows, n_tokens, _ = space.x.shape
    counter = _Counter(sizes.H_cycles * (sizes.L_cycles * len(weights.L) + len(weights.H)))

    def level(blocks, then: int, state: Tensor | None, other: Tensor | None) -> None:
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1
            _block(space, block, sizes, which, counter, then if last else IN_BLOCK, state, other, past)

    block_m, options = _rows_at_once(space.x)
    flat = [None if t is None else t.view(n_rows * n_tokens, -1) for t in (space.x, space.z_H, space.z_L, space.u)]
    launch(
        _begin, (min(cdiv(n_rows * n_tokens, block_m), PROGRAMS),),
        *flat, space.before_H, space.before_L, *which, n_rows * n_tokens, n_tokens,
        C=space.x.shape[2], KEEP_BEFORE=space.before_H is not None, **which.flags,
        BLOCK_M=block_m, BLOCK_C=power_of_2(space.x.shape[2]), **options,
    )  # fmt: skip
    for h in range(sizes.H_cycles):
        for _ in range(sizes.L_cycles - 1):
            level(weights.L, L_AGAIN, None, space.z_H)
        level(weights.L, L_TO_H, space.z_L, space.z_H)
        level(weights.H, H_TO_L if h < sizes.H_cycles - 1 else DONE, space.z_H, space.z_L)
    scored = space.z_H
    if past is not None:
        scored, c = space.mean, space.x.shape[2]
        launch(
            _keep, (n_rows,),
            space.z_H, space.z_L, *past[1:4], scored, past.position, books.active, books.n_active, books.executed,
            n_rows, past.z_L.shape[1], C=c, BLOCK_C=power_of_2(c), num_warps=1, num_stages=1,
        )  # fmt: skip
    pooled = space.lengths if space.pooled is None else space.pooled
    keep_books(scored, weights.q, weights.q_bias, sizes.halt_bias, pooled, books)


DRAWS = 3
"""Dropouts of a block: of attention weights and of its two branches."""


class _Counter:
    """Numbers the dropouts of a step, so that each draws its own."""

    def __init__(self, n_blocks: int):
        self.total, self.next = DRAWS * n_blocks, 0

    def __call__(self) -> tuple[int, int]:
        """(number, how many there are)."""
        self.next += 1
        return self.next - 1, self.total


def _block(
    space: Space, block: BlockWeights, sizes: Sizes, which: Rows, counter, then: int, state, other, past
) -> None:
    """One block from space.u, by way of space.v, to space.u (and `state`)."""
    n_rows, n_tokens, _ = space.x.shape
    m = n_rows * n_tokens
    u, v, qkv, heads, branch, hidden = (
        t.view(m, -1) for t in (space.u, space.v, space.qkv, space.heads, space.branch, space.hidden)
    )
    projections, biases = (block.q, block.k, block.v), (block.q_bias, block.k_bias, block.v_bias)
    start_projection(u, projections, biases, space.rotary, qkv, n_tokens, which)
    number, draws = counter()
    if past is None:
        start_attention(
            space.qkv, space.seed, space.heads, None, sizes.n_head, sizes.n_kv_head, sizes.dropout_p, which,
            space.books.executed, number, draws,
        )  # fmt: skip
    else:
        start_step_attention(
            space.qkv, past, space.heads, sizes.n_head, sizes.n_kv_head, which, space.books.executed,
            number // DRAWS, draws // DRAWS,
        )  # fmt: skip
    start_linear(heads, block.o, block.o_bias, branch, n_tokens, which)
    _start_add_norm(space, u, branch, block.norm_1, v, sizes, which, counter)
    if block.gate is None:
        start_linear(v, block.up, block.up_bias, hidden, n_tokens, which, gelu=True)
    else:
        mlp, biases = (block.gate, block.up), (block.gate_bias, block.up_bias)
        start_swiglu(v, mlp, biases, hidden, (None, None), n_tokens, which)
    start_linear(hidden, block.down, block.down_bias, branch, n_tokens, which)
    _start_add_norm(space, v, branch, block.norm_2, u, sizes, which, counter, then, state, other)


def _start_add_norm(
    space: Space, x, branch, w, following, sizes: Sizes, which: Rows, counter, then=IN_BLOCK, state=None, other=None
) -> None:
    n_tokens, (m, c) = space.x.shape[1], x.shape
    block_m, options = _rows_at_once(space.x)
    launch(
        _add_norm, (min(cdiv(m, block_m), PROGRAMS),),
        x, branch, w, following, state, other, space.x, space.seed, space.books.executed,
        *which, m, n_tokens, sizes.eps, sizes.dropout_p, *counter(),
        C=c, THEN=then, DROPOUT=sizes.dropout_p > 0, **which.flags,
        BLOCK_M=block_m, BLOCK_C=power_of_2(c), **options,
    )  # fmt: skip


def _rows_at_once(x: Tensor) -> tuple[int, dict[str, int]]:
    """(tokens of a program that holds whole channels, launch options)."""
    chosen = tile("rms_norm", x.dtype, x.shape[0] * x.shape[1], x.device)
    n = power_of_2(x.shape[2])
    warps = max(chosen.num_warps, min(n // 512, 16))
    return max(1, min(chosen.M, 2048 // n)), {"num_warps": warps, "num_stages": chosen.num_stages}
