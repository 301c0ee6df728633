"""A training run of any stage: one class that owns it from its first sample to its last checkpoint."""

from __future__ import annotations

import gc
import operator
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..atomic import read_json, remove_leftovers
from ..checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    load_average,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from ..config import HRMConfig
from ..depth_statistics import DepthStatistics
from ..halting import Exploration, Price, price_rate
from ..model import HRMForCausalLM
from ..quantization import check_trainable
from ..ranks import Ranks
from ..sharded import in_shards
from .clock import Clock, duration
from .dashboard import draw_dashboard
from .device import choose_device, choose_dtype, choose_kernels, compile_blocks, make_deterministic
from .distributed import join, local_device, spread
from .dry_run import dry_run
from .ema import WeightAverage
from .evaluation import Evaluation
from .flops import peak_flops
from .head import HeadTraining
from .interrupt import Interrupt
from .metrics import MetricsLog, Trackers
from .optim import build_optimizer
from .provenance import add_resume, has_provenance, write_provenance
from .recipes import TrainConfig
from .reports import depth_plan, evaluation, missed_target
from .rundir import RunLock, contents, find_checkpoint, make_directory
from .stage_data import StageData, open_stage_data
from .step import DataError, NotFiniteError, StepResult, TrainingStep

EXIT_INTERRUPTED = 75
"""Exit status of a run that saved and left on Ctrl-C or SIGTERM (sysexits' EX_TEMPFAIL: try again)."""
EXIT_NOT_FINITE = 76
"""Exit status of a run whose loss or gradient stopped being a number."""


