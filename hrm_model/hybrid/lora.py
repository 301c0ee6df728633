"""Low-rank adapters on the language model's upper layers, by the peft package.

    W x + (alpha / r) B A x,   A [r, in] random, B [out, r] zero at the start

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.
"""

from __future__ import annotations

import re

from torch import nn

from .config import HybridConfig
from .language_model import LanguageModel, need

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


def add_adapters(language: LanguageModel, config: HybridConfig) -> dict[str, nn.Parameter]:
    """Put adapters on every linear map of the uppermost `lora_layers` layers; returns their parameters by name.

    Raises:
        ValueError: peft is missing, or there are fewer layers.
    """
    peft = need("peft", "lora")
    if config.lora_layers > language.n_layers:
        raise ValueError(
            f"lora_layers {config.lora_layers} is over the {language.n_layers} layers of the language model; "
            "0 takes all"
        )
    first = language.n_layers - (config.lora_layers or language.n_layers)
    kinds = (nn.Linear, need("transformers", "hf").pytorch_utils.Conv1D)
    names = [
        name for name, module in language.model.named_modules()
        if isinstance(module, kinds) and (found := _LAYER.search(name)) and int(found[1]) >= first
    ]  # fmt: skip
    is_conv = any(not isinstance(language.model.get_submodule(name), nn.Linear) for name in names)
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names, lora_dropout=0.0, fan_in_fan_out=is_conv
    )
    peft.inject_adapter_in_model(settings, language.model)
    adapters = {name: p for name, p in language.model.named_parameters() if "lora_" in name}
    for p in adapters.values():
        p.requires_grad_(True)
    language.model.eval()
    return adapters
