"""A run of train/hybrid.py: the loop of every stage with another model, other data and other lines in its log."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from ...checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from ...depth_statistics import DepthStatistics
from ...halting import Exploration, Price
from ...training.clock import Clock, duration
from ...training.head import HeadTraining
from ...training.loop import Training
from ...training.optim import build_optimizer
from ..build import build
from ..tasks import Mixture
from .evaluation import HybridEvaluation
from .options import HybridRun
from .step import HybridData, HybridStep, HybridStepResult

EVAL_CSV = "eval.csv"
FITTED = 1024
"""Training examples that pooling and injector are set by before the first step."""


class HybridTraining(Training):
    """A run of the hybrid or of a baseline. Everything that can be wrong with its inputs is raised by the constructor.

    Raises:
        ValueError, OSError: the message names the option, what was found and the remedy.
    """

    run: HybridRun

    def __init__(self, run: HybridRun):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("train/hybrid.py runs in one process; start it without torchrun")
        super().__init__(run)

    def _assemble(self, shape: dict[str, Any] | None) -> None:
        run = self.run
        built = build(run, self.device, self.dtype)
        self.model, self.collator = built.model, built.collator
        if run.init_from and self.checkpoint is None:
            found = (
                latest_checkpoint(run.init_from) if (Path(run.init_from) / "checkpoints").exists() else run.init_from
            )
            load_checkpoint(found or run.init_from, self.model, restore_rng=False)
        self.mixture = Mixture(run.task_names, run.seed, run.eval_n)
        if run.system == "hybrid" and not run.init_from and self.checkpoint is None:
            examples = self.mixture.training(range(FITTED))
            self.model.fit(self.collator(examples[i : i + 64]) for i in range(0, len(examples), 64))
        for example in self.mixture.test:
            self.collator([example])  # raises where one does not fit
        self.data = HybridData(run, self.mixture, self.collator)
        self.price, self.average = Price(run.act_penalty), None
        self.exploration = Exploration(run.seed, max(1, run.segments), 0.0, 0)
        self.head = HeadTraining(self.model.controller, "policy", self.price, "row") if run.use_act else None
        self.optimizer = build_optimizer(self.model, run)
        self.train_step = HybridStep(run, self.model, self.data, self.optimizer, self.head, self.dtype)
        self.evaluation = HybridEvaluation(run, self.model, self.mixture, self.collator, self.dtype)

    def _data_summary(self) -> list[dict[str, Any]]:
        return [
            {"task": name, "fingerprint": mark}
            for name, mark in zip(self.mixture.tasks, self.data.fingerprints, strict=True)
        ]

    def _log(self, recent: list[HybridStepResult], clock: Clock) -> None:
        run, newest = self.run, recent[-1]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        by_segment = [mean(column) for column in zip(*(r.segment_losses for r in recent), strict=True)]
        tokens_per_s, _ = clock.rates()
        record = {
            "kind": "train",
            "step": self.step,
            "loss": mean([r.loss for r in recent]),
            "segment_losses": {str(s): x for s, x in enumerate(by_segment, 1)},
            "lr": newest.lr,
            "grad_norm": newest.grad_norm,
            "z_norm": mean([r.z_norm for r in recent]),
            "tokens_per_s": tokens_per_s,
        }
        if newest.head is not None:
            record |= newest.head.record()
        self.metrics.write(record)
        self.trackers.log(self.step, record)
        self._say(
            f"step {self.step:>{len(str(run.steps))}}/{run.steps}  loss {record['loss']:.4f} by segment "
            + " ".join(f"{x:.4f}" for x in by_segment)
            + f"  |z_H| {record['z_norm']:.2f}  lr {newest.lr:.2e}  grad norm {newest.grad_norm:.3f}  "
            + (f"q loss {newest.head.loss:.4f} segments {newest.head.depths().mean:.2f}  " if newest.head else "")
            + f"{tokens_per_s:,.0f} tok/s  left {duration(clock.remaining(self.step, run.steps))}"
        )
        every = run.log_samples_every
        if every and self.step // every > (self.step - len(recent)) // every:
            with clock.paused():
                for line in self.evaluation.spot_checks():
                    self._say(f"  {line}")

    def _report(self, record: dict[str, Any], depths: DepthStatistics) -> str:
        of_tasks = "  ".join(f"{name}: {x:.3f}" for name, x in record["accuracy_by_task"].items())
        lines = [
            f"accuracy {record['accuracy']:.3f} of {self.run.eval_n} held-out examples at "
            f"{record['mean_segments']:.2f} segments; {of_tasks}",
            "val loss by segment: " + "  ".join(f"{s}: {x:.4f}" for s, x in record["loss_by_segment"].items()),
        ]
        if "accuracy_deep" in record:
            lines.append(f"accuracy {record['accuracy_deep']:.3f} with up to {self.run.eval_segments} segments")
        return "\n".join("  " + line for line in lines)

    def _draw(self) -> None:
        """The evaluations as eval.csv, and all as a picture."""
        evals = [r for r in self.metrics.records if r["kind"] == "eval"]
        columns = ["step", "accuracy", "accuracy_deep", "val_loss", "mean_segments"]
        temporary = self.out / (EVAL_CSV + ".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            tasks = list(self.mixture.tasks)
            rows = csv.writer(file)
            rows.writerow([*columns, *tasks])
            for r in evals:
                rows.writerow(
                    [*(r.get(name, "") for name in columns), *(r["accuracy_by_task"].get(t, "") for t in tasks)]
                )
        temporary.replace(self.out / EVAL_CSV)
        super()._draw()

    def _draw_picture(self, path: Path, title: str) -> None:
        from .picture import draw_run

        draw_run(self.metrics.records, path, title)

    def _print_header(self) -> None:
        run, model = self.run, self.model
        if run.system == "hrm":
            what = "no language model"
        else:
            language = model.language
            frozen = sum(p.numel() for p in language.model.parameters() if not p.requires_grad)
            what = f"{run.model_name} ({language.family} family, {frozen:,} frozen parameters)"
        self._say(
            f"model   {run.system}: {model.num_parameters():,} trained parameters, {what}\n"
            f"data    {', '.join(self.mixture.tasks)}; {run.eval_n} held-out examples\n"
            f"run     {run.steps} steps of {run.batch_size * run.accumulation} examples, {run.segments} segments, "
            f"in {self.out}\n"
            f"device  {self.device}, {str(self.dtype).removeprefix('torch.')}\n"
            f"kernels {self.kernels}"
        )

    def _print_summary(self) -> None:
        last = next((r for r in reversed(self.metrics.records) if r["kind"] == "eval"), None)
        if last:
            self._say(f"done: accuracy {last['accuracy']:.3f}, val loss {last['val_loss']:.4f}")
        self._say(
            f"checkpoint {self.saved}\nbest       {best_checkpoint(self.out)}\n"
            f"evaluation {self.out / EVAL_CSV}\nmetrics    {self.out / 'metrics.jsonl'}"
        )
