"""A text learned by a model: a run of the common loop that knows what came before it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import CheckpointError, read_json
from ..cache import free_bytes
from ..checkpoint import OPTIMIZER, best_checkpoint, load_model
from ..config import HRMConfig
from ..model import HRMForCausalLM
from ..sharded import read_whole
from ..tensors import apply_optimizer, check_optimizer, unpack_optimizer
from ..training.batch import ValidationRows
from ..training.device import autocast
from ..training.evaluation import Evaluation
from ..training.loop import EXIT_INTERRUPTED, Training
from ..training.sampler import validation_windows
from ..training.shards import Dataset, ShardError, open_dataset
from ..training.stage_data import StageData
from ..training.validation import Validation
from . import forgetting
from .elastic import Elastic
from .growth import LayerPlan, grow, grow_optimizer, rows_for
from .options import ContinualConfig
from .store import PAUSE, TOKENIZER, Growth, History, ModelDirectory, Seen, read_history
from .text import Text, keep_samples, read_samples, store
from .tokenizer import CharTokenizer
from .windows import TextWindows

KEPT = {"seq_length": "block_size", "n_cycles": "hrm_H_cycles", "t_steps": "hrm_L_cycles"}
KEPT |= {"loss": "loss", "dropout": "dropout"}
"""Options that a model keeps, by the field of its configuration."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments, float32."""


class Lesson:
    """One text for one model: what has to happen before training, without any of it done.

    Args:
        options: with the text's sequence length and growth rule. text: what is learned. directory: of the model.

    Raises:
        ValueError: the model has learned this text already, or its files do not belong together.
    """

    def __init__(self, options: ContinualConfig, text: Text, directory: ModelDirectory):
        self.options, self.text, self.directory = options, text, directory
        self.before = directory.history()  # None: a new model
        texts = self.before.texts if self.before else []
        last = texts[-1] if texts else None
        self.resumes = last is not None and last.sha256 == text.sha256 and last.status == "learning"
        if not self.resumes and not options.again:
            self._refuse_known(texts)
        self.number = len(texts) + (not self.resumes)
        known = CharTokenizer() if self.before is None else directory.tokenizer()
        self.tokenizer = known.grown(text.content)
        if self.before is None:
            self.history = History(self.tokenizer.characters)
        else:
            self.history = History.from_dict(self.before.to_dict())
            self.history.characters = self.tokenizer.characters
        if not self.resumes:
            if last is not None and last.status == "learning":
                last = self.history.texts[-1]
                last.status = "stopped"
            was = len(self.before.characters) if self.before else 1
            entry = Seen(text.name, text.sha256, len(text.content), self.tokenizer.n_vocab - was)
            self.history.texts.append(entry)
        self.growths = self._growths_due()

    @property
    def entry(self) -> Seen:
        """The text's line in the history."""
        return self.history.texts[-1]

    @property
    def out(self) -> Path:
        """The run's directory."""
        return self.directory.run(self.number, self.entry.name)

    def _refuse_known(self, texts: list[Seen]) -> None:
        for number, seen in enumerate(texts, 1):
            if seen.sha256 == self.text.sha256 and seen.status != "learning":
                raise AlreadyLearned(
                    f"{self.directory.path.name} has {seen.status} this text already, as number {number} "
                    f"({seen.name}); nothing to do. --again learns it once more, --fresh begins a new model"
                )

    def _growths_due(self) -> int:
        if self.resumes:
            return 0
        return self.options.growth.due(self.history.total, self.history.n_growths)

    def config_before(self) -> HRMConfig | None:
        """Of the model as it is."""
        if self.before is None:
            return None
        return HRMConfig.from_dict(read_json(self.directory.checkpoint() / "config.json"))

    def layer_plan(self) -> LayerPlan:
        """Layers that come before this text."""
        shape = read_json(Path(self.options.config)) if self.options.config else None
        return self.options.growth.plan(self.config_before() or self.options.model_config(shape), self.growths)

    def plan(self) -> str:
        """What would happen, for --dry-run."""
        config, layers = self.config_before(), self.layer_plan()
        n = self.tokenizer.n_vocab
        lines = [
            f"model    {self.directory.path}: "
            + ("new" if config is None else f"text {self.number}, {'resumed' if self.resumes else 'new to it'}"),
            f"text     {self.text.path}: {len(self.text.content):,} characters, {self.entry.new_characters} new to the "
            f"vocabulary",
            f"rows     {n} of {rows_for(n)} in use"
            + ("" if config is None else f" (before: {config.n_chars} of {config.vocab_size})"),
            f"seen     {self.history.total:,} characters with this text, one growth every "
            f"{self.options.growth_chars:,}, {self.history.n_growths} so far, {self.growths} due",
            f"layers   {layers if self.growths else 'none to add'}; one has {layers.each:,} parameters",
        ]
        return "\n".join(lines)


class AlreadyLearned(ValueError):
    """The model knows this text."""


