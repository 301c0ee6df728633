"""The published model's behaviour, on our weights: the baseline of every comparison.

Written anew from a description of it, faults included: a row that has halted goes on being updated until the whole
batch has, the mean runs over padding, the host asks the device after every step, key/value heads are repeated in
memory, logits are float32 as a whole, and only the last possible step has a gradient. Its numbers are held to the
published code's by tests/test_parity.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_model.blocks import Attention, RMSNorm, SwiGLU
from hrm_model.model import PUBLISHED_STEP_PENALTY, HRMForCausalLM, HRMOutput


class PublishedHRM(nn.Module):
    """Runs an HRMForCausalLM's weights as the published code would. No `lengths`, no forced depth: it has neither.

    Args:
        model: whose parameters are used (shared, not copied). Its training mode decides dropout and halting bias.
    """

    def __init__(self, model: HRMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, targets: Tensor | None = None) -> HRMOutput:
        """As HRMForCausalLM.forward with neither lengths nor depth options; logits are always made."""
        model, config = self.model, self.model.config
        self.set_positions(ids_BT.shape[1])
        x = model.wte(ids_BT)
        if not config.use_rotary:
            x = x + model.wpe.weight[: ids_BT.shape[1]]
        x = self._drop(x)
        for block in model.input_blocks:
            x = self._pre_norm(block, x)
        z_H, q, steps_taken, executed = self.reason(x)
        for block in model.output_blocks:
            z_H = self._pre_norm(block, z_H)
        logits = F.linear(_norm(model.ln_f, z_H), model.lm_head.weight)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
            loss = loss + PUBLISHED_STEP_PENALTY * steps_taken.float().mean()
        return HRMOutput(logits, loss, steps_taken, executed, q, torch.tensor([int(executed.sum()), 0]))

    def set_positions(self, n_tokens: int) -> None:
        """Make the rotary table of rows of `n_tokens`, which `reason` needs; forward makes its own."""
        config, device = self.model.config, self.model.device
        self.rotary = _complex_rotary(n_tokens, config.head_dim, device) if config.use_rotary else None

    def reason(
        self, x: Tensor, max_steps: int | None = None, halt_bias: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loop over steps alone: (z_H, q, steps_taken, executed) from x [B, T, C], the input blocks' output.

        Args:
            max_steps, halt_bias: other ones than the configuration's.
        """
        core, config = self.model.hrm_core, self.model.config
        z_H, z_L = (p.expand_as(x).clone() for p in (core.H_init, core.L_init))
        bias = (0.0 if self.model.training else config.halt_bias) if halt_bias is None else halt_bias
        max_steps = config.hrm_max_steps if max_steps is None else max_steps
        halted = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        steps_taken = torch.full((x.shape[0],), max_steps, device=x.device)
        for step in range(1, max_steps + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == max_steps):
                for _ in range(config.hrm_H_cycles):
                    for _ in range(config.hrm_L_cycles):
                        z_L = self._level(core.L_level, z_L + (z_H + x))
                    z_H = self._level(core.H_level, z_H + z_L)
            with torch.no_grad():
                q = core.q_head(z_H.mean(dim=1)).float()
            if max_steps > 1:
                halt = (q[:, 0] + bias > q[:, 1]) & ~halted
                if self.model.training and torch.rand(()).item() < config.hrm_exploration_prob:
                    halt = halt & (step >= int(torch.randint(2, max_steps + 1, ())))
                steps_taken[halt] = step - 1
                halted = halted | halt
                if halted.all():
                    break
        return z_H, q, steps_taken, torch.full_like(steps_taken, step)

    def _level(self, level: nn.Module, z: Tensor) -> Tensor:
        for block in level.layers:
            z = _norm(block.ln_1, z + self._attention(block.attn, z))
            z = _norm(block.ln_2, z + self._mlp(block.mlp, z))
        return z

    def _pre_norm(self, block: nn.Module, x: Tensor) -> Tensor:
        x = x + self._attention(block.attn, _norm(block.ln_1, x))
        return x + self._mlp(block.mlp, _norm(block.ln_2, x))

    def _attention(self, attn: Attention, x: Tensor) -> Tensor:
        n_head, n_kv_head = attn.n_head, attn.n_kv_head
        q, k, v = (
            proj(x).unflatten(-1, (heads, -1))
            for proj, heads in ((attn.q_proj, n_head), (attn.k_proj, n_kv_head), (attn.v_proj, n_kv_head))
        )
        if self.rotary is not None:
            q, k = _rotate(q, self.rotary), _rotate(k, self.rotary)
        k, v = (t.repeat_interleave(n_head // n_kv_head, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        dropout_p = attn.dropout if self.model.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        return self._drop(attn.c_proj(heads.transpose(1, 2).flatten(2)))

    def _mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        if isinstance(mlp, SwiGLU):
            return self._drop(mlp.down(F.silu(mlp.up(x)) * mlp.gate(x)))
        return self._drop(mlp.c_proj(F.gelu(mlp.c_fc(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.model.config.dropout, self.model.training)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight).type_as(x)


def _complex_rotary(n_positions: int, head_dim: int, device: torch.device) -> Tensor:
    frequencies = 1.0 / 1e4 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(n_positions, device=device).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)[:, None, :]


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)
