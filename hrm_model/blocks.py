"""The two kinds of transformer block and their parts. All arithmetic but plain projections goes through hrm_kernels."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hrm_kernels as ops

from .config import HRMConfig

Past = ops.Past | ops.Forest
"""What attention looks at beside a row's own causal past: a cache, or the trees that rows share."""


class RMSNorm(nn.Module):
    """Holder of a norm's weight [C], in float32 whatever the autocast precision."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(x + branch, norm of it)."""
        return ops.add_rms_norm(x, branch, self.weight, self.eps)

    def of_sum(self, x: Tensor, branch: Tensor) -> Tensor:
        """Norm of x + branch."""
        return ops.add_rms_norm(x, branch, self.weight, self.eps, keep_sum=False)[1]


class Linear(nn.Linear):
    """A projection [..., C] -> [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Rows of a table, [B, T] ids -> [B, T, C]."""

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class Attention(nn.Module):
    """Causal grouped-query self-attention, [B, T, C] -> [B, T, C]. With a `past`, queries look at a cache's keys and
    values, to which their own are added first; with a forest, at what the shape of its trees lets them see."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        kv_dim = config.kv_heads * config.head_dim
        self.q_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k_proj = Linear(config.n_embd, kv_dim, bias=config.bias)
        self.v_proj = Linear(config.n_embd, kv_dim, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.kv_heads, config.dropout

    def forward(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, past: Past | None = None) -> Tensor:
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        weights, sizes = (q.weight, k.weight, v.weight), (self.n_head, self.n_kv_head)
        biases = None if q.bias is None else (q.bias, k.bias, v.bias)
        if isinstance(past, ops.Forest):
            heads = ops.forest_attention(ops.qkv_rope(x, *weights, biases, rotary), past, *sizes)
        elif past is not None:
            heads = ops.cached_attention(ops.qkv_rope(x, *weights, biases, rotary), past.kv, past.tokens, *sizes)
        else:
            dropout_p = self.dropout if self.training else 0.0
            heads = ops.rope_gqa_attention(x, *weights, biases, rotary, *sizes, lengths, dropout_p)
        return F.dropout(self.c_proj(heads), self.dropout, self.training)


class SwiGLU(nn.Module):
    """down(silu(up(x)) * gate(x)): the activation sits on `up`, unlike Llama's."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.gate = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.up = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.down = Linear(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = ops.swiglu(x, self.gate.weight, self.up.weight, self.gate.bias, self.up.bias)
        return F.dropout(self.down(hidden), self.dropout, self.training)


class GeluMLP(nn.Module):
    """c_proj(gelu(c_fc(x))), exact GELU; for configurations without SwiGLU."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.c_proj = Linear(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


def _kernels_as_now():
    """Contexts of a forward pass and of its repetition in the backward pass, when another backend may be in force."""
    return nullcontext(), ops.as_now()


class _BlockParts(nn.Module):
    recompute = False
    """Keep a pass's input alone for the backward pass, and make the rest again there."""

    def apply_to(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, past: Past | None = None) -> Tensor:
        """The block's forward pass, as `recompute` has it."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self, x, rotary, lengths, use_reentrant=False, context_fn=_kernels_as_now)
        if past is not None:  # a compiled block would be compiled again and again, for ever other numbers of tokens
            return self._call_impl(x, rotary, lengths, past)
        return self(x, rotary, lengths)

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.ln_1 = RMSNorm(config)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config)
        self.mlp = SwiGLU(config) if config.use_swiglu else GeluMLP(config)


class Block(_BlockParts):
    """Pre-norm block of the input and output stacks: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def forward(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, past: Past | None = None) -> Tensor:
        x, normed = self.ln_2.add(x, self.attn(self.ln_1(x), rotary, lengths, past))
        return x + self.mlp(normed)


class ReasoningBlock(_BlockParts):
    """Post-norm block of the HRM levels: ln_1(x + attn(x)), then ln_2(x + mlp(x))."""

    def weights(self) -> ops.BlockWeights:
        """The parameters, as the HRM loop's kernels want them."""
        attn, mlp = self.attn, self.mlp
        gate, up, down = (mlp.gate, mlp.up, mlp.down) if isinstance(mlp, SwiGLU) else (None, mlp.c_fc, mlp.c_proj)
        linears = {"q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj, "o": attn.c_proj}
        linears |= {"gate": gate, "up": up, "down": down}
        given = {name: None if linear is None else linear.weight for name, linear in linears.items()}
        given |= {f"{name}_bias": None if linear is None else linear.bias for name, linear in linears.items()}
        return ops.BlockWeights(norm_1=self.ln_1.weight, norm_2=self.ln_2.weight, **given)

    def forward(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, past: Past | None = None) -> Tensor:
        x = self.ln_1.of_sum(x, self.attn(x, rotary, lengths, past))
        return self.ln_2.of_sum(x, self.mlp(x))


class GrownBlock(ReasoningBlock):
    """A layer that came to a trained level: x + a (block(x) - x), a = 0 at first.

    Post-norm blocks are no identity when their branches are zero (the norms remain), so the gate is around the whole
    block; at a = 0 the level's function is the old one to the last bit.
    """

    def __init__(self, config: HRMConfig):
        super().__init__(config)
        self.gate_a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, past: ops.Past | None = None) -> Tensor:
        return x + self.gate_a * (super().forward(x, rotary, lengths, past) - x)
