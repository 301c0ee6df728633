"""Named tensors of a model, an optimizer and torch's random states, to and from safetensors files.

An optimizer's state is stored under parameter names, not positions, so it survives a change in the order
of parameters:

    state/<parameter>/<slot>    e.g. state/wte.weight/exp_avg
    rng/cpu, rng/cuda.<index>   torch's generators
    metadata "optimizer"        JSON: class, parameter names and hyper-parameters of each group, slots
    that are numbers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .atomic import CheckpointError

TIED = ("wte.weight", "lm_head.weight")
# How an optimizer computes, not what: the live one's own choice stays.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile and data parallelism, which put prefixes on its keys."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def to_store(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """CPU tensors fit for safetensors: contiguous, each with memory of its own; floating ones as `dtype`."""
    result: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU, backed by the file) and metadata of a safetensors file.

    Raises:
        CheckpointError: no such file, or truncated or otherwise not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}; copy or download it again"
        ) from error


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Compare a file's tensors with a state dict.

    Raises:
        CheckpointError: one message with every missing, unexpected and mis-shaped key, eight of each by name.
    """
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"{len(missing)} missing: {some(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        faults.append(f"{len(unexpected)} unexpected: {some(unexpected)}")
    misshaped = [
        f"{name} (file {list(found[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if misshaped:
        faults.append(f"{len(misshaped)} of another shape: {some(misshaped)}")
    if faults:
        raise CheckpointError(
            f"{path} does not fit the model of its config:\n  " + "\n  ".join(faults) + "\nload it with its own config"
        )


def complete_tied(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Let one key of the tied pair serve both.

    Raises:
        CheckpointError: both are there and differ.
    """
    pair = [tensors[name] for name in TIED if name in tensors]
    if len(pair) == 1:
        return tensors | dict.fromkeys(TIED, pair[0])
    if len(pair) == 2 and not _same(*pair):
        raise CheckpointError(
            f"{path}: {' and '.join(TIED)} differ, but the config ties them; set tie_embeddings to false in the config"
        )
    return tensors


@torch.no_grad()
def copy_into(
    state_dict: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    spread: Callable[[Tensor, Tensor], Tensor] = lambda value, target: value,
) -> None:
    """Overwrite a state dict's tensors in place; `spread` cuts a whole tensor as its target is cut."""
    for name, target in state_dict.items():
        target.copy_(spread(tensors[name], target))


def some(names: Iterable[str]) -> str:
    """The first eight names and how many more there are."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def plain(value: Any, where: str) -> Any:
    """`value` as JSON holds it: one-element tensors and arrays become numbers, tuples lists.

    Raises:
        ValueError: it has no such form; names `where` and the type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if hasattr(value, "item"):
        try:
            return value.item()
        except (ValueError, RuntimeError):
            pass
    raise ValueError(
        f"{where} is of type {type(value).__name__}, which JSON cannot hold; store numbers, strings, lists or dicts"
    )


@dataclass
class SavedOptimizer:
    """Content of an optimizer.safetensors."""

    path: Path
    kind: str | None
    """Class of the optimizer; None if the checkpoint was written without one."""
    groups: list[dict[str, Any]]
    """Per group: "params", its parameter names, and its hyper-parameters."""
    slots: dict[str, dict[str, Any]]
    """parameter name -> slot -> tensor or number."""
    rng: dict[str, Tensor]
    """"cpu" or "cuda.<index>" -> generator state, uint8."""


def pack_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of `optimizer` (None: of no optimizer) and of torch's random states.

    Raises:
        ValueError: it holds a parameter that `model` does not have, or a hyper-parameter that is no plain
            value.
    """
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            tensors[f"rng/cuda.{index}"] = torch.cuda.get_rng_state(index)
    if optimizer is None:
        return tensors, {}
    groups, numbers = [], {}
    for group, names in zip(optimizer.param_groups, _group_names(model, optimizer), strict=True):
        options = {key: plain(value, f"optimizer {key}") for key, value in group.items() if key != "params"}
        groups.append(options | {"params": names})
        for name, parameter in zip(names, group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state/{name}/{slot}"] = value
                else:
                    numbers.setdefault(name, {})[slot] = plain(value, f"optimizer state {slot} of {name}")
    content = {"kind": type(optimizer).__name__, "groups": groups, "numbers": numbers}
    return tensors, {"optimizer": json.dumps(content)}


def unpack_optimizer(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> SavedOptimizer:
    """Undo pack_optimizer(); `path` is for messages.

    Raises:
        CheckpointError: the content is of another kind.
    """
    try:
        content = json.loads(metadata.get("optimizer", '{"kind": null, "groups": [], "numbers": {}}'))
        slots: dict[str, dict[str, Any]] = {name: dict(values) for name, values in content["numbers"].items()}
        rng = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "rng":
                rng[rest] = tensor.clone()
            else:
                name, _, slot = rest.rpartition("/")
                slots.setdefault(name, {})[slot] = tensor
        return SavedOptimizer(path, content["kind"], content["groups"], slots, rng)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no optimizer state of ours ({error!r}); use another checkpoint") from error


def check_optimizer(saved: SavedOptimizer, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that apply_optimizer() can do all of its work.

    Raises:
        CheckpointError: another class of optimizer, other groups, or a state tensor of another shape.
    """
    if saved.kind is None:
        raise CheckpointError(f"{saved.path} was written without an optimizer; load it with optimizer=None")
    if saved.kind != type(optimizer).__name__:
        raise CheckpointError(
            f"{saved.path} is the state of {saved.kind}, not of {type(optimizer).__name__}; use the same optimizer"
        )
    groups = _group_names(model, optimizer)
    if len(groups) != len(saved.groups):
        raise CheckpointError(
            f"{saved.path} has {len(saved.groups)} parameter groups, the optimizer {len(groups)}; group them alike"
        )
    for index, (names, group) in enumerate(zip(groups, saved.groups, strict=True)):
        if other := sorted(set(names) ^ set(group["params"])):
            raise CheckpointError(
                f"{saved.path}: group {index} has other parameters than the optimizer's: {some(other)}; "
                "group them alike"
            )
    parameters = dict(model.named_parameters())
    for name, slots in saved.slots.items():
        for slot, value in slots.items():
            if slot.startswith("exp_avg") and value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{saved.path}: {slot} of {name} has shape {list(value.shape)}, the parameter "
                    f"{list(parameters[name].shape)}; use a checkpoint of this model"
                )


@torch.no_grad()
def apply_optimizer(
    saved: SavedOptimizer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spread: Callable[[Tensor, Tensor], Tensor] = lambda value, target: value,
) -> None:
    """Give `optimizer` the saved state and hyper-parameters; foreach, fused and the like stay its own. `spread` as in
    copy_into()."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for group, stored in zip(optimizer.param_groups, saved.groups, strict=True):
        for key, value in stored.items():
            if key == "params" or key in _IMPLEMENTATION:
                continue
            current = group.get(key)
            if isinstance(current, Tensor):
                current.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(current, tuple) else value
        # torch keeps the step counter on the CPU unless the update itself runs on the device.
        step_on_device = group.get("capturable") or group.get("fused")
        for name in stored["params"]:
            parameter = parameters[name]
            for slot, value in saved.slots.get(name, {}).items():
                if isinstance(value, Tensor):
                    on_cpu = slot == "step" and not step_on_device
                    value = value.clone() if on_cpu else value.to(parameter.device, copy=True)
                    if value.shape == parameter.shape:
                        value = spread(value, parameter)
                optimizer.state[parameter][slot] = value


def restore_random_states(saved: SavedOptimizer) -> None:
    """Set torch's CPU generator and those of the CUDA devices that are here.

    Raises:
        CheckpointError: this torch does not take the state.
    """
    try:
        torch.set_rng_state(saved.rng["cpu"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in saved.rng:
                torch.cuda.set_rng_state(saved.rng[f"cuda.{index}"], index)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{saved.path}: torch {torch.__version__} does not take its random state ({error}); use restore_rng=False"
        ) from error


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {list(parameter.shape)} that the model does "
                    "not have; make the optimizer from this model's parameters"
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _same(a: Tensor, b: Tensor) -> bool:
    # equal_nan: a diverged model is broken in another way, and loads.
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
