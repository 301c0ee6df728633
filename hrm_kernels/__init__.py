"""Ops of the hierarchical-reasoning model, on tensors: the one seam between models and kernels.

A model calls these functions and knows nothing of how they run. `backend.py` decides that, `reference.py` defines what
they compute. Shapes use B batch, T time, C channels, H query heads, K key/value heads, D head size, F MLP hidden,
V vocabulary, M rows (any leading shape, flattened).
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .autocast import compute_dtype, shared_casts
from .backend import (
    OPS,
    BackendError,
    as_now,
    choices,
    current_backend,
    describe,
    run,
    run_rope_gqa_attention,
    runs_kernel,
    use_backend,
    why_no_kernel,
)
from .forest import Forest, forest_attention
from .loop import BlockWeights, HRMLoop, LoopResult, LoopWeights
from .packed import PackedWeights, linear, packed_weights
from .past import NewestTokens, Past, Span, StepPast, Tokens
from .quantized import embedding, is_narrow, is_quantized, plain
from .reference import halt_margin, rope, rope_table
from .transfer import to_device
from .version import __version__

__all__ = [
    "OPS",
    "BackendError",
    "BlockWeights",
    "Forest",
    "HRMLoop",
    "LoopResult",
    "LoopWeights",
    "NewestTokens",
    "PackedWeights",
    "Past",
    "Span",
    "StepPast",
    "Tokens",
    "__version__",
    "add_rms_norm",
    "as_now",
    "attention",
    "cached_attention",
    "choices",
    "current_backend",
    "describe",
    "embedding",
    "forest_attention",
    "halt_margin",
    "halting",
    "is_narrow",
    "is_quantized",
    "linear",
    "linear_cross_entropy",
    "packed_weights",
    "qkv_rope",
    "rms_norm",
    "rope",
    "rope_gqa_attention",
    "rope_table",
    "runs_kernel",
    "shared_casts",
    "swiglu",
    "swiglu_mul",
    "to_device",
    "use_backend",
    "why_no_kernel",
]


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * w, in float32, cast back to x's dtype.

    Args:
        x: [..., C], any float dtype. w: [C].
    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    checks.norm(x, None, w)
    return run("rms_norm", x, w, eps)


def add_rms_norm(
    x: Tensor, branch: Tensor, w: Tensor, eps: float = 1e-5, keep_sum: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Residual add and RMSNorm in one pass: s = x + branch; returns (s, rms_norm(s, w, eps)).

    A pre-norm block keeps both (the new residual and the next branch's input). A post-norm block needs only the
    second: with keep_sum=False the first is None, and forward alone it never reaches memory.

    Args:
        x: [..., C] residual. branch: [..., C], may have a lower precision than x (autocast). w: [C].
    Returns:
        (sum or None, norm), both [..., C] in the dtype x + branch promotes to.
    """
    checks.norm(x, branch, w)
    return run("add_rms_norm", x, branch, w, eps, keep_sum)


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None = None, b_up: Tensor | None = None) -> Tensor:
    """silu(x w_up^T + b_up) * (x w_gate^T + b_gate). The activation sits on `up`, as in the published model.

    Args:
        x: [..., C]. w_gate, w_up: [F, C]. b_gate, b_up: [F] or None.
    Returns:
        [..., F].
    Source: Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5, with the two projections' roles exchanged.
    """
    checks.swiglu(x, w_gate, w_up, b_gate, b_up)
    return run("swiglu", x, w_gate, w_up, b_gate, b_up)


