"""The frozen language model: where its final norm and head are, its last hidden states before that norm, its cache.

Families are told by their module structure, not by a class name, so that a model of another name but of the same build
works:

    Llama, Mistral, Qwen2, Qwen3    model.norm                    lm_head
    GPT-NeoX                        gpt_neox.final_layer_norm     embed_out, or lm_head in newer releases
    GPT-2                           transformer.ln_f              lm_head

What a family calls its last hidden states may be before or after the norm; here they are what goes into it, read by a
hook. That logits are head(norm(h)) and nothing else is tried on two tokens before a model is accepted.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STRUCTURES = {
    "llama": ("model", "norm", "lm_head"),
    "gpt_neox": ("gpt_neox", "final_layer_norm", "embed_out lm_head"),
    "gpt2": ("transformer", "ln_f", "lm_head"),
}
"""Family: (the transformer, its final norm, the head, by one name or another)."""
LIKE = {"llama": "Llama, Mistral, Qwen2, Qwen3", "gpt_neox": "GPT-NeoX", "gpt2": "GPT-2"}
SAMPLED = 1024
"""Values of each tensor that the digest of the weights looks at."""


class LanguageModel:
    """A causal language model of transformers, frozen, in eval mode. No module: what holds it does not train it.

    Args:
        model: an instance of a ...ForCausalLM class.

    Raises:
        ValueError: no norm or head is found, or its logits are not head(norm(h)).
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()
        self.family, self.base, self.norm, self.head = _find_parts(model)
        config = model.config
        self.width, self.vocab_size = self.head.weight.shape[1], self.head.weight.shape[0]
        self.n_layers = int(config.num_hidden_layers)
        self.window = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        known = inspect.signature(self.base.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"  # transformers 5.2x renamed it
        self._check_logits()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.head.weight.dtype

    def encode(self, ids_BT: Tensor, mask_BT: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """Run the transformer; returns its last hidden states [B, T, D] before the final norm, in its dtype.

        Args:
            ids_BT: [B, T] int64. mask_BT: [B, T], 0 on padding; with a cache, over what is in it, too.
            positions: [B, T] int64, default 0..T-1. cache: of `new_cache`, which takes these tokens in.
        """
        caught: list[Tensor] = []
        handle = self.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        options = {} if positions is None else {"position_ids": positions}
        if cache is not None:
            options[self._cache_argument] = cache
        try:
            self.base(input_ids=ids_BT, attention_mask=mask_BT, use_cache=cache is not None, **options)
        finally:
            handle.remove()
        return caught[-1]

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return need("transformers", "hf").DynamicCache()

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] before the final norm -> [..., V]."""
        return self.head(self.norm(h))

    def check_length(self, n_prompt: int, n_new: int) -> None:
        """Raises ValueError where prompt and answer do not fit into the window."""
        if n_prompt + n_new > self.window:
            raise ValueError(
                f"a prompt of {n_prompt} tokens and {n_new} new ones are over the language model's window of "
                f"{self.window}; shorten the prompt or lower max_new_tokens to {max(0, self.window - n_prompt)}"
            )

    def description(self) -> dict[str, Any]:
        """What a controller has to be loaded with again: a checkpoint of another model is refused by it."""
        return {
            "family": self.family, "width": self.width, "layers": self.n_layers, "vocab_size": self.vocab_size,
            "digest": self.digest(),
        }  # fmt: skip

    @torch.no_grad()
    def digest(self) -> str:
        """sha256 over 1,024 evenly spaced values of every tensor, rounded to bfloat16, adapters left out: the same for
        a model in float32 and in the bfloat16 that it was stored in."""
        found = hashlib.sha256()
        for name, p in sorted(self.model.named_parameters()):
            if "lora_" not in name:
                values = p.flatten()[:: max(1, p.numel() // SAMPLED)].to(torch.bfloat16).view(torch.int16)
                found.update(
                    f"{name.replace('base_layer.', '')} {tuple(p.shape)}".encode() + values.cpu().numpy().tobytes()
                )
        return found.hexdigest()

    @torch.no_grad()
    def _check_logits(self) -> None:
        ids = torch.tensor([[0, self.vocab_size - 1]], device=self.device)
        mask = torch.ones_like(ids)
        own = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not torch.equal(own, self.logits(self.encode(ids, mask))):
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than head(norm(h)), a scale or a soft cap; "
                f"nothing can be injected before its norm. Models built like {'; '.join(LIKE.values())} work"
            )


def _find_parts(model: nn.Module) -> tuple[str, nn.Module, nn.Module, nn.Module]:
    for family, (base_name, norm_name, head_names) in STRUCTURES.items():
        base = getattr(model, base_name, None)
        head = next((found for name in head_names.split() if (found := getattr(model, name, None)) is not None), None)
        norm = getattr(base, norm_name, None)
        if isinstance(norm, nn.Module) and isinstance(head, nn.Linear):
            return family, base, norm, head
    looked_for = "; ".join(f"{base}.{norm} and {head.replace(' ', ' or ')}" for base, norm, head in STRUCTURES.values())
    parts = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"no final norm and head found in {type(model).__name__} (it has {parts or 'no modules'}); looked for "
        f"{looked_for}. Models built like {'; '.join(LIKE.values())} work"
    )


def need(package: str, extra: str):
    """Import an optional package. Raises ValueError with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"this needs {package}, which is not installed: pip install 'hrm-kernels[{extra}]'") from error


def load_language_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of this name on the hub, or in this directory.

    Raises:
        ValueError: transformers is missing, there is no such model, it is damaged, or of another build.
    """
    transformers = need("transformers", "hf")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # each release raises others: OSError, ValueError, KeyError, safetensors' own
        raise ValueError(_unreadable("language model", name, error)) from error
    return LanguageModel(model.to(device))


def load_tokenizer(name: str, pad_token: str = ""):
    """The tokenizer of this name on the hub, or in this directory, with an end-of-text and a padding token.

    Args:
        pad_token: which of its tokens pads, where it does not say itself.
    Raises:
        ValueError: there is none, or it lacks one of the two.
    """
    transformers = need("transformers", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above
        raise ValueError(_unreadable("tokenizer", name, error)) from error
    if pad_token:
        if tokenizer.convert_tokens_to_ids(pad_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"--pad-token {pad_token!r} is no token of {name}; its end of text, {tokenizer.eos_token!r}, serves"
            )
        tokenizer.pad_token = pad_token
    check_tokenizer(tokenizer, name)
    return tokenizer


def check_tokenizer(tokenizer, name: str = "") -> None:
    """Raises ValueError where it has no end-of-text or no padding token."""
    name = name or getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name} has no end-of-text token, by which an answer ends; set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer {name} has no padding token; name one of its tokens, such as --pad-token "
            f"{tokenizer.eos_token!r}: padding is masked, so that any serves"
        )


def _unreadable(what: str, name: str, error: Exception) -> str:
    where = (
        "the directory is damaged or of another kind"
        if Path(name).exists()
        else "there is no such directory, and the hub did not give it"
    )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot read the {what} {name!r}: {where} ({first})"
