"""Query, key and value projections as one product, queries and keys rotated in its epilogue.

    [q k v] = x [Wq; Wk; Wv]^T + [bq bk bv];   pairs (a, b) of q and k -> (a cos - b sin, a sin + b cos)

Pairs are adjacent columns, so each element is rotated exactly once, in registers, at no traffic but the table's.
Rotating keys inside attention instead would turn each again for every tile of queries and every query head: about five
times at T = 512 with two query heads a key head. The three weights stay where they are: a tile's columns find theirs by
address. Gradients are turned back (by -sin) before the two plain products with x and the weights, which torch's
library makes. Su et al., "RoFormer", 2021, eq. 15.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import cast, compute_dtype
from ..tuning import tile
from .launch import EVERY_ROW, Rows, cdiv, dense, kernel_op, launch, needs_grad, precision, rows
from .parts import how_many, product, rotated, tile_of, tokens_of


@triton.jit
def _column_of_three(column, n_q, n_kv, q_ptr, k_ptr, v_ptr, stride):
    """Address of each column's row in whichever of three tensors holds it."""
    pointer = tl.where(column < n_q, q_ptr + column * stride, k_ptr + (column - n_q) * stride)
    return tl.where(column < n_q + n_kv, pointer, v_ptr + (column - n_q - n_kv) * stride)


