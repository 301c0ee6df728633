"""Attention by well-kept libraries, on the same packed projection: PyTorch's own and flash-attn.

Both see queries, keys and values as strided views, so nothing is copied or repeated; both take attention dropout.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import reference

FLASH_INSTALLED = importlib.util.find_spec("flash_attn") is not None


def sdpa(qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, which is also what the reference calls."""
    return reference.attention(qkv, n_head, n_kv_head, lengths, dropout_p)


def flash(qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """flash_attn.flash_attn_func (Dao, 2023). Causality alone keeps right padding out of real tokens."""
    from flash_attn import flash_attn_func

    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=2)
    return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=True).flatten(-2)


def why_not_flash(qkv: Tensor, n_head: int, n_kv_head: int) -> str | None:
    """None if `flash` can take this tensor, else the reason."""
    head_dim = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    if not FLASH_INSTALLED:
        return "the package flash-attn is not installed (pip install flash-attn)"
    if qkv.device.type != "cuda":
        return f"the tensors are on {qkv.device.type}, flash-attn needs a CUDA device"
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"qkv is {qkv.dtype}, flash-attn takes bfloat16 and float16"
    if head_dim % 8 or head_dim > 256:
        return f"the head size is {head_dim}, flash-attn takes multiples of 8 up to 256"
    return None
