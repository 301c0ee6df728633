"""The model with Hugging Face's interface: the same parts, the same arithmetic, their arguments and results.

attention_mask [B, T]    columns of 0 are not there: a row is what remains, padded left, right or anywhere
labels [B, T]            not shifted, -100 ignored; a mean over targets, or a sum over num_items_in_batch
use_cache                keys, values and states of every step (hrm_model/cache.py), in HRMGenerationCache
generate                 transformers' own, with its options, and ours: max_steps, force_steps, halt_bias
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..model import IGNORE, LanguageModel
from ..sampling import N_GPT2_IDS
from .cache import HRMGenerationCache
from .configuration import CosmicFishHRMConfig

THEIR_IGNORE = -100
CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What transformers calls a cache among arguments and results; it changed within version 5."""
ALIGNMENT = 64
"""Bytes, to which torch aligns memory of the CPU."""
_DEPTH = ("max_steps", "force_steps", "halt_bias")
# told to every model, and without a meaning here
_NEITHER_HERE_NOR_THERE = ("output_attentions", "output_hidden_states", "cache_position", "position_ids", "return_dict")


@dataclass
class CosmicFishHRMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast and what the loop did. B rows."""

    executed_steps: Tensor | None = None
    """[B] int64, HRM steps that were run for the row."""
    steps_taken: Tensor | None = None
    """[B] int64, as published: executed - 1 if the row halted by decision. None over a cache."""
    q_logits: Tensor | None = None
    """[B, 2] float32, [halt, continue] after the row's last step. None over a cache."""


class CosmicFishHRMPreTrainedModel(PreTrainedModel):
    """What transformers asks about the model."""

    config_class = CosmicFishHRMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "HRMCore"]  # noqa: RUF012
    _is_stateful = True  # speculative decoding would take logits of several tokens at one depth
    _supports_attention_backend = False
    _supports_sdpa = True  # hrm_kernels chooses


