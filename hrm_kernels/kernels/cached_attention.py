"""Causal grouped-query attention of single tokens over a cache of keys and values.

    o = softmax(q k^T / sqrt(D)) v, over the keys of the token's row up to its own

A program takes one token and one key/value head, with all the query heads that share it, and passes over the row's keys
with a running maximum and sum, as attention.py does. In the loop over HRM steps the tokens are the newest of each row
that goes on; which keys are theirs follows from the step that the row is at, which the device knows. Where there is one
token a row, its own key and value are added by the same program; else they lie in the cache before the kernel starts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..past import NewestTokens, StepPast, Tokens
from ..tuning import tile
from .attention import _load, _pass_over_keys, attention
from .launch import EVERY_ROW, Rows, launch, power_of_2, precision


@triton.jit(do_not_specialize=["application"])
def _attend(
    qkv_ptr, kv_ptr, out_ptr, row_ptr, position_ptr, active_ptr, n_active_ptr, executed_ptr,
    R, P, scale_log2, application, applications,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ACTIVE: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token, kv = tl.program_id(0) // N_KV, tl.program_id(0) % N_KV
    if ACTIVE:
        if token >= tl.load(n_active_ptr):
            return
        token = tl.load(active_ptr + token)
        plane = tl.load(executed_ptr + token) * applications + application
        row = plane.to(tl.int64) * R + token
    else:
        row = tl.load(row_ptr + token).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int32)
    group: tl.constexpr = N_HEAD // N_KV
    # the heads that share these keys, as rows of a tile: enough for a matrix instruction
    head = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    out_ptrs = out_ptr + token.to(tl.int64) * (N_HEAD * D) + (kv * group + head[:, None]) * D + d[None, :]
    there = (head < group)[:, None] & (d < D)[None, :]
    if position < 0:  # no token
        tl.store(out_ptrs, tl.zeros((BLOCK_M, D_PAD), out_ptr.dtype.element_ty), there)
        return
    kv_stride: tl.constexpr = 2 * N_KV * D
    qkv_stride: tl.constexpr = (N_HEAD + 2 * N_KV) * D
    mine = qkv_ptr + token.to(tl.int64) * qkv_stride
    k_ptr = kv_ptr + row * P * kv_stride + kv * D
    v_ptr = k_ptr + N_KV * D
    q = _load(mine + kv * group * D, head, group, D, D, D_PAD)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    top = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    seen = position + (0 if ADD else 1)
    query = position + 0 * head
    full = seen // BLOCK_N * BLOCK_N
    acc, top, total = _pass_over_keys(
        acc, top, total, q, k_ptr, v_ptr, query, 0, full, seen, P, kv_stride, scale_log2, 0, 0.0, 0,
        D, D_PAD, BLOCK_N, False, False, PRECISION,
    )  # fmt: skip
    acc, top, total = _pass_over_keys(
        acc, top, total, q, k_ptr, v_ptr, query, full, seen, seen, P, kv_stride, scale_log2, 0, 0.0, 0,
        D, D_PAD, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip
    if ADD:
        k = tl.load(mine + (N_HEAD + kv) * D + d, d < D, other=0.0)
        v = tl.load(mine + (N_HEAD + N_KV + kv) * D + d, d < D, other=0.0)
        at = position.to(tl.int64) * kv_stride + d
        tl.store(k_ptr + at, k, d < D)
        tl.store(v_ptr + at, v, d < D)
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
        new_top = tl.maximum(top, s)
        shrink, p = tl.exp2(top - new_top), tl.exp2(s - new_top)
        acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)[None, :]
        total = total * shrink + p
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), there)


def _start(qkv, kv, out, row, position, add, which, executed, n_head, n_kv_head, application=0, applications=1) -> None:
    n, head_dim = out.shape[0], kv.shape[-1]
    chosen = tile("cached_attention", qkv.dtype, n, qkv.device)
    launch(
        _attend, (n * n_kv_head,),
        qkv, kv, out, row, position, which.active, which.n_active, executed,
        kv.shape[-5], kv.shape[-4], math.log2(math.e) / math.sqrt(head_dim), application, applications,
        N_HEAD=n_head, N_KV=n_kv_head, D=head_dim, D_PAD=power_of_2(max(head_dim, 16)),
        ACTIVE=which.active is not None, ADD=add, PRECISION=precision(qkv.dtype),
        BLOCK_M=max(16, power_of_2(n_head // n_kv_head)), BLOCK_N=chosen.N, **chosen.options,
    )  # fmt: skip


def start_step_attention(
    qkv: Tensor, past: StepPast, heads: Tensor, n_head: int, n_kv_head: int, which: Rows, executed: Tensor,
    application: int, applications: int,
) -> None:  # fmt: skip
    """Launch the kernel for the newest token of each row that goes on: qkv [R, 1, (H + 2K) D] -> heads [R, 1, H D], in
    block application `application` of the step that each row is at."""
    n = qkv.shape[0]
    _start(
        qkv, past.kv, heads.view(n, -1), None, past.position, True, which, executed, n_head, n_kv_head,
        application, applications,
    )  # fmt: skip


LONG = 16
"""Tokens of a row from which on rows that begin here are better served by tiles of queries."""


def cached_attention(qkv: Tensor, kv: Tensor, tokens: Tokens | NewestTokens, n_head: int, n_kv_head: int) -> Tensor:
    n, head_dim = qkv.shape[1], kv.shape[-1]
    qkv, one_a_row = qkv.contiguous(), not isinstance(tokens, Tokens)
    if not one_a_row:
        new = qkv[0, :, n_head * head_dim :]
        kv.view(-1, new.shape[1]).index_copy_(0, tokens.place, new)
        if tokens.longest >= LONG and all(span.begin == 0 for span in tokens.spans):
            return _from_the_start(qkv, tokens, n_head, n_kv_head)
    out = torch.empty((n, n_head * head_dim), dtype=qkv.dtype, device=qkv.device)
    _start(qkv, kv, out, tokens.row, tokens.position, one_a_row, EVERY_ROW, None, n_head, n_kv_head)
    return out[None]


def _from_the_start(qkv: Tensor, tokens: Tokens, n_head: int, n_kv_head: int) -> Tensor:
    """Whole rows: nothing of the cache is looked at, and the kernel for batches of rows applies."""
    sizes = [span.size for span in tokens.spans]
    if len(set(sizes)) == 1:
        return attention(qkv.view(len(sizes), sizes[0], -1), n_head, n_kv_head).flatten(0, 1)[None]
    order = torch.arange(len(sizes), device=qkv.device)
    lengths = torch.tensor(sizes, device=qkv.device)
    index = torch.repeat_interleave(order, lengths, output_size=tokens.size), tokens.position
    padded = qkv.new_zeros((len(sizes), max(sizes), qkv.shape[-1]))
    padded[index] = qkv[0]
    return attention(padded, n_head, n_kv_head, lengths)[index][None]
