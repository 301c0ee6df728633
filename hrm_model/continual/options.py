"""What a text is learned with: the options of train/continual.py, two recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import LOSSES, HRMConfig
from ..training.recipes import TrainConfig
from .growth import GrowthRule

ON_INTERRUPT = ("ask", "pause", "stop")
MOST_EPOCHS = 1_000_000_000
"""More are no number of steps."""


@dataclass
class ContinualConfig(TrainConfig):
    """A text to learn, and how. Fields it shares with every stage are TrainConfig's.

    Raises:
        ValueError: lists every field that is wrong.
    """

    stage: str = "continual"
    """continual"""
    text: str = ""
    """the text to learn, a UTF-8 file"""
    models: str = "models"
    """folder of the models"""
    model: str = ""
    """which model of --models goes on; default: the one that learned last, or a first one"""
    fresh: bool = False
    """begin a new model, beside those that are there"""
    again: bool = False
    """learn a text once more that this model has learned already"""
    seq_length: int = 80
    """characters of a sequence, and of the model's window"""
    stride: int = 1
    """characters between the starts of two sequences"""
    n_cycles: int = 2
    """N, reasoning cycles of a step"""
    t_steps: int = 2
    """T, steps of the L level in a cycle"""
    loss: str = "softmax"
    """output: softmax or stablemax; a model keeps what it began with"""
    warmup_ratio: float = 0.1
    """share of the steps in which the learning rate rises"""
    eval_epochs: float = 1.0
    """epochs between evaluations"""
    save_epochs: float = 1.0
    """epochs between checkpoints"""
    replay: float = 0.25
    """share of each batch that comes from samples of earlier texts; 0: none"""
    replay_windows: int = 500
    """sequences of each text that are kept for replay"""
    elastic: float = 0.0
    """strength of the elastic penalty that holds what earlier texts need; 0: none"""
    growth_chars: int = 3_000_000
    """characters of different texts after which layers are added; 0: never"""
    growth_params: int = 1_000_000
    """parameters of one such growth: as many layers as fit, at least one"""
    growth_order: str = "LLH"
    """levels that get the layers, in turn"""
    on_interrupt: str = "ask"
    """on Ctrl-C: ask (without a terminal: pause), pause (the same command goes on), or stop (the text is over)"""

    FREE = TrainConfig.FREE | frozenset(
        "text models model fresh again save_epochs eval_epochs growth_chars growth_params growth_order "
        "on_interrupt".split()
    )
    NO_FLAG: ClassVar[frozenset[str]] = frozenset(
        "stage data data_weights out init_from resume overwrite tokens_per_batch train_on_prompt max_rise warmup "
        "parallel timeout eval_every save_every".split()
    )

    def _faults(self):
        yield from super()._faults()
        for name in ("seq_length", "stride", "n_cycles", "t_steps", "replay_windows"):
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is below its minimum 1"
        for name in ("eval_epochs", "save_epochs"):
            if not 0 < getattr(self, name) <= MOST_EPOCHS:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is outside 0 < epochs <= {MOST_EPOCHS:,}"
        if self.epochs > MOST_EPOCHS:
            yield f"--epochs {self.epochs:g} is over the limit of {MOST_EPOCHS:,}"
        if not 0 <= self.replay < 1:
            yield f"--replay {self.replay} is outside 0 <= replay < 1"
        if not 0 <= self.elastic < math.inf:
            yield f"--elastic {self.elastic} is not a finite number of at least 0"
        if not 0 <= self.warmup_ratio <= 1:
            yield f"--warmup-ratio {self.warmup_ratio} is outside 0..1"
        for name, allowed in (("loss", LOSSES), ("on_interrupt", ON_INTERRUPT)):
            if getattr(self, name) not in allowed:
                yield f"--{name.replace('_', '-')} {getattr(self, name)!r} is none of {', '.join(allowed)}"
        try:
            _ = self.growth
        except ValueError as error:
            yield str(error)

    @classmethod
    def stage_names(cls) -> tuple[str, ...]:
        """The one there is."""
        return ("continual",)

    @property
    def growth(self) -> GrowthRule:
        """When and how layers are added."""
        return GrowthRule(self.growth_chars, self.growth_params, self.growth_order)

    @classmethod
    def of_recipe(cls, recipe: str, stage: str = "continual", **changes: Any) -> ContinualConfig:
        """The recipe's fields, replaced by `changes`.

        Raises:
            ValueError: no recipe of that name, or impossible values.
        """
        if recipe not in RECIPES:
            raise ValueError(f"--recipe {recipe!r} is none of {', '.join(RECIPES)}")
        values = {"recipe": recipe, "resume": "auto", **RECIPES[recipe]}
        if changes.get("epochs") and "steps" not in changes:
            values["steps"] = 0
        if changes.get("steps") and "epochs" not in changes:
            values["epochs"] = 0.0
        return cls(**values | changes)

    def model_config(self, shape: dict[str, Any] | None = None) -> HRMConfig:
        """Of a new model: the recipe's preset or `shape`, with this N, T, sequence, output and head."""
        changes = {"dropout": self.dropout, "block_size": self.seq_length, "loss": self.loss, "halting": self.halting}
        changes |= {"hrm_H_cycles": self.n_cycles, "hrm_L_cycles": self.t_steps}
        if self.fixed_depth:  # no other depth is trained, so there is none to choose
            changes["hrm_max_steps"] = self.fixed_depth
        if shape is not None:
            return HRMConfig.from_dict({**shape, **changes})
        return HRMConfig.preset({"base": "characters", "tiny": "characters-tiny"}[self.recipe], **changes)

    def resolve_steps(self, steps_per_epoch: float) -> None:
        """Turn epochs and shares into numbers of steps."""
        if self.epochs:
            self.steps = max(1, math.ceil(self.epochs * steps_per_epoch))
        self.warmup = round(self.warmup_ratio * self.steps)
        self.eval_every = max(1, round(self.eval_epochs * steps_per_epoch))
        self.save_every = max(1, round(self.save_epochs * steps_per_epoch))


# ACT is off: one step of N x T for every character. --halting policy --depth auto makes a model of up to 8 steps.
_SHARED = dict(batch_size=16, lr=1e-3, min_lr=1e-4, embed_lr=5e-4, weight_decay=0.01, halting="none", depth="fixed:1")
_SHARED |= dict(eval_windows=64, log_every=50, keep_last=2, sample_prompt="The ", sample_tokens=120)
RECIPES: dict[str, dict[str, Any]] = {
    # Hours on a CPU: some 4.6 M parameters, three epochs of stride 1.
    "base": _SHARED | dict(epochs=3.0),
    # Minutes: 0.4 M parameters, and many small steps, as early learning wants them.
    "tiny": _SHARED
    | dict(steps=3000, batch_size=4, lr=2e-3, min_lr=2e-4, embed_lr=1e-3, eval_epochs=0.015, save_epochs=0.015),
}