def swiglu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(up) * gate, elementwise, for callers that already have the two products. Shapes [..., F]."""
    checks.swiglu_mul(gate, up)
    return run("swiglu_mul", gate, up)


def qkv_rope(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """Query, key and value projections, packed, with queries and keys rotated by their positions.

    Args:
        x: [B, T, C]. w_q: [H*D, C]. w_k, w_v: [K*D, C]. biases: three vectors, or None.
        rotary: rope_table(positions, D), float32 [T, D/2, 2] or [B, T, D/2, 2]; None leaves everything unrotated.
            The table is an argument, not the positions, so that a forward pass of hundreds of block applications
            computes its cosines once.
    Returns:
        [B, T, (H + 2K) * D]: queries, then keys, then values.
    """
    checks.qkv_rope(x, w_q, w_k, w_v, biases, rotary)
    return run("qkv_rope", x, w_q, w_k, w_v, biases, rotary)


def attention(
    qkv: Tensor, n_head: int, n_kv_head: int, lengths: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Causal grouped-query attention on a packed projection, scale 1/sqrt(D).

    Args:
        qkv: [B, T, (H + 2K) * D] from `qkv_rope`. n_head: H. n_kv_head: K, divides H.
        lengths: [B] int64, real tokens of each right-padded row. Causality already hides padding from real tokens;
            what padding positions hold is finite and otherwise unspecified.
        dropout_p: dropout of attention weights, 0 outside training.
    Returns:
        [B, T, H*D].
    Source: Ainslie et al., "GQA", 2023, section 2.2.
    """
    checks.attention(qkv, n_head, n_kv_head, lengths, dropout_p)
    return run("attention", qkv, n_head, n_kv_head, lengths, dropout_p)


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
    """`attention` of `qkv_rope`: from hidden states [B, T, C] to heads [B, T, H*D], before the output projection."""
    checks.qkv_rope(x, w_q, w_k, w_v, biases, rotary)
    checks.rope_gqa_attention(x, w_q, w_k, rotary, n_head, n_kv_head, lengths, dropout_p)
    return run_rope_gqa_attention(x, w_q, w_k, w_v, biases, rotary, n_head, n_kv_head, lengths, dropout_p)


def cached_attention(qkv: Tensor, kv: Tensor, tokens: Tokens | NewestTokens, n_head: int, n_kv_head: int) -> Tensor:
    """Causal grouped-query attention of some tokens over a cache, to which their keys and values are added first.

    Args:
        qkv: [1, N, (H + 2K) * D] from `qkv_rope`, of the tokens in their order. Forward only.
        kv: [R, P, 2, K, D] of qkv's dtype, dense; written at the tokens' places, and nowhere else.
        tokens: which they are; NewestTokens are for the kernel alone. Positions before a token's own must be there
            already, or be among the tokens.
    Returns:
        [1, N, H*D].
    """
    checks.cached_attention(qkv, kv, tokens, n_head, n_kv_head)
    return run("cached_attention", qkv, kv, tokens, n_head, n_kv_head)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of softmax(x w^T) against `targets`, without ever holding all logits.

    Per row: logsumexp(l) - l[target] + z_loss * logsumexp(l)^2, float32.

    Args:
        x: [M, C] hidden states. w: [V, C]. targets: [M] int64, already shifted; ignore_index rows count for nothing.
        reduction: "mean" over the rows that count (0 if there are none), "sum", or "none" ([M], 0 where ignored).
        z_loss: weight of the squared log-partition (Chowdhery et al., "PaLM", 2022, section 5), in nats.
    Raises:
        ValueError: shapes that do not match, or an unknown reduction.
    """
    w = plain(w, compute_dtype(x))
    checks.linear_cross_entropy(x, w, targets, reduction)
    return run("linear_cross_entropy", x, w, targets, ignore_index, reduction, z_loss)


def halting(
    z_H: Tensor, w: Tensor, b: Tensor, halt_bias: float = 0.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The halting head: pool over each row's real tokens, score, decide.

    q = mean_{t < length}(z_H) w^T + b = [halt, continue] in float32 even under autocast; halt where
    q_halt + halt_bias > q_continue, strictly.

    Args:
        z_H: [B, T, C]. w: [2, C]. b: [2]. halt_bias: in units of q. lengths: [B] int64 or None for all T.
    Returns:
        (q [B, 2] float32, halt [B] bool).
    """
    checks.halting(z_H, w, b, lengths)
    return run("halting", z_H, w, b, halt_bias, lengths)
