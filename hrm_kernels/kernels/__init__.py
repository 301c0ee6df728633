"""Every Triton kernel of this package: what runs an op, and which inputs it does not cover. A new one is entered here.

Importing this module imports Triton, so backend.py does it only when a kernel is about to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import in_autocast
from . import attention, cached_attention, halting, hrm_step, linear_cross_entropy, qkv_rope, rms_norm, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """One op's kernel."""

    run: Callable
    """Takes what the seam's function takes."""
    why_not: Callable[..., str | None]
    """Of the same arguments: None if the kernel covers them, else the reason, which names the argument."""


def _dtype(**tensors: Tensor | None) -> str | None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in DTYPES:
            return f"{name} is {t.dtype}; kernels take float32, bfloat16 and float16"
    return None


def _same_dtype(x: Tensor, **weights: Tensor) -> str | None:
    """Outside autocast a matrix product needs one dtype."""
    if not in_autocast(x):
        for name, w in weights.items():
            if w.dtype != x.dtype:
                return f"{name} is {w.dtype} and x is {x.dtype}; convert one, or use autocast"
    return _dtype(x=x, **weights)


def _one_dtype(biases: tuple[Tensor | None, ...] | None) -> str | None:
    dtypes = {b.dtype for b in biases or () if b is not None}
    if len(dtypes) > 1:
        return f"biases are {', '.join(sorted(map(str, dtypes)))}; convert them to one dtype"
    return None


def _norm(x, branch, w):
    if x.shape[-1] > rms_norm.WIDEST:
        return f"x has {x.shape[-1]} channels; the kernel takes up to {rms_norm.WIDEST}"
    return _dtype(x=x, branch=branch, w=w)


def _swiglu(x, w_gate, w_up, b_gate, b_up):
    return _one_dtype((b_gate, b_up)) or _same_dtype(x, w_gate=w_gate, w_up=w_up)


def _swiglu_mul(gate, up):
    if gate.dtype != up.dtype:
        return f"gate is {gate.dtype} and up is {up.dtype}; convert one"
    return _dtype(gate=gate)


def _qkv_rope(x, w_q, w_k, w_v, biases, rotary):
    if rotary is not None and rotary.dtype != torch.float32:
        return f"rotary is {rotary.dtype}; the kernel takes float32, as rope_table makes it"
    if rotary is not None and rotary.requires_grad:
        return "rotary requires a gradient, which the kernel does not make; detach it"
    return _one_dtype(biases) or _same_dtype(x, w_q=w_q, w_k=w_k, w_v=w_v)


def _head_dim(head_dim):
    if head_dim > attention.LARGEST_HEAD or head_dim % 2:
        return f"the head size is {head_dim}; the kernel takes even sizes up to {attention.LARGEST_HEAD}"
    return None


def _attention(qkv, n_head, n_kv_head, lengths, dropout_p):
    return _head_dim(qkv.shape[-1] // (n_head + 2 * n_kv_head)) or _dtype(qkv=qkv)


def _cached_attention(qkv, kv, tokens, n_head, n_kv_head):
    return _head_dim(kv.shape[-1]) or _dtype(qkv=qkv)


def _rope_gqa_attention(x, w_q, w_k, w_v, biases, rotary, n_head, n_kv_head, lengths, dropout_p):
    return _head_dim(w_q.shape[0] // n_head) or _qkv_rope(x, w_q, w_k, w_v, biases, rotary)


def _linear_cross_entropy(x, w, targets, ignore_index, reduction, z_loss):
    return _same_dtype(x, w=w)


def _halting(z_H, w, b, halt_bias, lengths):
    if z_H.shape[0] > halting.MOST_ROWS:
        return f"z_H has {z_H.shape[0]} rows; the kernel takes up to {halting.MOST_ROWS}"
    if z_H.shape[2] > halting.WIDEST:
        return f"z_H has {z_H.shape[2]} channels; the kernel takes up to {halting.WIDEST}"
    return _dtype(z_H=z_H, w=w, b=b)


def _hrm_loop(x, weights, n_head, n_kv_head):
    if not weights.L or not weights.H:
        return "a level has no blocks"
    blocks = (*weights.L, *weights.H)
    tensors = {f"a block's {name}": t for block in blocks for name, t in block._asdict().items()}
    shapes = {tuple(None if t is None else t.shape for t in block) for block in blocks}
    if len(shapes) > 1:
        return "its blocks differ in shape"
    for block in blocks:
        if reason := _one_dtype(block[-7:]):
            return reason
    if not in_autocast(x):
        for name, t in tensors.items():
            if t is not None and "norm" not in name and t.dtype != x.dtype:
                return f"{name} is {t.dtype} and x is {x.dtype}; convert one, or use autocast"
    head = _head_dim(blocks[0].q.shape[0] // n_head)
    return head or _halting(x, weights.q, weights.q_bias, 0.0, None) or _dtype(x=x, **tensors)


KERNELS = {
    "rms_norm": Kernel(rms_norm.rms_norm, lambda x, w, eps: _norm(x, None, w)),
    "add_rms_norm": Kernel(rms_norm.add_rms_norm, lambda x, branch, w, eps, keep_sum: _norm(x, branch, w)),
    "swiglu": Kernel(swiglu.swiglu, _swiglu),
    "swiglu_mul": Kernel(swiglu.swiglu_mul, _swiglu_mul),
    "qkv_rope": Kernel(qkv_rope.qkv_rope, _qkv_rope),
    "attention": Kernel(attention.attention, _attention),
    "cached_attention": Kernel(cached_attention.cached_attention, _cached_attention),
    # what qkv_rope and attention run as where both are Triton's: one op with one backward pass
    "rope_gqa_attention": Kernel(attention.rope_gqa_attention, _rope_gqa_attention),
    "linear_cross_entropy": Kernel(linear_cross_entropy.linear_cross_entropy, _linear_cross_entropy),
    "halting": Kernel(halting.halting, _halting),
    # one step of the loop; who runs it is loop.py
    "hrm_loop": Kernel(hrm_step.step, _hrm_loop),
}
