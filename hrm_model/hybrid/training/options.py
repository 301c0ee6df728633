"""What a run of train/hybrid.py is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...halting import price_faults
from ...sampling import Sampling
from ...training.recipes import TrainConfig
from ..config import HybridConfig

SYSTEMS = ("hybrid", "lm", "hrm")
_SHAPE = "d_h h_layers l_layers n_heads inner_T segments memory_tokens gate_init use_act loss dropout lora_rank"
_SHAPE += " lora_alpha lora_layers"


@dataclass
class HybridRun(TrainConfig):
    """A run: TrainConfig's options where they have a meaning here, and the hybrid's own.

    Raises:
        ValueError: lists every field that is wrong.
    """

    stage: str = "hybrid"
    """hybrid"""
    recipe: str = "hybrid"
    """hybrid"""
    config: str = ""
    """a .json or .yaml file of these flags, by their names; flags on the command line win"""
    init_from: str = ""
    """start from these weights: a run of this script, or a checkpoint"""
    out: str = "runs/hybrid"
    """directory of the run"""
    resume: str = "never"
    """auto: continue the newest intact checkpoint of --out, if there is one; or the directory of a run"""
    model_name: str = ""
    """the language model: a directory, or a name on the hub"""
    tokenizer: str = ""
    """where the tokenizer is; default: with the language model"""
    pad_token: str = ""
    """the token that pads, where the tokenizer does not say"""
    system: str = "hybrid"
    """hybrid; or a baseline: lm (the language model alone, with --lora-rank adapters), hrm (no language model)"""
    tasks: str = "toy_addition"
    """names with commas between: toy_addition, toy_addition:DIGITS, or any of reasoning-gym, such as basic_arithmetic,
    chain_sum, simple_equations, gsm_symbolic"""
    d_h: int = 512
    """channels of the controller"""
    h_layers: int = 4
    """blocks of the slow level"""
    l_layers: int = 4
    """blocks of the fast level"""
    n_heads: int = 8
    """their attention heads"""
    inner_T: int = 3
    """L micro-steps of a segment, the last with gradient"""
    segments: int = 3
    """segments in training, each with a loss"""
    injector: str = "grb"
    """grb (gated residual bias) or cab (cross-attention bridge)"""
    memory_tokens: int = 4
    """tokens made of z_H, for cab"""
    gate_init: float = 0.0
    """the injector's raw gate at the start; 0 is half open"""
    no_logit_bias: bool = False
    """leave out the gated bias on the vocabulary"""
    use_act: bool = False
    """train a head that stops a row before its last segment"""
    act_penalty: float = 0.01
    """what a segment costs the head, nats"""
    loss: str = "softmax"
    """softmax or stablemax cross-entropy"""
    lora_rank: int = 0
    """rank of adapters on the language model's upper layers; 0: none"""
    lora_alpha: float = 16.0
    """their scale times the rank"""
    lora_layers: int = 4
    """how many of the uppermost layers have adapters; 0: all"""
    steps: int = 50_000
    """optimizer steps"""
    controller_warmup: int = 200
    """steps in which the injector learns alone what all answers have in common; taught that, too, the controller would
    end up thinking the same of every prompt"""
    lr: float = 3e-4
    """peak learning rate"""
    warmup: int = 200
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices"""
    eval_every: int = 500
    """steps between evaluations"""
    eval_n: int = 200
    """held-out examples, of all tasks together; none of them, nor one with its numbers exchanged, is trained on"""
    eval_segments: int = 0
    """also answer them with this many segments, more than in training; 0: no"""
    max_new_tokens: int = 64
    """longest answer, tokens"""
    decode_temperature: float = 1.0
    """divides the logits when answering"""
    decode_top_p: float = 0.0
    """likeliest tokens that together reach it; 0 is greedy"""
    decode_top_k: int = 0
    """keep the k likeliest tokens; 0 keeps all"""
    log_samples_every: int = 500
    """steps between answers shown as spot checks; 0: none"""
    save_every: int = 500
    """steps between checkpoints"""
    sample_tokens: int = 0
    """0"""
    halting: str = "none"
    """none; see use_act"""
    data: list[str] = field(default_factory=list)
    """none"""

    FREE = TrainConfig.FREE | frozenset(
        "config model_name tokenizer eval_segments max_new_tokens decode_temperature decode_top_p decode_top_k "
        "log_samples_every".split()
    )
    HIDDEN: ClassVar[frozenset[str]] = frozenset(
        "stage recipe data data_weights epochs tokens_per_batch train_on_prompt halting depth decisions step_price "
        "target_steps explore depth_warmup gradient gradient_steps gradient_window window_warmup max_rise compile "
        "recompute parallel timeout dry_run eval_windows sample_prompt sample_tokens z_loss ema".split()
    )
    """Fields that have no meaning here, and so no flag."""

    @classmethod
    def stage_names(cls) -> tuple[str, ...]:
        return ("hybrid",)

    @property
    def is_chat(self) -> bool:
        return False

    @property
    def task_names(self) -> list[str]:
        """--tasks, one by one."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn. Raises ValueError for what is no such way."""
        if self.decode_temperature == 0 or self.decode_top_p == 0:
            return Sampling(temperature=0)
        return Sampling(self.decode_temperature, self.decode_top_k or None, self.decode_top_p)

    @property
    def shape(self) -> HybridConfig:
        """The controller's configuration. Raises ValueError."""
        values = {name: getattr(self, name) for name in _SHAPE.split()}
        injector = "none" if self.system == "lm" else self.injector
        return HybridConfig(**values, injector=injector, logit_bias_head=not self.no_logit_bias)

    def _faults(self):
        yield from super()._faults()
        for make in (lambda: self.shape, lambda: self.sampling):
            try:
                make()
            except ValueError as error:
                yield str(error)
        if not self.model_name:
            yield "--model-name is missing: the language model's directory, or its name on the hub"
        if self.system not in SYSTEMS:
            yield f"--system {self.system!r} is none of {', '.join(SYSTEMS)}"
        if self.injector not in ("grb", "cab"):
            yield f"--injector {self.injector!r} is none of grb, cab; for the language model alone use --system lm"
        if self.system == "lm" and not self.lora_rank:
            yield "--system lm trains adapters alone, and --lora-rank 0 has none; give a rank, such as 8"
        for name, least in (
            ("eval_n", 1),
            ("max_new_tokens", 1),
            ("eval_segments", 0),
            ("log_samples_every", 0),
            ("controller_warmup", 0),
        ):
            if getattr(self, name) < least:
                yield f"--{name.replace('_', '-')} {getattr(self, name)} is below its minimum {least}"
        yield from (fault.replace("--step-price", "--act-penalty") for fault in price_faults(self.act_penalty, None))
