"""What a training run is made of: one dataclass for all stages, three recipes for each."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

from ..config import HRMConfig
from ..halting import OBJECTIVES, price_faults, target_fault


@dataclass
class TrainConfig:
    """A training run of any stage. Every field is a flag of the stage's script, but for `stage` itself and fields that
    the stage has no use for (NOT_FOR); the text under a field is its help.

    Raises:
        ValueError: lists every field that is wrong.
    """

    stage: str = "pretrain"
    """pretrain, converse, instruct, identity or calibrate"""
    recipe: str = "tiny"
    """model and hyperparameters to start from: tiny, small or base"""
    data: list[str] = field(default_factory=list)
    """prepared datasets (directories made by train/prepare.py); default: made from the standard library, or of an
    identity"""
    data_weights: list[float] = field(default_factory=list)
    """one weight per dataset; default: their token counts, of conversations their number; calibrate has 0.4 0.6"""
    out: str = ""
    """directory of the run; default runs/RECIPE, of later stages runs/RECIPE-STAGE"""
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
    epochs: float = 0.0
    """instead of --steps: how often each conversation is seen"""
    batch_size: int = 8
    """sequences per micro-batch, of all processes together"""
    tokens_per_batch: int = 0
    """tokens per micro-batch, padding included, of all processes together; conversations of similar length share one"""
    train_on_prompt: bool = False
    """let the loss look at questions and instructions too, not at answers alone"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = 3e-5
    """learning rate at the end of the schedule"""
    embed_lr: float = 0.0
    """peak learning rate of the embedding table; it follows the same schedule; 0: --lr"""
    head_lr: float = 0.01
    """peak learning rate of the halting head; it follows the same schedule"""
    warmup: int = 2000
    """steps of linear warm-up"""
    schedule: str = "cosine"
    """cosine, linear, or wsd: stay at the peak and fall over the last --decay of the steps, for runs to be prolonged"""
    decay: float = 0.2
    """share of the steps over which wsd falls"""
    optimizer: str = "adamw"
    """adamw; or atan2, Adam without an epsilon, for losses or weights of unusual scale"""
    weight_decay: float = 0.1
    """the optimizer's decay, on matrices of the blocks only"""
    beta1: float = 0.9
    """decay of the optimizer's first moment"""
    beta2: float = 0.95
    """decay of its second moment"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 turns clipping off"""
    ema: float = 0.0
    """decay of an average of the weights, evaluated and saved beside them, such as 0.999; 0: none. For a schedule that
    stays high (wsd), or noisy small batches"""
    z_loss: float = 0.0
    """weight of the squared log-partition in the loss, 1e-4 where logits drift in long bfloat16 runs"""
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
    gradient_window: int = 0
    """how many level applications at the end of the replayed step have a gradient; 2 is the one-step gradient of the
    HRM paper, faster and less exact; 0: all"""
    window_warmup: float = 0.0
    """share of the optimizer steps in which that window grows from 2 to its size: cheaper early steps"""
    max_rise: float = 0.0
    """stop when the conversational validation loss has risen by this many nats over its start; 0: never"""
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
    parallel: str = "auto"
    """under torchrun: ddp (replicas), or fsdp (parameters, gradients and optimizer state in shards); auto is ddp"""
    timeout: float = 10.0
    """minutes that a process waits for the others before it gives up"""
    dry_run: bool = False
    """build everything, say what the run would need in memory and time, and leave"""
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
    max_minutes: float = 0.0
    """save and leave after this long, as on Ctrl-C; 0: no limit"""

    # Fields that change nothing about the weights a run ends with, so a resumed run may differ in them.
    FREE = frozenset(
        "out resume overwrite log_every eval_every eval_windows save_every keep_last sample_prompt sample_tokens track "
        "init_from parallel timeout dry_run recompute max_minutes".split()
    )
    # Fields that have no meaning in a stage, and so no flag.
    NOT_FOR: ClassVar[dict[str, frozenset[str]]] = {
        "text": frozenset("stage tokens_per_batch train_on_prompt epochs max_rise".split()),
        "chat": frozenset("stage batch_size config".split()),
    }

    def __post_init__(self):
        faults = list(self._faults())
        if faults:
            raise ValueError("impossible training options:\n  " + "\n  ".join(faults))

    def _faults(self):
        positive = (
            "batch_size accumulation gradient_steps log_every eval_every eval_windows save_every keep_last".split()
        )
        if not self.epochs:
            positive.insert(0, "steps")
        if self.is_chat:
            positive.append("tokens_per_batch")
        for name in positive:
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is below its minimum 1"
        if self.steps and self.epochs:
            yield f"--steps {self.steps} and --epochs {self.epochs:g} each say how long the run is; give one of them"
        if self.gradient_window and (self.gradient_window < 2 or self.gradient_steps > 1 or self.gradient != "replay"):
            yield (
                f"--gradient-window {self.gradient_window} must be at least 2 (or 0, all), with --gradient replay and "
                "--gradient-steps 1"
            )
        if self.window_warmup and (self.gradient_steps > 1 or self.gradient != "replay"):
            yield f"--window-warmup {self.window_warmup:g} needs --gradient replay and --gradient-steps 1"
        if not 0 <= self.ema < 1:
            yield f"--ema {self.ema} is outside 0 <= ema < 1; 0 keeps no average"
        for name in ("warmup", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is negative"
        if self.seed >= 2**63:
            yield f"--seed {self.seed} is not below 2^63"
        if self.overwrite and self.resume == "auto":
            yield "--overwrite and --resume auto contradict each other; give one of them"
        if self.config and self.init_from:
            yield "--config and --init-from each say what the model is; give one of them"
        rates = "lr min_lr head_lr embed_lr weight_decay grad_clip z_loss epochs max_rise max_minutes"
        for name in rates.split():
            if not 0 <= getattr(self, name) < math.inf:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is not a finite number of at least 0"
        if not 0 < self.timeout < math.inf:
            yield f"--timeout {self.timeout} is not a finite number of minutes above 0"
        if self.min_lr > self.lr:
            yield f"--min-lr {self.min_lr} is above --lr {self.lr}"
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)} is outside 0 <= {name} < 1"
        for name in ("explore", "depth_warmup", "decay", "window_warmup"):
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
        if self.stage not in self.stage_names():
            yield f"stage {self.stage!r} is none of {', '.join(self.stage_names())}"
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                yield f"--{name} {getattr(self, name)!r} is none of {', '.join(allowed)}"
        if not (self.depth in ("auto", "random", "head") or self.fixed_depth):
            yield f"--depth {self.depth!r} is none of auto, random, head, fixed:N (N at least 1)"
        for tracker in self.track:
            if tracker not in ("tensorboard", "wandb"):
                yield f"--track {tracker!r} is none of tensorboard, wandb"

    @classmethod
    def stage_names(cls) -> tuple[str, ...]:
        """Stages that these options are for."""
        return tuple(STAGES)

    @property
    def is_chat(self) -> bool:
        """Whether the stage trains on conversations."""
        return self.stage not in ("pretrain", "continual")

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
    def of_recipe(cls, recipe: str, stage: str = "pretrain", **changes: Any) -> TrainConfig:
        """The fields of a stage's recipe, replaced by `changes`.

        Raises:
            ValueError: no recipe of that name, or impossible values.
        """
        if recipe not in RECIPES:
            raise ValueError(f"--recipe {recipe!r} is none of {', '.join(RECIPES)}")
        values = {"stage": stage, "recipe": recipe, "out": default_out(stage, recipe), **STAGES[stage][recipe]}
        if changes.get("epochs") and "steps" not in changes:
            values["steps"] = 0
        if changes.get("steps") and "epochs" not in changes:
            values["epochs"] = 0.0
        return cls(**values | changes)

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

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate leaves its peak."""
        return max(self.warmup, self.steps - round(self.decay * self.steps)) if self.schedule == "wsd" else self.warmup

    def differences(self, other: dict[str, Any], step: int) -> list[str]:
        """Fields that give a run of values `other` other weights from `step` on, as "--flag was X, is Y"."""
        # what an older version did not know was at its default
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(self)}
        other = defaults | other
        free = set(self.FREE)
        if not self.is_chat and self.batch_size * self.accumulation == other["batch_size"] * other["accumulation"]:
            free |= {"batch_size", "accumulation"}  # the same rows in every step
        former = replace(self, steps=other["steps"] or 1, epochs=0.0)
        if self.schedule == "wsd" and step <= min(self.decay_start, former.decay_start):
            free |= {"steps", "epochs"}  # the rate is where it would be in a run of either length
        return [
            f"--{name.replace('_', '-')} was {other[name]!r}, is {getattr(self, name)!r}"
            for name in defaults
            if name not in free and other[name] != getattr(self, name)
        ]


PUBLISHED_BIAS = 0.35

_CHOICES = {
    "halting": ("policy", "gain", "expected", "q", "none", "published"),
    "decisions": ("prefix", "row"),
    "resume": ("never", "auto"),
    "gradient": ("replay", "published"),
    "schedule": ("cosine", "linear", "wsd"),
    "optimizer": ("adamw", "atan2"),
    "parallel": ("auto", "ddp", "fsdp"),
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

# Conversations are few: a run is as long as some passes over them, and evaluated often enough to see it turn.
_CHAT = dict(weight_decay=0.01, depth_warmup=0.0, sample_prompt="What is a list?")
_OFTEN = dict(eval_every=50, save_every=50)
_TINY = _CHAT | _OFTEN | dict(tokens_per_batch=512, warmup=10)
_SMALL = _CHAT | _OFTEN | dict(tokens_per_batch=4096, warmup=50, dropout=0.1, eval_windows=64)
# The published fine-tuning: batches of 32 rows of 512 tokens, rate 6e-6, decay 0.01, 500 steps of warm-up.
_BASE = _CHAT | dict(tokens_per_batch=32 * 512, warmup=500, dropout=0.1, lr=6e-6, min_lr=6e-7, epochs=3.0)
_BASE |= dict(eval_windows=256, eval_every=250, save_every=250)
_FINE_TUNING = {
    # As in pretraining, many small steps, at a higher rate: whether an answer is about its question comes late.
    "tiny": _TINY | dict(steps=150, lr=3e-3, min_lr=1e-4),
    "small": _SMALL | dict(epochs=2.0, lr=1e-4, min_lr=1e-5),
    "base": _BASE,
}
_IDENTITY = _FINE_TUNING | {"tiny": _FINE_TUNING["tiny"] | dict(steps=1000, eval_every=250, save_every=250)}
# The published calibration: 5e-7 to 1e-7, 50 steps of warm-up, ended by a rise of 0.15 nats.
_CALIBRATION = {
    # Of so small a model the identity stage leaves little of the conversations; they come back at a larger rate.
    "tiny": _TINY | dict(steps=400, lr=1e-3, min_lr=1e-4, max_rise=0.15, eval_every=100, save_every=100),
    "small": _SMALL | dict(steps=200, lr=2e-5, min_lr=4e-6, max_rise=0.15),
    "base": _BASE | dict(epochs=0.0, steps=1000, lr=5e-7, min_lr=1e-7, warmup=50, max_rise=0.15),
}
STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "pretrain": RECIPES,
    "converse": _FINE_TUNING,
    "instruct": _FINE_TUNING,
    "identity": _IDENTITY,
    "calibrate": _CALIBRATION,
}


def default_out(stage: str, recipe: str) -> str:
    """Where a stage's run goes by default."""
    return f"runs/{recipe}" if stage == "pretrain" else f"runs/{recipe}-{stage}"


def default_start(stage: str, recipe: str) -> str:
    """The run that a stage goes on from by default: the stage before it."""
    return default_out(stage_before(stage), recipe) if stage != "pretrain" else ""


def stage_before(stage: str) -> str:
    """The stage that comes before one that is not the first."""
    names = list(STAGES)
    return names[names.index(stage) - 1]
