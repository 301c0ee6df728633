"""A projection for some rows of a batch: the product that a library cannot leave halted rows out of.

    y = x W^T + b, or gelu of it (exact: u Phi(u))

Used by hrm_step.py alone; everywhere else the projection that ends a branch is torch's. Why Triton here is in
docs/hrm_step.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning import tile
from .launch import Rows, cdiv, launch, precision
from .parts import how_many, product, tile_of, tokens_of


@triton.jit
def _linear(
    x_ptr, w_ptr, b_ptr, y_ptr, lengths_ptr, active_ptr, n_active_ptr, M, T, x_row_stride, w_row_stride,
    K: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = how_many(M, T, n_active_ptr, ACTIVE)
    n_m, n_n = tl.cdiv(count, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= n_m * n_n:
        return
    tile_m, tile_n = tile_of(tl.program_id(0), n_m, n_n, 8)
    index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place, _, _, real = tokens_of(index, count, T, lengths_ptr, active_ptr, ACTIVE, HAS_LENGTHS)
    if HAS_LENGTHS and tl.max(real.to(tl.int32), 0) == 0:
        return
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_row = tl.minimum(column, N - 1)
    x_ptrs = x_ptr + place[:, None] * x_row_stride + k[None, :]
    w_ptrs = w_ptr + w_row[None, :] * w_row_stride + k[:, None]
    y = product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_ptrs, w_ptrs, K, PRECISION, BLOCK_K)
    if HAS_BIAS:
        y += tl.load(b_ptr + w_row).to(tl.float32)[None, :]
    if GELU:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # where the reference rounds
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    y_ptrs = y_ptr + place[:, None] * N + column[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), (index < count)[:, None] & (column < N)[None, :])


def start_linear(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, n_tokens: int, which: Rows, gelu=False) -> None:
    """Launch the kernel for `which` rows: x [M, K], w [N, K], b [N] or None -> y [M, N], dense along the last axis."""
    (m, k), n = x.shape, w.shape[0]
    chosen = tile("linear", w.dtype, m, x.device)
    launch(
        _linear, (cdiv(m, chosen.M) * cdiv(n, chosen.N),),
        x, w, b, y, *which, m, n_tokens, x.stride(0), w.stride(0),
        K=k, N=n, HAS_BIAS=b is not None, GELU=gelu, PRECISION=precision(w.dtype), **which.flags,
        BLOCK_M=chosen.M, BLOCK_N=chosen.N, BLOCK_K=chosen.K, **chosen.options,
    )  # fmt: skip