@triton.jit
def _project(
    x_ptr, w_q_ptr, w_k_ptr, w_v_ptr, b_q_ptr, b_k_ptr, b_v_ptr, rotary_ptr, qkv_ptr,
    lengths_ptr, active_ptr, n_active_ptr, M, T, x_row_stride, rotary_row_stride,
    K: tl.constexpr, N_Q: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N_Q + 2 * N_KV
    count = how_many(M, T, n_active_ptr, ACTIVE)
    n_m, n_n = tl.cdiv(count, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= n_m * n_n:
        return
    tile_m, tile_n = tile_of(tl.program_id(0), n_m, n_n, 8)
    index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place, row, position, real = tokens_of(index, count, T, lengths_ptr, active_ptr, ACTIVE, HAS_LENGTHS)
    if HAS_LENGTHS and tl.max(real.to(tl.int32), 0) == 0:
        return
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real_column = tl.minimum(column, N - 1)
    x_ptrs = x_ptr + place[:, None] * x_row_stride + k[None, :]
    w_row = _column_of_three(real_column, N_Q, N_KV, w_q_ptr, w_k_ptr, w_v_ptr, K)
    if ALIGNED:
        w_row = tl.multiple_of(w_row, 16)  # bytes; the choice between addresses has hidden it from the compiler
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    out = product(out, x_ptrs, w_row[None, :] + k[:, None], K, PRECISION, BLOCK_K)
    if HAS_BIAS:
        bias = tl.load(_column_of_three(real_column, N_Q, N_KV, b_q_ptr, b_k_ptr, b_v_ptr, 1))
        out += bias.to(tl.float32)[None, :]
    if ROTATE and tile_n * BLOCK_N < N_Q + N_KV:
        angle = row * rotary_row_stride + position * D
        angles = tl.load(rotary_ptr + angle[:, None] + (column % D)[None, :])
        pair = tile_n * BLOCK_N + 2 * tl.arange(0, BLOCK_N // 2)
        out = rotated(out, angles, (pair < N_Q + N_KV)[None, :], False, BLOCK_M, BLOCK_N)
    out_ptrs = qkv_ptr + place[:, None] * N + column[None, :]
    tl.store(out_ptrs, out.to(qkv_ptr.dtype.element_ty), (index < count)[:, None] & (column < N)[None, :])


@triton.jit
def _rotate_back(
    dqkv_ptr, rotary_ptr, out_ptr, n_elements, T, rotary_row_stride,
    N: tl.constexpr, N_ROTATED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = i < n_elements
    row, column = i // N, i % N
    angles = tl.load(rotary_ptr + (row // T) * rotary_row_stride + (row % T) * D + column % D, real, other=0.0)
    pair = 2 * (tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :])
    d = tl.load(dqkv_ptr + i, real, other=0.0).to(tl.float32)
    d = rotated(d, angles, pair % N < N_ROTATED, True, 1, BLOCK)
    tl.store(out_ptr + i, d.to(out_ptr.dtype.element_ty), real)


def rotary_row_stride(rotary: Tensor | None) -> int:
    """Distance of one batch row's angles from the next: 0 where all share a table [T, D/2, 2]."""
    return 0 if rotary is None or rotary.dim() == 3 else rotary.stride(0)


@kernel_op(
    "qkv_rope_forward(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, Tensor? b_q, Tensor? b_k, Tensor? b_v,"
    " Tensor? rotary, Tensor(a!) qkv, SymInt n_tokens) -> ()"
)
def launch_qkv_rope(x, w_q, w_k, w_v, b_q, b_k, b_v, rotary, qkv, n_tokens):
    start_projection(x, (w_q, w_k, w_v), (b_q, b_k, b_v), rotary, qkv, n_tokens, EVERY_ROW)


def start_projection(x, weights, biases, rotary, qkv, n_tokens: int, which: Rows) -> None:
    """Launch the kernel for `which` rows: x [M, C] -> qkv [M, N], every tensor dense along its last axis."""
    (m, k), (w_q, w_k, w_v) = x.shape, weights
    chosen = tile("qkv", w_q.dtype, m, x.device)
    aligned = all(address % 16 == 0 for address in (k * w_q.element_size(), *(w.data_ptr() for w in (w_q, w_k, w_v))))
    launch(
        _project, (cdiv(m, chosen.M) * cdiv(qkv.shape[1], chosen.N),),
        x, *weights, *biases, rotary, qkv, *which, m, n_tokens, x.stride(0), rotary_row_stride(rotary),
        K=k, N_Q=w_q.shape[0], N_KV=w_k.shape[0], D=2 if rotary is None else 2 * rotary.shape[-2],
        HAS_BIAS=biases[0] is not None, ROTATE=rotary is not None, ALIGNED=aligned, PRECISION=precision(w_q.dtype),
        **which.flags,
        BLOCK_M=chosen.M, BLOCK_N=chosen.N, BLOCK_K=chosen.K, **chosen.options,
    )  # fmt: skip


@kernel_op("rotate_back(Tensor dqkv, Tensor rotary, Tensor(a!) out, SymInt n_tokens, SymInt n_rotated) -> ()")
def launch_rotate_back(dqkv, rotary, out, n_tokens, n_rotated):
    chosen = tile("rotate", dqkv.dtype, dqkv.shape[0], dqkv.device)
    launch(
        _rotate_back, (cdiv(dqkv.numel(), chosen.N),),
        dqkv, rotary, out, dqkv.numel(), n_tokens, rotary_row_stride(rotary),
        N=dqkv.shape[1], N_ROTATED=n_rotated, D=2 * rotary.shape[-2], BLOCK=chosen.N, **chosen.options,
    )  # fmt: skip


def project(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], rotary: Tensor | None) -> Tensor:
    """The kernel's forward pass, [B, T, C] -> [B, T, N]."""
    n_rows, n_tokens, _ = x.shape
    width = sum(w.shape[0] for w in weights)
    qkv = torch.empty((n_rows, n_tokens, width), dtype=weights[0].dtype, device=x.device)
    launch_qkv_rope(rows(x), *dense(*weights, *biases), rotary, qkv.view(n_rows * n_tokens, width), n_tokens)
    return qkv


def project_backward(
    dqkv: Tensor, x: Tensor, weights: tuple[Tensor, ...], bias_dtype: torch.dtype | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(dx, dWq, dWk, dWv, dbq, dbk, dbv), as far as wanted, from the gradient [M, N] of the projection before its
    rotation."""
    sizes = [w.shape[0] for w in weights]
    dx, dw, db = None, (None,) * 3, (None,) * 3
    if wanted[0]:
        dx = (dqkv @ torch.cat(weights)).to(x.dtype).view(x.shape)
    if any(wanted[1:4]):
        dw = (dqkv.t() @ x.reshape(-1, x.shape[-1]).to(dqkv.dtype)).split(sizes)
    if bias_dtype is not None:
        db = dqkv.sum(0, dtype=torch.float32).to(bias_dtype).split(sizes)
    return dx, *dw, *db


class _QKVRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_q, w_k, w_v, b_q, b_k, b_v, rotary):
        ctx.save_for_backward(x, w_q, w_k, w_v, rotary)
        ctx.bias_dtype = None if b_q is None else b_q.dtype
        return project(x, (w_q, w_k, w_v), (b_q, b_k, b_v), rotary)

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv):
        x, w_q, w_k, w_v, rotary = ctx.saved_tensors
        flat = dqkv.reshape(-1, dqkv.shape[-1]).contiguous()
        if rotary is not None:
            turned = torch.empty_like(flat)
            launch_rotate_back(flat, rotary, turned, x.shape[1], w_q.shape[0] + w_k.shape[0])
            flat = turned
        return *project_backward(flat, x, (w_q, w_k, w_v), ctx.bias_dtype, ctx.needs_input_grad), None


def qkv_rope(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    dtype = compute_dtype(x)
    weights = tuple(cast(w, dtype) for w in (w_q, w_k, w_v))
    biases = biases or (None, None, None)
    (rotary,) = dense(rotary)
    if needs_grad(x, *weights, *biases):
        return _QKVRope.apply(x, *weights, *biases, rotary)
    return project(x, weights, biases, rotary)
