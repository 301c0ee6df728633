"""Weights that are stored narrower than what is computed, and products with them.

    y = a(x) W^T + b      W = scale * (q - zero), a scale for each row or group of a row
                          a = x, or x rounded to 8 bits a token ("dynamic")

torchao's tensors are known by their `tensor_data_names` and asked to `dequantize`; torchao itself is not imported.
bfloat16 and float16 weights beside activations of another type are of the same kind: cast where they are used. A weight
is made plain once a forward pass (`shared_casts`), and where a cache decodes, once for as long as that lives
(packed.py): without AVX-512 torch multiplies integers number by number (`python bench/quantized.py` prints the times).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import cast

_HALF = (torch.bfloat16, torch.float16)


def is_quantized(w: Tensor) -> bool:
    """Whether it is one of torchao's tensors."""
    return hasattr(w, "tensor_data_names")


def is_narrow(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` has to make it plain first."""
    return is_quantized(w) or (w.dtype in _HALF and w.dtype != dtype)


def plain(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as a product in `dtype` takes it: itself, or dequantised to that type."""
    return cast(w, dtype) if is_narrow(w, dtype) else w


def rounded(x: Tensor, w: Tensor) -> Tensor:
    """a(x): x [..., K] as the weight's scheme has it; x itself unless that rounds activations.

    Symmetric (int8 weights): s = max|x| / 127.5, a(x) = s clamp(round(x / s), -128, 127).
    Asymmetric (int4): s = (max(x, 0) - min(x, 0)) / 255, z = -128 - round(min(x, 0) / s),
    a(x) = s (clamp(round(x / s) + z, -128, 127) - z). Minimum and maximum are a token's own.
    Source: torchao 0.18, choose_qparams_affine and quantize_affine, which the tests hold this against.
    """
    scheme = _rounding(w)
    if scheme is None:
        return x
    wide = x.float()
    if scheme == "symmetric":
        scale = (wide.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
        q = (wide / scale).round().clamp(-128, 127)
    else:
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        q = ((wide / scale).round() + zero).clamp(-128, 127) - zero
    return (q * scale).to(x.dtype)


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b, for an x that `rounded` has seen."""
    return F.linear(x, w if multiplies_itself(w) else plain(w, x.dtype), b)


def multiplies_itself(w: Tensor) -> bool:
    """Whether the product is torchao's own: float8 by float8, which only hardware does."""
    return is_quantized(w) and w.dtype.is_floating_point and _rounding(w) == "hardware"


def embedding(ids: Tensor, w: Tensor) -> Tensor:
    """Rows `ids` of w [V, C]: [..., C]. Of a quantised w, with a scale for each row, only these are dequantised."""
    if not is_quantized(w):
        return F.embedding(ids, w)
    return w.qdata[ids].to(w.dtype) * w.scale[ids].to(w.dtype)


def _rounding(w: Tensor) -> str | None:
    if not is_quantized(w):
        return None
    if getattr(w, "activation_quantization", None) is not None:
        return "asymmetric"
    if getattr(w, "act_quant_kwargs", None) is None:
        return None
    return "symmetric" if w.qdata.dtype == torch.int8 else "hardware"
