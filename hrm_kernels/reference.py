"""Every op in plain PyTorch: the definition that the kernels are held to. Documentation of each is in __init__.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from .packed import packed_product
from .past import Tokens
from .quantized import product, rounded

# Rows of logits alive at a time in linear_cross_entropy: 256 x 50,304 float32 is 52 MB. On two shared CPU cores 64 rows
# took 1.6 to 2.2 times as long, 512 rows 0.8 to 0.9 times (bench/ops.py --reference); on a GPU it was not measured.
CROSS_ENTROPY_CHUNK = 256


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower, so that float64 input gives a float64 truth."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    x_wide = x.to(_wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * w.to(x_wide.dtype)).to(x.dtype)


def add_rms_norm(
    x: Tensor, branch: Tensor, w: Tensor, eps: float = 1e-5, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    total = x + branch
    return total if keep_sum else None, rms_norm(total, w, eps)


def swiglu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(up) * gate


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None = None, b_up: Tensor | None = None) -> Tensor:
    x = rounded(x, w_gate)
    both = packed_product(x, (w_gate, w_up), (b_gate, b_up))
    gate, up = (product(x, w_gate, b_gate), product(x, w_up, b_up)) if both is None else both.chunk(2, dim=-1)
    return swiglu_mul(gate, up)


def rope_table(positions: Tensor, head_dim: int, theta: float = 1e4) -> Tensor:
    """cos and sin of position * theta^(-2i/D) for i < D/2: float32 [*positions.shape, D/2, 2].

    Args:
        positions: [T] or [B, T], integer. head_dim: D, even.
    Source: Su et al., "RoFormer", 2021, eq. 15.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings rotate pairs, so it must be even")
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[..., None] * theta ** (-i / head_dim)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent (interleaved) pairs: (a, b) -> (a cos - b sin, a sin + b cos), in float32.

    Args:
        x: [B, T, heads, D]. table: from `rope_table`, [T, D/2, 2] or [B, T, D/2, 2].
    Returns:
        x's shape and dtype.
    """
    pairs = x.to(_wide(x.dtype)).unflatten(-1, (-1, 2))
    if x.device.type != "mps" and not torch.compiler.is_compiling():
        # One complex product is the same four real ones in a single pass: 5 to 15 times as fast for 8 x 128 x 4 x 32 on
        # two shared CPU cores (bench/ops.py --reference). Inductor fuses the real form and cannot generate code for the
        # complex one; MPS has no view of it.
        turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table).unsqueeze(-2)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = table.unsqueeze(-3).unbind(-1)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def qkv_rope(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    b_q, b_k, b_v = biases or (None, None, None)
    x = rounded(x, w_q)
    packed = packed_product(x, (w_q, w_k, w_v), (b_q, b_k, b_v))
    if packed is not None:
        if rotary is None:
            return packed
        qk, v = packed.split((len(w_q) + len(w_k), len(w_v)), dim=-1)
        return torch.cat((rope(qk.unflatten(-1, (-1, 2 * rotary.shape[-2])), rotary).flatten(-2), v), dim=-1)
    q, k, v = product(x, w_q, b_q), product(x, w_k, b_k), product(x, w_v, b_v)
    if rotary is not None:
        head_dim = 2 * rotary.shape[-2]
        q = rope(q.unflatten(-1, (-1, head_dim)), rotary).flatten(-2)
        k = rope(k.unflatten(-1, (-1, head_dim)), rotary).flatten(-2)
    return torch.cat((q, k, v), dim=-1)


def attention(
    qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    # Right padding comes after every real token, so the causal mask alone keeps it out of them: lengths only tells
    # a kernel what it may leave out.
    heads = rearrange(qkv, "b t (h d) -> b h t d", h=n_head + 2 * n_kv_head)
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=n_kv_head != n_head)
    return rearrange(out, "b h t d -> b t (h d)")


def cached_attention(qkv: Tensor, kv: Tensor, tokens: Tokens, n_head: int, n_kv_head: int) -> Tensor:
    if not isinstance(tokens, Tokens):
        raise ValueError(f"{type(tokens).__name__} are for the kernel; give the reference Tokens, which the host knows")
    n_rows, n_positions = kv.shape[:2]
    head_dim = kv.shape[-1]
    q, new = qkv[0].split((n_head * head_dim, 2 * n_kv_head * head_dim), dim=-1)
    kv.view(n_rows * n_positions, -1).index_copy_(0, tokens.place, new)
    if tokens.in_step:
        # the query heads that share a key/value head are as many queries of that head
        first, grouped = tokens.spans[0].row, q.view(tokens.size, n_kv_head, -1, head_dim)
        keys, values = kv[first : first + tokens.size, : tokens.longest].transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(1, tokens.size, -1)
    # Row by row, each over its own positions: what others may hold must not be looked at, 0 times nan being nan.
    out, at = torch.empty_like(q), 0
    for row, begin, end in tokens.spans:
        mine = slice(at, at + end - begin)
        keys, values = kv[row, None, :end].transpose(1, 3).unbind(2)
        if end - begin == 1:  # in the shape above, so that a row's bits are those that it has alone
            grouped = q[mine].view(1, n_kv_head, -1, head_dim)
            out[mine] = F.scaled_dot_product_attention(grouped, keys, values).reshape(1, -1)
            at = mine.stop
            continue
        queries = q[mine].unflatten(-1, (n_head, head_dim)).transpose(0, 1)[None]
        seen = None
        if begin:
            seen = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).tril(begin)
        heads = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, is_causal=begin == 0, enable_gqa=n_kv_head != n_head
        )
        out[mine] = heads[0].transpose(0, 1).flatten(1)
        at = mine.stop
    return out[None]


def halt_margin(q: Tensor, halt_bias: float = 0.0) -> Tensor:
    """The rule that decides: q_halt + halt_bias - q_continue, and a row halts where this is above 0.

    Args:
        q: [..., 2], [halt, continue]. halt_bias: in units of q; inf halts everywhere, -inf nowhere.
    Returns:
        [...] of q's dtype.
    """
    return q[..., 0] + halt_bias - q[..., 1]


def halting(
    z_H: Tensor, w: Tensor, b: Tensor, halt_bias: float = 0.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(z_H.device.type, enabled=False):
        z_wide = z_H.to(_wide(z_H.dtype))
        if lengths is None:
            pooled = z_wide.mean(dim=1)
        else:
            real = torch.arange(z_H.shape[1], device=z_H.device) < lengths[:, None]
            pooled = (z_wide * real[..., None]).sum(dim=1) / lengths[:, None]
        q = F.linear(pooled, w.to(pooled.dtype), b.to(pooled.dtype))
    return q, halt_margin(q, halt_bias) > 0


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    keep = targets != ignore_index
    # Of a conversation one row in three has a target. Where looking costs no wait, the others' logits are not computed.
    rows, kept = len(targets), None
    if x.device.type == "cpu" and not keep.all():
        kept = keep.nonzero()[:, 0]
        x, targets, keep = x[kept], targets[kept], keep[kept]
    if reduction == "none":
        losses = _RowLosses.apply(x, w, targets, ignore_index, z_loss)
        return losses if kept is None else losses.new_zeros(rows).index_copy(0, kept, losses)
    row_weight = keep.to(_wide(x.dtype))
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    total = _TotalLoss.apply(x, w, targets, ignore_index, z_loss, row_weight, with_gradient)
    # last, so that gradients of single rows are of order 1 and survive float16
    return total / keep.sum().clamp(min=1) if reduction == "mean" else total


class _TotalLoss(torch.autograd.Function):
    """sum_i row_weight_i * loss_i, in chunks of rows. The weights are known, so a chunk's gradient is made while its
    logits are there: three products instead of the four that a backward of its own would need.

    With l = x w^T, s = logsumexp(l), p = exp(l - s): dl = row_weight * (p * (1 + 2 z_loss s) - onehot(target)),
    dx = dl w, dw = dl^T x.
    """

    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, z_loss, row_weight, with_gradient):
        total = row_weight.new_zeros(())
        dx, dw = (torch.empty_like(x), torch.zeros_like(w, dtype=row_weight.dtype)) if with_gradient else (None, None)
        for rows, logits in _logit_chunks(x, w, row_weight.dtype):
            target = targets[rows].where(targets[rows] != ignore_index, 0)[:, None]
            loss, lse, sums = _exponentiate(logits, target, z_loss)
            weight = row_weight[rows]
            total += (loss * weight).sum()
            if with_gradient:
                logits.mul_((weight * (1 + 2 * z_loss * lse) / sums)[:, None])
                d_logits = logits.scatter_add_(-1, target, -weight[:, None]).to(w.dtype)
                dx[rows] = d_logits @ w
                if dw.dtype == x.dtype:
                    dw.addmm_(d_logits.t(), x[rows])  # saves a temporary of w's size
                else:
                    dw += d_logits.t() @ x[rows]
        if with_gradient:
            ctx.save_for_backward(dx, dw.to(w.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        # in the loss's precision: as a float16 number g would overflow at a loss scale of 65,536
        return (dx * g.expand(1, 1)).to(dx.dtype), (dw * g.expand(1, 1)).to(dw.dtype), None, None, None, None, None


class _RowLosses(torch.autograd.Function):
    """[M] losses in chunks of rows. Their weights come with the backward, which makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, z_loss):
        losses = torch.empty(x.shape[0], dtype=_wide(x.dtype), device=x.device)
        for rows, logits in _logit_chunks(x, w, losses.dtype):
            keep = targets[rows] != ignore_index
            loss, _, _ = _exponentiate(logits, targets[rows].where(keep, 0)[:, None], z_loss)
            losses[rows] = loss.where(keep, 0.0)
        ctx.save_for_backward(x, w, targets)
        ctx.ignore_index, ctx.z_loss = ignore_index, z_loss
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, targets = ctx.saved_tensors
        row_weight = g.where(targets != ctx.ignore_index, 0.0)
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), w.detach().requires_grad_()
            total = _TotalLoss.apply(*inputs, targets, ctx.ignore_index, ctx.z_loss, row_weight, True)
            return *torch.autograd.grad(total, inputs), None, None, None


def _exponentiate(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp, sums) of each row; overwrites `logits` with exp(logits - max), whose row sums are `sums`."""
    picked = logits.gather(-1, target)[:, 0]
    top = logits.amax(-1)
    sums = logits.sub_(top[:, None]).exp_().sum(-1)
    lse = sums.log() + top
    return lse - picked + z_loss * lse.square(), lse, sums


def _logit_chunks(x: Tensor, w: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits in `dtype`) for chunks of x's rows. One buffer serves every chunk: the caller may overwrite
    it, and fresh memory for each would cost as much as the arithmetic (page faults, measured on a CPU)."""
    buffer = x.new_empty(min(CROSS_ENTROPY_CHUNK, x.shape[0]), w.shape[0])
    for start in range(0, x.shape[0], CROSS_ENTROPY_CHUNK):
        rows = slice(start, start + CROSS_ENTROPY_CHUNK)
        logits = torch.mm(x[rows], w.t(), out=buffer[: x[rows].shape[0]])
        yield rows, logits.to(dtype)
