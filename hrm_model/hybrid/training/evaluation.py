"""What a run says of held-out examples: losses by segment, and the share that a verifier takes for right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...depth_statistics import DepthStatistics
from ...halting import executed_steps, halt_margin
from ...training.device import autocast
from ..hrm_only import HRMOnly
from ..model import HybridModel
from ..tasks import Example, Mixture
from ..tasks.collate import Collator
from .options import HybridRun

ROWS = 64
"""Examples that are answered together."""


@dataclass
class HybridEvaluation:
    """Answers the held-out examples and makes a record of metrics.jsonl of it."""

    run: HybridRun
    model: HybridModel | HRMOnly
    mixture: Mixture
    collator: Collator
    dtype: torch.dtype

    def __call__(self, step: int, stop: Callable[[], bool]) -> tuple[dict[str, Any], DepthStatistics] | None:
        """A record, and the segments that rows ran; None if `stop` said so in between."""
        self.model.eval()
        losses, q = self._losses(stop)
        if losses is None or stop():
            return None
        run = self.run
        shown = executed_steps(halt_margin(q)) if run.use_act else torch.full((len(losses),), losses.shape[1])
        scores, segments = self.scores(run.segments)
        by_task: dict[str, list[float]] = {}
        for example, score in zip(self.mixture.test, scores, strict=True):
            by_task.setdefault(example.task, []).append(score)
        depths = DepthStatistics.of(torch.tensor(segments).clamp(min=1).numpy(), max(1, run.segments))
        record = {
            "kind": "eval",
            "step": step,
            "val_loss": losses.gather(1, shown[:, None] - 1).mean().item(),
            "loss_by_segment": {str(s): x for s, x in enumerate(losses.mean(0).tolist(), 1)},
            "accuracy": sum(scores) / len(scores),
            "accuracy_by_task": {name: sum(found) / len(found) for name, found in by_task.items()},
            "mean_segments": depths.mean,
        }
        if run.eval_segments and not stop():
            deep, ran = self.scores(run.eval_segments)
            record |= {"accuracy_deep": sum(deep) / len(deep), "mean_segments_deep": sum(ran) / len(ran)}
        return record, depths

    def scores(self, segments: int, **options) -> tuple[list[float], list[int]]:
        """(what the verifier gives each held-out example's answer, segments run)."""
        examples = self.mixture.test
        texts, ran = self.answer(examples, segments, **options)
        return [self.mixture.score(text, example) for text, example in zip(texts, examples, strict=True)], ran

    def answer(self, examples: list[Example], segments: int, **options) -> tuple[list[str], list[int]]:
        """(answer, segments run) of each example, as --decode-* say."""
        run = self.run
        self.model.eval()
        with autocast(self.model.device, self.dtype):
            return self.model.answers(
                self.collator, [e.prompt for e in examples], run.max_new_tokens, run.sampling, segments,
                batch_size=ROWS, **options,
            )  # fmt: skip

    def spot_checks(self, n: int = 3) -> list[str]:
        """Lines that show some held-out examples, what was answered and whether it was right."""
        test = self.mixture.test
        examples = [test[i * len(test) // n] for i in range(min(n, len(test)))]
        texts, ran = self.answer(examples, self.run.eval_segments or self.run.segments)
        return [
            f"{e.prompt!r} -> {text!r} (expected {e.answer!r}, score {self.mixture.score(text, e):g}, {k} segments)"
            for e, text, k in zip(examples, texts, ran, strict=True)
        ]

    def _losses(self, stop: Callable[[], bool]):
        losses, q = [], []
        for start in range(0, len(self.mixture.test), ROWS):
            if stop():
                return None, None
            batch = self.collator(self.mixture.test[start : start + ROWS])
            with autocast(self.model.device, self.dtype):
                found = self.model.row_losses(batch, self.run.segments)
            losses.append(found[0].float().cpu())
            q.append(found[1].float().cpu())
        return torch.cat(losses), torch.cat(q)
