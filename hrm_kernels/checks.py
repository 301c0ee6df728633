"""What every implementation of an op may rely on: ranks, shapes, devices. One ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def same_device(x: Tensor, **others: Tensor | None) -> None:
    """A kernel that follows a pointer to another device dies without a word."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, the op's first argument on {x.device}; move one of them")


def shape(name: str, t: Tensor, expected: tuple[int, ...], because: str) -> None:
    """t must have this shape."""
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; {because} it must be {expected}")


def rank(name: str, t: Tensor, axes: str) -> None:
    """t must have as many axes as the space-separated `axes` name."""
    if t.dim() != len(axes.split()):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be [{axes.replace(' ', ', ')}]")


def integers(name: str, t: Tensor) -> None:
    """t must hold integers."""
    if t.is_floating_point() or t.dtype.is_complex or t.dtype.itemsize == 1:
        raise ValueError(f"{name} is {t.dtype}; it must be int32 or int64")


def norm(x: Tensor, branch: Tensor | None, w: Tensor) -> None:
    """rms_norm and add_rms_norm."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [..., C] with at least one channel")
    shape("w", w, tuple(x.shape[-1:]), f"with {x.shape[-1]} channels in x")
    if branch is not None:
        shape("branch", branch, tuple(x.shape), "as x has it,")
    same_device(x, branch=branch, w=w)


def projections(x: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> None:
    """x [..., C] times each weight [N, C]^T plus its bias [N]; all biases or none."""
    for name, w in weights.items():
        rank(name, w, "N C")
        if w.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(w.shape)} and x {tuple(x.shape)}; their last axes must agree")
    for (name, bias), w in zip(biases.items(), weights.values(), strict=True):
        if bias is not None:
            shape(name, bias, tuple(w.shape[:1]), "as its weight has it,")
    if len({bias is None for bias in biases.values()}) > 1:
        raise ValueError(f"{', '.join(biases)}: give all or none")
    same_device(x, **weights, **biases)


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None) -> None:
    """swiglu."""
    projections(x, {"w_gate": w_gate, "w_up": w_up}, {"b_gate": b_gate, "b_up": b_up})
    shape("w_up", w_up, tuple(w_gate.shape), "as w_gate has it,")


def swiglu_mul(gate: Tensor, up: Tensor) -> None:
    """swiglu_mul."""
    shape("up", up, tuple(gate.shape), "as gate has it,")
    same_device(gate, up=up)


def qkv_rope(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, biases, rotary: Tensor | None) -> None:
    """qkv_rope."""
    rank("x", x, "B T C")
    b_q, b_k, b_v = biases or (None, None, None)
    projections(x, {"w_q": w_q, "w_k": w_k, "w_v": w_v}, {"biases[0]": b_q, "biases[1]": b_k, "biases[2]": b_v})
    shape("w_v", w_v, tuple(w_k.shape), "as w_k has it,")
    if rotary is None:
        return
    n_rows, n_tokens, _ = x.shape
    per_row = (n_rows,) if rotary.dim() == 4 else ()
    shape("rotary", rotary, (*per_row, n_tokens, rotary.shape[-2] if rotary.dim() > 2 else 0, 2), "for this x")
    head_dim = 2 * rotary.shape[-2]
    for name, w in (("w_q", w_q), ("w_k", w_k)):
        if head_dim == 0 or w.shape[0] % head_dim:
            raise ValueError(f"{name} makes {w.shape[0]} channels, no multiple of rotary's head size {head_dim}")
    same_device(x, rotary=rotary)


def attention(qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None, dropout_p: float) -> None:
    """attention."""
    rank("qkv", qkv, "B T (H+2K)D")
    heads(n_head, n_kv_head)
    if qkv.shape[-1] == 0 or qkv.shape[-1] % (n_head + 2 * n_kv_head):
        raise ValueError(
            f"qkv has {qkv.shape[-1]} channels, no multiple of the {n_head} + 2 x {n_kv_head} heads it must hold"
        )
    options(qkv, lengths, dropout_p)


def cached_attention(qkv: Tensor, kv: Tensor, tokens, n_head: int, n_kv_head: int) -> None:
    """cached_attention."""
    heads(n_head, n_kv_head)
    rank("kv", kv, "R P 2 K D")
    n_rows, n_positions, _, _, head_dim = kv.shape
    shape("kv", kv, (n_rows, n_positions, 2, n_kv_head, head_dim), f"with {n_kv_head} key/value heads")
    shape("qkv", qkv, (1, tokens.size, (n_head + 2 * n_kv_head) * head_dim), "for these tokens and heads")
    if qkv.dtype != kv.dtype:
        raise ValueError(f"qkv is {qkv.dtype} and the cache {kv.dtype}; make it under the same autocast and dtype")
    if not kv.is_contiguous():
        raise ValueError("kv is not dense; it is written in place, so give the cache itself")
    if tokens.n_positions != n_positions:
        raise ValueError(f"tokens are of a cache of {tokens.n_positions} positions, kv has {n_positions}")
    spans = getattr(tokens, "spans", ())
    if spans and (tokens.longest > n_positions or max(span.row for span in spans) >= n_rows):
        raise ValueError(f"tokens {spans} lie outside a cache of {n_rows} rows x {n_positions} positions")
    same_device(qkv, kv=kv)


def heads(n_head: int, n_kv_head: int) -> None:
    """Head counts."""
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_head {n_head} is not divisible by n_kv_head {n_kv_head}")


def rope_gqa_attention(x, w_q, w_k, rotary, n_head: int, n_kv_head: int, lengths, dropout_p: float) -> None:
    """rope_gqa_attention, beyond what qkv_rope needs."""
    heads(n_head, n_kv_head)
    if w_q.shape[0] % n_head or w_k.shape[0] * n_head != w_q.shape[0] * n_kv_head:
        raise ValueError(
            f"w_q makes {w_q.shape[0]} channels for {n_head} heads and w_k {w_k.shape[0]} for {n_kv_head}; "
            f"both must be whole heads of one size"
        )
    if rotary is not None and 2 * rotary.shape[-2] * n_head != w_q.shape[0]:
        raise ValueError(f"rotary is for heads of {2 * rotary.shape[-2]}; w_q makes heads of {w_q.shape[0] // n_head}")
    options(x, lengths, dropout_p)


def options(x: Tensor, lengths: Tensor | None, dropout_p: float) -> None:
    """lengths [B] and dropout_p, for x [B, T, ...]. What lengths hold is not looked at: that would wait for a GPU."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if lengths is not None:
        shape("lengths", lengths, (x.shape[0],), "one for each row,")
        integers("lengths", lengths)
        same_device(x, lengths=lengths)


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, reduction: str) -> None:
    """linear_cross_entropy."""
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or targets.shape != x.shape[:1]:
        shapes = f"x {tuple(x.shape)}, w {tuple(w.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"linear_cross_entropy needs x [M, C], w [V, C], targets [M]; got {shapes}")
    if w.shape[0] == 0:
        raise ValueError("w has shape (0, ...): a softmax over no columns is undefined; give at least one")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of 'mean', 'sum', 'none'")
    integers("targets", targets)
    same_device(x, w=w, targets=targets)


