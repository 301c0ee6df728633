"""Reads the .pt files that the published training code wrote, without running anything that is in them.

A .pt file is a zip archive with a pickle, and a pickle can call any function it names.
torch.load(weights_only=True) calls only what it knows, but then refuses the published files, whose config
is an object of a class that exists in their repository alone. So every name it does not know is bound to
an inert stand-in that keeps what it is given and does nothing. Names that have no place in a checkpoint
(os.system, exec) are refused outright.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import CheckpointError, read_json
from .config import HRMConfig
from .tensors import some

CONFIG_KEYS = ("config", "hrm_config", "model_config", "cosmicconf")
WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
_PREFIXES = ("_orig_mod.", "module.")

# A stand-in would render these harmless too; a file that asks for them is still not one to trust.
_REFUSED_MODULES = frozenset(
    # commands and cPickle: what subprocess and pickle are called in the pickle protocol that torch writes.
    "os posix nt sys subprocess commands shutil socket pty runpy importlib ctypes pickle cPickle _pickle marshal "
    "webbrowser".split()
)
_REFUSED_FUNCTIONS = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__", "io", "_io")
    for name in "eval exec compile execfile __import__ open input breakpoint open_code FileIO".split()
)


class Inert:
    """Stands in for an object of an unknown class: holds its attributes and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        # (dict, slots) is how pickle stores a class with __slots__.
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


def read_published(path: str | Path) -> tuple[HRMConfig, dict[str, Tensor]]:
    """Config and state dict of a published .pt file; the tensors are on the CPU, backed by the file.

    The config is found under config, hrm_config, model_config or cosmicconf (an object of any class, or a
    dict), else in a config.json beside the file; the weights under model_state_dict, model or state_dict,
    or the file is a state dict itself. Key prefixes _orig_mod. and module. are taken off. Attributes of
    the config that HRMConfig does not know are left out with a warning.

    Raises:
        CheckpointError: not such a file, names a function that runs code, no config, no weights, bad values.
    """
    path = Path(path)
    content = _load_inert(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds an object of type {_type_name(content)}, not a dict; "
            f"expected weights under {', '.join(WEIGHT_KEYS)}, or a state dict"
        )
    return _config(content, path), _weights(content, path)


def write_published(config: HRMConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """A .pt file as read_published() reads it: the config's fields under config, weights under model_state_dict; no
    class but torch's own is named in it."""
    torch.save({"config": dataclasses.asdict(config), "model_state_dict": dict(tensors)}, path)


def _load_inert(path: Path) -> Any:
    advice = "save it again with torch.save(), its default protocol, and weights as a state dict"
    try:
        unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # damaged files raise anything
        raise CheckpointError(f"{path} is no .pt file that can be read ({_first_line(error)}); {advice}") from error
    if refused := [name for name in unknown if _is_refused(name)]:
        raise CheckpointError(
            f"{path} names {some(refused)}, which can run commands and has no place in a checkpoint. "
            "Nothing of it was run; get the file from its authors again"
        )
    try:
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]):
            # mmap: the optimizer's state, two thirds of a training file, is not read from disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read without running code in it ({_first_line(error)}); {advice}"
        ) from error


def _is_refused(name: str) -> bool:
    return name.partition(".")[0] in _REFUSED_MODULES or name in _REFUSED_FUNCTIONS


def _stand_in(name: str) -> Any:
    if name == "collections.defaultdict":
        return _plain_dict  # its items are set one by one, which torch allows on real dicts only
    module, _, attribute = name.rpartition(".")
    return type(attribute, (Inert,), {"__module__": module})


def _plain_dict(*_: Any) -> dict:
    return {}


def _config(content: Mapping[str, Any], path: Path) -> HRMConfig:
    for key in CONFIG_KEYS:
        if key in content:
            fields = _attributes(content[key])
            # Some of their stages keep the run's settings under the same name; a model's config has a width.
            if fields is not None and "n_embd" in fields:
                return _config_from(fields, f"{path} ({key})", strict=False)
    beside = path.with_name("config.json")
    if beside.exists():
        return _config_from(read_json(beside), str(beside), strict=True)
    present = ", ".join(key for key in CONFIG_KEYS if key in content)
    found = f"{present} has no n_embd" if present else f"there is none of {', '.join(CONFIG_KEYS)}"
    raise CheckpointError(f"{path} has no config ({found}); put the model's config.json beside it, as {beside}")


def _attributes(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Inert) or dataclasses.is_dataclass(value):
        return {key: item for key, item in vars(value).items() if not str(key).startswith("_")}
    return None


def _config_from(fields: dict[str, Any], source: str, strict: bool) -> HRMConfig:
    if not strict:
        known = HRMConfig().to_dict().keys() | {"tie_word_embeddings"}
        if ignored := sorted(str(key) for key in fields.keys() - known):
            warnings.warn(
                f"{source}: ignored {len(ignored)} config attributes unknown to HRMConfig: {some(ignored)}",
                stacklevel=5,
            )
        fields = {key: _plain(value) for key, value in fields.items() if key in known}
        if opaque := [key for key, value in fields.items() if isinstance(value, Inert)]:
            raise CheckpointError(
                f"{source}: {opaque[0]} is an object of type {_type_name(fields[opaque[0]])}, not a plain "
                "value; put a config.json beside the file and remove the config from it"
            )
    try:
        return HRMConfig.from_dict(fields)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _weights(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    weights = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), Mapping)), None)
    if weights is None:
        weights = content
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path} has no weights: there is no dict of tensors under {', '.join(WEIGHT_KEYS)}, and the "
                f"file is not one; its keys: {some(str(key) for key in content)}"
            )
    result: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: weight {key!r} is of type {_type_name(value)}, not a tensor")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise CheckpointError(f"{path}: weight {key!r} is {value.dtype}, {value.layout}, not dense floating point")
        name = _strip(str(key))
        if name in result:
            raise CheckpointError(f"{path}: {name} is there twice, with and without {' or '.join(_PREFIXES)}")
        result[name] = value
    return result


def _strip(key: str) -> str:
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