class Training:
    """A run: model, data, optimizer, log. Everything that can be wrong with its inputs is raised by the constructor.

    Started by torchrun, every process makes one; the first prints, logs and decides what there is to resume.

    Args:
        run: the resolved options. shape: content of a config.json that replaces the recipe's model.

    Raises:
        ValueError, OSError: the message names the option, what was found and the remedy.
    """

    GO_ON = "continue with --resume auto"
    ANEW = "start a new run with --init-from and another --out"
    tokenizer = None
    """Of the samples; None is GPT-2's."""

    def __init__(self, run: TrainConfig, shape: dict[str, Any] | None = None):
        self.run, self.out = run, Path(run.out)
        self.ranks: Ranks = join(run.timeout)
        self.device = local_device(choose_device(run.device))
        self.dtype = choose_dtype(run.dtype, self.device)
        self.kernels = choose_kernels(run.fused, self.device)
        if run.deterministic:
            make_deterministic()
        self._contents, self.checkpoint = self.ranks.first(self._look_at_directory)
        torch.manual_seed(run.seed)
        self._assemble(shape)
        self.step = self.saved_step = 0
        self.val_loss: float | None = None  # of the weights as they are
        self.start_loss: float | None = None  # of conversations, before the first step; where --max-rise counts from
        self.ended_early = False
        self._lock: RunLock | None = None
        if run.dry_run:
            return
        self.ranks.first(self._take_directory)
        if self.checkpoint is not None:
            self._resume(self.checkpoint)

    def _assemble(self, shape: dict[str, Any] | None) -> None:
        """Make model, data, optimizer, step and evaluation."""
        run = self.run
        self.model = self._build_model(shape)
        run.check_model(self.config)
        self.data = self._open_data()
        if run.recompute:
            self.model.recompute_activations()
        if run.compile:
            compile_blocks(self.model)
        if self.ranks.size > 1 and run.parallel == "fsdp" and run.gradient == "published":
            raise ValueError(
                "--gradient published has no --parallel fsdp: where no row of a process runs all steps, its part of "
                "the core's gradient never comes; use --parallel ddp or --gradient replay"
            )
        wrapped = spread(self.model, run.parallel, self.ranks)
        self.exploration = self._exploration()
        self.head = HeadTraining(self.model, run.halting, self.price, run.decisions) if run.trains_head else None
        self.optimizer = build_optimizer(self.model, run)
        self.average = WeightAverage(self.model, run.ema) if run.ema else None
        self.train_step = TrainingStep(
            run, self.model, wrapped, self.data.training, self.optimizer, self.exploration, self.head, self.dtype,
            self.average, self.ranks,
        )  # fmt: skip
        self.evaluation = Evaluation(
            run, self.model, self.data.validations, self.dtype, self.average, self.ranks, self.tokenizer
        )

    @property
    def config(self) -> HRMConfig:
        """The model's configuration."""
        return self.model.config

    def _build_model(self, shape: dict[str, Any] | None) -> HRMForCausalLM:
        if self.run.init_from and self.checkpoint is not None:  # a resumed run no longer needs what it began from
            shape = read_json(self.checkpoint / "config.json")
        if not self.run.init_from or self.checkpoint is not None:
            return HRMForCausalLM(self.run.model_config(shape)).to(self.device)
        loaded, config = load_model(self.run.init_from)
        check_trainable(loaded, self.run.init_from)
        if bad := [name for name, p in loaded.named_parameters() if not p.isfinite().all()]:
            raise ValueError(
                f"--init-from {self.run.init_from} has weights that are not finite, in {bad[0]} and {len(bad) - 1} "
                "other tensors; start from an earlier checkpoint"
            )
        model = HRMForCausalLM(self.run.model_config(config.to_dict()))
        model.load_state_dict(loaded.state_dict())
        return model.to(self.device)

    def _open_data(self) -> StageData:
        return open_stage_data(self.run, self.config)

    def _exploration(self) -> Exploration:
        run = self.run
        warmup = round(run.depth_warmup * run.steps) if run.driver == "head" and run.trains_head else 0
        share = run.explore if run.trains_head else 0.0
        rows = sum(len(samples) for samples in self.data.training.plan(0))
        sees = 1 - (1 - share) ** rows  # an explorer, in a step
        self.price = Price(run.step_price, run.target_steps or None, price_rate(sees * run.steps))
        return Exploration(run.seed, self.config.hrm_max_steps, share, warmup)

    def _data_summary(self) -> list[dict[str, Any]]:
        keys = ("source", "fingerprint", "tokenizer")
        return [{"path": str(d.path), **{key: d.manifest[key] for key in keys}} for d in self.data.datasets]

    def _look_at_directory(self) -> tuple[set[str], Path | None]:
        if not self.run.dry_run:
            # what a killed save moved aside comes back now: between the two looks it would be another process's doing
            remove_leftovers(self.out / "checkpoints")
        return contents(self.out), find_checkpoint(self.out, self.run.resume, self.run.overwrite)

    def _take_directory(self) -> None:
        self._lock = RunLock(self.out)
        if contents(self.out) != self._contents:
            raise ValueError(
                f"another process trained in --out {self.out} while this one started; run the command again"
            )
        if self.checkpoint is None:
            make_directory(self.out, self.run.overwrite)

    def _resume(self, path: Path) -> None:
        state = read_json(path / "state.json")
        changed = self.run.differences(state["run"], state["step"])
        if state["data"] != self.data.fingerprints:
            changed.append("--data has other content than when the run began")
        if changed:
            raise ValueError(
                f"cannot resume {path}: the command differs from the run's:\n  "
                + "\n  ".join(changed)
                + f"\ngive the same options, or {self.ANEW}"
            )
        state = load_checkpoint(path, self.model, self.optimizer)
        if self.average is not None:
            load_average(path, self.average.average)
        if self.run.batch_size != state["run"]["batch_size"]:
            warnings.warn(
                "other micro-batches than the run's: the same rows in each step, but not the same bits", stacklevel=2
            )
        if state["threads"] != torch.get_num_threads() and self.device.type == "cpu":
            warnings.warn(
                f"the run used {state['threads']} threads and this process {torch.get_num_threads()}: it continues, "
                f"but not to the same bits (set OMP_NUM_THREADS={state['threads']})",
                RuntimeWarning,
                stacklevel=2,
            )
        self.step, self.val_loss = state["step"], state["val_loss"]
        self.saved, self.saved_step = path, self.step
        self.price.value = state["price"]
        self.start_loss, self.ended_early = state.get("start_loss"), state.get("ended_early", False)
        self._say(f"resumed from {path} (step {self.step})")

    def _say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, flush=True)

    # -- the whole run -------------------------------------------------------------------------------------------

    def __call__(self) -> int:
        """Train to the end, an interrupt or a loss that is not finite; returns the process's exit status."""
        run = self.run
        self._print_header()
        if run.dry_run:
            dry_run(self)
            return 0
        self.metrics, self.trackers = None, None
        if self.ranks.is_first:
            if self.checkpoint is None or not has_provenance(self.out):
                write_provenance(self.out, asdict(run), self.config.to_dict(), self._data_summary())
            self.metrics = MetricsLog(self.out / "metrics.jsonl", self.step)
        if self.ranks.first(self._has_finished):
            why = "it ended early" if self.ended_early else f"step {self.step} of {run.steps}"
            self._say(f"the run has finished: {why}; nothing to do")
            self._close()
            return 0
        if self.ranks.is_first:
            if self.checkpoint is not None:
                add_resume(self.out, self.step)
            self.trackers = Trackers(run.track, self.out, asdict(run))
        try:
            with Interrupt(60 * run.max_minutes) as stop:
                together = False
                try:
                    self._train(stop)
                    together = True
                except (NotFiniteError, DataError):
                    together = True
                    raise
                finally:
                    # whatever ended the loop, the steps that were taken are not lost; unless other processes are, or
                    # it ended in the middle of an update
                    whole = (together or self.ranks.size == 1) and not self.train_step.updating
                    if self.step != self.saved_step and whole:
                        self._save()
        except NotFiniteError as error:
            kept = latest_checkpoint(self.out) if self.ranks.is_first else None
            self._fail(
                f"{error}. Last good checkpoint: {kept or 'none'}. Look at those samples, or start anew with a "
                f"lower --lr or --grad-clip, {self._anew(kept)}"
            )
            return EXIT_NOT_FINITE
        except DataError as error:
            if error.__cause__ or self.ranks.is_first:  # whoever could not read knows what
                where = "" if self.ranks.is_first else f"process {self.ranks.rank}: "
                print(f"error: {where}{error}; saved at step {self.step}", file=sys.stderr, flush=True)
            return 1
        finally:
            self._close()
        if not self.ranks.first(self._has_finished):
            saved = f"saved at step {self.step} of {run.steps}" if self.step else "before the first step"
            self._say(f"stopped, {saved}; {self.GO_ON}")
            return EXIT_INTERRUPTED
        if self.ranks.is_first:
            self._print_summary()
        return 0

    def _anew(self, kept: Path | None) -> str:
        """How a run whose loss was no number begins anew; `kept` is its last good checkpoint."""
        return f"from it: --init-from {kept} --out ANOTHER" if kept else "with --overwrite"

    def _fail(self, message: str) -> None:
        if self.ranks.is_first:
            print(f"error: {message}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        for part in (self.trackers, self.metrics, self._lock):
            if part is not None:
                part.close()

    def _train(self, stop: Interrupt) -> None:
        run = self.run
        if run.is_chat and self.start_loss is None:  # what the stage begins from, for its report and for --max-rise
            record = self._evaluate(stop)
            if record is None:
                return
            self.start_loss = _guarded(record)
        if 0 < self.step < run.steps and self.step % run.eval_every == 0 and self.val_loss is None:
            # a signal came before this evaluation was over; without it --max-rise would miss a look
            record = self._evaluate(stop)
            if record is None:
                return
            self._guard(record)
            if not self.ended_early:
                self._save()
        clock = Clock(self.step)
        recent: list[StepResult] = []
        stopped = False
        while self.step < run.steps and not self.ended_early:
            result = self.train_step(self.step, lambda: bool(stop))
            if result is None:
                stopped = True
                break
            self.val_loss = None  # it belonged to the weights before this step
            self.step += 1
            recent.append(result)
            clock.add(result.tokens, result.flops)
            last = self.step == run.steps
            if self.step % run.log_every == 0 or last:
                self._log(recent, clock)
                recent.clear()
            with clock.paused():
                if self.step % run.eval_every == 0 and not last:
                    self._guard(self._evaluate(stop))
                if self.step % run.save_every == 0 and not last and not self.ended_early:
                    self._save()
        if not stopped and (self.ended_early or self._evaluate(stop) is not None):
            self._save()

    def _guard(self, record: dict[str, Any] | None) -> None:
        """End the run where conversations have been unlearned."""
        if record is None or not self.run.max_rise:
            return
        rise = _guarded(record) - self.start_loss
        if rise >= self.run.max_rise:
            self.ended_early = True
            self._say(f"ended at step {self.step}: the conversational validation loss has risen by {rise:.4f} nats")

    def _has_finished(self) -> bool:
        """Whether the last step's weights have been evaluated, which is the end of a run."""
        if self.ended_early:
            return True
        done = any(r["kind"] == "eval" and r["step"] == self.run.steps for r in self.metrics.records)
        return self.step >= self.run.steps and done

    def _log(self, recent: list[StepResult], clock: Clock) -> None:
        """One line for the steps since the last one: mean loss, all their depths; rate and norm of the newest."""
        if not self.ranks.is_first:
            return
        run, newest = self.run, recent[-1]
        loss = sum(r.loss for r in recent) / len(recent)
        depths = sum((r.depths for r in recent), Counter())
        mean_steps = sum(d * n for d, n in depths.items()) / depths.total()
        tokens_per_s, flops_per_s = clock.rates()
        peak = peak_flops(self.device, self.dtype)
        mfu = flops_per_s / (peak * self.ranks.size) if peak else None
        record = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "lr": newest.lr,
            "grad_norm": newest.grad_norm,
            "mean_steps": mean_steps,
            "depths": {str(d): n for d, n in sorted(depths.items())},
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
        }
        if run.is_chat:
            tokens, padding = (sum(getattr(r, name) for r in recent) for name in ("tokens", "padding"))
            record["padding_share"] = padding / (tokens + padding)
        heads = [r.head for r in recent if r.head is not None]
        head = reduce(operator.add, heads) if heads else None
        if head:
            record |= head.record()
        self.metrics.write(record)
        self.trackers.log(self.step, record)
        self._say(
            f"step {self.step:>{len(str(run.steps))}}/{run.steps}  loss {loss:.4f}  lr {newest.lr:.2e}  "
            f"grad norm {newest.grad_norm:.3f}  steps {mean_steps:.2f}  {tokens_per_s:,.0f} tok/s  "
            + (f"MFU {mfu:.1%}  " if mfu else "")
            + (f"head {head.depths().mean:.2f} at price {head.price:.3g}  " if head else "")
            + f"left {duration(clock.remaining(self.step, run.steps))}"
        )

    def _evaluate(self, stop: Interrupt) -> dict[str, Any] | None:
        """Evaluate, log and draw; None if a signal came in between."""
        found = self.evaluation(self.step, lambda: bool(stop))
        if found is None:
            return None
        record, depths = found
        self.val_loss = record["val_loss"]
        sample = self.evaluation.sample() if self.run.sample_tokens else ""
        if self.ranks.is_first:
            self.metrics.write(record)
            self.trackers.log(self.step, record)
            self._say(self._report(record, depths))
            if self.run.sample_tokens:
                self._say(f"  sample: {sample!r}")
            self._draw()
        return record

    def _report(self, record: dict[str, Any], depths: DepthStatistics) -> str:
        """Lines that say what an evaluation found."""
        return evaluation(record, self.evaluation.own_depth, depths)

    def _save(self) -> None:
        """Write a checkpoint. Raises NotFiniteError, on all processes, for weights that are no numbers."""
        own = [p.to_local() if in_shards(p) else p for p in self.model.parameters()]
        if self.ranks.any(not torch.stack([p.isfinite().all() for p in own]).all().item()):
            raise NotFiniteError(f"step {self.step}: the weights after it are not finite; they were not saved")
        state = self._state()
        average = None if self.average is None else self.average.average
        self.saved = save_checkpoint(
            self.out, self.step, self.model, self.optimizer, state, self.run.keep_last, None, average, self.ranks
        )
        self.saved_step = self.step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        return {
            "val_loss": self.val_loss,
            "price": self.price.value,
            "run": asdict(self.run),
            "data": self.data.fingerprints,
            "threads": torch.get_num_threads(),
            "start_loss": self.start_loss,
            "ended_early": self.ended_early,
        }

    def _draw(self) -> None:
        title = f"{self.out} ({self.run.recipe})"
        try:
            self._draw_picture(self.out / "dashboard.png", title)
        except Exception as error:  # a picture is never worth a training run
            remedy = "; pip install 'hrm-kernels[plot]'" if isinstance(error, ImportError) else ""
            warnings.warn(f"no dashboard.png: {error}{remedy}", RuntimeWarning, stacklevel=2)
        # a figure is 16,000 objects in cycles, with buffers of 5 MB: left to itself Python collects them by the dozen
        gc.collect()

    def _draw_picture(self, path: Path, title: str) -> None:
        """Raises ImportError where matplotlib is missing."""
        draw_dashboard(self.metrics.records, path, title)

    def _print_header(self) -> None:
        run, c = self.run, self.config
        exact = self.device.type == "cpu" or run.deterministic
        if run.is_chat:
            rows = f"{run.accumulation} x {run.tokens_per_batch} tokens"
        else:
            rows = f"{run.batch_size * run.accumulation} x {c.block_size} tokens"
        several = f"{self.ranks.size} processes ({'fsdp' if run.parallel == 'fsdp' else 'ddp'}), "
        self._say(
            f"model   {run.recipe}: {self.model.num_parameters():,} parameters, {c.blocks_per_step} block applications "
            f"a step, up to {c.hrm_max_steps} steps\n"
            f"data    {self.data.summary()}\n"
            f"run     {run.steps} steps of {rows}, "
            f"{depth_plan(run, self.exploration.warmup)}, in {self.out}\n"
            f"device  {several if self.ranks.size > 1 else ''}{self.device}, {str(self.dtype).removeprefix('torch.')}, "
            f"{torch.get_num_threads()} threads; "
            + ("a resumed run gives the same bits" if exact else "resuming keeps the data order, not every bit")
            + f"\nkernels {self.kernels}"
        )

    def _print_summary(self) -> None:
        last = next((r for r in reversed(self.metrics.records) if r["kind"] == "eval"), None)
        if last:
            gain = last["unigram"] - last["val_loss"]
            side = "under" if gain >= 0 else "over"
            print(f"done: val loss {last['val_loss']:.4f}, {abs(gain):.4f} nats {side} the unigram model's", flush=True)
            if missed := missed_target(self.run, last["mean_steps"], self.price.value):
                print(missed, flush=True)
        print(
            f"checkpoint {self.saved}\nbest       {best_checkpoint(self.out)}\n"
            f"picture    {self.out / 'dashboard.png'}\nmetrics    {self.out / 'metrics.jsonl'}",
            flush=True,
        )


def _guarded(record: dict[str, Any]) -> float:
    """The loss that --max-rise looks at: of the last dataset, the conversations."""
    return list(record["losses"].values())[-1] if "losses" in record else record["val_loss"]
