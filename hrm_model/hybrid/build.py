"""From a run's options to its model and tokenizer, new or as a checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import CheckpointError, read_json
from ..checkpoint import latest_checkpoint, load_checkpoint
from .config import HybridConfig
from .hrm_only import LONGEST_HRM, HRMOnly
from .language_model import load_language_model, load_tokenizer
from .model import HybridModel
from .tasks.collate import Collator
from .training.options import HybridRun


@dataclass
class Built:
    """A model, and what makes its batches."""

    model: HybridModel | HRMOnly
    collator: Collator
    run: HybridRun


def build(
    run: HybridRun, device: torch.device, dtype: torch.dtype = torch.float32, config: HybridConfig | None = None
) -> Built:
    """The model that a run trains, with new weights, over the language model that it names.

    Args:
        dtype: of the language model's weights. config: of a checkpoint, which knows its language model; default what
            the run's options say.

    Raises:
        ValueError: the language model or its tokenizer cannot be read, they do not belong together, or the language
            model is another than config's.
    """
    tokenizer = load_tokenizer(run.tokenizer or run.model_name, run.pad_token)
    if run.system == "hrm":
        model, window = HRMOnly(run.shape, len(tokenizer), LONGEST_HRM, device), LONGEST_HRM
    else:
        language = load_language_model(run.model_name, device, dtype)
        if len(tokenizer) > language.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the language model {language.vocab_size}: they do "
                "not belong together; see --tokenizer"
            )
        model, window = HybridModel(language, config or run.shape), language.window
    return Built(model, Collator(tokenizer, window, device), run)


def load_run(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, language_model: str = ""
) -> Built:
    """A trained hybrid, or one of its baselines, in eval mode.

    Args:
        path: a run of train/hybrid.py, whose newest checkpoint is taken, or one of its checkpoints.
        dtype: of the language model's weights. language_model: where that is now; default where it was in training.

    Raises:
        ValueError, OSError: no such run, a damaged checkpoint, or another language model than it was trained over.
    """
    path = Path(path)
    checkpoint = latest_checkpoint(path) if (path / "checkpoints").is_dir() else path
    if checkpoint is None or not (checkpoint / "state.json").exists():
        raise CheckpointError(
            f"{path} is neither a run of train/hybrid.py with a checkpoint nor a checkpoint of one; train one: "
            "python train/hybrid.py --help"
        )
    values = read_json(checkpoint / "state.json").get("run", {})
    if values.get("stage") != "hybrid":
        raise CheckpointError(
            f"{path} is of the stage {values.get('stage')!r}, not of train/hybrid.py; for a language model of its own: "
            f"hrm generate {path}"
        )
    run = HybridRun(**values | ({"model_name": language_model} if language_model else {}))
    config = None if run.system == "hrm" else HybridConfig.from_dict(read_json(checkpoint / "config.json"))
    built = build(run, torch.device(device), dtype, config)
    load_checkpoint(checkpoint, built.model, restore_rng=False)
    built.model.eval()
    return built
