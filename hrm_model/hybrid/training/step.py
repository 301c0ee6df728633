"""One optimizer step of the hybrid, or of a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ...keyed import DROPOUT_STREAM, keyed_words
from ...training.device import autocast
from ...training.head import HeadStep, HeadTraining
from ...training.optim import clip_gradients
from ...training.schedule import learning_rate, set_learning_rates
from ...training.step import DataError, NotFiniteError
from ..hrm_only import HRMOnly
from ..model import HybridModel
from ..tasks import Mixture
from ..tasks.collate import AnswerBatch, Collator
from .options import HybridRun


@dataclass
class HybridStepResult:
    """What a step did."""

    loss: float
    """Nats a target, mean over segments."""
    segment_losses: list[float]
    """Nats a target after each segment."""
    z_norm: float
    """Mean norm of z_H after the last segment."""
    grad_norm: float
    lr: float
    head: HeadStep | None
    """None without --use-act."""
    tokens: int
    """Real ones, prompts included."""
    flops: float = 0.0
    """Not counted."""


class HybridData:
    """Micro-batches as a pure function of the step: sample i of a run is training example i of its tasks."""

    def __init__(self, run: HybridRun, mixture: Mixture, collator: Collator):
        self.run, self.mixture, self.collator = run, mixture, collator

    @property
    def fingerprints(self) -> list[str]:
        """What the examples are a function of."""
        return [f"{name} seed {self.run.seed}" for name in self.mixture.tasks]

    def samples(self, step: int) -> list[np.ndarray]:
        """Sample numbers of each micro-batch of optimizer step `step`, from 0."""
        size, parts = self.run.batch_size, self.run.accumulation
        return [np.arange((step * parts + i) * size, (step * parts + i + 1) * size) for i in range(parts)]

    def batches(self, step: int) -> list[AnswerBatch]:
        """The micro-batches. Raises ValueError where a row does not fit."""
        return [self.collator(self.mixture.training(samples)) for samples in self.samples(step)]


@dataclass
class HybridStep:
    """Call it with the step's number, from 0; the parameters are updated once."""

    run: HybridRun
    model: HybridModel | HRMOnly
    data: HybridData
    optimizer: torch.optim.Optimizer
    head: HeadTraining | None
    dtype: torch.dtype
    updating: bool = field(default=False, init=False)
    """Whether an update was begun and not ended."""

    def __call__(self, step: int, stop: Callable[[], bool] = lambda: False) -> HybridStepResult | None:
        """None, and nothing has happened, where `stop` held.

        Raises:
            NotFiniteError: before any parameter was changed. DataError: a row does not fit the window.
        """
        if stop():
            return None
        run, model = self.run, self.model
        batches = self._read(step)
        scale = 1 / sum(int((batch.targets >= 0).sum()) for batch in batches)
        lr = learning_rate(step, run)
        set_learning_rates(self.optimizer, lr, run)
        torch.manual_seed(int(keyed_words(run.seed, step, 1, DROPOUT_STREAM)[0, 0] >> np.uint64(1)))
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        seen = []
        for batch in batches:
            with autocast(model.device, self.dtype):
                seen.append(model.learn(batch, scale, controller=step >= run.controller_warmup))
            if self.head is not None:
                self.head.add_exits(seen[-1].exits)
        norm = float(clip_gradients(model, run.grad_clip))
        loss = sum(found.loss for found in seen)
        if not np.isfinite([loss, norm]).all():
            first, last = self.data.samples(step)[0][0], self.data.samples(step)[-1][-1]
            raise NotFiniteError(
                f"step {step + 1}: loss {loss}, gradient norm {norm} in samples {first}..{last}; no parameter "
                "was changed"
            )
        head = self.head.finish(run.grad_clip) if self.head is not None else None
        self.updating = True
        self.optimizer.step()
        self.updating = False
        return HybridStepResult(
            loss, [sum(parts) for parts in zip(*(found.segment_losses for found in seen), strict=True)],
            sum(found.z_norm for found in seen) / len(seen), norm, lr, head,
            sum(int(batch.mask.sum()) for batch in batches),
        )  # fmt: skip

    def _read(self, step: int) -> list[AnswerBatch]:
        try:
            return self.data.batches(step)
        except ValueError as error:
            raise DataError(f"step {step + 1}: {error}") from error
