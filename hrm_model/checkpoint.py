"""Saves and loads models, and a training run's checkpoints.

    a model         DIR/  config.json  model.safetensors  manifest.json
    one quantised   the same: config.json says how, quantized_files.py what the tensors are
    a checkpoint    RUN/checkpoints/step-00000123/  the same, and  optimizer.safetensors  state.json, perhaps
                    ema.safetensors, an average of the weights that loads as a model, too

Directories are written whole or not at all (atomic.py), every file has its sha256 in the manifest, and
nothing that is read can run code (safetensors and JSON; published.py for the authors' .pt files). A
training run restored from a checkpoint continues to the same bits on a CPU: parameters, optimizer state,
hyper-parameters and torch's random states all come back as they were.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import (
    MANIFEST,
    CheckpointError,
    atomic_directory,
    interrupted_replacement,
    read_json,
    read_manifest,
    remove_directory,
    remove_leftovers,
    verify,
    write_error,
    write_json,
)
from .config import HRMConfig
from .model import HRMForCausalLM
from .published import read_published
from .quantization import Quantization, quantization_of
from .ranks import ALONE, OtherRankError, Ranks
from .sharded import files_of, read_whole, spread_like, write_part
from .tensors import (
    TIED,
    apply_optimizer,
    check_fit,
    check_optimizer,
    complete_tied,
    copy_into,
    nbytes,
    pack_optimizer,
    plain,
    restore_random_states,
    to_store,
    unpack_optimizer,
    unwrap,
)

__all__ = [
    "CheckpointError",
    "best_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
    "save_model",
    "verify_checkpoint",
]

CONFIG, WEIGHTS, OPTIMIZER, STATE = "config.json", "model.safetensors", "optimizer.safetensors", "state.json"
AVERAGE = "ema.safetensors"
ROLES = ("latest", "best", "main")
"""Checkpoints by name in a directory of hrm_model/continual, in the order in which they are tried."""
BIN = "pytorch_model.bin"  # what Hugging Face wrote before safetensors: a .pt file with a state dict
_STEP_NAME = re.compile(r"step-\d{8,}")
# What retention has hashed in this process: path -> its files' size, time and inode. Files are hashed
# again once these change; every load hashes regardless.
_found_intact: dict[Path, tuple] = {}


def save_model(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Write `model` to the directory `path`: config.json, model.safetensors, manifest.json.

    Both keys of a tied pair are written, so the published code loads the file strictly.

    Args:
        model: an HRMForCausalLM, or any module whose .config has to_dict(); compiled or data-parallel
            wrappers are looked through.
        path: directory to make; it appears whole or not at all.
        dtype: store floating-point weights as this type; default as they are. A quantised model's stay as they are.
        overwrite: replace an earlier save at `path`.

    Returns:
        The path.

    Raises:
        CheckpointError: `path` exists and overwrite is false, the disk is full, the path cannot be written, or
            another dtype is wanted of a quantised model.
    """
    with atomic_directory(path, overwrite, nbytes(unwrap(model).state_dict())) as directory:
        write_model(model, directory, dtype)
    return Path(path)


