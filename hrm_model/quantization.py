"""Quantised models: which weights are narrower than float32, and torchao's tensors that hold them.

    weights of attention and MLP    int8, a scale for each row; int4, a scale and a zero for each group of a row;
                                    fp8 (e4m3), a scale for each row; bf16, fp16
    embedding, and lm_head          int8, a scale for each token; beside bf16 and fp16 as these; or left in float32
    halting head, norms, biases,    float32: they decide how deep a row goes, or take no room
    initial states, learned positions

"dynamic" rounds what a product with a weight of attention or MLP takes, too: to 8 bits a token. Products are
hrm_kernels/quantized.py's. torchao is imported when a model is quantised or read, never before.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Linear
from .config import HRMConfig
from .tensors import TIED

KINDS = ("int8", "int4", "fp8", "bf16", "fp16")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDINGS = ("int8", "float32")
GROUP_SIZES = (16, 32, 64, 128, 256)
GROUP_SIZE = 32
FLOAT8_GPU = (8, 9)
"""Compute capability from which GPUs multiply float8 (Ada, Hopper)."""
INSTALL = 'pip install "hrm-kernels[quant]"'


@dataclass(frozen=True)
class Quantization:
    """How a model is quantised.

    Raises:
        ValueError: a combination that there is not; names the value and what there is.
    """

    to: str
    """One of KINDS."""
    dynamic: bool = False
    """Round activations to 8 bits a token too."""
    group_size: int | None = None
    """int4: numbers of a row that share a scale; default 32."""
    embedding: str | None = None
    """int8, float32, or beside bf16 and fp16 the same; default int8, or the same."""

    def __post_init__(self):
        if self.to not in KINDS:
            raise ValueError(f"there is no quantisation to {self.to!r}; there are {', '.join(KINDS)}")
        if self.dynamic and self.to in HALF:
            raise ValueError(f"--dynamic rounds activations to 8 bits, which {self.to} weights do not; leave it out")
        if self.group_size is not None and self.to != "int4":
            raise ValueError(f"--group-size {self.group_size} is for int4; {self.to} has a scale for each row")
        if self.to == "int4":
            object.__setattr__(self, "group_size", GROUP_SIZE if self.group_size is None else self.group_size)
            if self.group_size not in GROUP_SIZES:
                raise ValueError(f"--group-size {self.group_size} is none of {', '.join(map(str, GROUP_SIZES))}")
        known = (self.to, "float32") if self.to in HALF else EMBEDDINGS
        if self.embedding is None:
            object.__setattr__(self, "embedding", known[0])
        if self.embedding not in known:
            raise ValueError(f"--embedding {self.embedding!r} is none of {', '.join(known)}, beside {self.to} weights")

    @classmethod
    def from_dict(cls, values: Any) -> Quantization:
        """Of config.json's "quantization". Raises ValueError: not what to_dict gives."""
        names = {"to": str, "dynamic": bool, "group_size": (int, type(None)), "embedding": str}
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"quantization {values!r} does not have exactly {', '.join(names)}; update hrm-kernels")
        if wrong := [name for name, kind in names.items() if not isinstance(values[name], kind)]:
            raise ValueError(f"quantization's {wrong[0]} {values[wrong[0]]!r} is of the wrong type")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds under "quantization"."""
        return asdict(self)

    def describe(self) -> str:
        """In words, for people."""
        how = "activations rounded to 8 bits" if self.dynamic else "weight-only"
        group = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.to}{group}, {how}, embedding {self.embedding}, halting head float32"

    def kind_of(self, name: str) -> str:
        """The kind of the weight called `name` in a state dict; "float32" where it is left alone."""
        if name in TIED:
            return self.embedding
        return self.to if name.endswith(("_proj.weight", *_MLP)) else "float32"


_MLP = tuple(f"mlp.{name}.weight" for name in ("gate", "up", "down", "c_fc"))


def quantize(model: nn.Module, how: Quantization) -> None:
    """Quantise an HRMForCausalLM in place. It goes on in eval mode, without gradients.

    Raises:
        ValueError: it is quantised already, or a model of characters; torchao or the machine lacks this quantisation; a
            weight does not take it: not finite, over float16's range, or of a width that the group size does not
            divide.
    """
    if quantization_of(model) is not None:
        raise ValueError(f"the model is quantised already ({quantization_of(model).describe()}); take its source")
    if model.config.n_chars is not None:
        raise ValueError("the model is one of characters, whose output head only multiplies float32; leave it as it is")
    device, linears = model.device, dict(_linears(model, how))
    check_machine(how, device)
    _check_widths(model.config, how)
    for name, linear in linears.items():
        _check_weight(name, linear.weight, how.kind_of(name))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for name, linear in linears.items():
            quantize_linear(linear, how.kind_of(name), how.dynamic and name not in TIED, how.group_size)
    if model.config.tie_embeddings:
        model.wte.weight = model.lm_head.weight
    elif "wte.weight" in linears:
        model.wte.weight = linears["wte.weight"].weight
    model.quantization = how


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantised; None where it is not."""
    return getattr(model, "quantization", None)


