"""Quantised weights to and from plain tensors, as safetensors files hold them.

    NAME.q      int8 or float8_e4m3fn [N, K]; int4 as uint8 [N, K / 2], of each pair the first in the low half, plus 8
    NAME.scale  float32 [N, 1], for int4 [N, K / group]; for float8 with rounded activations [1, 1]
    NAME.zero   int4: int8 [N, K / group]
    NAME        what is bfloat16 or float16, and what is left alone: float32

The layout is ours, not torchao's, so that a file outlives its classes. Of a tied pair lm_head.weight is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .atomic import CheckpointError
from .quantization import HALF, Quantization, check_machine, torchao_tensor
from .tensors import TIED, check_fit, copy_into

FORMAT = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


def to_plain(model: nn.Module) -> dict[str, Tensor]:
    """A quantised model's state dict in plain tensors."""
    how, plain = model.quantization, {}
    for name, tensor in _once(model):
        kind = how.kind_of(name)
        if kind not in FORMAT:
            plain[name] = tensor
            continue
        plain[f"{name}.q"] = _pack(tensor.qdata) if kind == "int4" else tensor.qdata
        plain[f"{name}.scale"] = tensor.scale
        if kind == "int4":
            plain[f"{name}.zero"] = tensor.zero_point
    return plain


def from_plain(
    model: nn.Module,
    how: Quantization,
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give `model`, of initial weights, what to_plain() gave; what is not narrow computes in `dtype`. It is still on
    the CPU, and bound for `device`.

    Raises:
        CheckpointError: other tensors than the config's model has, or of other shapes or types.
        ValueError: torchao is not installed, or the machine lacks the quantisation.
    """
    check_machine(how, device)
    expected = _expected(model, how)
    check_fit(expected, tensors, path)
    if wrong := [name for name, t in expected.items() if tensors[name].dtype != t.dtype]:
        found, wanted = tensors[wrong[0]].dtype, expected[wrong[0]].dtype
        raise CheckpointError(f"{path}: {wrong[0]} is {found}, its config wants {wanted}; quantise the model again")
    plain = {}
    for name, tensor in list(_once(model)):
        kind = how.kind_of(name)
        if kind == "float32":
            plain[name] = tensor
            continue
        if kind in HALF:
            weight = tensors[name].clone()
        else:
            parts = {part: tensors[f"{name}.{part}"].clone() for part in _parts(kind)}
            parts["q"] = _unpack(parts["q"]) if kind == "int4" else parts["q"]
            weight = torchao_tensor(parts, kind, how.dynamic and name not in TIED, how.group_size)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.wte.weight
    for name, parameter in model.named_parameters():
        if name in plain and "q_head" not in name:
            parameter.data = parameter.data.to(dtype)
    state = model.state_dict()
    copy_into({name: state[name] for name in plain}, tensors)
    model.requires_grad_(False)
    model.quantization = how


def _once(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_embeddings:
            yield name, tensor


def _parts(kind: str) -> tuple[str, ...]:
    return ("q", "scale", "zero") if kind == "int4" else ("q", "scale")


def _expected(model: nn.Module, how: Quantization) -> dict[str, Tensor]:
    """What a file of it holds: empty tensors of the right shapes and types."""
    found = {}
    for name, tensor in _once(model):
        kind = how.kind_of(name)
        if kind not in FORMAT:
            found[name] = torch.empty(tensor.shape, dtype=HALF.get(kind, torch.float32), device="meta")
            continue
        n, k = tensor.shape
        groups = k // how.group_size if kind == "int4" else 1
        scales = (1, 1) if kind == "fp8" and how.dynamic else (n, groups)
        width = k // 2 if kind == "int4" else k
        found[f"{name}.q"] = torch.empty((n, width), dtype=FORMAT[kind], device="meta")
        found[f"{name}.scale"] = torch.empty(scales, dtype=torch.float32, device="meta")
        if kind == "int4":
            found[f"{name}.zero"] = torch.empty(scales, dtype=torch.int8, device="meta")
    return found


def _pack(q: Tensor) -> Tensor:
    """[N, K] int8 of -8..7 -> [N, K / 2] uint8."""
    high, low = ((q[:, first::2] + 8).to(torch.uint8) for first in (1, 0))
    return high << 4 | low


def _unpack(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 -> [N, K] int8 of -8..7."""
    halves = torch.stack((packed & 15, packed >> 4), -1)
    return halves.flatten(1).to(torch.int8) - 8
