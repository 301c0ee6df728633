"""HRMConfig: every number that shapes a model. The published config.json keys plus a few of our own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

HALTING_OBJECTIVES = ("published", "none", "policy", "gain", "expected", "q")
FORWARD_DTYPES = ("float32", "bfloat16", "float16")
LOSSES = ("softmax", "stablemax")
INITS = ("normal", "truncated")
VOCAB_BLOCK = 64
"""Rows by which a character model's vocabulary grows."""
END_OF_TEXT = 50256

# What Hugging Face and the published repository put into config.json beside the model's own keys: accepted, not used.
_HUGGING_FACE_KEYS = frozenset(
    "model_type architectures torch_dtype dtype auto_map transformers_version bos_token_id eos_token_id pad_token_id "
    "tie_word_embeddings use_cache is_decoder return_dict use_return_dict name_or_path _name_or_path initializer_range "
    "output_attentions output_hidden_states _attn_implementation_autoset task_specific_params id2label label2id "
    "num_labels problem_type tokenizer_class is_encoder_decoder torchscript use_bfloat16 tf_legacy_loss pruned_heads "
    "chunk_size_feed_forward cross_attention_hidden_size add_cross_attention tie_encoder_decoder max_length min_length "
    "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task "
    "prefix sep_token_id decoder_start_token_id".split()
)
_MINIMUM = {
    "vocab_size": 1,
    "n_embd": 1,
    "block_size": 1,
    "n_head": 1,
    "n_kv_head": 1,
    "n_input_layers": 0,
    "n_output_layers": 0,
    "hrm_H_layers": 0,
    "hrm_L_layers": 0,
    "hrm_H_cycles": 1,
    "hrm_L_cycles": 1,
    "hrm_max_steps": 1,
    "hrm_H_grown": 0,
    "hrm_L_grown": 0,
}
_BOOLEANS = ("bias", "use_rotary", "use_gqa", "use_swiglu", "tie_embeddings")
_NUMBERS = ("hrm_exploration_prob", "dropout", "eps", "halt_bias", "embed_scale")


