"""New tokens at the end of cached rows: the numbers of a forward pass over the whole rows, for a fraction of its work.

    input blocks      the new tokens
    step 1, 2, ...    the new tokens, and before them those that have not run this step yet (backfill)
                      q = q_head(sum of z_H over the row / its length): halt, or go on
    output blocks     the new tokens at the depth that the row now has, and those not decoded at it yet (refill)
    lm_head           each row's last token

The blocks are the model's own; only what their attention looks at comes from the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels import Past, Span, Tokens

from .cache import HRMCache
from .model import LanguageModel, check_halt_bias, checked_depths
from .newest import NewestDecoder, Started


@dataclass
class Extended:
    """Of the rows that were extended, in the order in which they were given."""

    logits: Tensor
    """[n, V] after each row's last token; with `keep`, of its last so many tokens, one row after the other."""
    executed_steps: list[int]
    """HRM steps that each row as a whole takes now."""
    halted: list[bool]
    """Whether by the head's decision."""


def extend(
    model: LanguageModel,
    cache: HRMCache,
    new: Mapping[int, Sequence[int]],
    *,
    max_steps: int | None = None,
    force_steps: int | Sequence[int] | None = None,
    halt_bias: float | None = None,
    keep: Mapping[int, int] | None = None,
) -> Extended:
    """Add tokens to rows of the cache: logits and steps are those of `model(whole rows)` in eval mode.

    Args:
        new: row -> the ids to add, at least one each.
        max_steps, force_steps (one number, or one for each row in `new`'s order), halt_bias: as in
            HRMForCausalLM.forward. They may change from call to call.
        keep: row -> of how many of its last new tokens logits are wanted, all at the depth that the row now has;
            default of the last alone.

    Raises:
        ValueError: an argument out of range, before anything is changed. After any other exception the rows are empty.
    """
    options = dict(max_steps=max_steps, force_steps=force_steps, halt_bias=halt_bias, keep=keep)
    return Extending(model, cache, new, **options).finish().result


class Finished(NamedTuple):
    """What Extending.finish returns."""

    result: Extended
    beside: list | None
    """What the caller had read in the same transfer."""
    again: list[int]
    """Places among the rows whose logits were made again: whatever was queued on the first ones is wrong for them."""


class Extending:
    """`extend` in two parts, for callers who queue work of their own on the logits before they wait for the device.

    Where kernels decode (newest.py), the first part queues everything and waits for nothing; else it does it all.
    """

    logits: Tensor
    """[n, V] in `new`'s order; those of some rows may be made again by `finish`."""

    def __init__(self, model: LanguageModel, cache: HRMCache, new: Mapping[int, Sequence[int]], keep=None, **options):
        self._model, self._cache, self._new = model, cache, new
        self._keep = _checked_keep(new, keep)
        self._limits, self._halt_bias = _checked(model, cache, new, **options)
        self._done: Extended | None = None
        cache.settle(new)
        cache.doubt(new)
        with self._undoing():
            decoder = cache.decoder() if all(len(ids) == 1 for ids in new.values()) else None
            if decoder is None:
                self._done = self._all_at_once()
                self.logits = self._done.logits
            else:
                self._started = self._queue(decoder)
                self._rows = ops.to_device(torch.tensor(list(new), device="cpu"), cache.device)
                self.logits = self._started.logits[self._rows]

    def finish(self, beside: Tensor | None = None) -> Finished:
        """Wait for the device.

        Args:
            beside: [any, n], of the caller's, to be read in the same transfer.
        """
        if self._done is not None:
            finished = Finished(self._done, None if beside is None else beside.tolist(), [])
        else:
            with self._undoing():
                finished = self._settle(beside)
        self._cache.trust(self._new)
        return finished

    @contextmanager
    def _undoing(self):
        """Whatever happens, rows are whole or empty."""
        try:
            with torch.no_grad(), ops.shared_casts(), evaluating(self._model), ops.packed_weights(self._cache.packed):
                yield
        except BaseException:
            for row in self._new:
                self._cache.clear(row)
            raise

    def _all_at_once(self) -> Extended:
        model, cache, new = self._model, self._cache, self._new
        order = sorted(new)  # neighbours in the cache next to each other
        begin = {row: cache.length(row) for row in order}
        cache.append(new)
        _read(model, cache, [Span(row, begin[row], cache.length(row)) for row in order])
        depth, halted = _reason(model, cache, dict.fromkeys(order, 0), self._limits, self._halt_bias)
        logits = _write(model, cache, {row: depth[row] for row in order}, self._keep)
        if order != list(new):
            parts = dict(zip(order, logits.split([self._keep[row] for row in order]), strict=True))
            logits = torch.cat([parts[row] for row in new])
        return Extended(logits, [depth[row] for row in new], [row in halted for row in new])

    def _queue(self, decoder: NewestDecoder) -> Started:
        cache, new = self._cache, self._new
        # earlier tokens have run so many steps; a row that goes deeper waits for them in `finish`
        ready = {row: sum(n == cache.length(row) for n in cache.done[row]) for row in new}
        limits = {row: min(limit, ready[row]) for row, (limit, _) in self._limits.items()}
        may_halt = {row: may for row, (_, may) in self._limits.items()}
        started = decoder.start({row: ids[0] for row, ids in new.items()}, limits, may_halt, self._halt_bias)
        cache.append(new)
        return started

    def _settle(self, beside: Tensor | None) -> Finished:
        model, cache, rows = self._model, self._cache, list(self._new)
        told = torch.stack((self._started.executed, self._started.halted.long()))[:, self._rows]
        if beside is not None:
            told = torch.cat((told.float(), beside))  # whole numbers below 2^24 stay what they are
        executed, halted, *beside_told = told.tolist()
        depth = {row: int(n) for row, n in zip(rows, executed, strict=True)}
        halted = {row for row, yes in zip(rows, halted, strict=True) if yes}
        for row in rows:
            for s in range(depth[row]):
                cache.done[row][s] = cache.length(row)
        cache.work.input += len(rows) * len(model.input_blocks)
        cache.work.core += sum(depth.values()) * cache.config.blocks_per_step
        deeper = {row: depth[row] for row in rows if row not in halted and depth[row] < self._limits[row][0]}
        if deeper:
            found, also_halted = _reason(model, cache, deeper, self._limits, self._halt_bias)
            depth |= found
            halted |= also_halted
        again = [row for row in rows if row in deeper or cache.decoded[row][depth[row] - 1] < cache.length(row) - 1]
        for row in rows:
            if row not in again:
                cache.decoded[row][depth[row] - 1] = cache.length(row)
        cache.work.output += (len(rows) - len(again)) * len(model.output_blocks)
        places = [rows.index(row) for row in again]
        logits = self.logits
        if again:
            logits = logits.clone()
            logits[places] = _write(model, cache, {row: depth[row] for row in again}, self._keep)
        result = Extended(logits, [depth[row] for row in rows], [row in halted for row in rows])
        return Finished(result, None if beside is None else beside_told, places)


