"""SwiGLU: both projections and the gate in one kernel; the gate alone; their gradients.

    u = x Wu^T + bu, g = x Wg^T + bg, h = silu(u) g
    du = dh g silu'(u), dg = dh silu(u)
    dx = [dg du] [Wg; Wu], [dWg; dWu] = [dg du]^T x, [dbg dbu] = column sums of [dg du]

Forward alone, g and u never reach memory. For a gradient they are kept: at 32,768 rows of the base model writing and
reading them back is 470 MB, 110 us at 4.3 TB/s, against 133 us for the two products again at 790 TFLOP/s (arithmetic,
not measured). The products of the backward pass are plain ones, so torch's library makes them.
Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5, with the two projections' roles exchanged.
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
from .parts import how_many, silu_and_slope, tile_of, tokens_of


@triton.jit
def _forward(
    x_ptr, w_gate_ptr, w_up_ptr, b_gate_ptr, b_up_ptr, h_ptr, gate_ptr, up_ptr,
    lengths_ptr, active_ptr, n_active_ptr, M, T, x_row_stride, w_gate_row_stride, w_up_row_stride,
    K: tl.constexpr, F: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    count = how_many(M, T, n_active_ptr, ACTIVE)
    n_m, n_n = tl.cdiv(count, BLOCK_M), tl.cdiv(F, BLOCK_N)
    if tl.program_id(0) >= n_m * n_n:
        return
    tile_m, tile_n = tile_of(tl.program_id(0), n_m, n_n, 8)
    index = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    place, _, _, real = tokens_of(index, count, T, lengths_ptr, active_ptr, ACTIVE, HAS_LENGTHS)
    if HAS_LENGTHS and tl.max(real.to(tl.int32), 0) == 0:
        return
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # columns beyond the edge read the last real one, which costs no mask, and are not stored
    x_ptrs = x_ptr + place[:, None] * x_row_stride + k[None, :]
    w_row = tl.minimum(column, F - 1)
    gate_ptrs = w_gate_ptr + w_row[None, :] * w_gate_row_stride + k[:, None]
    up_ptrs = w_up_ptr + w_row[None, :] * w_up_row_stride + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + start)
            w_gate = tl.load(gate_ptrs + start)
            w_up = tl.load(up_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (start + k < K)[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs + start, (start + k < K)[:, None], other=0.0)
            w_up = tl.load(up_ptrs + start, (start + k < K)[:, None], other=0.0)
        x = x.to(w_gate.dtype)
        gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
        up = tl.dot(x, w_up, up, input_precision=PRECISION)
    if HAS_BIAS:
        gate += tl.load(b_gate_ptr + w_row).to(tl.float32)[None, :]
        up += tl.load(b_up_ptr + w_row).to(tl.float32)[None, :]
    out = place[:, None] * F + column[None, :]
    mask = (index < count)[:, None] & (column < F)[None, :]
    # rounded whether they are stored or not, so that a pass without gradient computes the same bits as one with
    gate = gate.to(h_ptr.dtype.element_ty)
    up = up.to(h_ptr.dtype.element_ty)
    if KEEP:
        tl.store(gate_ptr + out, gate, mask)
        tl.store(up_ptr + out, up, mask)
    activated, _ = silu_and_slope(up.to(tl.float32))
    tl.store(h_ptr + out, (activated * gate.to(tl.float32)).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _gate_forward(gate_ptr, up_ptr, h_ptr, n_elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_elements
    gate = tl.load(gate_ptr + i, mask, other=0.0).to(tl.float32)
    activated, _ = silu_and_slope(tl.load(up_ptr + i, mask, other=0.0).to(tl.float32))
    tl.store(h_ptr + i, (activated * gate).to(h_ptr.dtype.element_ty), mask)


@triton.jit
def _gate_backward(
    gate_ptr, up_ptr, dh_ptr, dgate_ptr, dup_ptr, n_elements, d_row_stride, F: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_elements
    gate = tl.load(gate_ptr + i, mask, other=0.0).to(tl.float32)
    activated, slope = silu_and_slope(tl.load(up_ptr + i, mask, other=0.0).to(tl.float32))
    dh = tl.load(dh_ptr + i, mask, other=0.0).to(tl.float32)
    out = i // F * d_row_stride + i % F
    tl.store(dgate_ptr + out, (dh * activated).to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + out, (dh * gate * slope).to(dup_ptr.dtype.element_ty), mask)


@kernel_op(
    "swiglu_forward(Tensor x, Tensor w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up, Tensor(a!) h,"
    " Tensor(b!)? gate, Tensor(c!)? up) -> ()"
)
def _launch_forward(x, w_gate, w_up, b_gate, b_up, h, gate, up):
    start_swiglu(x, (w_gate, w_up), (b_gate, b_up), h, (gate, up), x.shape[0], EVERY_ROW)


def start_swiglu(x, weights, biases, h, kept, n_tokens: int, which: Rows) -> None:
    """Launch the kernel for `which` rows: x [M, C] -> h [M, F], and both products into `kept` unless None."""
    (m, k), (w_gate, w_up) = x.shape, weights
    f = w_gate.shape[0]
    chosen = tile("swiglu", w_gate.dtype, m, x.device)
    launch(
        _forward, (cdiv(m, chosen.M) * cdiv(f, chosen.N),),
        x, *weights, *biases, h, *kept, *which, m, n_tokens, x.stride(0), w_gate.stride(0), w_up.stride(0),
        K=k, F=f, HAS_BIAS=biases[0] is not None, KEEP=kept[0] is not None, PRECISION=precision(w_gate.dtype),
        **which.flags,
        BLOCK_M=chosen.M, BLOCK_N=chosen.N, BLOCK_K=chosen.K, **chosen.options,
    )  # fmt: skip


@kernel_op("swiglu_mul_forward(Tensor gate, Tensor up, Tensor(a!) h) -> ()")
def _launch_gate_forward(gate, up, h):
    chosen = tile("swiglu_mul", gate.dtype, gate.shape[0], gate.device)
    grid = (cdiv(gate.numel(), chosen.N),)
    launch(_gate_forward, grid, gate, up, h, gate.numel(), BLOCK=chosen.N, **chosen.options)


@kernel_op("swiglu_mul_backward(Tensor gate, Tensor up, Tensor dh, Tensor(a!) dgate, Tensor(b!) dup) -> ()")
def _launch_gate_backward(gate, up, dh, dgate, dup):
    chosen = tile("swiglu_mul", gate.dtype, gate.shape[0], gate.device)
    launch(
        _gate_backward, (cdiv(gate.numel(), chosen.N),),
        gate, up, dh, dgate, dup, gate.numel(), dgate.stride(0),
        F=gate.shape[1], BLOCK=chosen.N, **chosen.options,
    )  # fmt: skip


def _project(x, w_gate, w_up, b_gate, b_up, keep):
    """(h [..., F], and for a gradient gate and up [M, F])."""
    flat = rows(x)
    h = torch.empty((*x.shape[:-1], w_gate.shape[0]), dtype=w_gate.dtype, device=x.device)
    flat_h = h.view(flat.shape[0], w_gate.shape[0])
    gate, up = (torch.empty_like(flat_h), torch.empty_like(flat_h)) if keep else (None, None)
    _launch_forward(flat, rows(w_gate), rows(w_up), *dense(b_gate, b_up), flat_h, gate, up)
    return h, gate, up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, b_gate, b_up):
        h, gate, up = _project(x, w_gate, w_up, b_gate, b_up, True)
        ctx.save_for_backward(rows(x), w_gate, w_up, gate, up)
        ctx.bias_dtype = None if b_gate is None else b_gate.dtype
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        x, w_gate, w_up, gate, up = ctx.saved_tensors
        f = gate.shape[1]
        both = torch.empty((gate.shape[0], 2 * f), dtype=gate.dtype, device=gate.device)
        _launch_gate_backward(gate, up, dh.reshape(-1, f).contiguous(), both[:, :f], both[:, f:])
        # one product over both halves instead of two: a single rounding of dx, one kernel fewer
        dx, dw, db = None, (None, None), (None, None)
        if ctx.needs_input_grad[0]:
            dx = (both @ torch.cat((w_gate, w_up))).to(x.dtype).view(*dh.shape[:-1], x.shape[1])
        if any(ctx.needs_input_grad[1:3]):
            dw = (both.t() @ x.to(both.dtype)).split(f)
        if ctx.bias_dtype is not None:
            db = both.sum(0, dtype=torch.float32).to(ctx.bias_dtype).split(f)
        return dx, *dw, *db


def _gate(gate, up):
    """(h, and for a gradient gate and up [M, F])."""
    width = gate.shape[-1] if gate.dim() else 1
    flat_gate, flat_up = dense(gate.reshape(-1, width), up.reshape(-1, width))
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch_gate_forward(flat_gate, flat_up, h.view(flat_gate.shape))
    return h, flat_gate, flat_up


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        h, *saved = _gate(gate, up)
        ctx.save_for_backward(*saved)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _launch_gate_backward(gate, up, dh.reshape(gate.shape).contiguous(), dgate, dup)
        return dgate.view(dh.shape), dup.view(dh.shape)


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None = None, b_up: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(x)
    w_gate, w_up = cast(w_gate, dtype), cast(w_up, dtype)
    if needs_grad(x, w_gate, w_up, b_gate, b_up):
        return _SwiGLU.apply(x, w_gate, w_up, b_gate, b_up)
    return _project(x, w_gate, w_up, b_gate, b_up, False)[0]


def swiglu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _Gate.apply(gate, up) if needs_grad(gate, up) else _gate(gate, up)[0]
