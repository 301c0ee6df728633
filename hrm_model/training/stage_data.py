"""What a stage's datasets become: rows to train on, rows to validate with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import HRMConfig
from .batch import TrainingData, ValidationRows
from .recipes import TrainConfig
from .rows import RowSampler, validation_rows
from .sampler import Sampler, WindowBatches, validation_windows
from .shards import Dataset, open_dataset
from .validation import Validation

VERIFIED_TOKENS = 500_000_000
"""Up to this many training tokens the shards' sha256 are checked at the start, a second or two; beyond, their sizes."""


@dataclass
class StageData:
    """Open datasets of a run."""

    datasets: list[Dataset]
    training: TrainingData
    validations: list[tuple[str, Validation, float]]
    """(name, rows, their share of the validation loss): one, or one a dataset."""
    padding_share: float = 0.0
    """Of conversations: what rows of unlike length cost."""

    @property
    def fingerprints(self) -> list[str]:
        """Of each dataset's content."""
        return [d.manifest["fingerprint"] for d in self.datasets]

    def summary(self) -> str:
        """For a run's header."""
        n_train = sum(len(d.split("train")) for d in self.datasets)
        paths = ", ".join(str(d.path) for d in self.datasets)
        n_val = sum(len(v.rows.inputs) for _, v, _ in self.validations)
        if not isinstance(self.training, RowSampler):
            size = self.validations[0][1].rows.inputs.shape[1]
            return f"{paths}: {n_train:,} training tokens, {n_val} validation windows of {size}"
        rows = self.training
        return (
            f"{paths}: {rows.conversations:,} conversations, {rows.answer_tokens:,} of {n_train:,} tokens in answers, "
            f"{n_val} to validate; {self.padding_share:.1%} padding"
        )


def open_stage_data(run: TrainConfig, config: HRMConfig) -> StageData:
    """Open and check what --data names; resolves --epochs to steps in `run`.

    Raises:
        ValueError: a dataset is missing, damaged, of another kind or does not fit the model.
    """
    datasets = [open_dataset(path) for path in run.data]
    if sum(len(d.split("train")) for d in datasets) <= VERIFIED_TOKENS:
        datasets = [open_dataset(path, verify=True) for path in run.data]
    if not run.is_chat:
        sampler = Sampler(
            datasets, config.block_size, run.seed, weights=run.data_weights or None, vocab_size=config.vocab_size
        )
        windows = ValidationRows(
            *validation_windows(datasets, config.block_size, run.eval_windows, config.vocab_size), None
        )
        validations = [("", _validation(windows, datasets, config), 1.0)]
        return StageData(datasets, WindowBatches(sampler, run.batch_size, run.accumulation), validations)
    rows = RowSampler(
        datasets, config.block_size, run.seed, run.tokens_per_batch, run.accumulation, run.data_weights or None,
        config.vocab_size, run.train_on_prompt,
    )  # fmt: skip
    if run.epochs:
        run.steps = steps_of(rows, run.epochs)
    names = [Path(d.path).name for d in datasets]
    if len(set(names)) < len(names):  # each is a key in the metrics
        names = [str(d.path) for d in datasets]
    apart = [[d] for d in datasets] if run.stage == "calibrate" else [datasets]
    shares = rows.shares if run.stage == "calibrate" else [1.0]
    validations = []
    for name, group, share in zip(names, apart, shares, strict=False):
        count = max(1, run.eval_windows // len(apart))
        found = validation_rows(group, config.block_size, count, run.train_on_prompt, config.vocab_size)
        validations.append((name, _validation(found, group, config), share))
    return StageData(datasets, rows, validations, rows.padding_share(min(run.steps, 100)))


def steps_of(rows: RowSampler, epochs: float) -> int:
    """Optimizer steps in which as many rows come as `epochs` passes over all conversations have; at least 1."""
    wanted, seen, step = epochs * rows.rows_per_epoch, 0, 0
    while seen < wanted:
        seen += sum(len(samples) for samples in rows.plan(step))
        step += 1
    return max(1, step)


def _validation(rows: ValidationRows, datasets: list[Dataset], config: HRMConfig) -> Validation:
    return Validation(rows, [d.split("train") for d in datasets], config.vocab_size)
