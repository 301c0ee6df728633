"""What a run says of its model every now and then: validation losses, depths, rivals, a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import template
from ..depth_statistics import Costs, DepthStatistics
from ..generate import generate
from ..model import HRMForCausalLM
from ..ranks import ALONE, Ranks
from ..tokenizer import get_tokenizer
from .device import autocast
from .distributed import gathered
from .ema import WeightAverage
from .recipes import TrainConfig
from .validation import Reading, Validation


@dataclass
class Evaluation:
    """Reads the validation rows and makes a record of metrics.jsonl of it."""

    run: TrainConfig
    model: HRMForCausalLM
    validations: list[tuple[str, Validation, float]]
    dtype: torch.dtype
    average: WeightAverage | None = None
    ranks: Ranks = ALONE
    tokenizer: Any = None
    """Of the samples; None is GPT-2's."""

    def __post_init__(self):
        largest, vocab_size = max(self._prompt_ids()), self.model.config.vocab_size
        if self.run.sample_tokens and largest >= vocab_size:
            raise ValueError(
                f"--sample-prompt {self.run.sample_prompt!r} has token ids up to {largest}, the model's vocab_size "
                f"{vocab_size} allows up to {vocab_size - 1}; use another prompt, or --sample-tokens 0"
            )

    def _prompt_ids(self) -> list[int]:
        run, tokenizer = self.run, self.tokenizer or get_tokenizer()
        if run.is_chat:
            return template.prompt([{"role": "user", "content": run.sample_prompt}], tokenizer)
        return tokenizer.encode(run.sample_prompt) or [tokenizer.eot]

    @property
    def own_depth(self) -> int | None:
        """Steps at which the model is evaluated and samples: None is what its head decides."""
        run, config = self.run, self.model.config
        decides = run.trains_head or (run.driver == "head" and config.head_is_trained)
        return None if decides and not run.fixed_depth else run.fixed_depth or config.hrm_max_steps

    def __call__(self, step: int, stop: Callable[[], bool]) -> tuple[dict[str, Any], DepthStatistics] | None:
        """A record, and the depths; None if `stop` said so in between. All processes have to call it."""
        with gathered(self.model):
            readings = self._read(stop)
        if readings is None:
            return None
        averaged = None
        if self.average is not None:
            with self.average.in_place(), gathered(self.model):
                averaged = self._read(stop)
            if averaged is None:
                return None
        return self._record(step, readings, averaged)

    def _read(self, stop: Callable[[], bool]) -> list[Reading] | None:
        readings = []
        for _, validation, _ in self.validations:
            found = validation.read(self.model, self._rows(), self._region, stop, self.ranks)
            if found is None:
                return None
            readings.append(found)
        return readings

    def _rows(self) -> int:
        """Rows that are read together."""
        run = self.run
        together = max(1, run.tokens_per_batch // self.model.config.block_size) if run.is_chat else run.batch_size
        return max(1, together // self.ranks.size)

    def _region(self):
        return autocast(self.model.device, self.dtype)

    def _record(
        self, step: int, readings: list[Reading], averaged: list[Reading] | None
    ) -> tuple[dict[str, Any], DepthStatistics]:
        own, costs = self.own_depth, Costs.of(self.model.config)
        rule = "head" if own is None else f"fixed:{own}"
        reading, validation = self._joined(readings), self.validations[0][1]
        executed = reading.executed(rule=rule)
        loss, depths = reading.loss(executed), reading.statistics(executed)
        record = {
            "kind": "eval",
            "step": step,
            "val_loss": loss,
            "bits_per_byte": validation.bits_per_byte(loss),
            "unigram": sum(v.unigram * share for _, v, share in self.validations),
            "bigram": sum(v.bigram * share for _, v, share in self.validations),
            "loss_by_depth": {str(s): loss for s, loss in enumerate(reading.by_depth().tolist(), 1)},
            "mean_steps": depths.mean,
            "dispersion": depths.dispersion,
            "applications": reading.applications(executed, costs),
            "depths": {str(s): n for s, n in enumerate(depths.histogram, 1)},
        }
        if len(readings) > 1:
            own_losses = [r.loss(r.executed(rule=rule)) for r in readings]
            record["losses"] = {name: loss for (name, _, _), loss in zip(self.validations, own_losses, strict=True)}
            del record["bits_per_byte"]
        if averaged is not None:
            mean = self._joined(averaged)
            record["ema_val_loss"] = mean.loss(mean.executed(rule=rule))
        if own is None:
            rivals = reading.rivals(executed, costs, draws=0)
            record |= {name: rival.loss for name, rival in rivals.items()}
            record["gain_correlation"] = reading.gain_correlation(executed)
        return record, depths

    def _joined(self, readings: list[Reading]) -> Reading:
        if len(readings) == 1:
            return readings[0]
        return Reading.joined(readings, [share for _, _, share in self.validations])

    def sample(self) -> str:
        """A text, or in fine-tuning an answer; "" but on the first process. All processes have to call it."""
        with gathered(self.model):
            return self._sample() if self.ranks.is_first else ""

    def _sample(self) -> str:
        run, tokenizer, ids = self.run, self.tokenizer or get_tokenizer(), self._prompt_ids()
        with self._region():
            out = generate(
                self.model,
                torch.tensor([ids], device=self.model.device),
                run.sample_tokens,
                temperature=0.8,
                top_k=50,
                seed=run.seed,
                force_steps=self.own_depth,
                tokenizer=tokenizer,
                **({"stop": template.STOP} if run.is_chat else {}),
            )
        ids = out[0].tolist()[len(ids) if run.is_chat else 0 :]
        return tokenizer.decode(i for i in ids if i != tokenizer.eot)