def check_trainable(model: nn.Module, path: Any) -> None:
    """Raises ValueError where the model that came from `path` is quantised: what was rounded does not learn."""
    if (how := quantization_of(model)) is not None:
        raise ValueError(f"{path} is quantised ({how.describe()}) and cannot be trained; start from its float32 source")


def check_machine(how: Quantization, device: torch.device) -> None:
    """Raises ValueError where torchao or the machine lacks a quantisation; names which, and what would have it."""
    if how.to in HALF:
        return
    torchao()
    if how.to == "fp8" and how.dynamic:
        found = "a CPU" if device.type != "cuda" else "a GPU of compute capability {}.{}".format(*_capability(device))
        if device.type != "cuda" or _capability(device) < FLOAT8_GPU:
            raise ValueError(
                f"fp8 --dynamic multiplies float8 by float8, which needs a CUDA GPU of compute capability "
                f"{FLOAT8_GPU[0]}.{FLOAT8_GPU[1]} or later; this is {found}: leave --dynamic out or take int8 --dynamic"
            )


def torchao() -> SimpleNamespace:
    """What of torchao is used here.

    Raises:
        ValueError: it is not installed, or lacks something; names the extra to install.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # it tells of CUDA libraries that a CPU build of torch cannot load
    try:
        import torchao as package  # noqa: F401
        from torchao import quantization as q
        from torchao.quantization.quantize_ import workflows as w
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8TensorActivationQuantization as Activations,
        )

        return SimpleNamespace(
            quantize_=q.quantize_, PerRow=q.PerRow, PerTensor=q.PerTensor, PerGroup=q.PerGroup, Mapping=q.MappingType,
            int8=q.Int8WeightOnlyConfig, int8_dynamic=q.Int8DynamicActivationInt8WeightConfig,
            intx=q.IntxWeightOnlyConfig, intx_dynamic=q.Int8DynamicActivationIntxWeightConfig,
            fp8=q.Float8WeightOnlyConfig, fp8_dynamic=q.Float8DynamicActivationFloat8WeightConfig,
            Int8Tensor=w.Int8Tensor, Int8Activations=w.QuantizeTensorToInt8Kwargs,
            IntxTensor=w.IntxUnpackedToInt8Tensor, intx_asymmetric=Activations.INT8_ASYM_PER_TOKEN,
            Float8Tensor=w.Float8Tensor, Float8Activations=w.QuantizeTensorToFloat8Kwargs, Float8MM=q.Float8MMConfig,
        )  # fmt: skip
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torchao":
            raise
        if error.name == "torchao":
            raise ValueError(f"quantised models need torchao, which is not installed; {INSTALL}") from error
        raise ValueError(_lacks(error)) from error
    except (ImportError, AttributeError) as error:
        raise ValueError(_lacks(error)) from error
    finally:
        logging.disable(disabled)


def _lacks(error: Exception) -> str:
    return f"torchao {importlib.metadata.version('torchao')} lacks what this package uses ({error}); {INSTALL}"


def torchao_tensor(parts: Mapping[str, Tensor], kind: str, dynamic: bool, group_size: int | None) -> Tensor:
    """torchao's tensor of plain parts: q, scale and for int4 zero, of a weight [N, K] of this kind (int8, int4, fp8).

    q: [N, K] int8, int4 as int8 of -8..7, or float8_e4m3fn. scale: float32 [N, 1], or [N, K / group]. zero: int8, as
    scale.
    """
    ao, q, scale, wide = torchao(), parts["q"], parts["scale"], torch.float32
    if kind == "int8":
        rounding = ao.Int8Activations(granularity=ao.PerRow()) if dynamic else None
        zero = torch.zeros_like(scale, dtype=torch.int8)
        return ao.Int8Tensor(q, scale, [1, q.shape[1]], wide, zero_point=zero, act_quant_kwargs=rounding)
    if kind == "int4":
        rounding = ao.intx_asymmetric if dynamic else None
        return ao.IntxTensor(q, scale, parts["zero"], torch.int4, (1, group_size), wide, rounding)
    if not dynamic:
        return ao.Float8Tensor(q, scale, block_size=[1, q.shape[1]], dtype=wide)
    rounding, fast = ao.Float8Activations(torch.float8_e4m3fn, ao.PerTensor()), ao.Float8MM(use_fast_accum=True)
    return ao.Float8Tensor(q, scale, list(q.shape), fast, act_quant_kwargs=rounding, dtype=wide)


def _linears(model: nn.Module, how: Quantization) -> Iterator[tuple[str, nn.Linear]]:
    """The layers whose weights are to be quantised, by the weight's name in the state dict."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and how.kind_of(f"{name}.weight") != "float32":
            yield f"{name}.weight", module
    if how.embedding != "float32" and not model.config.tie_embeddings:
        holder = nn.Linear(1, 1, bias=False)  # torchao quantises layers, and this table belongs to none
        holder.weight = model.wte.weight
        yield "wte.weight", holder


