"""One optimizer step: explorers for the head, micro-batches for the rest, the same update on every process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..halting import Exploration
from ..keyed import DROPOUT_STREAM, keyed_words
from ..model import PUBLISHED_STEP_PENALTY, HRMForCausalLM
from ..ranks import ALONE, Ranks
from .batch import IGNORE, Batch, TrainingData
from .device import autocast
from .distributed import accumulating, gather_parameters
from .ema import WeightAverage
from .flops import exploring_flops, training_flops
from .head import HeadStep, HeadTraining
from .optim import clip_gradients
from .recipes import TrainConfig
from .schedule import gradient_window, learning_rate, set_learning_rates

MOSTLY = 0.9
"""From this share of targets on, picking their rows out costs more than decoding the others."""


class NotFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite; parameters are those before the step."""


class DataError(RuntimeError):
    """The samples of a step cannot be read; parameters are those before the step."""


@dataclass
class StepResult:
    """One optimizer step, over all processes."""

    loss: float
    """Nats per target."""
    grad_norm: float
    lr: float
    depths: Counter
    """How many rows ran 1, 2, .. steps."""
    flops: float
    head: HeadStep | None
    """None where the head has no loss, or no row explored."""
    tokens: int = 0
    """Real ones, without padding."""
    padding: int = 0


@dataclass
class TrainingStep:
    """What a step works with. Call it with the step's number, counted from 0."""

    run: TrainConfig
    model: HRMForCausalLM
    wrapped: nn.Module
    """What is called in training: the model, or what spreads it over processes."""
    data: TrainingData
    optimizer: torch.optim.Optimizer
    exploration: Exploration
    head: HeadTraining | None
    dtype: torch.dtype
    average: WeightAverage | None = None
    ranks: Ranks = ALONE
    penalty: Callable[[], None] | None = None
    """Adds the gradient of a penalty on the parameters, which the reported loss leaves out."""
    updating: bool = field(default=False, init=False)
    """Whether an update was begun and not ended: then the parameters are those of no step."""

    def __call__(self, step: int, stop: Callable[[], bool] = lambda: False) -> StepResult | None:
        """Update the parameters once; None, and nothing has happened, where `stop` held on one of the processes.

        Raises:
            NotFiniteError, DataError: on every process, before any parameter was changed.
        """
        run, model = self.run, self.model
        plan = self.data.plan(step)
        batches = self._read(step, plan, stop)
        if batches is None:
            return None
        n_targets = max(1, sum(self.data.count_targets(samples) for samples in plan))
        lr = learning_rate(step, run)
        set_learning_rates(self.optimizer, lr, run)
        self.seed_dropout(step)
        gather_parameters(model)
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        applications = model.config.hrm_H_cycles * (model.config.hrm_L_cycles + 1)
        window = gradient_window(step, run, applications)
        losses, seen = [], _Seen(model.config.hrm_max_steps)
        for number, batch in enumerate(batches):
            seen.explored(batch, self._explore(batch))
            depths, pooled = self.depths(batch, step)
            with accumulating(self.wrapped, last=number == len(batches) - 1):
                with autocast(model.device, self.dtype):
                    out = self.wrapped(
                        *(torch.from_numpy(a).to(model.device) for a in (batch.inputs, batch.targets)),
                        batch.lengths,
                        force_steps=depths,
                        pooled=pooled,
                        gradient=run.gradient,
                        gradient_steps=run.gradient_steps,
                        gradient_window=window,
                        reduction="sum",
                        z_loss=run.z_loss,
                        loss_rows=self._loss_rows(batch),
                    )
                loss = out.loss / n_targets
                # processes' gradients are averaged, and are wanted summed
                (loss * self.ranks.size).backward()
            losses.append(loss.detach())
            seen.add(batch, out)
        if self.penalty is not None:
            self.penalty()
        norm = clip_gradients(model, run.grad_clip)
        # the host waits for the device only here, and for the head
        *losses, norm = torch.stack([*losses, norm]).tolist()
        seen.finish(model.config, batches)
        numbers = self.ranks.sum([*losses, *seen.numbers()])
        losses = numbers[: len(plan)]
        self._require_finite(step, losses, norm, plan)
        head = self.head.finish(run.grad_clip) if self.head else None
        self._require_finite_head(step, head, plan)
        if self.head and head is None:  # with a gradient of 0 the optimizer's momentum would move it
            for p in model.hrm_core.q_head.parameters():
                p.grad = None
        self.updating = True
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step + 1)
        self.updating = False
        tokens, padding, flops, penalty, *histogram = numbers[len(plan) :]
        loss = sum(losses)
        if run.gradient == "published":
            loss += PUBLISHED_STEP_PENALTY * penalty / max(1, sum(histogram))
        depths = Counter({s: round(n) for s, n in enumerate(histogram, 1) if n})
        return StepResult(loss, norm, lr, depths, flops, head, round(tokens), round(padding))

    def _read(self, step: int, plan: list[np.ndarray], stop: Callable[[], bool]) -> list[Batch] | None:
        """This process's rows of each micro-batch; None where one of the processes is to stop."""
        batches, error = [], None
        try:
            for samples in plan:
                mine = self.ranks.share(samples)
                batches.append(self.data.batch(mine) if len(mine) else _NOBODY)
        except (ValueError, OSError) as problem:
            error = problem
        failed, stopped = self.ranks.sum([float(error is not None), float(stop())])
        if error is not None:
            raise DataError(f"step {step + 1}: {error}") from error
        if failed:
            raise DataError(f"step {step + 1}: another process cannot read its samples; its message says which")
        return None if stopped else batches

    def seed_dropout(self, step: int) -> None:
        """Dropout is a function of (seed, step, process), so that a resumed run goes on to the same bits."""
        words = keyed_words(self.run.seed, step, 1, DROPOUT_STREAM + 256 * self.ranks.rank)
        torch.manual_seed(int(words[0, 0] >> np.uint64(1)))

    def _explore(self, batch: Batch) -> int:
        """Run the rows that explore through all exits for the head; returns how many there were."""
        if self.head is None or not len(batch.samples):
            return 0
        rows = self.exploration.explorers(batch.samples)
        if rows.any():
            device = self.model.device
            inputs, targets = (torch.from_numpy(a[rows]).to(device) for a in (batch.inputs, batch.targets))
            lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths[rows]).to(device)
            with autocast(device, self.dtype):
                self.head.add(inputs, targets, lengths)
        return int(rows.sum())

    def depths(self, batch: Batch, step: int) -> tuple[list[int] | None, list[int] | None]:
        """(steps of each row, None or 0 where the head decides; the prefix that decides for it, None for all of it),
        pure functions of (seed, sample number)."""
        run, samples = self.run, batch.samples
        if not len(samples):
            return [1], None
        if run.driver == "fixed":
            return [run.fixed_depth] * len(samples), None
        if run.driver == "random":
            return self.exploration.random_depths(samples), None
        depths = self.exploration.depths(samples, step) if self.head else None
        if run.decisions == "row" or not self.model.config.head_is_trained or all(depths or [0]):
            return depths, None
        lengths = batch.inputs.shape[1] if batch.lengths is None else batch.lengths
        return depths, self.exploration.pooled(samples, lengths)

    def _loss_rows(self, batch: Batch) -> torch.Tensor | None:
        """Where the targets are, unless nearly everywhere."""
        rows = np.flatnonzero(batch.targets.ravel() != IGNORE)
        if not 0 < len(rows) < MOSTLY * batch.targets.size:
            return None
        return torch.from_numpy(rows).to(self.model.device)

    def _require_finite(self, step: int, losses: list[float], norm: float, plan: list[np.ndarray]) -> None:
        if np.isfinite([*losses, norm]).all():
            return
        bad = [n for loss, n in zip(losses, plan, strict=True) if not np.isfinite(loss)] or plan
        what = "the loss" if not np.isfinite(losses).all() else f"the gradient norm ({norm})"
        samples = ", ".join(f"{n.min()}..{n.max()}" for n in bad)
        raise NotFiniteError(f"step {step + 1}: {what} is not finite, in samples {samples}; no parameter was changed")

    def _require_finite_head(self, step: int, head: HeadStep | None, plan: list[np.ndarray]) -> None:
        if head is not None and not head.is_finite:
            raise NotFiniteError(
                f"step {step + 1}: the halting head's loss or gradient is not finite, with explorers among samples "
                f"{min(n.min() for n in plan)}..{max(n.max() for n in plan)}; no parameter was changed"
            )


