"""Floating-point operations of a pass, for the steps that really ran, and what a device can do at most."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..config import HRMConfig

# Dense bfloat16 peak in TFLOP/s by words of the device's name, from the makers' data sheets; the first match counts.
# A device that is not here has no MFU: a made-up peak would be worse than none.
_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
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


def training_flops(config: HRMConfig, n_tokens: int, n_rows: int, row_steps: Sequence[int]) -> float:
    """FLOPs of forward and backward for `n_rows` rows of `n_tokens` tokens, for the steps that really ran.

    row_steps counts HRM steps of rows without gradient (1 forward) and with (1 forward + 2 backward). Everything
    outside the core has a gradient. Recomputation inside ops is not counted.
    """
    block = block_flops(config, n_tokens)
    step = block * config.blocks_per_step
    outside = block * (config.n_input_layers + config.n_output_layers) + 2.0 * config.n_embd * config.vocab_size
    looped, replayed = row_steps
    return n_tokens * (3.0 * n_rows * outside + (looped + 3.0 * replayed) * step)


def exploring_flops(config: HRMConfig, n_tokens: int, n_rows: int) -> float:
    """FLOPs of `n_rows` rows of `n_tokens` tokens that are run through all steps and decoded at every exit, forward."""
    block = block_flops(config, n_tokens)
    exit_ = block * config.n_output_layers + 2.0 * config.n_embd * config.vocab_size
    step = block * config.blocks_per_step
    return n_tokens * n_rows * (block * config.n_input_layers + config.hrm_max_steps * (step + exit_))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s at bfloat16, or None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(device_name: str) -> float | None:
    """Dense bfloat16 peak in FLOP/s of a device by its name; None if its name is not in the table as whole words."""
    matches = (tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", device_name))
    return next(matches, None)
