"""New tokens at the end of cached rows: the numbers of a forward pass over the whole rows, for a fraction of its work.

    input blocks      the new tokens
    step 1, 2, ...    the new tokens, and before them those that have not run this step yet (backfill)
                      q = q_head(sum of z_H over the row / its length): halt, or go on
    output blocks     the new tokens at the depth that the row now has, and those not decoded at it yet (refill)
    lm_head           each row's last token

The blocks are the model's own; only what their attention looks at comes from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels import Past, Span, Tokens

from .cache import HRMCache
from .model import HRMForCausalLM, checked_depths


@dataclass
class Extended:
    """Of the rows that were extended, in the order in which they were given."""

    logits: Tensor
    """[n, V] after each row's last token."""
    executed_steps: list[int]
    """HRM steps that each row as a whole takes now."""
    halted: list[bool]
    """Whether by the head's decision."""


@torch.no_grad()
@ops.shared_casts()
def extend(
    model: HRMForCausalLM,
    cache: HRMCache,
    new: Mapping[int, Sequence[int]],
    *,
    max_steps: int | None = None,
    force_steps: int | Sequence[int] | None = None,
    halt_bias: float | None = None,
) -> Extended:
    """Add tokens to rows of the cache: logits and steps are those of `model(whole rows)` in eval mode.

    Args:
        new: row -> the ids to add, at least one each.
        max_steps, force_steps (one number, or one for each row in `new`'s order), halt_bias: as in
            HRMForCausalLM.forward. They may change from call to call.

    Raises:
        ValueError: an argument out of range, before anything is changed. After any other exception the rows are empty.
    """
    _check(model, cache, new)
    max_steps = model.config.hrm_max_steps if max_steps is None else max_steps
    forced = checked_depths(force_steps, max_steps, len(new))
    if max(forced) > cache.max_steps or (max_steps > cache.max_steps and 0 in forced):
        raise ValueError(
            f"{max(max_steps, *forced)} steps are more than the cache's max_steps {cache.max_steps}; make it with more"
        )
    halt_bias = model.config.halt_bias if halt_bias is None else halt_bias
    if math.isnan(halt_bias):
        raise ValueError("halt_bias is nan; give a number (inf halts every row after one step, -inf none)")
    try:
        with evaluating(model), ops.packed_weights(cache.packed):
            order = sorted(new)  # neighbours in the cache next to each other
            begin = {row: cache.length(row) for row in order}
            for row in order:
                cache._ids[row] += new[row]
            _read(model, cache, [Span(row, begin[row], cache.length(row)) for row in order])
            limits = {row: (forced[i] or max_steps, forced[i] == 0 and max_steps > 1) for i, row in enumerate(new)}
            depth, halted = _reason(model, cache, order, limits, halt_bias)
            logits = _write(model, cache, {row: depth[row] for row in order})
    except BaseException:
        for row in new:
            cache.clear(row)
        raise
    place = [order.index(row) for row in new]
    if place != list(range(len(place))):
        logits = logits[torch.tensor(place, device=logits.device)]
    return Extended(logits, [depth[row] for row in new], [row in halted for row in new])


