"""Answers: the prompt is encoded and thought about once, then a token at a time over the language model's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import TOKEN_STREAM, keyed_uniform
from ..sampling import Sampling, draw
from .model import HybridModel, Thought

GREEDY = Sampling(temperature=0)


@dataclass
class Answers:
    """What a batch of prompts was answered."""

    ids: list[list[int]]
    """Of each row, up to its end of text, which is left out."""
    ended: list[bool]
    """Whether the end of text came, or max_new_tokens did."""
    segments: list[int]
    """That the controller ran for each row; 0 without one."""


@torch.no_grad()
def generate(
    model: HybridModel, ids_BT: Tensor, mask_BT: Tensor, max_new_tokens: int, end: int, *, sampling: Sampling = GREEDY,
    seed: int = 0, segments: int | None = None, decide: bool | None = None, thought: Thought | None = None,
    first_row: int = 0,
) -> Answers:  # fmt: skip
    """Continue each prompt until its end of text.

    Args:
        ids_BT: [B, T] int64, padded on the left. mask_BT: [B, T] int64, 0 on padding. end: the end-of-text token.
        segments: the most that the controller runs, also more than in training; default the configuration's.
        decide: as in Controller.think. thought: of these prompts, or of others in their place; default their own.
        first_row: number of the first row among all that share a seed: draws are functions of (seed, row, token)

    Raises:
        ValueError: a row without a prompt, or prompt and answer over the language model's window.
    """
    language = model.language
    n_rows = len(ids_BT)
    lengths = mask_BT.sum(1)
    if (lengths == 0).any():
        raise ValueError(
            f"row {int((lengths == 0).nonzero()[0])} has an empty prompt; a prompt needs at least one token"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} is below its minimum 1")
    language.check_length(int(lengths.max()), max_new_tokens)
    sampling.check_vocabulary(language.vocab_size, language.vocab_size)

    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = language.new_cache()
    h = language.encode(ids_BT, mask_BT, positions, cache)
    memory = None
    if model.controller is not None:
        thought = thought or model.think(model.pool(h, mask_BT.bool()), segments, decide)
        memory = model.injector.memory(thought.z_H)

    ids: list[list[int]] = [[] for _ in range(n_rows)]
    ended = [False] * n_rows
    for number in range(max_new_tokens):
        h = h[:, -1:]
        logits = language.logits(h) if memory is None else model.injected_logits(h, thought.z_H, memory)
        uniform = None
        if sampling.temperature > 0:
            uniform = [keyed_uniform(seed, number, TOKEN_STREAM + 256 * (first_row + row)) for row in range(n_rows)]
        tokens = draw(logits[:, 0], uniform, sampling, n_ids=language.vocab_size)[0].long()
        for row, token in enumerate(tokens.tolist()):
            if not ended[row]:
                ended[row] = token == end
                if not ended[row]:
                    ids[row].append(token)
        if all(ended) or number == max_new_tokens - 1:
            break
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], 1)
        h = language.encode(tokens[:, None], mask_BT, (lengths + number)[:, None], cache)
    return Answers(ids, ended, [0] * n_rows if thought is None else thought.segments.tolist())


def answer_texts(
    model: HybridModel, collator, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 64,
    shuffle: bool = False,
    **options,
) -> tuple[list[str], list[int]]:  # fmt: skip
    """(answer, segments run) of each prompt. shuffle: give each prompt the z_H of the one before it in its batch, a
    control: what the controller found out is then about another prompt. options: of `generate`."""
    texts, segments = [], []
    for start in range(0, len(prompts), batch_size):
        ids, mask = collator.prompts(prompts[start : start + batch_size])
        if shuffle:
            options["thought"] = shuffled_thought(model, ids, mask, options.get("segments"), options.get("decide"))
        found = generate(model, ids, mask, max_new_tokens, collator.tokenizer.eos_token_id, first_row=start, **options)
        texts += [collator.tokenizer.decode(row, skip_special_tokens=True) for row in found.ids]
        segments += found.segments
    return texts, segments


@torch.no_grad()
def shuffled_thought(
    model: HybridModel, ids_BT: Tensor, mask_BT: Tensor, segments: int | None, decide: bool | None
) -> Thought:
    """What the controller thinks of each prompt's predecessor in the batch, the last being the first one's."""
    if len(ids_BT) < 2:
        raise ValueError("z_H of one prompt cannot be exchanged with another's; give at least 2 prompts a batch")
    h = model.language.encode(ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0))
    own = model.think(model.pool(h, mask_BT.bool()), segments, decide)
    return Thought(own.z_H.roll(1, 0), own.segments.roll(1, 0))
