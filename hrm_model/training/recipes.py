"""What a pretraining run is made of: one dataclass, three recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import HRMConfig
from ..halting import OBJECTIVES, price_faults, target_fault


@dataclass
class TrainConfig:
    """A pretraining run. Every field is a flag of train/pretrain.py; the text under a field is its help.

    Raises:
        ValueError: lists every field that is wrong.
    """

    recipe: str = "tiny"
    """model and hyperparameters to start from: tiny, small or base"""
    data: list[str] = field(default_factory=list)
    """prepared datasets (directories made by train/prepare.py); default: the standard library's text"""
    data_weights: list[float] = field(default_factory=list)
    """one weight per dataset; default: their token counts"""
    out: str = ""
    """directory of the run; default runs/RECIPE"""
    config: str = ""
    """a config.json that replaces the recipe's model"""
    init_from: str = ""
    """start from these weights (checkpoint, run or published .pt)"""
    resume: str = "never"
    """auto: continue the newest intact checkpoint of --out, if there is one"""
    overwrite: bool = False
    """delete what --out holds and start anew"""
    steps: int = 0
    """optimizer steps"""
    batch_size: int = 8
    """sequences per micro-batch"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = 3e-5
    """learning rate at the end of the cosine"""
    head_lr: float = 0.01
    """peak learning rate of the halting head; it follows the same schedule"""
    warmup: int = 2000
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices of the blocks only"""
    beta1: float = 0.9
    """AdamW's first moment"""
    beta2: float = 0.95
    """AdamW's second moment"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 turns clipping off"""
    dropout: float = 0.0
    """dropout in training"""
    halting: str = "policy"
    """what trains the halting head: policy (optimal stopping), gain, expected, q; none; or published (none either)"""
    depth: str = "auto"
    """what sets a row's steps: random (uniform over 1..max), head, fixed:N; auto: head if it is trained, else random"""
    step_price: float = 0.01
    """what a step costs in the head's objective, nats"""
    target_steps: float = 0.0
    """mean depth that the price is steered to, slowly; 0 leaves the price as it is"""
    explore: float = 0.125
    """share of rows that are run through all exits for the head, and keep a random depth"""
    depth_warmup: float = 1 / 3
    """share of the optimizer steps in which every row's depth is random, before the head drives"""
    decisions: str = "prefix"
    """what decides in training: prefix (each prefix of a row, as in generation) or row (the whole row, as published)"""
    gradient: str = "replay"
    """replay (last steps of every row) or published (only rows that run all steps)"""
    gradient_steps: int = 1
    """how many of a row's last steps are replayed with gradient; memory grows with them"""
    seed: int = 1337
    """initial weights, data order, depths, dropout"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """autocast precision: bfloat16 or float32; auto is bfloat16 on a GPU that has it"""
    fused: str = "off"
    """kernels of hrm_kernels: auto where a GPU and a kernel are, require makes their absence an error"""
    compile: bool = False
    """torch.compile the blocks"""
    recompute: bool = False
    """keep only block inputs for the backward pass and compute the rest again: less memory, slower"""
    deterministic: bool = False
    """bitwise reproducible on a GPU too, slower"""
    log_every: int = 10
    """steps between log lines"""
    eval_every: int = 100
    """steps between evaluations"""
    eval_windows: int = 32
    """validation windows of block_size tokens"""
    save_every: int = 100
    """steps between checkpoints"""
    keep_last: int = 3
    """checkpoints kept beside the best"""
    sample_prompt: str = "The"
    """start of the text sampled at every evaluation"""
    sample_tokens: int = 48
    """tokens of that sample; 0 for none"""
    track: list[str] = field(default_factory=list)
    """also log to tensorboard and/or wandb"""

    # Fields that change nothing about the weights a run ends with, so a resumed run may differ in them.
    FREE = frozenset(
        "out resume overwrite log_every eval_every eval_windows save_every keep_last sample_prompt sample_tokens track "
        "init_from".split()
    )

    def __post_init__(self):
        faults = list(self._faults())
        if faults:
            raise ValueError("impossible training options:\n  " + "\n  ".join(faults))

    def _faults(self):
        positive = "steps batch_size accumulation gradient_steps log_every eval_every eval_windows save_every keep_last"
        for name in positive.split():
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is below its minimum 1"
        for name in ("warmup", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is negative"
        if self.seed >= 2**63:
            yield f"--seed {self.seed} is not below 2^63"
        if self.overwrite and self.resume == "auto":
            yield "--overwrite and --resume auto contradict each other; give one of them"
        if self.config and self.init_from:
            yield "--config and --init-from each say what the model is; give one of them"
        for name in ("lr", "min_lr", "head_lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is not a finite number of at least 0"
        if self.min_lr > self.lr:
            yield f"--min-lr {self.min_lr} is above --lr {self.lr}"
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} is outside 0 <= {name} < 1"
        for name in ("explore", "depth_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is outside 0..1"
        if self.trains_head and self.explore == 0:
            yield (
                f"--explore 0 leaves --halting {self.halting} nothing to learn from, and unseen depths unusable; "
                "1/16 to 1/8 is usual"
            )
        yield from price_faults(self.step_price, self.target_steps or None)
        if self.target_steps and not self.trains_head:
            yield (
                f"--target-steps {self.target_steps} steers a head that learns, and --halting {self.halting} has none; "
                "use --halting policy"
            )
        if self.gradient == "published" and self.gradient_steps > 1:
            yield f"--gradient-steps {self.gradient_steps} is for --gradient replay; the published one has 1"
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                yield f"--{name} {getattr(self, name)!r} is none of {', '.join(allowed)}"
        if not (self.depth in ("auto", "random", "head") or self.fixed_depth):
            yield f"--depth {self.depth!r} is none of auto, random, head, fixed:N (N at least 1)"
        for tracker in self.track:
            if tracker not in ("tensorboard", "wandb"):
                yield f"--track {tracker!r} is none of tensorboard, wandb"

    @property
    def trains_head(self) -> bool:
        """Whether the halting head has a loss."""
        return self.halting in OBJECTIVES

    @property
    def driver(self) -> str:
        """What sets a row's depth once the warm-up is over: random, head or fixed."""
        if self.depth == "auto":
            return "head" if self.trains_head or self.halting == "published" else "random"
        return self.depth.partition(":")[0]

    @property
    def fixed_depth(self) -> int:
        """N of depth "fixed:N", else 0."""
        kind, _, number = self.depth.partition(":")
        return int(number) if kind == "fixed" and number.isdecimal() else 0

    @classmethod
    def of_recipe(cls, recipe: str, **changes: Any) -> TrainConfig:
        """The recipe's fields, replaced by `changes`.

        Raises:
            ValueError: no recipe of that name, or impossible values.
        """
        if recipe not in RECIPES:
            raise ValueError(f"--recipe {recipe!r} is none of {', '.join(RECIPES)}")
        values = {"recipe": recipe, "out": f"runs/{recipe}", **RECIPES[recipe], **changes}
        return cls(**values)

    def model_config(self, shape: dict[str, Any] | None = None) -> HRMConfig:
        """The model's configuration: `shape` (a config.json's content) or the recipe's preset, with our dropout and
        what will have trained its head."""
        changes = {"dropout": self.dropout}
        if self.halting != "none":  # with none, a head stays what it was
            changes |= {"halting": self.halting, "halt_bias": PUBLISHED_BIAS if self.halting == "published" else 0.0}
        if shape is None:
            return HRMConfig.preset(self.recipe, **changes)
        return HRMConfig.from_dict({**shape, **changes})

    def check_model(self, config: HRMConfig) -> None:
        """Raises ValueError where an option does not fit the model's hrm_max_steps."""
        most = config.hrm_max_steps
        for option, n in (("depth", self.fixed_depth), ("gradient_steps", self.gradient_steps)):
            if n > most:
                value = self.depth if option == "depth" else n
                raise ValueError(f"--{option.replace('_', '-')} {value} is over hrm_max_steps {most} of the model")
        if self.trains_head:
            if most < 2:
                raise ValueError(
                    f"--halting {self.halting} needs a model of at least 2 steps, this one has hrm_max_steps {most}; "
                    "use --halting none"
                )
            if fault := target_fault(self.target_steps or None, most):
                raise ValueError(fault)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Fields in which a saved run's values `other` would make other weights, as "--flag was X, is Y"."""
        names = [f.name for f in fields(self) if f.name not in self.FREE]
        return [
            f"--{name.replace('_', '-')} was {other.get(name)!r}, is {getattr(self, name)!r}"
            for name in names
            if other.get(name) != getattr(self, name)
        ]


PUBLISHED_BIAS = 0.35

_CHOICES = {
    "halting": ("policy", "gain", "expected", "q", "none", "published"),
    "decisions": ("prefix", "row"),
    "resume": ("never", "auto"),
    "gradient": ("replay", "published"),
    "dtype": ("auto", "float32", "bfloat16"),
    "fused": ("off", "auto", "require"),
}

RECIPES: dict[str, dict[str, Any]] = {
    # Early learning is limited by steps, not tokens: 256 tokens a step, two minutes or so on two CPU cores.
    "tiny": dict(steps=600, batch_size=2, lr=1e-3, min_lr=1e-4, warmup=20)
    | dict(eval_every=100, save_every=100, eval_windows=32, log_every=10),
    "small": dict(steps=4000, batch_size=8, accumulation=2, lr=1e-3, min_lr=1e-4, warmup=200, dropout=0.1)
    | dict(eval_every=250, save_every=250, eval_windows=64),
    # The published recipe: 64 x 2 x 512 tokens a step, 200,000 steps.
    "base": dict(steps=200_000, batch_size=64, accumulation=2, lr=3e-4, min_lr=3e-5, warmup=2000, dropout=0.1)
    | dict(eval_every=1000, save_every=1000, eval_windows=256),
}
