"""The pretraining loop: one class that owns a run from its first sample to its last checkpoint."""

from __future__ import annotations

import operator
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import read_json
from ..checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint, load_model, save_checkpoint
from ..config import HRMConfig
from ..depth_statistics import Costs
from ..generate import generate
from ..halting import Exploration, Price, price_rate
from ..model import HRMForCausalLM
from ..tokenizer import get_tokenizer
from .clock import Clock, duration
from .dashboard import draw_dashboard
from .device import autocast, choose_device, choose_dtype, choose_kernels, compile_blocks, make_deterministic
from .flops import exploring_flops, peak_flops, training_flops
from .head import HeadStep, HeadTraining
from .interrupt import Interrupt
from .metrics import MetricsLog, Trackers
from .ngram import ngram_losses
from .optim import build_optimizer, clip_gradients, learning_rate, set_learning_rates
from .provenance import RUN_FILE, add_resume, write_provenance
from .recipes import TrainConfig
from .reports import depth_plan, evaluation, missed_target
from .rundir import find_checkpoint, make_directory
from .sampler import Sampler, validation_windows
from .shards import open_dataset
from .validation import Validation

VERIFIED_TOKENS = 500_000_000
"""Up to this many training tokens the shards' sha256 are checked at the start, a second or two; beyond, their sizes."""

EXIT_INTERRUPTED = 75
"""Exit status of a run that saved and left on Ctrl-C or SIGTERM (sysexits' EX_TEMPFAIL: try again)."""
EXIT_NOT_FINITE = 76
"""Exit status of a run whose loss or gradient stopped being a number."""


class NotFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite; parameters are those before the step."""


class DataError(RuntimeError):
    """The samples of a step cannot be read; parameters are those before the step."""


@dataclass
class StepResult:
    """One optimizer step."""

    loss: float
    grad_norm: float
    lr: float
    depths: Counter
    flops: float
    head: HeadStep | None
    """None where the head has no loss, or no row explored."""


class Pretraining:
    """A run: model, data, optimizer, log. Everything that can be wrong with its inputs is raised by the constructor.

    Args:
        run: the resolved options. shape: content of a config.json that replaces the recipe's model.

    Raises:
        ValueError, OSError: the message names the option, what was found and the remedy.
    """

    def __init__(self, run: TrainConfig, shape: dict[str, Any] | None = None):
        self.run, self.out = run, Path(run.out)
        self.device = choose_device(run.device)
        self.dtype = choose_dtype(run.dtype, self.device)
        self.kernels = choose_kernels(run.fused, self.device)
        if run.deterministic:
            make_deterministic()
        self.checkpoint = find_checkpoint(self.out, run.resume, run.overwrite)
        torch.manual_seed(run.seed)
        self.model = self._build_model(shape)
        self._open_data()
        self._prepare_halting()
        self.optimizer = build_optimizer(self.model, run)
        self.step = self.saved_step = 0
        self.val_loss: float | None = None
        if self.checkpoint is None:
            make_directory(self.out, run.overwrite)
        else:
            self._resume(self.checkpoint)
        if run.recompute:
            self.model.recompute_activations()
        if run.compile:
            compile_blocks(self.model)

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
        model = HRMForCausalLM(self.run.model_config(config.to_dict()))
        model.load_state_dict(loaded.state_dict())
        return model.to(self.device)

    def _open_data(self) -> None:
        run, config = self.run, self.config
        run.check_model(config)
        self.datasets = [open_dataset(path) for path in run.data]
        if sum(len(d.split("train")) for d in self.datasets) <= VERIFIED_TOKENS:
            self.datasets = [open_dataset(path, verify=True) for path in run.data]
        self.sampler = Sampler(
            self.datasets,
            config.block_size,
            run.seed,
            weights=run.data_weights or None,
            vocab_size=config.vocab_size,
        )
        inputs, targets = validation_windows(self.datasets, config.block_size, run.eval_windows, config.vocab_size)
        n_bytes = int(get_tokenizer().token_bytes()[targets].sum())
        ngram = ngram_losses([d.split("train") for d in self.datasets], targets, inputs, config.vocab_size)
        self.validation = Validation(inputs, targets, n_bytes, **ngram)

    def _prepare_halting(self) -> None:
        run = self.run
        warmup = round(run.depth_warmup * run.steps) if run.driver == "head" and run.trains_head else 0
        share = run.explore if run.trains_head else 0.0
        self.exploration = Exploration(run.seed, self.config.hrm_max_steps, share, warmup)
        sees = 1 - (1 - share) ** (run.batch_size * run.accumulation)  # an explorer, in a step
        self.price = Price(run.step_price, run.target_steps or None, price_rate(sees * run.steps))
        self.head = HeadTraining(self.model, run.halting, self.price, run.decisions) if run.trains_head else None

    def _data_summary(self) -> list[dict[str, Any]]:
        keys = ("source", "fingerprint", "tokenizer")
        return [{"path": str(d.path), **{key: d.manifest[key] for key in keys}} for d in self.datasets]

    def _resume(self, path: Path) -> None:
        state = read_json(path / "state.json")
        changed = self.run.differences(state["run"])
        if state["data"] != [d.manifest["fingerprint"] for d in self.datasets]:
            changed.append("--data has other content than when the run began")
        if changed:
            raise ValueError(
                f"cannot resume {path}: the command differs from the run's:\n  "
                + "\n  ".join(changed)
                + "\ngive the same options, or start a new run with --init-from and another --out"
            )
        state = load_checkpoint(path, self.model, self.optimizer)
        if state["threads"] != torch.get_num_threads() and self.device.type == "cpu":
            warnings.warn(
                f"the run used {state['threads']} threads and this process {torch.get_num_threads()}: it continues, "
                f"but not to the same bits (set OMP_NUM_THREADS={state['threads']})",
                RuntimeWarning,
                stacklevel=2,
            )
        self.step = self.saved_step = state["step"]
        self.price.value = state["price"]
        print(f"resumed from {path} (step {self.step})", flush=True)

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """One optimizer step on the samples of step number `self.step`.

        Raises:
            NotFiniteError, DataError: before any parameter was changed.
        """
        run, model = self.run, self.model
        self.val_loss = None  # it belonged to the weights before this step
        lr = learning_rate(self.step, run)
        set_learning_rates(self.optimizer, lr, run)
        model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses, numbers, executed, row_steps, n_explorers = [], [], [], [], 0
        for micro in range(run.accumulation):
            first = (self.step * run.accumulation + micro) * run.batch_size
            try:
                inputs, targets, samples = self.sampler.batch(first, run.batch_size)
            except (ValueError, OSError) as error:
                raise DataError(f"step {self.step + 1}: {error}") from error
            n_explorers += self._explore(inputs, targets, samples)
            depths, pooled = self._depths(samples)
            with autocast(self.device, self.dtype):
                out = model(
                    torch.from_numpy(inputs).to(self.device),
                    torch.from_numpy(targets).to(self.device),
                    force_steps=depths,
                    pooled=pooled,
                    gradient=run.gradient,
                    gradient_steps=run.gradient_steps,
                )
            (out.loss / run.accumulation).backward()
            losses.append(out.loss.detach())
            numbers.append(samples)
            executed.append(out.executed_steps)
            row_steps.append(out.row_steps)
        norm = clip_gradients(model, run.grad_clip)
        per_micro = torch.stack([*losses, norm]).tolist()  # the host waits for the device only here, and for the head
        self._require_finite(per_micro[:-1], per_micro[-1], numbers)
        head = self.head.finish(run.grad_clip) if self.head else None
        self._require_finite_head(head, numbers)
        if self.head and head is None:  # with a gradient of 0 the optimizer's momentum would move it
            for p in model.hrm_core.q_head.parameters():
                p.grad = None
        depths = Counter(torch.cat(executed).tolist())
        ran = torch.stack(row_steps).sum(0).tolist()
        n_tokens = inputs.shape[1]
        flops = training_flops(self.config, n_tokens, run.batch_size * run.accumulation, ran)
        flops += exploring_flops(self.config, n_tokens, n_explorers)
        self.optimizer.step()
        self.step += 1
        return StepResult(sum(per_micro[:-1]) / run.accumulation, per_micro[-1], lr, depths, flops, head)

    def _explore(self, inputs: np.ndarray, targets: np.ndarray, samples: np.ndarray) -> int:
        """Run the rows that explore through all exits for the head; returns how many there were."""
        if self.head is None:
            return 0
        rows = self.exploration.explorers(samples)
        if rows.any():
            with autocast(self.device, self.dtype):
                self.head.add(*(torch.from_numpy(a[rows]).to(self.device) for a in (inputs, targets)))
        return int(rows.sum())

    def _depths(self, samples: np.ndarray) -> tuple[list[int] | None, list[int] | None]:
        """(steps of each row, None or 0 where the head decides; the prefix that decides for it, None for all of it),
        pure functions of (seed, sample number)."""
        run = self.run
        if run.driver == "fixed":
            return [run.fixed_depth] * len(samples), None
        if run.driver == "random":
            return self.exploration.random_depths(samples), None
        depths = self.exploration.depths(samples, self.step) if self.head else None
        if run.decisions == "row" or not self.config.head_is_trained or all(depths or [0]):
            return depths, None
        return depths, self.exploration.pooled(samples, self.config.block_size)

    def _require_finite(self, losses: list[float], norm: float, numbers: list[np.ndarray]) -> None:
        if np.isfinite([*losses, norm]).all():
            return
        bad = [n for loss, n in zip(losses, numbers, strict=True) if not np.isfinite(loss)] or numbers
        what = "the loss" if not np.isfinite(losses).all() else f"the gradient norm ({norm})"
        samples = ", ".join(f"{n[0]}..{n[-1]}" for n in bad)
        raise NotFiniteError(
            f"step {self.step + 1}: {what} is not finite, in samples {samples}; no parameter was changed"
        )

    def _require_finite_head(self, head: HeadStep | None, numbers: list[np.ndarray]) -> None:
        if head is not None and not np.isfinite(head.loss):
            raise NotFiniteError(
                f"step {self.step + 1}: the halting head's loss is not finite, with explorers among samples "
                f"{numbers[0][0]}..{numbers[-1][-1]}; no parameter was changed"
            )

    # -- the whole run -------------------------------------------------------------------------------------------

    def __call__(self) -> int:
        """Train to the end, an interrupt or a loss that is not finite; returns the process's exit status."""
        run = self.run
        self._print_header()
        if not (self.out / RUN_FILE).exists() or self.checkpoint is None:
            write_provenance(self.out, asdict(run), self.config.to_dict(), self._data_summary())
        self.metrics = MetricsLog(self.out / "metrics.jsonl", self.step)
        if self.step >= run.steps and self._is_evaluated():
            self.metrics.close()
            print(f"the run has finished: step {self.step} of {run.steps}; nothing to do", flush=True)
            return 0
        if self.checkpoint is not None:
            add_resume(self.out, self.step)
        self.trackers = Trackers(run.track, self.out, asdict(run))
        try:
            with Interrupt() as stop:
                try:
                    self._train(stop)
                finally:
                    # whatever ended the loop, the steps that were taken are not lost
                    if self.step != self.saved_step:
                        self._save()
        except NotFiniteError as error:
            kept = latest_checkpoint(self.out)
            anew = f"from it: --init-from {kept} --out ANOTHER" if kept else "with --overwrite"
            print(
                f"error: {error}. Last good checkpoint: {kept or 'none'}. Look at those samples, or start anew with a "
                f"lower --lr or --grad-clip, {anew}",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_NOT_FINITE
        except DataError as error:
            print(f"error: {error}; saved at step {self.step}", file=sys.stderr, flush=True)
            return 1
        finally:
            self.trackers.close()
            self.metrics.close()
        if not self._is_evaluated():
            saved = f"saved at step {self.step} of {run.steps}" if self.step else "before the first step"
            print(f"stopped, {saved}; continue with --resume auto", flush=True)
            return EXIT_INTERRUPTED
        self._print_summary()
        return 0

    def _train(self, stop: Interrupt) -> None:
        run = self.run
        clock = Clock(self.step)
        recent: list[StepResult] = []
        while self.step < run.steps and not stop:
            result = self.train_step()
            recent.append(result)
            clock.add(run.batch_size * run.accumulation * self.config.block_size, result.flops)
            last = self.step == run.steps
            if self.step % run.log_every == 0 or last:
                self._log(recent, clock)
                recent.clear()
            with clock.paused():
                if self.step % run.eval_every == 0 and not last and not stop:
                    self._evaluate(stop)
                if self.step % run.save_every == 0 and not last:
                    self._save()
        if self.step == run.steps and not stop:
            self._evaluate(stop)
            self._save()

    def _is_evaluated(self) -> bool:
        """Whether the last step's weights have been evaluated, which is the end of a run."""
        return any(r["kind"] == "eval" and r["step"] == self.run.steps for r in self.metrics.records)

    def _log(self, recent: list[StepResult], clock: Clock) -> None:
        """One line for the steps since the last one: mean loss, all their depths; rate and norm of the newest."""
        run, newest = self.run, recent[-1]
        loss = sum(r.loss for r in recent) / len(recent)
        depths = sum((r.depths for r in recent), Counter())
        mean_steps = sum(d * n for d, n in depths.items()) / depths.total()
        tokens_per_s, flops_per_s = clock.rates()
        peak = peak_flops(self.device, self.dtype)
        mfu = flops_per_s / peak if peak else None
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
        heads = [r.head for r in recent if r.head is not None]
        head = reduce(operator.add, heads) if heads else None
        if head:
            record |= head.record()
        self.metrics.write(record)
        self.trackers.log(self.step, record)
        print(
            f"step {self.step:>{len(str(run.steps))}}/{run.steps}  loss {loss:.4f}  lr {newest.lr:.2e}  "
            f"grad norm {newest.grad_norm:.3f}  steps {mean_steps:.2f}  {tokens_per_s:,.0f} tok/s  "
            + (f"MFU {mfu:.1%}  " if mfu else "")
            + (f"head {head.depths().mean:.2f} at price {head.price:.3g}  " if head else "")
            + f"left {duration(clock.remaining(self.step, run.steps))}",
            flush=True,
        )

    def _own_depth(self) -> int | None:
        """Steps at which the model is evaluated and samples: None is what its head decides."""
        run = self.run
        decides = run.trains_head or (run.driver == "head" and self.config.head_is_trained)
        return None if decides and not run.fixed_depth else run.fixed_depth or self.config.hrm_max_steps

    def _evaluate(self, stop: Interrupt) -> None:
        run, val = self.run, self.validation
        reading = val.read(self.model, run.batch_size, lambda: autocast(self.device, self.dtype), lambda: bool(stop))
        if reading is None:
            return
        own = self._own_depth()
        executed = reading.executed(rule="head" if own is None else f"fixed:{own}")
        self.val_loss = reading.loss(executed)
        depths = reading.statistics(executed)
        record = {
            "kind": "eval",
            "step": self.step,
            "val_loss": self.val_loss,
            "bits_per_byte": val.bits_per_byte(self.val_loss),
            "unigram": val.unigram,
            "bigram": val.bigram,
            "loss_by_depth": {str(s): loss for s, loss in enumerate(reading.by_depth().tolist(), 1)},
            "mean_steps": depths.mean,
            "dispersion": depths.dispersion,
            "applications": float(Costs.of(self.config).applications(executed).mean()),
            "depths": {str(s): n for s, n in enumerate(depths.histogram, 1)},
        }
        if own is None:
            rivals = reading.rivals(executed, Costs.of(self.config), draws=0)
            record |= {name: rival.loss for name, rival in rivals.items()}
            record["gain_correlation"] = reading.gain_correlation(executed)
        self.metrics.write(record)
        self.trackers.log(self.step, record)
        print(evaluation(record, own, depths), flush=True)
        if run.sample_tokens:
            print(f"  sample: {self._sample(own)!r}", flush=True)
        self._draw()

    def _sample(self, depth: int | None) -> str:
        tokenizer = get_tokenizer()
        ids = tokenizer.encode(self.run.sample_prompt) or [tokenizer.eot]
        with autocast(self.device, self.dtype):
            out = generate(
                self.model,
                torch.tensor([ids], device=self.device),
                self.run.sample_tokens,
                temperature=0.8,
                top_k=50,
                seed=self.run.seed,
                force_steps=depth,
            )
        return tokenizer.decode(i for i in out[0].tolist() if i != tokenizer.eot)

    def _save(self) -> None:
        state = {
            "val_loss": self.val_loss,
            "price": self.price.value,
            "run": asdict(self.run),
            "data": [d.manifest["fingerprint"] for d in self.datasets],
            "threads": torch.get_num_threads(),
        }
        self.saved = save_checkpoint(
            self.out, self.step, self.model, self.optimizer, state, keep_last=self.run.keep_last
        )
        self.saved_step = self.step

    def _draw(self) -> None:
        try:
            draw_dashboard(self.metrics.records, self.out / "dashboard.png", f"{self.out} ({self.run.recipe})")
        except Exception as error:  # a picture is never worth a training run
            remedy = "; pip install 'hrm-kernels[plot]'" if isinstance(error, ImportError) else ""
            warnings.warn(f"no dashboard.png: {error}{remedy}", RuntimeWarning, stacklevel=2)

    def _print_header(self) -> None:
        run, c = self.run, self.config
        n_train = sum(len(d.split("train")) for d in self.datasets)
        exact = self.device.type == "cpu" or run.deterministic
        print(
            f"model   {run.recipe}: {self.model.num_parameters():,} parameters, {c.blocks_per_step} block applications "
            f"a step, up to {c.hrm_max_steps} steps\n"
            f"data    {', '.join(map(str, run.data))}: {n_train:,} training tokens, "
            f"{len(self.validation.inputs)} validation windows of {c.block_size}\n"
            f"run     {run.steps} steps of {run.batch_size * run.accumulation} x {c.block_size} tokens, "
            f"{depth_plan(run, self.exploration.warmup)}, in {self.out}\n"
            f"device  {self.device}, {str(self.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads; "
            + ("a resumed run gives the same bits" if exact else "resuming keeps the data order, not every bit")
            + f"\nkernels {self.kernels}",
            flush=True,
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