def hrm_loop(
    weights, x: Tensor, init_H, init_L, rotary, lengths, limit, may_halt, halt_bias: float, dropout_p: float,
    n_head: int, n_kv_head: int, pooled: Tensor | None = None, past=None,
) -> None:  # fmt: skip
    """HRMLoop.run."""
    rank("x", x, "B T C")
    n_rows, n_tokens, c = x.shape
    if n_rows == 0 or n_tokens == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; give at least one row of at least one position")
    if x.dtype.itemsize > 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; the loop's kernels take float32, bfloat16 and float16")
    for name, t in (("init_H", init_H), ("init_L", init_L)):
        start(name, t, x, past is not None)
    halting(x, weights.q, weights.q_bias, None)
    loop_blocks(weights, c, n_head, n_kv_head)
    if rotary is not None:
        per_row = (n_rows,) if rotary.dim() == 4 else ()
        head_dim = weights.L[0].q.shape[0] // n_head
        shape("rotary", rotary, (*per_row, n_tokens, head_dim // 2, 2), "for this x and these weights")
    for name, given in (("limit", limit), ("may_halt", may_halt)):
        if len(given) != n_rows:
            raise ValueError(f"{name} has {len(given)} entries for {n_rows} rows; give one for each")
    for n in (min(limit), max(limit)):
        if not 0 <= n < 2**31:
            raise ValueError(f"limit {n} is outside 0..{2**31 - 1}; it is the number of steps a row may run")
    if halt_bias != halt_bias:
        raise ValueError("halt_bias is nan; give a number (inf halts every row after one step, -inf none)")
    options(x, lengths, dropout_p)
    if lengths is not None and lengths.device.type == "cpu" and (lengths.min() < 1 or lengths.max() > n_tokens):
        raise ValueError(f"lengths {lengths.tolist()} must lie in 1..{n_tokens}, the padded length")
    if pooled is not None:
        if past is not None:
            raise ValueError("pooled was given with past, whose mean runs over all positions of a row; leave it out")
        leading(pooled, lengths, x)
    same_device(x, init_H=init_H, init_L=init_L, rotary=rotary, w=weights.L[0].q)


def start(name: str, t: Tensor, x: Tensor, over_a_cache: bool) -> None:
    """init_H or init_L of HRMLoop.run, for x [B, T, C]."""
    vector, states = tuple(x.shape[2:]), tuple(x.shape)
    if tuple(t.shape) not in (vector, states):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}; for this x it must be {vector}, where every position starts, or "
            f"{states}, states to go on from"
        )
    if t.dim() == 3 and over_a_cache:
        raise ValueError(f"{name} has shape {states}; with past, tokens are new: give {vector}, where they start")
    if t.dim() == 3 and t.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{name} is {t.dtype} and x {x.dtype}; convert these states to {x.dtype} or torch.float32")


