"""A model in another form: written beside its place, read again, compared by logits, and only then put in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import CheckpointError, atomic_directory, atomic_file
from .checkpoint import load_model, write_model
from .model import HRMForCausalLM, HRMOutput
from .published import write_published
from .quantization import quantization_of
from .tensors import nbytes, to_store

ROWS, TOKENS = 8, 64
"""Of the random text that logits are compared on; at most a window."""


def check_installed() -> None:
    """Raises ValueError, with the remedy, where what Hugging Face's form needs is missing; else quietens it."""
    try:
        from . import hf  # noqa: F401
    except ImportError as error:
        raise ValueError(str(error)) from error
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of a second, and it would stand between our lines


@torch.no_grad()
def convert(
    model: HRMForCausalLM,
    path: str | Path,
    form: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    with_code: bool = False,
) -> dict[str, Any]:
    """Write `model`, a float32 one in eval mode, to `path`.

    Args:
        path: a folder to make; with form "pt" a file. form: "safetensors" (ours), "hf" (transformers'), "pt" (the
            published). dtype: of the weights that are written. overwrite: replace an earlier save at `path`.
        with_code: of "hf", carry the model's source.

    Returns:
        bytes (written), logits_off (largest difference from the source's), same_top (share of positions whose likeliest
        token is the same), same_steps (whether rows take as many steps), and of a lower dtype also
        computed_logits_off and computed_same_top, where it is computed in as well.

    Raises:
        CheckpointError: the model is quantised, `path` is in the way or cannot be written, a weight is out of the
            dtype's range, or what was written has other weights or logits than it must; then nothing is at `path` that
            was not there before.
    """
    if how := quantization_of(model):
        raise CheckpointError(f"the model is quantised ({how.describe()}) and stays so; convert its float32 source")
    config = model.config
    weights = model.state_dict()
    check_range(weights, dtype)
    ids = torch.randint(
        0, config.vocab_size, (ROWS, min(TOKENS, config.block_size)), generator=torch.Generator().manual_seed(0)
    )
    with torch.random.fork_rng(devices=[]):
        rounded = HRMForCausalLM(config).eval()
    rounded.load_state_dict({name: t.to(dtype) for name, t in weights.items()})
    source, expected = model(ids), rounded(ids)
    path, written = Path(path), nbytes(weights) * dtype.itemsize // torch.float32.itemsize
    opened = atomic_file if form == "pt" else atomic_directory
    with opened(path, overwrite, written) as place:
        if form == "pt":
            write_published(config, to_store(weights, dtype), place)
        elif form == "hf":
            from .hf.export import write_folder

            write_folder(model, place, path.name, dtype, with_code)
        else:
            write_model(model, place, dtype)
        for how, found in readings(place, ids, form):
            if not same(expected, found):
                raise CheckpointError(
                    f"{path}, read by {how}, gives logits that are off by up to "
                    f"{(expected.logits - found.logits).abs().max().item():.3g}; nothing was put there"
                )
        report = {"bytes": sum(file.stat().st_size for file in (place.iterdir() if place.is_dir() else [place]))}
        report |= _compared(source, expected)
        if dtype != torch.float32:
            found = load_model(place, dtype=dtype)[0](ids)
            report |= {f"computed_{key}": value for key, value in _compared(source, found).items()}
    return report


def readings(place: Path, ids: Tensor, form: str) -> Iterator[tuple[str, HRMOutput]]:
    """What each way of loading a written model in float32 makes of `ids`."""
    yield "load_model", load_model(place)[0](ids)
    if form == "hf":
        from .hf import CosmicFishHRMForCausalLM

        model = CosmicFishHRMForCausalLM.from_pretrained(place, dtype=torch.float32)
        yield "transformers", model(input_ids=ids)


def check_range(weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raises CheckpointError for a weight that is finite and would not be in `dtype`."""
    limit = torch.finfo(dtype).max
    for name, t in weights.items():
        most = t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0
        if most > limit:
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} has a weight of {most:.3g}, beyond {kind}'s {limit:.3g}; use bfloat16")


def same(a: HRMOutput, b: HRMOutput) -> bool:
    """Whether logits are the same bits, nan as nan (a diverged model is broken in another way), and depths the same."""
    alike = torch.allclose(a.logits, b.logits, rtol=0, atol=0, equal_nan=True)
    return alike and torch.equal(a.executed_steps, b.executed_steps)


def _compared(source: HRMOutput, found: HRMOutput) -> dict[str, Any]:
    a, b = source.logits, found.logits.float()
    return {
        "logits_off": (a - b).abs().max().item(),
        "same_top": (a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        "same_steps": bool(torch.equal(source.executed_steps, found.executed_steps)),
    }