class ContinualTraining(Training):
    """The common loop on a lesson."""

    GO_ON = "the same command goes on"
    ANEW = "begin a new model with --fresh"

    def __init__(self, lesson: Lesson):
        self.lesson, run = lesson, lesson.options
        self.tokenizer = lesson.tokenizer
        run.out = str(lesson.out)
        shape = read_json(Path(run.config)) if run.config else None
        self._best: Path | None = None
        super().__init__(run, shape)
        start = lesson.directory.checkpoint() if self.checkpoint is None and lesson.before else None
        if start is not None:
            self._carry_optimizer(start)
        self._hold_on()

    # -- what differs from other stages --------------------------------------------------------------------------

    def _look_at_directory(self) -> tuple[set[str], Path | None]:
        try:
            return super()._look_at_directory()
        except ValueError as error:  # its remedies are options that a lesson does not have
            what = str(error).partition("; ")[0].removeprefix("--out ")
            raise ValueError(
                f"{what}; move {self.out} away, and the text begins again on what {self.lesson.directory.path} was"
            ) from error

    def _anew(self, kept: Path | None) -> str:
        return "with --fresh" if kept else "by the same command"

    def _build_model(self, shape: dict[str, Any] | None) -> HRMForCausalLM:
        lesson = self.lesson
        if self.checkpoint is not None:
            lesson.history = self._history_of_run(self.checkpoint)
            config = HRMConfig.from_dict(read_json(self.checkpoint / "config.json"))
            return HRMForCausalLM(config).to(self.device)
        if lesson.before is None:
            model = HRMForCausalLM(self.run.model_config(shape)).to(self.device)
        else:
            model, _ = load_model(lesson.directory.checkpoint(), self.device)
            self._check_kept(model.config)
            missing = len(lesson.history.texts) - 1 - len(lesson.history.losses)
            if missing:  # the last text was paused and is now over: what the model knew when it was
                lesson.history.losses.append(self._losses(model, lesson.history.texts[:-1]))
        layers = lesson.layer_plan()
        self._check_memory(model, layers)
        if lesson.growths:
            total = lesson.history.total
            lesson.history.growths.append(Growth(total, layers.L, layers.H, layers.parameters, lesson.growths))
        return grow(model, lesson.tokenizer.n_vocab, layers.L, layers.H)

    @staticmethod
    def _history_of_run(checkpoint: Path) -> History:
        """Killed between a save and its links, a run knows more than the checkpoints by name: growth, a row of the
        matrix. Killed while it was finished, it is finished again."""
        history = read_history(checkpoint)
        if history.texts[-1].status != "learning":
            history.texts[-1].status = "learning"
            history.losses.pop()
        return history

    def _check_kept(self, config: HRMConfig) -> None:
        """A model keeps what it began with."""
        run = self.run
        for name, key in KEPT.items():
            flag, asked, has = f"--{name.replace('_', '-')}", getattr(run, name), getattr(config, key)
            if asked != has:
                raise ValueError(
                    f"{flag} {asked} is not what {self.lesson.directory.path} began with, {has}; leave it out or give "
                    f"{flag} {has}, or begin a new model with --fresh"
                )

    def _check_memory(self, model: HRMForCausalLM, layers: LayerPlan) -> None:
        free, needed = free_bytes(self.device), BYTES_PER_PARAMETER * (model.num_parameters() + layers.parameters)
        if free is not None and needed > free:
            raise ValueError(
                f"growing by {layers} makes {model.num_parameters() + layers.parameters:,} parameters, which need "
                f"{needed / 2**30:.1f} GiB in training, and {free / 2**30:.1f} GiB are free on {self.device}; "
                f"lower --growth-params (now {self.run.growth_params:,}), or --growth-chars 0 for no growth"
            )

    def _open_data(self) -> StageData:
        run, lesson = self.run, self.lesson
        for number, seen in enumerate(lesson.history.texts[:-1], 1):
            self._dataset(number, seen)  # the matrix needs it: better said now than when the text is learned
        lesson.directory.path.mkdir(parents=True, exist_ok=True)
        lesson.tokenizer.save(lesson.directory.path / TOKENIZER)
        dataset = store(lesson.text, lesson.tokenizer, lesson.directory.data(lesson.number, lesson.entry.name))
        path = lesson.directory.samples(lesson.number, lesson.entry.name)
        keep_samples(dataset, run.replay_windows, run.seq_length, run.seed, path)
        self.old = self._earlier() if run.replay or run.elastic else []
        split = dataset.split("train")
        windows = TextWindows(
            split.read(0, len(split)), run.seq_length, run.stride, run.batch_size, run.accumulation, run.seed,
            self.old, run.replay,
        )  # fmt: skip
        run.resolve_steps(windows.steps_per_epoch)
        return StageData([dataset], windows, [("", self._validation(dataset, self.config), 1.0)])

    def _earlier(self) -> list[np.ndarray]:
        """Stored samples of each text before this one."""
        texts = self.lesson.history.texts[: self.lesson.number - 1]
        paths = [self.lesson.directory.samples(n, t.name) for n, t in enumerate(texts, 1)]
        return [read_samples(path, self.run.seq_length, self.tokenizer.n_vocab) for path in paths]

    def _dataset(self, number: int, text: Seen) -> Dataset:
        path = self.lesson.directory.data(number, text.name)
        try:
            return open_dataset(path, verify=True)
        except ShardError as error:
            what = str(error).rpartition("; run ")[0]  # its remedy is that of datasets of another tokenizer
            raise ValueError(
                f"text {number}, {text.name}, has no whole copy in the model's directory, and the matrix of losses "
                f"needs it: {what}; put {path} back, or {self.ANEW}"
            ) from error

    def _validation(self, dataset: Dataset, config: HRMConfig) -> Validation:
        windows = validation_windows([dataset], self.run.seq_length, self._windows_of(dataset), config.vocab_size)
        rows = ValidationRows(*windows, None)
        vocab_size = config.n_chars  # a spare row is no character that counting could expect
        return Validation(rows, [dataset.split("train")], vocab_size, self.tokenizer.token_bytes())

    def _windows_of(self, dataset: Dataset) -> int:
        return min(self.run.eval_windows, (len(dataset.split("val")) - 1) // self.run.seq_length)

    def _carry_optimizer(self, start: Path) -> None:
        saved = unpack_optimizer(start / OPTIMIZER, *read_whole(start, OPTIMIZER))
        if saved.kind != type(self.optimizer).__name__:
            return  # another --optimizer begins anew
        saved = grow_optimizer(saved, self.model, self.optimizer.param_groups)
        check_optimizer(saved, self.model, self.optimizer)
        apply_optimizer(saved, self.model, self.optimizer)

    def _hold_on(self) -> None:
        """The elastic penalty, from earlier texts on."""
        run, lesson = self.run, self.lesson
        if not run.elastic or not self.old:
            return
        path = lesson.directory.elastic(lesson.number, lesson.entry.name)
        if self.checkpoint is not None:
            try:
                elastic = Elastic.load(self.model, run.elastic, path)
            except CheckpointError as error:
                what = str(error).partition("; ")[0]
                raise CheckpointError(
                    f"{what}; the penalty holds what is in it: put the file back, or move {self.out} away, and the "
                    "text begins again"
                ) from error
        else:
            elastic = Elastic.measured(self.model, run.elastic, self.old, self.evaluation.own_depth)
            elastic.save(path)
        self.train_step.penalty = elastic

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        entry = self.lesson.entry
        entry.steps, entry.of = self.step, self.run.steps
        if self.val_loss is not None:
            entry.val_loss = self.val_loss
        return super()._state() | {"continual": self.lesson.history.to_dict()}

    def _save(self) -> None:
        super()._save()
        self._link()

    def _link(self) -> None:
        """Let the checkpoints by name be what was saved; latest comes last, as the one that is asked what is done."""
        directory = self.lesson.directory
        best = best_checkpoint(self.out)
        if best is not None and (best == self.saved or best != self._best):
            directory.link("best", best)
            self._best = best
        directory.unlink(PAUSE)
        directory.link("latest", self.saved)

    # -- the whole lesson ----------------------------------------------------------------------------------------

    def __call__(self) -> int:
        """Learn the text; returns the process's exit status."""
        status = super().__call__()
        if status == EXIT_INTERRUPTED and self.step:
            if self._stops():
                self._finish("stopped")
                return 0
            self.lesson.directory.link(PAUSE, self.saved)
            self._say(f"paused: {self.lesson.directory.path / PAUSE}; the same command goes on to the same bits")
        elif status == 0:
            self._finish("learned")
        return status

    def _stops(self) -> bool:
        """Whether the text is over after an interrupt."""
        how = self.run.on_interrupt
        if how != "ask":
            return how == "stop"
        if not (sys.stdin and sys.stdin.isatty()):
            return False
        print("1. pause: the same command goes on\n2. stop: this text is over, the model keeps what it has learned")
        try:
            return input("1 or 2 (default 1): ").strip() == "2"
        except (EOFError, KeyboardInterrupt):
            return False

    def _finish(self, status: str) -> None:
        """Measure what is left of every text, and let the result be main."""
        lesson, history = self.lesson, self.lesson.history
        lesson.entry.status = status
        history.losses.append(self._losses(self.model, history.texts))
        super()._save()
        names = [f"{n}. {t.name}" for n, t in enumerate(history.texts, 1)]
        forgetting.write(lesson.directory.path, names, history.losses)
        lesson.directory.link("main", self.saved)
        self._link()  # after all else: until latest says that the text is over, the same command comes here again
        self._say("loss on each text's validation split:\n" + forgetting.table(names, history.losses))
        self._say(f"model      {lesson.directory.path} (latest, best, main)")

    def _losses(self, model: HRMForCausalLM, texts: list[Seen]) -> list[float]:
        """Nats per character on each text's validation split, at the depth that the model uses."""
        own = Evaluation(self.run, model, [], self.dtype, tokenizer=self.tokenizer).own_depth
        rule, found = "head" if own is None else f"fixed:{own}", []
        for number, text in enumerate(texts, 1):
            validation = self._validation(self._dataset(number, text), model.config)
            reading = validation.read(model, self.run.batch_size, lambda: autocast(self.device, self.dtype))
            found.append(reading.loss(reading.executed(rule=rule)))
        return found