def write_model(model: nn.Module, directory: Path, dtype: torch.dtype | None = None) -> None:
    """config.json and model.safetensors as save_model() has them, into a directory that is there."""
    model = unwrap(model)
    config = _config_dict(model)
    if (how := quantization_of(model)) is None:
        tensors = to_store(model.state_dict(), dtype)
    else:
        if dtype is not None:
            raise CheckpointError(f"the model is quantised ({how.describe()}) and stays so; convert its float32 source")
        from .quantized_files import to_plain

        tensors = to_store(to_plain(model))
        config["quantization"] = how.to_dict()
    stored = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    if "torch_dtype" in config and stored is not None and how is None:
        config["torch_dtype"] = str(stored).removeprefix("torch.")
    write_json(directory / CONFIG, config)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[HRMForCausalLM, HRMConfig]:
    """Load a model, in eval mode, with its config.

    Args:
        path: a directory with config.json and model.safetensors, ours or Hugging Face's (verified where it has a
            manifest), the same directory's .safetensors file, a training run (its newest intact checkpoint; broken
            newer ones are skipped with a warning), or a published .pt file, of which nothing is executed.
        device: where the model goes.
        dtype: type of the parameters; default float32, whatever the file holds. Of a quantised model, of what is
            left to compute in: its narrow weights and its halting head stay as they are.

    Raises:
        CheckpointError: nothing there, damaged files, a config that is impossible or unknown, or weights
            that do not fit it; lists the keys that are missing, unexpected or of another shape.
        ValueError: the model is quantised, and torchao is not installed or the machine lacks that quantisation.
    """
    source = _resolve(Path(path))
    if source.suffix == ".safetensors":
        directory, weights = source.parent, source
        if (directory / MANIFEST).exists():
            verify(directory, only=(CONFIG, *files_of(weights.name, read_manifest(directory))))
        values = read_json(directory / CONFIG)
        how = values.pop("quantization", None)
        try:
            config = HRMConfig.from_dict(values)
            how = None if how is None else Quantization.from_dict(how)
        except ValueError as error:
            raise CheckpointError(f"{directory / CONFIG}: {error}") from error
        tensors, _ = read_whole(directory, weights.name)
    else:
        config, tensors = read_published(source)
        how = None
    # Drawing initial weights that are overwritten at once must not move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = HRMForCausalLM(config)
    if how is not None:
        from .quantized_files import from_plain

        from_plain(model, how, tensors, source, dtype or torch.float32, torch.device(device))
        return model.to(device).eval(), config
    if config.tie_embeddings:
        tensors = complete_tied(tensors, source)
    check_fit(model.state_dict(), tensors, source)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32)
    copy_into(model.state_dict(), tensors)
    return model.to(device).eval(), config


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    keep_last: int = 3,
    best: int | None = None,
    average: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write run_dir/checkpoints/step-XXXXXXXX and then delete the checkpoints that are no longer kept.

    Kept are the one just written, the newest `keep_last` intact ones and the best. A checkpoint of the
    same step is replaced. Random states are those of the calling process: the CPU's and each CUDA
    device's.

    Args:
        run_dir: directory of the run.
        step: optimizer steps done, at least 0.
        model: any module; its .config, if it has one, goes into config.json.
        optimizer: its state and hyper-parameters are kept under parameter names. None: there is none.
        state: plain JSON values and scalars (val_loss and anything else); tuples come back as lists.
        keep_last: how many of the newest to keep, at least 1.
        best: the step whose checkpoint is the best; default the lowest finite state["val_loss"], of
            equals the newest.
        average: parameters' averages by name, which become ema.safetensors.
        ranks: the processes that save together, each what it holds of tensors in shards (sharded.py); all have to see
            the directory.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: step, keep_last or state is no value that can be stored.
        CheckpointError: the disk is full or the path cannot be written; earlier checkpoints are untouched.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step {step!r} is not an integer of at least 0; pass the number of optimizer steps done")
    if not isinstance(keep_last, int) or keep_last < 1:
        raise ValueError(f"keep_last {keep_last!r} is not an integer of at least 1; with 1 only the newest is kept")
    if state.get("step", step) != step:
        raise ValueError(f"state['step'] is {state['step']!r}, but the checkpoint is of step {step}; leave it out")
    values = {key: plain(value, f"state[{key!r}]") for key, value in state.items()} | {"step": step}
    model = unwrap(model)
    weights = model.state_dict()
    optimizer_tensors, metadata = pack_optimizer(model, optimizer)
    files = {WEIGHTS: (weights, {}), OPTIMIZER: (optimizer_tensors, metadata)}
    if average is not None:
        files[AVERAGE] = ({name: average[_source_of(name, average)] for name in weights}, {})
    target = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    needed = sum(nbytes(tensors) for tensors, _ in files.values())
    with ExitStack() as stack:
        directory = ranks.first(lambda: stack.enter_context(atomic_directory(target, True, needed)))
        problem = None
        try:
            for name, (tensors, about) in files.items():
                write_part(directory, name, tensors, about, ranks)
            if ranks.is_first:
                write_json(directory / CONFIG, _config_dict(model))
                write_json(directory / STATE, values)
        except (OSError, SafetensorError) as error:
            problem = error
        if ranks.size > 1 and ranks.any(problem is not None) and problem is None:
            raise OtherRankError("another process could not write its part of a checkpoint; its message says why")
        if problem is not None:
            raise problem if ranks.is_first else write_error(problem, target, needed) from problem
        ranks.first(stack.pop_all().close)
    if ranks.is_first:
        _found_intact[target] = _signature(target)
        remove_leftovers(target.parent)
        _retain(target, keep_last, best)
    return target