class CosmicFishHRMForCausalLM(LanguageModel, CosmicFishHRMPreTrainedModel, GenerationMixin):
    """CosmicFish-HRM for transformers: save_pretrained, from_pretrained, generate, Trainer, pipelines.

    Parameters have the published names, so the published folder, and any folder of `hrm convert`, loads as it is.
    """

    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012

    def __init__(self, config: CosmicFishHRMConfig):
        PreTrainedModel.__init__(self, config)
        self.make_parts(config)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any):
        """As transformers has it. Weights are left where torch itself would have put them: those that the loader maps
        from a file lie at any address, on which the last bits of matrix products depend."""
        found = super().from_pretrained(*args, **options)
        model = found[0] if isinstance(found, tuple) else found
        if model.wte.weight.is_meta and not model.lm_head.weight.is_meta:
            raise ValueError(
                "the file has lm_head.weight and no wte.weight, which transformers 4 does not tie; use version 5, or "
                "make a folder with `hrm convert .. --to hf`"
            )
        for p in model.parameters():
            if p.device.type == "cpu" and p.data_ptr() % ALIGNMENT:
                p.data = p.data.clone()
        return found

    def _init_weights(self, module: nn.Module) -> None:
        prefix = next((name for name, other in self.named_modules() if other is module), "")
        for name, p in module.named_parameters(prefix=prefix, recurse=False):
            self.reset_parameter(name, p)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **options) -> None:
        self.gradient_checkpointing = enable
        self.recompute_activations(enable)

    def get_input_embeddings(self) -> nn.Module:
        """wte."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another in wte's place."""
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """lm_head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another in lm_head's place."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: HRMGenerationCache | None = None,
        cache: HRMGenerationCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        max_steps: int | None = None,
        force_steps: int | list[int] | Tensor | None = None,
        halt_bias: float | None = None,
        skip_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CosmicFishHRMOutput | tuple:
        """One pass over a batch; a row's result depends on nothing but that row.

        Args:
            input_ids: [B, T] int64; over a cache, the new columns alone.
            attention_mask: [B, T] (over a cache also [B, columns before + T]), 0 where a column is not there.
            labels: [B, T] int64, input_ids with THEIR_IGNORE where there is no target; not shifted.
            past_key_values, cache: two names of what an earlier pass with use_cache returned. No gradient passes it,
                and the pass is one of eval mode.
            use_cache: return a cache; default only where one was given.
            logits_to_keep: logits of so many last columns, or of these; 0 for all.
            max_steps, force_steps, halt_bias: depth, as in HRMForCausalLM.forward.
            skip_logits: with labels, the loss alone: at 50,304 ids logits are most of the memory.
            num_items_in_batch: what the sum of losses is divided by; default this call's targets.

        Raises:
            ValueError: an argument out of range or of no meaning here; the message names it.
        """
        self._check(input_ids, labels, others)
        cache = past_key_values if cache is None else cache
        depth = {"max_steps": max_steps, "force_steps": force_steps, "halt_bias": halt_bias}
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if cache is not None or use_cache:
            if labels is not None:
                raise ValueError("labels need a pass without a cache; leave out use_cache and the cache")
            found = self._over_cache(input_ids, attention_mask, cache, logits_to_keep, depth)
        else:
            found = self._whole(
                input_ids, attention_mask, labels, logits_to_keep, depth, skip_logits, num_items_in_batch
            )
        return found if return_dict else found.to_tuple()

    def _check(self, input_ids: Tensor | None, labels: Tensor | None, others: dict) -> None:
        if input_ids is None:
            raise ValueError("input_ids are missing; this model takes ids, not inputs_embeds")
        if others.get("output_attentions") or others.get("output_hidden_states"):
            raise ValueError("attentions and hidden states are not kept; leave out output_attentions and the like")
        given = [name for name, value in others.items() if value is not None and name not in _NEITHER_HERE_NOR_THERE]
        if given:
            raise ValueError(f"{given[0]} has no meaning for this model; leave it out")
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}")
            if labels.device.type == "cpu" and ((labels < 0) & (labels != THEIR_IGNORE)).any():
                raise ValueError(f"a label is below 0; use {THEIR_IGNORE} for 'no target'")

    def _whole(
        self, input_ids, attention_mask, labels, logits_to_keep, depth, skip_logits, num_items_in_batch
    ) -> CosmicFishHRMOutput:
        real = _real(attention_mask, input_ids.shape)
        order = place = lengths = None
        ids, targets = input_ids, None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=THEIR_IGNORE)
            targets = targets.masked_fill(targets == THEIR_IGNORE, IGNORE).long()
        if real is not None:
            lengths = real.sum(1)
            if (lengths == 0).any():
                raise ValueError("attention_mask leaves a row without any token; it must leave at least one")
            order = (~real).long().argsort(dim=1, stable=True)  # what is there first, in its order
            place = order.argsort(dim=1)
            ids = input_ids.take_along_dim(order, 1)[:, : int(lengths.max())]
            if labels is not None:
                # the target of a token is the next one that is there, if it has a label
                own = labels.take_along_dim(order, 1)[:, : ids.shape[1]]
                targets = F.pad(own[:, 1:], (0, 1), value=THEIR_IGNORE)
                targets = targets.masked_fill(targets == THEIR_IGNORE, IGNORE).long()
        reduction = "mean" if num_items_in_batch is None else "sum"
        columns = _columns(logits_to_keep, input_ids.shape[1], input_ids.device)
        at = None
        if place is not None or columns is not None:
            at = place if place is not None else torch.arange(input_ids.shape[1], device=ids.device)[None]
            at = at if columns is None else at[:, columns]
            at = at.expand(len(ids), -1).clamp(max=ids.shape[1] - 1)
        out = LanguageModel.forward(
            self, ids, targets, None if lengths is None else lengths, return_logits=not skip_logits,
            reduction=reduction, logits_at=at, **depth,
        )  # fmt: skip
        loss, logits = out.loss, out.logits
        if loss is not None and num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        if logits is not None and real is not None:
            kept = real if columns is None else real[:, columns]
            logits = logits.masked_fill(~kept[..., None], 0)
        return CosmicFishHRMOutput(
            loss=loss, logits=logits, executed_steps=out.executed_steps, steps_taken=out.steps_taken,
            q_logits=out.q_logits,
        )  # fmt: skip

    def _over_cache(self, input_ids, attention_mask, cache, logits_to_keep, depth) -> CosmicFishHRMOutput:
        if cache is None:
            cache = HRMGenerationCache(self, max_steps=depth["max_steps"])
        elif not isinstance(cache, HRMGenerationCache):
            raise ValueError(
                f"a cache of type {type(cache).__name__} cannot hold this model's states; use HRMGenerationCache, or "
                "what a pass with use_cache=True returned"
            )
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :] if attention_mask.dim() == 2 else attention_mask
        real = _real(attention_mask, input_ids.shape)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        last_only = last_only and (real is None or bool(real[:, -1].all()))
        force_steps = depth["force_steps"]
        if isinstance(force_steps, Tensor):
            depth = depth | {"force_steps": force_steps.tolist()}
        logits, executed = cache.extend(input_ids, real, last_only, **depth)
        if not last_only and (columns := _columns(logits_to_keep, input_ids.shape[1], logits.device)) is not None:
            logits = logits[:, columns]
        return CosmicFishHRMOutput(logits=logits, executed_steps=executed, **{CACHE: cache})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = True, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` passes to the next forward: the columns that its cache does not hold yet. (transformers looks
        for the name kwargs to see that forward's arguments may be given.)"""
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        if cache is not None:
            held = cache.get_seq_length()
            # `generate` may be told the whole text, or of a text that the cache holds what comes after it
            if held < input_ids.shape[1]:
                input_ids = input_ids[:, held:]
        elif not use_cache:
            window = self.config.block_size
            input_ids = input_ids[:, -window:]
            attention_mask = None if attention_mask is None else attention_mask[:, -window:]
        if attention_mask is not None and attention_mask.dim() == 2 and (attention_mask[:, -1] == 0).any():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} ends with padding, after which nothing can be said; pad on the left")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, CACHE: cache, "use_cache": use_cache}
        kept = {name: kwargs[name] for name in (*_DEPTH, "logits_to_keep") if name in kwargs}
        return inputs | {"logits_to_keep": 1} | kept

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *others
    ) -> None:
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} cannot hold this model's states; "
                "leave it out"
            )
        model_kwargs[CACHE] = HRMGenerationCache(self, max_cache_length, _most_steps(model_kwargs))

    def generate(self, *args: Any, **options: Any):
        """transformers' generate. Ids from 50257 on, which only pad the vocabulary, are never drawn unless the options
        say what is suppressed. max_steps, force_steps and halt_bias set depth as in `forward`."""
        config = options.get("generation_config") or self.generation_config
        if self.config.vocab_size > N_GPT2_IDS and getattr(config, "suppress_tokens", None) is None:
            options.setdefault("suppress_tokens", list(range(N_GPT2_IDS, self.config.vocab_size)))
        return super().generate(*args, **options)


def _most_steps(options: dict) -> int | None:
    """Steps that a cache needs room for; None for the model's own."""
    forced = options.get("force_steps")
    if forced is None:
        return options.get("max_steps")
    forced = forced.tolist() if isinstance(forced, Tensor) else forced
    forced = [forced] if isinstance(forced, int) else list(forced)
    return options.get("max_steps") if 0 in forced else max(forced)


def _real(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[B, T] bool of an attention mask, None where it leaves nothing out."""
    if mask is None:
        return None
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(shape)}; they must be alike")
    real = mask != 0
    return None if real.all() else real


def _columns(logits_to_keep: int | Tensor, n: int, device: torch.device) -> Tensor | None:
    """Which columns' logits are wanted; None for all."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep.to(device)
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep {logits_to_keep!r} must be an integer of at least 0, or a tensor of columns")
    return torch.arange(max(n - logits_to_keep, 0), n, device=device) if 0 < logits_to_keep < n else None