@dataclass(frozen=True)
class HRMConfig:
    """Shape and rules of one model. Defaults are the published 82.77 M-parameter model, without dropout.

    Raises:
        ValueError: lists every field that is wrong, each with its limit and a remedy.
    """

    vocab_size: int = 50304
    """Rows of the embedding. GPT-2's 50,257 ids, padded to a multiple of 64."""
    n_embd: int = 448
    """Channels of the residual stream."""
    block_size: int = 512
    """Longest sequence, in tokens."""
    n_head: int = 8
    """Query heads; divides n_embd."""
    n_kv_head: int = 4
    """Key/value heads; divides n_head. Read only where use_gqa is on."""
    n_input_layers: int = 6
    """Pre-norm transformer blocks before the core."""
    n_output_layers: int = 6
    """Pre-norm transformer blocks after the core."""
    hrm_H_layers: int = 4
    """Post-norm blocks of the slow (H) level."""
    hrm_L_layers: int = 4
    """Post-norm blocks of the fast (L) level."""
    hrm_H_cycles: int = 2
    """H updates in one step."""
    hrm_L_cycles: int = 2
    """L updates before each H update."""
    hrm_max_steps: int = 16
    """Most steps a row may take; S in the formulas."""
    hrm_exploration_prob: float = 0.1
    """gradient="published" in training only: chance, drawn at each step, that halting waits for a random step."""
    dropout: float = 0.0
    """On attention weights, branch outputs and the embedding, in training. Published recipe: 0.1."""
    bias: bool = False
    """Biases in the blocks' projections."""
    use_rotary: bool = True
    """Rotary positions; else a learned table wpe."""
    use_gqa: bool = True
    """Share key/value heads among query heads; else n_kv_head counts as n_head."""
    use_swiglu: bool = True
    """SwiGLU MLP; else Linear, GELU, Linear."""
    eps: float = 1e-5
    """RMSNorm's epsilon."""
    forward_dtype: str = "bfloat16"
    """Kept for published files; the caller's autocast decides the precision."""
    halt_bias: float = 0.35
    """Added to q_halt outside training; positive halts earlier. 0 for heads that were trained to decide."""
    halting: str = "published"
    """Objective the halting head was trained with; "published" is none at all."""
    mlp_hidden: int | None = None
    """MLP width; null means 4 n_embd."""
    tie_embeddings: bool = True
    """lm_head shares wte's weight."""
    embed_scale: float = 1.0
    """Factor on the token embedding."""
    loss: str = "softmax"
    """Cross-entropy's link function: softmax, or stablemax, a character model's (output_head.py)."""
    init: str = "normal"
    """Initial weights: normal, as published, or truncated, those of the HRM paper."""
    n_chars: int | None = None
    """Of a model of characters, the ids in use; rows of the vocabulary from there on are spare. null: not of them."""
    hrm_H_grown: int = 0
    """Of the H level's layers, how many at its end were added later, each behind a gate."""
    hrm_L_grown: int = 0
    """The same of the L level."""

    def __post_init__(self):
        faults = list(self._faults())
        if faults:
            raise ValueError("impossible configuration:\n  " + "\n  ".join(faults))

    @property
    def kv_heads(self) -> int:
        """Key/value heads in effect."""
        return self.n_kv_head if self.use_gqa else self.n_head

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """MLP width in effect."""
        return self.mlp_hidden or 4 * self.n_embd

    @property
    def blocks_per_step(self) -> int:
        """Block applications in one HRM step."""
        return self.hrm_H_cycles * (self.hrm_L_cycles * self.hrm_L_layers + self.hrm_H_layers)

    @property
    def head_is_trained(self) -> bool:
        """Whether the halting head learned to decide: neither "none" nor "published" gave it anything to learn from."""
        return self.halting not in ("none", "published")

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
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                yield f"{name} {getattr(self, name)!r} is not true or false"
        for name in _NUMBERS:
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value):
                yield f"{name} {value!r} is not a finite number"
            else:
                sound.add(name)
        if self.mlp_hidden is not None and (not is_int(self.mlp_hidden) or self.mlp_hidden < 1):
            yield f"mlp_hidden {self.mlp_hidden!r} is neither null (4 n_embd) nor an integer of at least 1"
        if {"n_embd", "n_head"} <= sound:
            yield from self._head_faults(sound)
        if "dropout" in sound and not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout} is outside 0 <= dropout < 1"
        if "hrm_exploration_prob" in sound and not 0 <= self.hrm_exploration_prob <= 1:
            yield f"hrm_exploration_prob {self.hrm_exploration_prob} is outside 0..1"
        if "eps" in sound and self.eps <= 0:
            yield f"eps {self.eps} is not positive; 1e-5 is usual"
        for name, allowed in (
            ("forward_dtype", FORWARD_DTYPES),
            ("halting", HALTING_OBJECTIVES),
            ("loss", LOSSES),
            ("init", INITS),
        ):
            if getattr(self, name) not in allowed:
                yield f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}"
        yield from self._character_faults(sound)

    def _character_faults(self, sound):
        n = self.n_chars
        if n is None:
            if self.loss == "stablemax":
                yield "loss 'stablemax' is a character model's; set n_chars, or use loss 'softmax'"
        elif not is_int(n) or n < 1 or ("vocab_size" in sound and n > self.vocab_size):
            yield f"n_chars {n!r} is neither null nor an integer of 1 to vocab_size {self.vocab_size}"
        elif self.tie_embeddings is True or self.vocab_size % VOCAB_BLOCK:
            yield (
                f"n_chars {n} needs tie_embeddings false and a vocab_size that is a multiple of {VOCAB_BLOCK}, "
                f"got {self.vocab_size}"
            )
        for level in ("H", "L"):
            grown, layers = f"hrm_{level}_grown", f"hrm_{level}_layers"
            if {grown, layers} <= sound and getattr(self, grown) > getattr(self, layers):
                yield f"{grown} {getattr(self, grown)} is over {layers} {getattr(self, layers)}, which counts them too"

    def _head_faults(self, sound):
        if self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            nearest = [str(n) for n in (below, below + self.n_head) if n > 0]
            yield (f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; nearest: {', '.join(nearest)}")
        elif self.use_rotary is True and self.head_dim % 2:
            yield (
                f"n_embd / n_head = {self.head_dim} is odd, and rotary positions rotate pairs; "
                f"use n_embd {self.n_embd + self.n_head} or use_rotary false"
            )
        if self.use_gqa is True and "n_kv_head" in sound and self.n_head % self.n_kv_head:
            divisors = ", ".join(str(d) for d in range(1, self.n_head + 1) if self.n_head % d == 0)
            yield f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}; use one of {divisors}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HRMConfig:
        """Config from a config.json's content. Hugging Face's own keys are accepted and left out.

        Raises:
            ValueError: unknown keys (with the nearest known one), another model_type, or impossible values.
        """
        known = {f.name for f in fields(cls)}
        model_type = values.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(f"config.json is of model_type {model_type!r}; this package reads {MODEL_TYPE!r}")
        unknown = [key for key in values if key not in known and key not in _HUGGING_FACE_KEYS]
        if unknown:
            raise ValueError("; ".join(_unknown_key(key, known) for key in unknown))
        kept = {key: value for key, value in values.items() if key in known}
        if "tie_embeddings" not in kept and "tie_word_embeddings" in values:
            kept["tie_embeddings"] = values["tie_word_embeddings"]
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: every field, and the keys Hugging Face looks for."""
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["HRMForCausalLM"],
            "torch_dtype": "float32",
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
            **asdict(self),
        }

    @classmethod
    def preset(cls, name: str, **changes: Any) -> HRMConfig:
        """The configuration called `name` (of PRESETS), with fields replaced by `changes`.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


def is_int(value: Any) -> bool:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unknown_key(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown configuration key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


MODEL_TYPE = "cosmicfish_hrm"

# halt_bias 0 and halting "none": models of our own start with a head that nothing has trained yet.
_OURS = {"halting": "none", "halt_bias": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    # Learns from real text within minutes on two CPU cores.
    "tiny": _OURS
    | dict(n_embd=128, block_size=128, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
    | dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=4),
    # An overnight run on a laptop, minutes on a GPU.
    "small": _OURS
    | dict(n_embd=256, block_size=256, n_head=4, n_kv_head=2, n_input_layers=2, n_output_layers=2)
    | dict(hrm_H_layers=2, hrm_L_layers=2, hrm_max_steps=8),
    # The published 82.77 M parameters.
    "base": _OURS | {},
}
# Characters: no blocks outside the core, an output head of its own, sqrt(n_embd) on the embedding, N x T = 2 x 2.
_CHARACTERS = _OURS | dict(vocab_size=VOCAB_BLOCK, n_chars=1, tie_embeddings=False, init="truncated", use_gqa=False)
_CHARACTERS |= dict(n_input_layers=0, n_output_layers=0, hrm_H_cycles=2, hrm_L_cycles=2, hrm_max_steps=8)
PRESETS |= {
    "characters": _CHARACTERS
    | dict(n_embd=256, n_head=8, mlp_hidden=640, hrm_H_layers=3, hrm_L_layers=3, block_size=80, embed_scale=16.0),
    "characters-tiny": _CHARACTERS
    | dict(n_embd=128, n_head=4, mlp_hidden=320, hrm_H_layers=1, hrm_L_layers=1, block_size=80, embed_scale=128**0.5),
}