def _source_of(name: str, average: Mapping[str, Tensor]) -> str:
    """The parameter that a state dict's key stands for: of a tied pair the average has one."""
    return name if name in average else TIED[1 - TIED.index(name)]


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Restore a checkpoint into `model` and `optimizer` and return its state.

    Everything is verified and compared first; on an error model, optimizer and random states are as before.

    Args:
        path: a step-XXXXXXXX directory.
        model: a module of the same config.
        optimizer: over the same named parameters in the same groups; None leaves the saved one unread.
        restore_rng: also set torch's CPU and CUDA random states.

    Raises:
        CheckpointError: damaged or missing files, another config (lists the fields with both values), or
            tensors that do not fit.
    """
    path = Path(path)
    verify_checkpoint(path)
    model = unwrap(model)
    _compare_configs(path / CONFIG, model)
    weights, _ = read_whole(path, WEIGHTS)
    check_fit(model.state_dict(), weights, path / WEIGHTS)
    saved = unpack_optimizer(path / OPTIMIZER, *read_whole(path, OPTIMIZER))
    state = read_json(path / STATE)
    if optimizer is not None:
        check_optimizer(saved, model, optimizer)
    if restore_rng:
        restore_random_states(saved)
    copy_into(model.state_dict(), weights, spread_like)
    if optimizer is not None:
        apply_optimizer(saved, model, optimizer, spread_like)
    return state


def load_average(path: str | Path, average: Mapping[str, Tensor]) -> None:
    """Put what a checkpoint has of an average into `average`, by parameter name.

    Raises:
        CheckpointError: it has none, or one of another model.
    """
    path = Path(path)
    names = files_of(AVERAGE, read_manifest(path))
    if names[0] not in read_manifest(path):
        raise CheckpointError(f"{path} has no {AVERAGE}: its run kept no average; resume without --ema")
    tensors, _ = read_whole(path, AVERAGE)
    check_fit(average, {name: tensors[name] for name in tensors if name in average}, path / AVERAGE)
    copy_into(average, tensors, spread_like)


def verify_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint or a saved model is whole and unchanged, by size and sha256 of every file.

    Raises:
        CheckpointError: what is wrong and in which file: no manifest (the save was interrupted), a file
            missing, of another size or with other bytes, JSON that cannot be read.
    """
    path = Path(path)
    there = read_manifest(path)
    required = [CONFIG, *files_of(WEIGHTS, there)]
    if _STEP_NAME.fullmatch(path.name):
        required += [*files_of(OPTIMIZER, there), STATE]
    verify(path, required)


