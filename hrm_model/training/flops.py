"""Floating-point operations of a pass, for the steps that really ran, and what a device can do at most."""

from __future__ import annotations

import torch

from ..config import HRMConfig

# Dense bfloat16 peak in TFLOP/s by a part of the device's name, from the makers' data sheets; the first match counts.
# A device that is not here has no MFU: a made-up peak would be worse than none.
_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "L4": 121,
    "A10": 125,
}


def block_flops(config: HRMConfig, n_tokens: int) -> float:
    """Forward FLOPs per token of one block in a sequence of `n_tokens`: 2 per weight, plus causal attention."""
    c = config
    projections = 2 * c.n_embd * c.n_embd + 2 * c.n_embd * c.kv_heads * c.head_dim
    mlp = (3 if c.use_swiglu else 2) * c.n_embd * c.hidden
    # scores and values: 2 * 2 * T * C, half of it hidden by the causal mask
    return 2.0 * (projections + mlp) + 2.0 * n_tokens * c.n_embd


def training_flops(config: HRMConfig, n_tokens: int, executed: torch.Tensor, steps_taken: torch.Tensor) -> float:
    """FLOPs of forward and backward for rows of `n_tokens` tokens, with the replayed gradient.

    A row of n executed steps runs n - 1 of them without gradient (n if it halted by decision, which takes a look at the
    last one) and one with (1 forward + 2 backward). Recomputation inside ops is not counted.
    """
    block = block_flops(config, n_tokens)
    step = block * config.blocks_per_step
    outside = block * (config.n_input_layers + config.n_output_layers) + 2.0 * config.n_embd * config.vocab_size
    looped = (2 * executed - steps_taken - 1).sum().item()
    return n_tokens * (3.0 * len(executed) * (outside + step) + looped * step)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s at bfloat16, or None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)
