"""RMSNorm and residual add + RMSNorm, forward and backward.

    s = x + branch (rounded to the sum's dtype), r = 1 / sqrt(mean(s^2) + eps), y = s r w

    with g = dL/dy, n = s r and gs = dL/ds from elsewhere:
    dL/ds = gs + r (g w - n mean(g w n)),    dL/dw = sum over rows of g n

A program holds whole rows; forward, up to 512 channels of a row are one warp's, so that sums need shuffles alone. The
weight's gradient is summed
without atomics: each of a fixed number of programs adds up its rows and writes one line, and the lines are summed last.
Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tuning import tile
from .launch import cdiv, kernel_op, launch, needs_grad, power_of_2, rows

WIDEST = 16384
"""Channels of a row that one program can hold."""

PARTIAL_SUMS = 1024
"""Most programs of the backward pass: about eight for each multiprocessor of an H200. Fixed, so that the sums' order,
and with it the last bit, is the same on every GPU."""


@triton.jit
def _forward(
    x_ptr, branch_ptr, w_ptr, sum_ptr, y_ptr, rstd_ptr,
    M, x_row_stride, branch_row_stride, eps,
    N: tl.constexpr, HAS_BRANCH: tl.constexpr, KEEP_SUM: tl.constexpr, KEEP_RSTD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_64 = row.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = (row[:, None] < M) & (column < N)
    s = tl.load(x_ptr + row_64 * x_row_stride + column, mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        s += tl.load(branch_ptr + row_64 * branch_row_stride + column, mask, other=0.0).to(tl.float32)
        s = s.to(y_ptr.dtype.element_ty)
        if KEEP_SUM:
            tl.store(sum_ptr + row_64 * N + column, s, mask)
        s = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, 1) / N + eps)
    w = tl.load(w_ptr + column, column < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_64 * N + column, (s * rstd[:, None] * w).to(y_ptr.dtype.element_ty), mask)
    if KEEP_RSTD:
        tl.store(rstd_ptr + row, rstd, row < M)


@triton.jit
def _backward(
    s_ptr, w_ptr, rstd_ptr, dy_ptr, dsum_ptr, ds_ptr, dw_ptr,
    M, s_row_stride, dy_row_stride, dsum_row_stride,
    N: tl.constexpr, HAS_DSUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)[None, :]
    w = tl.load(w_ptr + column, column < N, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile_index in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = tile_index * BLOCK_M + tl.arange(0, BLOCK_M)
        row_64 = row.to(tl.int64)[:, None]
        mask = (row[:, None] < M) & (column < N)
        s = tl.load(s_ptr + row_64 * s_row_stride + column, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row_64 * dy_row_stride + column, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < M, other=0.0)[:, None]
        normed = s * rstd
        dw += dy * normed
        dy *= w
        ds = rstd * (dy - normed * (tl.sum(dy * normed, 1) / N)[:, None])
        if HAS_DSUM:
            ds += tl.load(dsum_ptr + row_64 * dsum_row_stride + column, mask, other=0.0).to(tl.float32)
        tl.store(ds_ptr + row_64 * N + column, ds.to(ds_ptr.dtype.element_ty), mask)
    tl.store(dw_ptr + program * N + column, tl.sum(dw, 0)[None, :], column < N)


def _block(op: str, x: Tensor) -> tuple[int, int, dict[str, int]]:
    """(BLOCK_M, BLOCK_N, launch options): wide rows get fewer rows and more warps a program."""
    chosen = tile(op, x.dtype, x.shape[0], x.device)
    n = power_of_2(x.shape[1])
    warps = max(chosen.num_warps, min(n // 512, 16))
    return max(1, min(chosen.M, 2048 // n)), n, {"num_warps": warps, "num_stages": chosen.num_stages}


@kernel_op(
    "rms_norm_forward(Tensor x, Tensor? branch, Tensor w, Tensor(a!)? sum, Tensor(b!) y, Tensor(c!)? rstd, float eps)"
    " -> ()"
)
def _launch_forward(x, branch, w, total, y, rstd, eps):
    block_m, block_n, options = _block("rms_norm", x)
    launch(
        _forward, (cdiv(x.shape[0], block_m),),
        x, branch, w, total, y, rstd,
        x.shape[0], x.stride(0), 0 if branch is None else branch.stride(0), eps,
        N=x.shape[1], HAS_BRANCH=branch is not None, KEEP_SUM=total is not None, KEEP_RSTD=rstd is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, **options,
    )  # fmt: skip


@kernel_op(
    "rms_norm_backward(Tensor s, Tensor w, Tensor rstd, Tensor dy, Tensor? dsum, Tensor(a!) ds, Tensor(b!) dw) -> ()"
)
def _launch_backward(s, w, rstd, dy, dsum, ds, dw):
    block_m, block_n, options = _block("rms_norm_backward", s)
    programs = min(PARTIAL_SUMS, cdiv(s.shape[0], block_m))
    partial = torch.empty((programs, s.shape[1]), dtype=torch.float32, device=s.device)
    launch(
        _backward, (programs,),
        s, w, rstd, dy, dsum, ds, partial,
        s.shape[0], s.stride(0), dy.stride(0), 0 if dsum is None else dsum.stride(0),
        N=s.shape[1], HAS_DSUM=dsum is not None, BLOCK_M=block_m, BLOCK_N=block_n, **options,
    )  # fmt: skip
    torch.sum(partial, 0, out=dw)


def _normalise(x, branch, w, eps, keep_sum, with_gradient):
    """(sum or None, norm, what the backward pass needs)."""
    flat, w = rows(x), w.contiguous()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty_like(y) if branch is not None and (keep_sum or with_gradient) else None
    flat_total = None if total is None else total.view(flat.shape)
    rstd = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device) if with_gradient else None
    _launch_forward(flat, None if branch is None else rows(branch), w, flat_total, y.view(flat.shape), rstd, eps)
    return total if keep_sum else None, y, (flat if branch is None else flat_total, w, rstd)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, w, eps, keep_sum):
        total, y, saved = _normalise(x, branch, w, eps, keep_sum, True)
        ctx.save_for_backward(*saved)
        ctx.x_dtype, ctx.branch_dtype = x.dtype, None if branch is None else branch.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, dy):
        s, w, rstd = ctx.saved_tensors
        # not rows(): it asks for strides, and torch.compile cannot trace that of a gradient
        dy_rows = dy.reshape(s.shape).contiguous()
        dsum_rows = None if dsum is None else dsum.reshape(s.shape).contiguous()
        ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        dw = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        _launch_backward(s, w, rstd, dy_rows, dsum_rows, ds, dw)
        ds = ds.view(dy.shape)
        dbranch = None if ctx.branch_dtype is None else ds.to(ctx.branch_dtype)
        return ds.to(ctx.x_dtype), dbranch, dw.to(w.dtype), None, None


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    return _norm(x, None, w, eps, False)[1]


def add_rms_norm(
    x: Tensor, branch: Tensor, w: Tensor, eps: float = 1e-5, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    return _norm(x, branch, w, eps, keep_sum)


def _norm(x, branch, w, eps, keep_sum):
    if needs_grad(x, branch, w):
        return _Norm.apply(x, branch, w, eps, keep_sum)
    return _normalise(x, branch, w, eps, keep_sum, False)[:2]
