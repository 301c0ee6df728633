"""HybridConfig: every number that shapes a controller over a frozen language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..config import HRMConfig, is_int, is_number

INJECTORS = ("grb", "cab", "none")
LOSSES = ("softmax", "stablemax")
_MINIMUM = {
    "d_h": 1,
    "h_layers": 1,
    "l_layers": 1,
    "n_heads": 1,
    "inner_T": 1,
    "segments": 1,
    "memory_tokens": 1,
    "lora_rank": 0,
    "lora_layers": 0,
}
_NUMBERS = ("gate_init", "logit_bias_init", "dropout", "lora_alpha")


@dataclass(frozen=True)
class HybridConfig:
    """Shape of the controller, its injector, and LoRA. A segment is one step of HRMCore with a single H update.

    Raises:
        ValueError: lists every field that is wrong, each with its limit.
    """

    d_h: int = 512
    """Channels of the latent state."""
    h_layers: int = 4
    """Blocks of the slow (H) level."""
    l_layers: int = 4
    """Blocks of the fast (L) level."""
    n_heads: int = 8
    """Attention heads of the blocks; divides d_h."""
    mlp_hidden: int | None = None
    """Width of the blocks' SwiGLU; null is 8/3 d_h, rounded up to a multiple of 64: as many weights as a plain MLP of
    4 d_h has."""
    inner_T: int = 3
    """L micro-steps of a segment; all but the last run without gradient."""
    segments: int = 3
    """Segments in training, each with a loss of its own."""
    injector: str = "grb"
    """grb (gated residual bias), cab (cross-attention bridge) or none: no controller, the language model alone."""
    memory_tokens: int = 4
    """m, the tokens made of z_H that cab attends to."""
    gate_init: float = 0.0
    """The injector's raw gate at the start; sigmoid(0) = 0.5."""
    logit_bias_head: bool = True
    """A gated bias on the vocabulary's logits, linear in z_H."""
    logit_bias_init: float = -2.0
    """Its raw gate at the start; sigmoid(-2) = 0.12."""
    use_act: bool = False
    """Let the halting head stop a row before its last segment; else all segments run."""
    loss: str = "softmax"
    """softmax or stablemax cross-entropy."""
    vocab_ignore_index: int = -100
    """Label of a position that no loss looks at."""
    dropout: float = 0.0
    """In the controller's blocks, in training."""
    lora_rank: int = 0
    """Rank of adapters on the language model's linear maps; 0: none, it stays as it is."""
    lora_alpha: float = 16.0
    """Their scale: alpha / rank."""
    lora_layers: int = 4
    """How many of the uppermost layers get adapters; 0: all."""
    language_model: Mapping[str, Any] | None = None
    """What the controller is for: family, width, layers, vocabulary, digest of weights. HybridModel fills it in."""

    def __post_init__(self):
        faults = list(self._faults())
        if faults:
            raise ValueError("impossible configuration of the hybrid:\n  " + "\n  ".join(faults))

    @property
    def hidden(self) -> int:
        """MLP width in effect."""
        return self.mlp_hidden or -(-8 * self.d_h // 3 // 64) * 64

    def core_config(self, vocab_size: int = 1) -> HRMConfig:
        """What HRMCore is made of: a latent token, inner_T L micro-steps and one H update a step, `segments` steps."""
        return HRMConfig(
            vocab_size=vocab_size, n_embd=self.d_h, block_size=1, n_head=self.n_heads, n_kv_head=self.n_heads,
            use_gqa=False, use_rotary=False, n_input_layers=0, n_output_layers=0, hrm_H_layers=self.h_layers,
            hrm_L_layers=self.l_layers, hrm_H_cycles=1, hrm_L_cycles=self.inner_T, hrm_max_steps=self.segments,
            mlp_hidden=self.hidden, dropout=self.dropout, halting="policy" if self.use_act else "none", halt_bias=0.0,
        )  # fmt: skip

    def _faults(self):
        sound = set()
        for name, least in _MINIMUM.items():
            value = getattr(self, name)
            if not is_int(value):
                yield f"{name} {value!r} is not an integer"
            elif value < least:
                yield f"{name} {value} is below its minimum {least}"
            else:
                sound.add(name)
        if {"d_h", "n_heads"} <= sound and self.d_h % self.n_heads:
            yield f"d_h {self.d_h} is not divisible by n_heads {self.n_heads}; a divisor of it, such as 1, 2 or 4, is"
        if self.mlp_hidden is not None and (not is_int(self.mlp_hidden) or self.mlp_hidden < 1):
            yield f"mlp_hidden {self.mlp_hidden!r} is neither null (8/3 d_h) nor an integer of at least 1"
        for name in _NUMBERS:
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value):
                yield f"{name} {value!r} is not a finite number"
            elif name == "dropout" and not 0 <= value < 1:
                yield f"dropout {value} is outside 0 <= dropout < 1"
            elif name == "lora_alpha" and value <= 0:
                yield f"lora_alpha {value} is not positive; 16 is usual"
        for name in ("logit_bias_head", "use_act"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} {getattr(self, name)!r} is not true or false"
        for name, allowed in (("injector", INJECTORS), ("loss", LOSSES)):
            if getattr(self, name) not in allowed:
                yield f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}"
        if not is_int(self.vocab_ignore_index) or self.vocab_ignore_index >= 0:
            yield f"vocab_ignore_index {self.vocab_ignore_index!r} has to be a negative integer: others are tokens"
        if self.use_act and "segments" in sound and self.segments < 2:
            yield f"use_act needs at least 2 segments to choose from, got {self.segments}"
        if self.use_act and self.injector == "none":
            yield "use_act decides for a controller, and injector 'none' has none; use grb or cab"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridConfig:
        """Config from what `to_dict` gave. Raises ValueError for unknown keys and impossible values."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known - {"model_type"})
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE or unknown:
            what = f"unknown keys {', '.join(unknown)}" if unknown else f"model_type {values['model_type']!r}"
            raise ValueError(f"no configuration of a hybrid ({what}); expected model_type {MODEL_TYPE!r}")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's config.json holds."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


MODEL_TYPE = "hrm_hybrid"