@contextmanager
def evaluating(model: torch.nn.Module):
    """Eval mode; the mode that was is restored afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _check(model: HRMForCausalLM, cache: HRMCache, new: Mapping[int, Sequence[int]]) -> None:
    if not new:
        raise ValueError("no rows to extend; give at least one")
    vocab_size = model.config.vocab_size
    for row, ids in new.items():
        if row not in range(cache.rows):
            raise ValueError(f"row {row} is outside 0..{cache.rows - 1}, the cache's rows")
        if len(ids) == 0:
            raise ValueError(f"row {row} gets no token; give at least one, or leave it out")
        if cache.length(row) + len(ids) > cache.positions:
            raise ValueError(
                f"row {row} holds {cache.length(row)} tokens and gets {len(ids)} more; the cache has {cache.positions} "
                f"positions: drop the oldest, by a row of the newest alone"
            )
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside 0..{vocab_size - 1} (vocab_size {vocab_size})")


def _read(model: HRMForCausalLM, cache: HRMCache, spans: list[Span]) -> None:
    """The new tokens through the input blocks."""
    tokens = Tokens.of(spans, cache.positions, cache.device)
    ids = [token for row, begin, _ in spans for token in cache._ids[row][begin:]]
    ids = ops.to_device(torch.tensor([ids], dtype=torch.int64, device="cpu"), cache.device)
    x, rotary = model.embed(ids, tokens.position), _rotary(cache, tokens)
    for block, kv in zip(model.input_blocks, cache.kv_input, strict=True):
        x = block.apply_to(x, rotary, None, Past(kv, tokens))
    _put(cache.x, tokens, x)
    cache.work.input += len(tokens) * len(model.input_blocks)


def _reason(
    model: HRMForCausalLM, cache: HRMCache, rows: list[int], limits: Mapping[int, tuple[int, bool]], halt_bias: float
) -> tuple[dict[int, int], set[int]]:
    """Steps until every row is done: row -> its depth, and the rows that decided it. `limits`: row -> the steps after
    which it is done, and whether it may be earlier."""
    core = model.hrm_core
    depth, halted, live = {}, set(), rows
    tokens = None
    for s in range(max(limit for limit, _ in limits.values())):
        spans = [Span(row, cache.done[row][s], cache.length(row)) for row in live]
        if tokens is None or list(tokens.spans) != spans:
            tokens = Tokens.of(spans, cache.positions, cache.device)
            rotary, x = _rotary(cache, tokens), _get(cache.x, tokens)
            z_H, z_L = (_get(cache.z_H[s - 1], tokens), _get(cache.z_L, tokens)) if s else core.initial_state(x)
        pasts = (Past(kv, tokens) for kv in cache.kv_core[s])
        z_H, z_L = core.step(x, z_H, z_L, rotary, None, pasts)
        _put(cache.z_H[s], tokens, z_H)
        _put(cache.z_L, tokens, z_L)
        cache.sums[s].index_add_(0, tokens.row, z_H[0].to(cache.sums.dtype))
        for row in live:
            cache.done[row][s] = cache.length(row)
        cache.work.core += len(tokens) * cache.config.blocks_per_step
        decided = set()
        if any(limits[row][1] for row in live):
            halt = _decisions(model, cache, s, live, halt_bias)
            decided = {row for row, now in zip(live, halt, strict=True) if now and limits[row][1]}
        halted |= decided
        depth |= {row: s + 1 for row in live if row in decided or limits[row][0] == s + 1}
        live = [row for row in live if row not in depth]
        if not live:
            break
    return depth, halted


def _decisions(model: HRMForCausalLM, cache: HRMCache, s: int, rows: list[int], halt_bias: float) -> list[bool]:
    """Whether each row would halt after step s + 1, from the mean over all its positions. Waits for the device."""
    lengths = torch.tensor([[cache.length(row)] for row in rows], dtype=cache.sums.dtype)
    mean = (cache.sums[s][rows] / lengths.to(cache.device)).to(torch.promote_types(cache.x.dtype, torch.float32))
    _, halt = model.hrm_core.q_values(mean[:, None], halt_bias, None)
    return halt.tolist()


def _write(model: HRMForCausalLM, cache: HRMCache, depth: Mapping[int, int]) -> Tensor:
    """Logits [n, V] after each row's last token, the row's tokens seen at the depth that it has now."""
    spans = []
    for row, d in depth.items():
        # a row at a depth is a row of its own in the output blocks' caches
        spans.append(Span((d - 1) * cache.rows + row, cache.decoded[row][d - 1], cache.length(row)))
        cache.decoded[row][d - 1] = cache.length(row)
    tokens = Tokens.of(spans, cache.positions, cache.device)
    pasts = (Past(kv, tokens) for kv in cache.kv_output)
    h = model.decode(_get(cache.z_H, tokens), _rotary(cache, tokens), None, pasts)
    cache.work.output += len(tokens) * len(model.output_blocks)
    return model.lm_head(h[0, tokens.last])


def _rotary(cache: HRMCache, tokens: Tokens) -> Tensor | None:
    return None if cache.rotary is None else cache.rotary[tokens.position][None]


def _get(plane: Tensor, tokens: Tokens) -> Tensor:
    """[1, N, C]: the tokens' places in [..., R, P, C]."""
    return plane.view(-1, plane.shape[-1])[tokens.place][None]


def _put(plane: Tensor, tokens: Tokens, values: Tensor) -> None:
    """Store [1, N, C] at the tokens' places."""
    plane.view(-1, plane.shape[-1]).index_copy_(0, tokens.place, values[0].to(plane.dtype))