def leading(pooled: Tensor, lengths: Tensor | None, x: Tensor) -> None:
    """pooled [B] of HRMLoop.run. On a GPU what it holds is not looked at: that would wait."""
    shape("pooled", pooled, (x.shape[0],), "one for each row,")
    integers("pooled", pooled)
    same_device(x, pooled=pooled)
    most = x.shape[1] if lengths is None else lengths
    if pooled.device.type == "cpu" and (pooled.min() < 1 or (pooled > most).any()):
        upto = f"{most}, the positions of x" if lengths is None else f"lengths {lengths.tolist()}"
        raise ValueError(
            f"pooled {pooled.tolist()} must lie in 1..{upto}; give a number of leading tokens for each row"
        )


def loop_blocks(weights, c: int, n_head: int, n_kv_head: int) -> None:
    """Blocks of HRMLoop.run, all of one shape: a kernel that reads beyond a tensor's end says nothing."""
    if not weights.L or not weights.H:
        raise ValueError("a level has no blocks; give at least one to each")
    heads(n_head, n_kv_head)
    first = weights.L[0]
    wide, hidden = first.q.shape[0], first.up.shape[0]
    if wide == 0 or wide % n_head:
        raise ValueError(f"q makes {wide} channels, no multiple of {n_head} heads")
    narrow = wide // n_head * n_kv_head
    expected = {"norm_1": (c,), "q": (wide, c), "k": (narrow, c), "v": (narrow, c), "o": (c, wide), "norm_2": (c,)}
    expected |= {"gate": (hidden, c), "up": (hidden, c), "down": (c, hidden)}
    if first.gate is None:
        del expected["gate"]
    if first.q_bias is not None:
        expected |= {f"{name}_bias": size[:1] for name, size in expected.items() if not name.startswith("norm")}
    for block in (*weights.L, *weights.H):
        for name, t in block._asdict().items():
            if (t is None) != (name not in expected):
                raise ValueError(
                    f"a block's {name} is {'missing' if t is None else 'given'}; other weights are otherwise"
                )
            if t is not None and tuple(t.shape) != expected[name]:
                because = f"with {c} channels, {n_head} and {n_kv_head} heads, and the first block's q and up,"
                raise ValueError(f"a block's {name} has shape {tuple(t.shape)}; {because} it must be {expected[name]}")


def halting(z_H: Tensor, w: Tensor, b: Tensor, lengths: Tensor | None) -> None:
    """halting."""
    rank("z_H", z_H, "B T C")
    if z_H.shape[1] == 0:
        raise ValueError("z_H has no positions; a mean over none is undefined; give at least one")
    shape("w", w, (2, z_H.shape[2]), f"with {z_H.shape[2]} channels in z_H")
    shape("b", b, (2,), "one for halt and one for continue,")
    options(z_H, lengths, 0.0)
    same_device(z_H, w=w, b=b)
