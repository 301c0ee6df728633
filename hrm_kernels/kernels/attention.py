"""Causal grouped-query attention on a packed projection, forward and backward.

    S = q k^T / sqrt(D), P = softmax over keys <= query, O = P v
    dP = dO v^T, dS = P (dP - rowsum(dO O)), dq = dS k / sqrt(D), dk = dS^T q / sqrt(D), dv = P^T dO

Tiles of queries pass over tiles of keys with a running maximum and sum, so S never exists as a whole; the forward pass
leaves only log2-sum-exp2 of each row. Key/value heads are read where they lie, by all the query heads that share them;
their gradients are summed over those heads in registers, without atomics. Queries from `length` on give zero and take
no gradient: their log-sum is set to infinity, so that every weight computed from it is exactly 0.

Dao, "FlashAttention-2", 2023, algorithms 1 and 2; Ainslie et al., "GQA", 2023, section 2.2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import cast, compute_dtype
from ..tuning import Tile, tile
from .launch import Rows, cdiv, dense, kernel_op, launch, needs_grad, power_of_2, precision
from .parts import rotated, seed_of
from .qkv_rope import project, project_backward, rotary_row_stride

LARGEST_HEAD = 128


@triton.jit
def _length(lengths_ptr, sample, T, HAS_LENGTHS: tl.constexpr):
    if HAS_LENGTHS:
        return tl.minimum(tl.load(lengths_ptr + sample).to(tl.int32), T)
    else:
        return T


@triton.jit
def _load(base_ptr, position, limit, row_stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows `position` of one head, [len(position), D_PAD]; 0 from `limit` and from D on."""
    d = tl.arange(0, D_PAD)[None, :]
    pointer = base_ptr + position[:, None] * row_stride + d
    if D == D_PAD:
        return tl.load(pointer, (position < limit)[:, None], other=0.0)
    else:
        return tl.load(pointer, (position < limit)[:, None] & (d < D), other=0.0)


@triton.jit
def _store(base_ptr, position, limit, row_stride, value, D: tl.constexpr, D_PAD: tl.constexpr):
    d = tl.arange(0, D_PAD)[None, :]
    mask = (position < limit)[:, None] & (d < D)
    tl.store(base_ptr + position[:, None] * row_stride + d, value.to(base_ptr.dtype.element_ty), mask)


@triton.jit
def _kept(seed, head, query, key, T, dropout_p):
    """Whether a weight outlives dropout: a function of its place alone, so that the backward pass finds it again."""
    random, _, _, _ = tl.philox(seed, query * T + key, head + 0 * key, 0 * key, 0 * key)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def _pass_over_keys(
    acc, top, total, q, k_ptr, v_ptr, query, start, stop, length, T, row_stride, scale_log2, seed, dropout_p, head,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, key, length, row_stride, D, D_PAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if MASKED:
            s = tl.where((query[:, None] >= key[None, :]) & (key < length)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(seed, head, query[:, None], key[None, :], T, dropout_p), p / (1 - dropout_p), 0.0)
        v = _load(v_ptr, key, length, row_stride, D, D_PAD)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["application"])