@contextmanager
def evaluating(model: torch.nn.Module):
    """Eval mode; the mode that was is restored afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _checked(
    model: LanguageModel, cache: HRMCache, new: Mapping[int, Sequence[int]], *, max_steps=None, force_steps=None,
    halt_bias=None,
) -> tuple[dict[int, tuple[int, bool]], float]:  # fmt: skip
    """(row -> steps after which it is done and whether it may be earlier, halting bias)."""
    config = model.config
    check_model(model, cache)
    if not new:
        raise ValueError("no rows to extend; give at least one")
    for row, ids in new.items():
        if row not in range(cache.rows):
            raise ValueError(f"row {row} is outside 0..{cache.rows - 1}, the cache's rows")
        if len(ids) == 0:
            raise ValueError(f"row {row} gets no token; give at least one, or leave it out")
        if cache.length(row) + len(ids) > cache.positions:
            raise ValueError(
                f"row {row} holds {cache.length(row)} tokens and gets {len(ids)} more; the cache has {cache.positions} "
                f"positions: clear it and give the newest alone"
            )
        check_ids(ids, config.vocab_size, "")
    max_steps = config.hrm_max_steps if max_steps is None else max_steps
    forced = checked_depths(force_steps, max_steps, len(new))
    check_depths_fit(cache, [n or max_steps for n in forced])
    halt_bias = config.halt_bias if halt_bias is None else halt_bias
    check_halt_bias(halt_bias)
    return {row: (n or max_steps, n == 0 and max_steps > 1) for row, n in zip(new, forced, strict=True)}, halt_bias


def _checked_keep(new: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None) -> Mapping[int, int]:
    if keep is None:
        return dict.fromkeys(new, 1)
    for row, ids in new.items():
        if not 1 <= keep.get(row, 0) <= len(ids):
            raise ValueError(f"keep of row {row} is {keep.get(row)}; it must lie in 1..{len(ids)}, its new tokens")
    return keep


def check_model(model: LanguageModel, cache: HRMCache) -> None:
    """Raises ValueError where the cache is another model's."""
    if cache.model is not model:
        raise ValueError("the cache was made for another model, whose numbers it holds; make one for this model")


def check_ids(ids: Sequence[int], vocab_size: int, whose: str) -> None:
    """Raises ValueError for what is no id of this vocabulary; `whose` begins the message."""
    for token in ids:
        if not isinstance(token, Integral):
            raise ValueError(f"{whose}token id {token!r} is no integer; give ids as a list of integers")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{whose}token id {token} is outside 0..{vocab_size - 1} (vocab_size {vocab_size})")


def check_depths_fit(cache: HRMCache, depths: Sequence[int]) -> None:
    """Raises ValueError where the cache has no room for so many steps."""
    if max(depths) > cache.max_steps:
        raise ValueError(
            f"{max(depths)} steps are more than the cache's max_steps {cache.max_steps}; make it with more"
        )


