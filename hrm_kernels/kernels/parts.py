"""Pieces that several Triton kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, n_m, n_n, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share each column tile while it is in the L2 cache."""
    per_group = GROUP * n_n
    first_m = (program // per_group) * GROUP
    group = tl.minimum(n_m - first_m, GROUP)
    return first_m + (program % per_group) % group, (program % per_group) // group


@triton.jit
def how_many(M, T, n_active_ptr, ACTIVE: tl.constexpr):
    """Tokens to work on: all M, or those of the rows that go on."""
    if ACTIVE:
        return tl.load(n_active_ptr) * T
    else:
        return M


@triton.jit
def tokens_of(index, count, T, lengths_ptr, active_ptr, ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """(place, row, position, real) of the tokens numbered `index` [BLOCK_M], of `count` that are worked on.

    Token (row, position) lies at `place` = row T + position. With ACTIVE, tokens are counted through the rows that the
    device's list names, padding is not real, and a tile that ends one row goes on with the next: nothing that is
    computed for a token looks at its tile's other tokens. Indices beyond the last token name the last one, which costs
    no mask on loads, and are not real. A product's tile that holds any real token is computed and stored as a whole,
    padding too: what lies there in scratch memory is never looked at, and one mask more would make a kernel spill.
    """
    real = index < count
    index = tl.minimum(index, count - 1)
    row, position = index // T, index % T
    place = index.to(tl.int64)
    if ACTIVE:
        row = tl.load(active_ptr + row)
        place = row.to(tl.int64) * T + position
        if HAS_LENGTHS:
            real = real & (position < tl.load(lengths_ptr + row))
    return place, row, position, real


@triton.jit
def product(out, x_ptrs, w_ptrs, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """out + x w^T over K: x_ptrs [BLOCK_M, BLOCK_K] and w_ptrs [BLOCK_K, BLOCK_N] point at the first BLOCK_K columns. x
    is rounded to w's type in registers."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, (start + k < K)[:, None], other=0.0)
        out = tl.dot(x.to(w.dtype), w, out, input_precision=PRECISION)
    return out


@triton.jit
def rotated(x, angles, turns, BACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adjacent pairs of x [BLOCK_M, BLOCK_N] turned: (a, b) -> (a cos - b sin, a sin + b cos).

    angles [BLOCK_M, BLOCK_N] holds cos, sin, cos, sin, ...: as a rotary table lies in memory, so that it is read in
    wide loads. Pairs where turns [BLOCK_M, BLOCK_N / 2] is false stay. BACK turns the other way, as gradients need.
    """
    a, b = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_N // 2, 2)))
    cos, sin = tl.split(tl.reshape(angles, (BLOCK_M, BLOCK_N // 2, 2)))
    if BACK:
        sin = -sin
    turned_a = tl.where(turns, a * cos - b * sin, a)
    turned_b = tl.where(turns, a * sin + b * cos, b)
    return tl.reshape(tl.join(turned_a, turned_b), (BLOCK_M, BLOCK_N))


@triton.jit
def silu_and_slope(u):
    """silu(u) = u sigmoid(u) and its derivative sigmoid(u) (1 + u (1 - sigmoid(u)))."""
    s = tl.sigmoid(u)
    return u * s, s * (1 + u * (1 - s))


@triton.jit
def seed_of(seed_ptr, executed_ptr, active_ptr, application, applications, ACTIVE: tl.constexpr):
    """Key of a counter-based generator: the call's seed below, above it which application of a block this is. Rows go
    through the steps together, so the first one's count of steps is every active row's."""
    seed = tl.load(seed_ptr)
    if ACTIVE:
        step = tl.load(executed_ptr + tl.load(active_ptr))
        seed += (step * applications + application).to(tl.int64) << 32
    return seed
