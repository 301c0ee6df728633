"""HRMConfig with Hugging Face's interface."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from ..config import END_OF_TEXT, MODEL_TYPE, HRMConfig

_OURS = {field.name: field.default for field in fields(HRMConfig)}


class CosmicFishHRMConfig(PretrainedConfig):
    """Every field of HRMConfig, beside Hugging Face's own.

    Hugging Face's names for some of them work too: hidden_size, num_attention_heads, num_key_value_heads,
    max_position_embeddings, intermediate_size, tie_word_embeddings.

    Raises:
        ValueError: lists every field that is wrong, as HRMConfig does; or the folder is of hrm quantize.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012  (the base class has it like this)
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tie_embeddings",
    }

    keys_to_ignore_at_inference = ["past_key_values", "cache", "executed_steps", "steps_taken", "q_logits"]  # noqa: RUF012
    """Outputs that Trainer leaves out of predictions: what it gives to compute_metrics are logits."""

    def __init__(self, **given: Any):
        if "quantization" in given:  # transformers would call narrow weights unexpected, and draw new ones
            raise ValueError(
                f"the folder was written by hrm quantize ({given['quantization']}), and transformers cannot read it; "
                "take hrm_model.load_model, or hrm convert its float32 source --to hf"
            )
        for theirs, ours in self.attribute_map.items():
            if theirs in given:
                value = given.pop(theirs)
                given.setdefault(ours, value)
        if "intermediate_size" in given:
            width = given.pop("intermediate_size")
            given.setdefault("mlp_hidden", width)
        values = {name: given.pop(name, default) for name, default in _OURS.items()}
        HRMConfig(**values)
        for name, value in values.items():
            setattr(self, name, value)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = given.setdefault(name, END_OF_TEXT)
            if token == END_OF_TEXT >= self.vocab_size:  # a vocabulary that is not GPT-2's: no id of it
                given[name] = None
        super().__init__(tie_word_embeddings=self.tie_embeddings, **given)

    def hrm(self) -> HRMConfig:
        """The same as an HRMConfig."""
        return HRMConfig(**{name: getattr(self, name) for name in _OURS})

    @classmethod
    def of(cls, config: HRMConfig, **given: Any) -> CosmicFishHRMConfig:
        """From an HRMConfig."""
        return cls(**{name: getattr(config, name) for name in _OURS}, **given)

    # what an HRMConfig says of itself, from the same fields
    kv_heads = HRMConfig.kv_heads
    head_dim = HRMConfig.head_dim
    hidden = HRMConfig.hidden
    intermediate_size = HRMConfig.hidden
    blocks_per_step = HRMConfig.blocks_per_step
    head_is_trained = HRMConfig.head_is_trained

    @property
    def num_hidden_layers(self) -> int:
        """Blocks with parameters of their own; a forward pass applies those of the core many times."""
        return self.n_input_layers + self.n_output_layers + self.hrm_H_layers + self.hrm_L_layers