def _read(model: LanguageModel, cache: HRMCache, spans: list[Span]) -> None:
    """The new tokens through the input blocks."""
    tokens = Tokens.of(spans, cache.positions, cache.device)
    ids = [token for row, begin, _ in spans for token in cache._ids[row][begin:]]
    ids = ops.to_device(torch.tensor([ids], dtype=torch.int64, device="cpu"), cache.device)
    x, rotary = model.embed(ids, tokens.position), _rotary(cache, tokens)
    for block, kv in zip(model.input_blocks, cache.kv_input, strict=True):
        x = block.apply_to(x, rotary, None, Past(kv, tokens))
    _put(cache.x, tokens, x)
    cache.work.input += tokens.size * len(model.input_blocks)


def _reason(
    model: LanguageModel, cache: HRMCache, start: Mapping[int, int], limits: Mapping[int, tuple[int, bool]],
    halt_bias: float,
) -> tuple[dict[int, int], set[int]]:  # fmt: skip
    """Steps until every row of `start` (row -> steps that it has run) is done: row -> its depth, and the rows that
    decided it. limits: row -> the steps after which it is done, and whether it may be earlier."""
    core, depth, halted, tokens = model.hrm_core, {}, set(), None
    for s in range(min(start.values()), max(limits[row][0] for row in start)):
        live = [row for row in start if start[row] <= s and row not in depth]
        if not live:
            continue
        spans = tuple(Span(row, cache.done[row][s], cache.length(row)) for row in live)
        if tokens is None or tokens.spans != spans:
            tokens = Tokens.of(spans, cache.positions, cache.device)
            rotary, x = _rotary(cache, tokens), _get(cache.x, tokens)
            z_H, z_L = (_get(cache.z_H[s - 1], tokens), _get(cache.z_L, tokens)) if s else core.initial_state(x)
        z_H, z_L = core.step(x, z_H, z_L, rotary, None, (Past(kv, tokens) for kv in cache.kv_core[s]))
        _put(cache.z_H[s], tokens, z_H)
        _put(cache.z_L, tokens, z_L)
        cache.sums[s].index_add_(0, tokens.row, z_H[0].to(cache.sums.dtype))
        for row in live:
            cache.done[row][s] = cache.length(row)
        cache.work.core += tokens.size * cache.config.blocks_per_step
        decided = set()
        if any(limits[row][1] for row in live):
            halt = _decisions(model, cache, s, live, halt_bias)
            decided = {row for row, now in zip(live, halt, strict=True) if now and limits[row][1]}
        halted |= decided
        depth |= {row: s + 1 for row in live if row in decided or limits[row][0] == s + 1}
        if len(depth) == len(start):
            break
    return depth, halted


def _decisions(model: LanguageModel, cache: HRMCache, s: int, rows: list[int], halt_bias: float) -> list[bool]:
    """Whether each row would halt after step s + 1, from the mean over all its positions. Waits for the device."""
    lengths = torch.tensor([[cache.length(row)] for row in rows], dtype=cache.sums.dtype)
    mean = (cache.sums[s][rows] / lengths.to(cache.device)).to(torch.promote_types(cache.x.dtype, torch.float32))
    _, halt = model.hrm_core.q_values(mean[:, None], halt_bias, None)
    return halt.tolist()


def _write(model: LanguageModel, cache: HRMCache, depth: Mapping[int, int], keep: Mapping[int, int]) -> Tensor:
    """Logits after the last `keep` tokens of each row, one row after the other, the row's tokens seen at the depth that
    it has now."""
    spans = []
    for row, d in depth.items():
        # a row at a depth is a row of its own in the output blocks' caches
        spans.append(Span((d - 1) * cache.rows + row, cache.decoded[row][d - 1], cache.length(row)))
        cache.decoded[row][d - 1] = cache.length(row)
    tokens = Tokens.of(spans, cache.positions, cache.device)
    pasts = (Past(kv, tokens) for kv in cache.kv_output)
    h = model.decode(_get(cache.z_H, tokens), _rotary(cache, tokens), None, pasts)
    cache.work.output += tokens.size * len(model.output_blocks)
    last = tokens.last
    if any(n > 1 for n in keep.values()):
        places = [range(end - keep[row] + 1, end + 1) for row, end in zip(depth, last.tolist(), strict=True)]
        last = torch.tensor([place for row in places for place in row], device=last.device)
    return model.lm_head(h[0, last])


def _rotary(cache: HRMCache, tokens: Tokens) -> Tensor | None:
    return None if cache.rotary is None else cache.rotary[tokens.position][None]


def _get(plane: Tensor, tokens: Tokens) -> Tensor:
    """[1, N, C]: the tokens' places in [..., R, P, C]."""
    return plane.view(-1, plane.shape[-1])[tokens.place][None]


def _put(plane: Tensor, tokens: Tokens, values: Tensor) -> None:
    """Store [1, N, C] at the tokens' places."""
    plane.view(-1, plane.shape[-1]).index_copy_(0, tokens.place, values[0].to(plane.dtype))