def _check_weight(name: str, weight: Tensor, kind: str) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite; the checkpoint is of a run that diverged")
    largest = weight.abs().max().item()
    if kind == "fp16" and largest > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} has numbers up to {largest:.3g}, over float16's 65504; take bf16")


def quantize_linear(linear: nn.Linear, kind: str, dynamic: bool, group_size: int | None) -> None:
    """Replace a layer's weight by one of `kind`."""
    if kind in HALF:
        linear.weight = nn.Parameter(linear.weight.to(HALF[kind]), requires_grad=False)
        return
    ao = torchao()
    quiet = {} if kind == "int4" else {"set_inductor_config": False}  # else it sets options of torch.compile, for all
    if kind == "int8":
        config = ao.int8_dynamic(**quiet) if dynamic else ao.int8(**quiet)
    elif kind == "fp8":
        config = ao.fp8_dynamic(**quiet) if dynamic else ao.fp8(**quiet)
    elif dynamic:
        config = ao.intx_dynamic(torch.int4, ao.PerGroup(group_size), ao.Mapping.ASYMMETRIC)
    else:
        config = ao.intx(torch.int4, ao.PerGroup(group_size), ao.Mapping.ASYMMETRIC)
    ao.quantize_(linear, config, filter_fn=lambda module, name: True)
    if kind == "fp8":  # a row of zeros has the scale 0, and torchao 0.18 divides by it: nan
        q, empty = linear.weight.qdata, linear.weight.scale == 0
        q.view(torch.uint8).masked_fill_(empty, 0)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check_widths(config: HRMConfig, how: Quantization) -> None:
    """Raises ValueError where the group size does not divide the width of every weight that it is for."""
    if how.group_size is None:
        return
    for name, width in (("n_embd", config.n_embd), ("the MLP's width", config.hidden)):
        if width % how.group_size:
            fitting = [str(size) for size in GROUP_SIZES if not config.n_embd % size and not config.hidden % size]
            remedy = f"take --group-size {' or '.join(fitting)}" if fitting else "take int8"
            raise ValueError(f"--group-size {how.group_size} does not divide {name}, {width}; {remedy}")
