"""What carries z_H into the language model's last hidden states, before its final norm.

    GRB   h' = h + s(g) r W z_H                                        the same bias at every position
    CAB   M = W_m z_H, m tokens [m, D];  h' = h + s(g) r W_o attention(W_q norm(h), W_k M, W_v M)
    bias  logits' = logits + s(v) W_b z_H                              on the vocabulary, optional

s is the sigmoid, g and v are learned numbers; r is the size of the language model's states, measured once before
training (0.1 in a small model, tens in a large one), so that a learning rate means the same for all. At s = 0 nothing
changes, to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HybridConfig
from .whitening import whiten


class Gate(nn.Module):
    """sigmoid of a learned number."""

    def __init__(self, start: float):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(float(start)))

    def forward(self) -> Tensor:
        return self.raw.sigmoid()

    @torch.no_grad()
    def set_value(self, value: float) -> None:
        """Make sigmoid(raw) this value of 0..1; 0 shuts the gate."""
        if not 0 <= value <= 1:
            raise ValueError(f"a gate's value lies in 0..1, got {value}")
        self.raw.copy_(torch.special.logit(torch.tensor(float(value))))


class ResidualBias(nn.Module):
    """GRB: a gated bias in hidden space."""

    def __init__(self, config: HybridConfig, width: int):
        super().__init__()
        self.project = nn.Linear(config.d_h, width, bias=False)
        self.gate = Gate(config.gate_init)
        self.register_buffer("size", torch.ones(()))

    def memory(self, z_H: Tensor) -> Tensor:
        """[B, 1, d_h] -> [B, 1, D]: what `forward` adds, the same for all positions."""
        return self.gate() * self.size * self.project(z_H)

    def forward(self, h_BTD: Tensor, memory: Tensor) -> Tensor:
        return h_BTD + memory.to(h_BTD.dtype)

    @torch.no_grad()
    def fit(self, h_ND: Tensor) -> None:
        """Set r by states [N, D] that answers are predicted from."""
        self.size.copy_(typical_size(h_ND))


class CrossAttentionBridge(nn.Module):
    """CAB: token states attend to m tokens made of z_H, so that each position can take something else from it."""

    HEAD_DIM = 64

    def __init__(self, config: HybridConfig, width: int):
        super().__init__()
        self.n_tokens, self.width = config.memory_tokens, width
        self.n_heads = max(n for n in range(1, max(1, width // self.HEAD_DIM) + 1) if width % n == 0)
        self.make_tokens = nn.Linear(config.d_h, config.memory_tokens * width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = Gate(config.gate_init)
        self.register_buffer("size", torch.ones(()))

    def memory(self, z_H: Tensor) -> Tensor:
        """[B, 1, d_h] -> [B, m, 2 D]: keys and values, once for all positions of a prompt."""
        tokens = self.make_tokens(z_H).view(len(z_H), self.n_tokens, self.width)
        return self.key_value(tokens)

    def forward(self, h_BTD: Tensor, memory: Tensor) -> Tensor:
        q = self._heads(self.query(self.normed(h_BTD).to(memory.dtype)))
        k, v = (self._heads(part) for part in memory.chunk(2, -1))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h_BTD + (self.gate() * self.size * self.out(heads)).to(h_BTD.dtype)

    @torch.no_grad()
    def fit(self, h_ND: Tensor) -> None:
        """Set r, and the queries, by states [N, D] that answers are predicted from: positions then ask for
        different things."""
        self.size.copy_(typical_size(h_ND))
        whiten(self.query, self.normed(h_ND))

    def normed(self, h: Tensor) -> Tensor:
        """What queries are made of: states [.., D] with mean square 1."""
        return F.rms_norm(h.to(torch.promote_types(h.dtype, torch.float32)), (self.width,))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def typical_size(h_ND: Tensor) -> Tensor:
    """Median of the states' root mean squares: not the mean, as first tokens can be a hundred times larger."""
    return h_ND.float().pow(2).mean(-1).sqrt().median()


class VocabularyBias(nn.Module):
    """A gated bias on the logits, linear in z_H."""

    def __init__(self, config: HybridConfig, vocab_size: int):
        super().__init__()
        self.project = nn.Linear(config.d_h, vocab_size, bias=False)
        self.gate = Gate(config.logit_bias_init)

    def forward(self, z_H: Tensor) -> Tensor:
        """[B, 1, d_h] -> [B, 1, V]."""
        return self.gate() * self.project(z_H)


def make_injector(config: HybridConfig, width: int) -> nn.Module:
    """The injector that the configuration names, for hidden states of `width` channels."""
    kinds = {"grb": ResidualBias, "cab": CrossAttentionBridge}
    return kinds[config.injector](config, width)