def latest_checkpoint(run_dir: str | Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest intact checkpoint of a run, or None. What killed saves left there is cleared first.

    Args:
        run_dir: directory of the run.
        warn: called with one line for each newer checkpoint that is broken; default warnings.warn.
    """
    remove_leftovers(Path(run_dir) / "checkpoints")
    for path in _steps(run_dir):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            message = f"skipped broken checkpoint {path.name}: {error}"
            warnings.warn(message, stacklevel=2) if warn is None else warn(message)
        else:
            return path
    return None


def best_checkpoint(run_dir: str | Path) -> Path | None:
    """The intact checkpoint with the lowest finite state["val_loss"], of equals the newest, or None."""
    for path in _by_loss(_steps(run_dir)):
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        return path
    return None


def role_checkpoint(path: Path) -> Path:
    """The first intact one of latest, best and main in `path`; broken ones before it are skipped with a warning.

    Raises:
        CheckpointError: none is intact.
    """
    remove_leftovers(path)
    broken: list[str] = []
    for role in ROLES:
        if not (path / role).is_dir():
            continue
        try:
            verify_checkpoint(path / role)
        except CheckpointError as error:
            broken.append(f"{role}: {error}")
            continue
        for line in broken:
            warnings.warn(f"skipped broken checkpoint {line}", stacklevel=3)
        return path / role
    raise CheckpointError(f"{path} has no intact checkpoint" + "".join(f"\n  {line}" for line in broken))


def _resolve(path: Path) -> Path:
    """The .safetensors or .pt file that `path` stands for, which may be there in parts."""
    in_parts = path.suffix == ".safetensors" and path.parent.is_dir()
    in_parts = in_parts and files_of(path.name, (entry.name for entry in path.parent.iterdir())) != [path.name]
    if not path.exists() and not in_parts:
        former = interrupted_replacement(path)
        remedy = f"a save over it was interrupted: rename {former} to {path.name}" if former else "check the path"
        raise CheckpointError(f"{path} does not exist; {remedy}")
    if not path.is_dir():
        if path.suffix == ".safetensors" and not (path.parent / CONFIG).exists():
            raise CheckpointError(f"{path} has no {CONFIG} beside it; put the model's there")
        return path
    names = [entry.name for entry in path.iterdir()]
    if CONFIG in names and files_of(WEIGHTS, names)[0] in names:
        return path / WEIGHTS
    if CONFIG in names and BIN in names:
        return path / BIN
    if (path / "checkpoints").is_dir():
        broken: list[str] = []
        found = latest_checkpoint(path, broken.append)
        if found is None:
            raise CheckpointError(f"{path} has no intact checkpoint" + "".join(f"\n  {line}" for line in broken))
        for line in broken:
            warnings.warn(line, stacklevel=3)
        return found / WEIGHTS
    if any((path / role).is_dir() for role in ROLES):
        return role_checkpoint(path) / WEIGHTS
    others = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} is no model: it has neither {CONFIG} with {WEIGHTS} nor checkpoints/, but {others}; "
        "pass a model's directory, a run's directory or a .pt file"
    )


def _steps(run_dir: str | Path) -> list[Path]:
    """Checkpoint directories of a run, newest first, intact or not."""
    entries = (Path(run_dir) / "checkpoints").glob("step-*")
    found = [entry for entry in entries if _STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_loss(paths: list[Path]) -> Iterator[Path]:
    """Those of `paths` (newest first) with a finite val_loss, lowest first; equals stay newest first."""
    losses = []
    for path in paths:
        try:
            loss = read_json(path / STATE).get("val_loss")
        except CheckpointError:
            continue
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses.append((loss, path))
    return (path for _, path in sorted(losses, key=lambda pair: pair[0]))


def _retain(written: Path, keep_last: int, best: int | None) -> None:
    paths = _steps(written.parent.parent)
    newest = list(islice(filter(_is_intact, paths), keep_last))
    if len(newest) < keep_last:
        return  # broken ones stay too, until there are enough intact ones: they may be all there is
    if best is None:
        kept = list(islice(filter(_is_intact, _by_loss(paths)), 1))
    else:
        kept = [path for path in paths if _step_of(path) == best]
    kept.append(written)  # not among the newest when the run was taken back to an earlier step
    for path in paths[paths.index(newest[-1]) + 1 :]:
        if path not in kept:
            _found_intact.pop(path, None)
            try:
                remove_directory(path)
            except CheckpointError as error:  # the save itself succeeded: no reason to end a run
                warnings.warn(str(error), stacklevel=3)


def _is_intact(path: Path) -> bool:
    try:
        signature = _signature(path)
        if _found_intact.get(path) != signature:
            verify_checkpoint(path)
            _found_intact[path] = signature
    except (OSError, CheckpointError):
        return False
    return True


def _signature(path: Path) -> tuple:
    names = sorted([*read_manifest(path), MANIFEST])
    stats = [(path / name).stat() for name in names]
    return tuple(zip(names, ((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats), strict=True))


def _config_dict(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {} if config is None else dict(config.to_dict())


def _compare_configs(path: Path, model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None:
        return
    saved = read_json(path)
    if hasattr(config, "from_dict"):  # fields that are newer than the file take their defaults
        try:
            saved = type(config).from_dict(saved).to_dict()
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    saved, ours = (json.loads(json.dumps(values)) for values in (saved, config.to_dict()))
    differences = [
        f"{key}: checkpoint {saved.get(key, 'absent')}, model {ours.get(key, 'absent')}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key, "absent") != ours.get(key, "absent")
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another model:\n  "
            + "\n  ".join(differences)
            + "\nmake the model from the checkpoint's config"
        )
