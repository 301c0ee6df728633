"""Sampling continuations. Every new token recomputes the row's whole window: exact, and slow for long texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import END_OF_TEXT

# Ids from here to vocab_size only pad GPT-2's vocabulary to a multiple of 64; no text has them.
N_GPT2_IDS = END_OF_TEXT + 1


@torch.no_grad()
def generate(
    model,
    ids_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    lengths: Sequence[int] | Tensor | None = None,
    max_steps: int | None = None,
    force_steps: int | Sequence[int] | None = None,
    halt_bias: float | None = None,
    stop_token: int | None = END_OF_TEXT,
) -> Tensor:
    """Continue each row by up to `max_new_tokens` tokens.

    Row r draws from its own generator, seeded with (seed, r's place), so what a row says does not depend on its
    neighbours. A row longer than block_size is continued from its last block_size tokens, as published.

    Args:
        model: an HRMForCausalLM; its training mode is restored afterwards.
        ids_BT: [B, T] int64 prompts, right-padded where `lengths` says so.
        temperature: 0 takes the likeliest token; above, divides the logits.
        top_k: keep the k likeliest tokens. top_p: keep the likeliest tokens that together reach this probability.
        repetition_penalty: at least 1; logits of tokens already in the row are lowered by it (Keskar et al., "CTRL",
            2019, section 4.1: positive logits are divided, negative ones multiplied).
        lengths: [B] prompt tokens per row, default T.
        max_steps, force_steps (one number or a list, one a row), halt_bias: as in HRMForCausalLM.forward.
        stop_token: a row that draws it is finished; None never stops.

    Returns:
        [B, T'] int64: each row's prompt followed at once by its new tokens, right-padded with END_OF_TEXT.

    Raises:
        ValueError: an option out of range, named with its limit.
    """
    if ids_BT.dim() != 2 or 0 in ids_BT.shape or ids_BT.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be [B, T] int64 with at least one token; got {tuple(ids_BT.shape)} {ids_BT.dtype}")
    _check(model, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    n_prompt = ids_BT.shape[1]
    rows = [row[:n].tolist() for row, n in zip(ids_BT, _as_list(lengths, ids_BT), strict=True)]
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + r) % 2**63) for r in range(len(rows))]
    open_rows = list(range(len(rows)))
    block_size, device = model.config.block_size, model.device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            windows = [rows[r][-block_size:] for r in open_rows]
            sizes = [len(w) for w in windows]
            padded = [w + [0] * (max(sizes) - len(w)) for w in windows]
            batch = torch.tensor(padded, device=device)
            out = model(
                batch,
                lengths=sizes if len(set(sizes)) > 1 else None,
                max_steps=max_steps,
                force_steps=[force_steps[r] for r in open_rows] if isinstance(force_steps, Sequence) else force_steps,
                halt_bias=halt_bias,
                return_logits=True,
            )
            last = out.logits[torch.arange(len(sizes)), torch.tensor(sizes) - 1].float().cpu()
            for r, logits in zip(list(open_rows), last, strict=True):
                token = _draw(logits, rows[r], generators[r], temperature, top_k, top_p, repetition_penalty)
                rows[r].append(token)
                if token == stop_token:
                    open_rows.remove(r)
            if not open_rows:
                break
    finally:
        model.train(was_training)
    longest = max(max(map(len, rows)), n_prompt)
    return torch.tensor([row + [END_OF_TEXT] * (longest - len(row)) for row in rows], device=ids_BT.device)


def _draw(logits, seen, generator, temperature, top_k, top_p, repetition_penalty) -> int:
    if logits.shape[0] > N_GPT2_IDS:
        logits[N_GPT2_IDS:] = -math.inf
    if repetition_penalty != 1.0:
        index = torch.tensor(sorted(set(seen)))
        value = logits[index]
        logits[index] = torch.where(value > 0, value / repetition_penalty, value * repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1.0:
        ranked, order = probabilities.sort(descending=True)
        # The token that crosses top_p is kept, so at least one always is.
        probabilities[order[ranked.cumsum(0) - ranked >= top_p]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _as_list(lengths, ids_BT: Tensor) -> list[int]:
    if lengths is None:
        return [ids_BT.shape[1]] * ids_BT.shape[0]
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(lengths) != ids_BT.shape[0] or not all(n in range(1, ids_BT.shape[1] + 1) for n in lengths):
        raise ValueError(f"lengths {lengths} must be {ids_BT.shape[0]} numbers in 1..{ids_BT.shape[1]}")
    return lengths


def _check(model, max_new_tokens, temperature, top_k, top_p, repetition_penalty) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens!r} must be an integer of at least 0")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be finite and at least 0 (0 is greedy)")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k {top_k!r} must be an integer of at least 1, or None for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is outside 0 < top_p <= 1")
    if not 1 <= repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty {repetition_penalty} must be at least 1 (1 is off)")
