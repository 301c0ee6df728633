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