def _forward(
    qkv_ptr, seed_ptr, executed_ptr, out_ptr, lse_ptr, lengths_ptr, active_ptr, n_active_ptr,
    n_heads, T, scale_log2, dropout_p, application, applications,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ACTIVE: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, KEEP_LSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # the tiles with most keys first, so that short ones fill the end of the grid
    tile_m = tl.num_programs(0) // n_heads - 1 - tl.program_id(0) // n_heads
    head = tl.program_id(0) % n_heads
    sample, h = head // N_HEAD, head % N_HEAD
    if ACTIVE:
        if sample >= tl.load(n_active_ptr):
            return
        sample = tl.load(active_ptr + sample)
        head = sample * N_HEAD + h
    length = _length(lengths_ptr, sample, T, HAS_LENGTHS)
    row_stride: tl.constexpr = (N_HEAD + 2 * N_KV) * D
    begin = qkv_ptr + sample.to(tl.int64) * T * row_stride
    kv = h // (N_HEAD // N_KV)
    query = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    lse = tl.full((BLOCK_M,), float("inf"), tl.float32)
    if tile_m * BLOCK_M < length:
        q = _load(begin + h * D, query, length, row_stride, D, D_PAD)
        k_ptr = begin + (N_HEAD + kv) * D
        v_ptr = k_ptr + N_KV * D
        top = tl.full((BLOCK_M,), -1.0e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        seed = 0
        if DROPOUT:
            seed = seed_of(seed_ptr, executed_ptr, active_ptr, application, applications, ACTIVE)
        full = tl.minimum(tile_m * BLOCK_M, length) // BLOCK_N * BLOCK_N
        stop = tl.minimum((tile_m + 1) * BLOCK_M, length)
        acc, top, total = _pass_over_keys(
            acc, top, total, q, k_ptr, v_ptr, query, 0, full, length, T, row_stride, scale_log2, seed, dropout_p, head,
            D, D_PAD, BLOCK_N, False, DROPOUT, PRECISION,
        )  # fmt: skip
        acc, top, total = _pass_over_keys(
            acc, top, total, q, k_ptr, v_ptr, query, full, stop, length, T, row_stride, scale_log2, seed, dropout_p,
            head, D, D_PAD, BLOCK_N, True, DROPOUT, PRECISION,
        )  # fmt: skip
        real = query < length
        acc = tl.where(real[:, None], acc / total[:, None], 0.0)
        lse = tl.where(real, top + tl.log2(total), float("inf"))
    out = out_ptr + (sample.to(tl.int64) * T * N_HEAD + h) * D
    _store(out, query, T, N_HEAD * D, acc, D, D_PAD)
    if KEEP_LSE:
        tl.store(lse_ptr + head.to(tl.int64) * T + query, lse, query < T)


@triton.jit
def _queries_backward(
    qkv_ptr, rotary_ptr, lengths_ptr, seed_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    n_heads, T, rotary_row_stride, scale, scale_log2, dropout_p,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ROTATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and delta = rowsum(dO O), which the keys' kernel needs."""
    tile_m = tl.num_programs(0) // n_heads - 1 - tl.program_id(0) // n_heads
    head = tl.program_id(0) % n_heads
    sample, h = head // N_HEAD, head % N_HEAD
    length = _length(lengths_ptr, sample, T, HAS_LENGTHS)
    row_stride: tl.constexpr = (N_HEAD + 2 * N_KV) * D
    begin = qkv_ptr + sample.to(tl.int64) * T * row_stride
    kv = h // (N_HEAD // N_KV)
    query = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dq = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if tile_m * BLOCK_M < length:
        row_begin = (sample.to(tl.int64) * T * N_HEAD + h) * D
        q = _load(begin + h * D, query, length, row_stride, D, D_PAD)
        dout = _load(dout_ptr + row_begin, query, length, N_HEAD * D, D, D_PAD)
        out = _load(out_ptr + row_begin, query, length, N_HEAD * D, D, D_PAD)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        dout = dout.to(q.dtype)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + query, query < T, other=float("inf"))
        k_ptr = begin + (N_HEAD + kv) * D
        v_ptr = k_ptr + N_KV * D
        seed = tl.load(seed_ptr) if DROPOUT else 0
        for first in range(0, tl.minimum((tile_m + 1) * BLOCK_M, length), BLOCK_N):
            key = first + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, key, length, row_stride, D, D_PAD)
            v = _load(v_ptr, key, length, row_stride, D, D_PAD)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            p = tl.where(query[:, None] >= key[None, :], p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                kept = _kept(seed, head, query[:, None], key[None, :], T, dropout_p)
                dp = tl.where(kept, dp / (1 - dropout_p), 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dq *= scale
        if ROTATE:
            dq = _turned_back(dq, rotary_ptr + sample * rotary_row_stride, query, length, D, BLOCK_M, D_PAD)
    _store(dqkv_ptr + sample.to(tl.int64) * T * row_stride + h * D, query, T, row_stride, dq, D, D_PAD)
    tl.store(delta_ptr + head.to(tl.int64) * T + query, delta, query < T)


@triton.jit
def _keys_backward(
    qkv_ptr, rotary_ptr, lengths_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    n_kv_heads, T, rotary_row_stride, scale, scale_log2, dropout_p,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ROTATE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over the queries of every head that shares it."""
    tile_n = tl.program_id(0) // n_kv_heads
    sample, kv = (tl.program_id(0) % n_kv_heads) // N_KV, (tl.program_id(0) % n_kv_heads) % N_KV
    length = _length(lengths_ptr, sample, T, HAS_LENGTHS)
    row_stride: tl.constexpr = (N_HEAD + 2 * N_KV) * D
    group: tl.constexpr = N_HEAD // N_KV
    begin = qkv_ptr + sample.to(tl.int64) * T * row_stride
    key = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    if tile_n * BLOCK_N < length:
        k_ptr = begin + (N_HEAD + kv) * D
        k = _load(k_ptr, key, length, row_stride, D, D_PAD)
        v = _load(k_ptr + N_KV * D, key, length, row_stride, D, D_PAD)
        seed = tl.load(seed_ptr) if DROPOUT else 0
        first_tile = tile_n * BLOCK_N // BLOCK_M
        n_tiles = tl.cdiv(length, BLOCK_M) - first_tile
        # the heads that share these keys and the tiles of their queries, as one loop that can be pipelined
        for i in range(0, group * n_tiles):
            h = kv * group + i // n_tiles
            head = sample * N_HEAD + h
            query = (first_tile + i % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            q = _load(begin + h * D, query, length, row_stride, D, D_PAD)
            dout = _load(dout_ptr + (sample.to(tl.int64) * T * N_HEAD + h) * D, query, length, N_HEAD * D, D, D_PAD).to(
                q.dtype
            )
            place = head.to(tl.int64) * T + query
            lse = tl.load(lse_ptr + place, query < T, other=float("inf"))
            delta = tl.load(delta_ptr + place, query < T, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            weight = p
            if DROPOUT:
                kept = _kept(seed, head, query[None, :], key[:, None], T, dropout_p)
                weight = tl.where(kept, p / (1 - dropout_p), 0.0)
                dp = tl.where(kept, dp / (1 - dropout_p), 0.0)
            dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk *= scale
        if ROTATE:
            dk = _turned_back(dk, rotary_ptr + sample * rotary_row_stride, key, length, D, BLOCK_N, D_PAD)
    out = dqkv_ptr + sample.to(tl.int64) * T * row_stride + (N_HEAD + kv) * D
    _store(out, key, T, row_stride, dk, D, D_PAD)
    _store(out + N_KV * D, key, T, row_stride, dv, D, D_PAD)


@triton.jit
def _turned_back(x, rotary_ptr, position, limit, D: tl.constexpr, BLOCK: tl.constexpr, D_PAD: tl.constexpr):
    angles = _load(rotary_ptr, position, limit, D, D, D_PAD)
    pair = 2 * tl.arange(0, D_PAD // 2)[None, :]
    return rotated(x, angles, (position < limit)[:, None] & (pair < D), True, BLOCK, D_PAD)


@kernel_op(
    "attention_forward(Tensor qkv, Tensor? lengths, Tensor? seed, Tensor(a!) out, Tensor(b!) lse,"
    " int n_head, int n_kv_head, float dropout_p) -> ()"
)
def _launch_forward(qkv, lengths, seed, out, lse, n_head, n_kv_head, dropout_p):
    start_attention(qkv, seed, out, lse, n_head, n_kv_head, dropout_p, Rows(lengths, None, None))


def start_attention(
    qkv, seed, out, lse, n_head, n_kv_head, dropout_p, which: Rows, executed=None, application=0, applications=1
) -> None:
    """Launch the forward kernel for `which` rows: qkv [B, T, N] -> out [B, T, H D], and lse [B, H, T] unless None. With
    `executed` [B], dropout is drawn anew for each of the `applications` of a step and each step."""
    n_rows, n_tokens, width = qkv.shape
    d = width // (n_head + 2 * n_kv_head)
    chosen = _tile("attention", d, qkv)
    launch(
        _forward, (cdiv(n_tokens, chosen.M) * n_rows * n_head,),
        qkv, seed, executed, out, lse, *which,
        n_rows * n_head, n_tokens, _scale_log2(d), dropout_p, application, applications,
        N_HEAD=n_head, N_KV=n_kv_head, D=d, D_PAD=_padded(d), **which.flags,
        DROPOUT=dropout_p > 0, KEEP_LSE=lse is not None, PRECISION=precision(qkv.dtype),
        BLOCK_M=chosen.M, BLOCK_N=chosen.N, **chosen.options,
    )  # fmt: skip


@kernel_op(
    "attention_backward(Tensor qkv, Tensor? rotary, Tensor? lengths, Tensor? seed, Tensor out, Tensor dout, Tensor lse,"
    " Tensor(a!) delta, Tensor(b!) dqkv, int n_head, int n_kv_head, float dropout_p) -> ()"
)
def _launch_backward(qkv, rotary, lengths, seed, out, dout, lse, delta, dqkv, n_head, n_kv_head, dropout_p):
    n_rows, n_tokens, width = qkv.shape
    d = width // (n_head + 2 * n_kv_head)
    sizes = {"N_HEAD": n_head, "N_KV": n_kv_head, "D": d, "D_PAD": _padded(d), "PRECISION": precision(qkv.dtype)}
    flags = {"HAS_LENGTHS": lengths is not None, "ROTATE": rotary is not None, "DROPOUT": dropout_p > 0}
    scalars = rotary_row_stride(rotary), 1 / math.sqrt(d), _scale_log2(d), dropout_p
    chosen = _tile("attention_dq", d, qkv)
    launch(
        _queries_backward, (cdiv(n_tokens, chosen.M) * n_rows * n_head,),
        qkv, rotary, lengths, seed, out, dout, lse, delta, dqkv, n_rows * n_head, n_tokens, *scalars,
        **sizes, **flags, BLOCK_M=chosen.M, BLOCK_N=chosen.N, **chosen.options,
    )  # fmt: skip
    chosen = _tile("attention_dkv", d, qkv)
    launch(
        _keys_backward, (cdiv(n_tokens, chosen.N) * n_rows * n_kv_head,),
        qkv, rotary, lengths, seed, dout, lse, delta, dqkv, n_rows * n_kv_head, n_tokens, *scalars,
        **sizes, **flags, BLOCK_M=chosen.M, BLOCK_N=chosen.N, **chosen.options,
    )  # fmt: skip


def _scale_log2(d: int) -> float:
    """1/sqrt(D) for exponents of 2: exp(s / sqrt(D)) = 2^(s log2(e) / sqrt(D)), one instruction cheaper a weight."""
    return math.log2(math.e) / math.sqrt(d)


def _tile(op: str, d: int, qkv: Tensor) -> Tile:
    """Heads of more than 64 have lines of their own: tiles of them hold twice as much."""
    return tile(op if d <= 64 else f"{op}_wide", qkv.dtype, qkv.shape[1], qkv.device)


def _padded(d: int) -> int:
    """Head size of a tile: a power of two and at least what a tensor-core product takes."""
    return max(16, power_of_2(d))


def _attend(qkv, lengths, seed, n_head, n_kv_head, dropout_p):
    """(out [B, T, H D], log2-sum-exp2 [B, H, T])."""
    n_rows, n_tokens, width = qkv.shape
    out = torch.empty(
        (n_rows, n_tokens, width // (n_head + 2 * n_kv_head) * n_head), dtype=qkv.dtype, device=qkv.device
    )
    lse = torch.empty((n_rows, n_head, n_tokens), dtype=torch.float32, device=qkv.device)
    _launch_forward(qkv, lengths, seed, out, lse, n_head, n_kv_head, dropout_p)
    return out, lse


def _attend_backward(dout, qkv, rotary, lengths, seed, out, lse, n_head, n_kv_head, dropout_p):
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    _launch_backward(qkv, rotary, lengths, seed, out, dout.contiguous(), lse, delta, dqkv, n_head, n_kv_head, dropout_p)
    return dqkv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, lengths, seed, n_head, n_kv_head, dropout_p):
        qkv = qkv.contiguous()
        out, lse = _attend(qkv, lengths, seed, n_head, n_kv_head, dropout_p)
        ctx.save_for_backward(qkv, lengths, seed, out, lse)
        ctx.sizes = n_head, n_kv_head, dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, lengths, seed, out, lse = ctx.saved_tensors
        dqkv = _attend_backward(dout, qkv, None, lengths, seed, out, lse, *ctx.sizes)
        return dqkv, None, None, None, None, None


class _RopeGQAAttention(torch.autograd.Function):
    """Both ops in one, so that dq and dk are turned back as they are stored instead of in a pass of their own."""

    @staticmethod
    def forward(ctx, x, w_q, w_k, w_v, b_q, b_k, b_v, rotary, lengths, seed, n_head, n_kv_head, dropout_p):
        qkv = project(x, (w_q, w_k, w_v), (b_q, b_k, b_v), rotary)
        out, lse = _attend(qkv, lengths, seed, n_head, n_kv_head, dropout_p)
        ctx.save_for_backward(x, w_q, w_k, w_v, rotary, lengths, seed, qkv, out, lse)
        ctx.sizes = n_head, n_kv_head, dropout_p
        ctx.bias_dtype = None if b_q is None else b_q.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w_q, w_k, w_v, rotary, lengths, seed, qkv, out, lse = ctx.saved_tensors
        dqkv = _attend_backward(dout, qkv, rotary, lengths, seed, out, lse, *ctx.sizes)
        flat, weights = dqkv.view(-1, dqkv.shape[-1]), (w_q, w_k, w_v)
        gradients = project_backward(flat, x, weights, ctx.bias_dtype, ctx.needs_input_grad)
        return *gradients, None, None, None, None, None, None


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A draw from torch's generator on the device itself: no synchronisation, and a CUDA graph draws anew each time."""
    return torch.randint(2**31 - 1, (1,), device=device) if dropout_p > 0 else None


def attention(
    qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    qkv = qkv.to(compute_dtype(qkv))
    (lengths,) = dense(lengths)
    seed = _seed(dropout_p, qkv.device)
    if needs_grad(qkv):
        return _Attention.apply(qkv, lengths, seed, n_head, n_kv_head, dropout_p)
    return _attend(qkv.contiguous(), lengths, seed, n_head, n_kv_head, dropout_p)[0]


def rope_gqa_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None,
    rotary: Tensor | None,
    n_head: int,
    n_kv_head: int,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    dtype = compute_dtype(x)
    weights = tuple(cast(w, dtype) for w in (w_q, w_k, w_v))
    rotary, lengths = dense(rotary, lengths)
    seed = _seed(dropout_p, x.device)
    biases = biases or (None, None, None)
    if needs_grad(x, *weights, *biases):
        return _RopeGQAAttention.apply(x, *weights, *biases, rotary, lengths, seed, n_head, n_kv_head, dropout_p)
    return _attend(project(x, weights, biases, rotary), lengths, seed, n_head, n_kv_head, dropout_p)[0]
