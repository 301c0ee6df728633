"""Models of a few thousand weights whose depth moves, and models that say a given text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hrm_model import HRMConfig, HRMForCausalLM

S = 5
SHAPE = dict(vocab_size=61, n_embd=16, block_size=32, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=S, halt_bias=0.0)


@torch.no_grad()
def thinker(seed: int = 0, dtype: torch.dtype = torch.float64, **shape) -> HRMForCausalLM:
    """A model whose decided depth goes up and down as a row grows. Its matrices are small enough that rounding errors
    do not grow from block to block, and its head looks away from what all rows have in common after a step: that would
    decide for every row alike."""
    torch.manual_seed(seed)
    made = HRMForCausalLM(HRMConfig(**SHAPE | shape)).double()
    config, core = made.config, made.hrm_core
    for name, p in made.named_parameters():
        if "ln_" in name:
            p.normal_(1, 0.1)
        else:
            std = 1 if name.startswith(("wte", "wpe")) or "_init" in name or "q_head" in name else 0.6
            p.normal_(0, std if std == 1 else std / config.n_embd**0.5)
    rotary, x = made.rotary(8), made.embed(torch.randint(0, config.vocab_size, (12, 8)))
    for block in made.input_blocks:
        x = block(x, rotary, None)
    means, (z_H, z_L) = [], core.initial_state(x)
    for _ in range(config.hrm_max_steps):
        z_H, z_L = core.step(x, z_H, z_L, rotary, None)
        means.append(z_H.mean((0, 1)))
    common, _ = torch.linalg.qr(torch.stack(means, 1))
    core.q_head.weight -= core.q_head.weight @ common @ common.T
    core.q_head.bias.zero_()
    return made.to(dtype).eval()


@torch.no_grad()
def speaker(tokens: Sequence[int], **shape) -> HRMForCausalLM:
    """A model that says these tokens, whatever the prompt of one token: logits are a function of the position alone.
    The likeliest token stands 30 nats above all others."""
    shape = dict(vocab_size=50304, n_embd=len(tokens) + 1, n_head=1, n_kv_head=1, use_rotary=False) | shape
    shape |= dict(n_input_layers=0, n_output_layers=0, hrm_H_layers=0, hrm_L_layers=0, tie_embeddings=False)
    made = HRMForCausalLM(HRMConfig(**SHAPE | dict(block_size=len(tokens) + 1) | shape)).eval()
    core = made.hrm_core
    for p in (made.wte.weight, made.lm_head.weight, core.H_init, core.L_init, core.q_head.weight, core.q_head.bias):
        p.zero_()
    torch.nn.init.eye_(made.wpe.weight)
    for position, token in enumerate(tokens):
        made.lm_head.weight[token, position] = 30.0 / made.config.n_embd**0.5  # the norm makes a one hot that large
    return made
