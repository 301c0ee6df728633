"""The command line that all stages share: flags, the run they ask for, errors on one line, exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import Training

DEFAULT_TEXT = "data/stdlib"
DEFAULT_TURNS = "data/stdlib-turns"
DEFAULT_PAIRS = "data/stdlib-pairs"
DEFAULT_IDENTITY = "data/identity"
IDENTITY_SHARE = 0.4
"""Of calibration's rows, as published; the others are conversations."""


def stage_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that the stage has; those that are not given leave no trace."""
    from .flags import add_flags
    from .recipes import TrainConfig

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fused = {"nargs": "?", "const": "auto", "metavar": "auto|require"}
    without = TrainConfig.NOT_FOR["text" if stage == "pretrain" else "chat"]
    if stage != "calibrate":
        without = without | {"max_rise"}
    add_flags(parser, TrainConfig, special={"fused": fused}, without=without)
    return parser


def build(given: dict[str, Any], stage: str = "pretrain", make_data: Callable[[], list[str]] | None = None) -> Training:
    """The run that the flags ask for, its default data prepared if none is named.

    Args:
        given: flags by name. make_data: prepares other data than the default and returns its paths.

    Raises:
        ValueError, OSError: something about the options, the data or the directory is wrong.
    """
    import torch

    from ..atomic import read_json
    from .distributed import join
    from .loop import Training
    from .recipes import TrainConfig, default_start, stage_before

    recipe = given.pop("recipe", None) or ("base" if torch.cuda.is_available() else "tiny")
    options = TrainConfig.of_recipe(recipe, stage, **given)
    shape = read_json(Path(options.config)) if options.config else None
    if options.is_chat and not options.init_from:
        options.init_from = default_start(stage, recipe)
        # a run that is resumed has its own weights
        resumes = options.resume == "auto" and (Path(options.out) / "checkpoints").exists()
        if not resumes and not Path(options.init_from).exists():
            before = stage_before(stage)
            raise ValueError(
                f"train/{stage}.py goes on from a model, by default {options.init_from}, which does not exist; first "
                f"run python train/{before}.py --recipe {recipe}, or give another model with --init-from"
            )
    if not options.data:
        make = make_data or (lambda: default_data(stage))
        options.data = join(options.timeout).first(make)
    if stage == "calibrate":
        if len(options.data) != 2:
            raise ValueError(
                f"calibration takes two datasets, --data IDENTITY CONVERSATIONS, got {len(options.data)}: "
                f"{' '.join(options.data)}"
            )
        options.data_weights = options.data_weights or [IDENTITY_SHARE, 1 - IDENTITY_SHARE]
    return Training(options, shape)


_DEFAULT_DATA = {
    "pretrain": [DEFAULT_TEXT],
    "converse": [DEFAULT_TURNS],
    "instruct": [DEFAULT_PAIRS],
    "identity": [DEFAULT_IDENTITY],
    "calibrate": [DEFAULT_IDENTITY, DEFAULT_TURNS],
}


def default_data(stage: str) -> list[str]:
    """The paths of a stage's default datasets; what is missing of them is made. Raises ValueError or OSError."""
    for path in _DEFAULT_DATA[stage]:
        _ensure(path)
    return list(_DEFAULT_DATA[stage])


def _ensure(path: str) -> None:
    """Make a default dataset where there is none."""
    if path == DEFAULT_TEXT:
        from .prepare import ensure_default_dataset

        ensure_default_dataset(path)
    elif path in (DEFAULT_TURNS, DEFAULT_PAIRS):
        from .chat_prepare import ensure_default_chat

        ensure_default_chat(path, Path(path).name)
    else:
        from .identity import ensure_default_identity

        ensure_default_identity(path)


def run(given: dict[str, Any], stage: str = "pretrain", make_data: Callable[[], list[str]] | None = None) -> int:
    """Build the run and train; returns the process's exit status, an error being one line."""
    return run_built(lambda: build(given, stage, make_data), stage)


def run_built(make: Callable[[], Training], stage: str) -> int:
    """Train what `make` makes; returns the process's exit status, an error being one line."""
    from .distributed import leave

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sampled character that the terminal lacks must not end a run
    training = None
    try:
        training = make()
        return training()
    except KeyboardInterrupt:  # outside of the training loop, which ends in its own way
        when = "before training began" if training is None else "before or after training"
        print(f"\nstopped {when}; nothing was lost", file=sys.stderr)
        return 130
    except Exception as error:
        message = explained(error, stage)
        if message is None:  # a fault of ours: its traceback is what helps
            raise
        where = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        print(f"error: {where}{message}", file=sys.stderr)
        return 1
    finally:
        training = None  # DistributedDataParallel goes before the process group: see leave()
        leave()


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
"""Of torch on GPUs and CPUs, of the system, of cuBLAS and cuDNN, in lower case."""


def explained(error: Exception, stage: str) -> str | None:
    """What to say of an error that has its cause outside this code; None of any other."""
    import torch

    from hrm_kernels import BackendError

    from ..ranks import OtherRankError
    from .step import DataError, NotFiniteError

    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        if stage in ("hybrid", "continual"):
            return (
                f"out of memory ({text.splitlines()[0]}); start anew with a lower --batch-size and --accumulation "
                "raised in proportion, or with --dtype bfloat16"
            )
        smaller = "a lower --batch-size and --accumulation raised in proportion" if stage == "pretrain" else ""
        return (
            f"out of memory ({text.splitlines()[0]}); go on with --resume auto and "
            f"{smaller + ', or ' if smaller else ''}--recompute, or --parallel fsdp under torchrun; or start anew with "
            f"--dtype bfloat16{'' if smaller else ' or a lower --tokens-per-batch'}"
        )
    # CheckpointError is a ValueError
    if isinstance(error, (ValueError, OSError, BackendError, OtherRankError, DataError, NotFiniteError)):
        return text
    if isinstance(error, RuntimeError) and (isinstance(error, torch.distributed.DistError) or "gloo" in text.lower()):
        return (
            f"lost the other processes ({text.splitlines()[0]}); one of them died or was stalled for longer than "
            "--timeout; the same command with --resume auto goes on from the last checkpoint"
        )
    return None