_NOBODY = Batch(*(np.full((1, 1), i, dtype=np.int64) for i in (0, IGNORE)), None, np.empty(0, dtype=np.int64))
"""For a process without rows: a row without a target. It takes part in every exchange and adds nothing."""


class _Seen:
    """What this process's rows were like, and what computing them took."""

    def __init__(self, max_steps: int):
        self.max_steps = max_steps
        self._explorers: list[tuple[int, int]] = []
        self._executed: list[Tensor] = []
        self._row_steps: list[Tensor] = []
        self._taken: list[Tensor] = []

    def explored(self, batch: Batch, n_rows: int) -> None:
        self._explorers.append((batch.inputs.shape[1], n_rows))

    def add(self, batch: Batch, out) -> None:
        self._executed.append(out.executed_steps[: len(batch.samples)])
        self._taken.append(out.steps_taken[: len(batch.samples)])
        self._row_steps.append(out.row_steps)

    def finish(self, config, batches: list[Batch]) -> None:
        """Wait for the counts."""
        self._histogram = torch.bincount(torch.cat(self._executed), minlength=self.max_steps + 1)[1:].tolist()
        self._penalty = float(torch.cat(self._taken).sum())
        self._tokens = self._room = 0
        self._flops = 0.0
        for batch, row_steps in zip(batches, torch.stack(self._row_steps).tolist(), strict=True):
            n_rows, n_tokens = len(batch.samples), batch.inputs.shape[1]
            if not n_rows:
                continue
            self._tokens += n_rows * n_tokens if batch.lengths is None else int(batch.lengths.sum())
            self._room += n_rows * n_tokens
            self._flops += training_flops(config, n_tokens, n_rows, row_steps)
        self._flops += sum(exploring_flops(config, n_tokens, n_rows) for n_tokens, n_rows in self._explorers)

    def numbers(self) -> list[float]:
        """Tokens, padding, FLOPs, steps_taken, rows by depth."""
        return [self._tokens, self._room - self._tokens, self._flops, self._penalty, *self._histogram]
