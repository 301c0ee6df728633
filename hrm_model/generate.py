"""Continuing texts: rows that come and go in a batch, each to its own end, over a cache or by recomputing every window.

A row of more tokens than block_size is continued from its last block_size tokens, as published. From there on every
token moves the window by one, all positions change and nothing computed before holds: each takes a forward pass over
the whole window (`recomputed` says where). `drop_oldest` drops more at once, so that this happens less often.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from hrm_kernels import PackedWeights, to_device

from .cache import HRMCache, Work, bytes_per_token, room
from .config import END_OF_TEXT, is_int
from .incremental import check_depths_fit, check_ids, check_model, evaluating
from .keyed import TOKEN_STREAM, keyed_uniform
from .model import HRMForCausalLM, check_halt_bias, checked_depths
from .rows import Cached, Recomputing, Row
from .sampling import Sampling, draw
from .stops import StoppedText
from .tokenizer import Tokenizer, get_tokenizer

DEPTH_UPDATES = ("token", "turn")
SHARE_OF_MEMORY = 0.8
"""Of the memory that is free, what a batch of unstated size may take."""


class Event(NamedTuple):
    """One new token of one row."""

    row: int
    """Number of the prompt."""
    token: int
    text: str
    """What has become certain of the row's text with this token: whole characters, no beginning of a stop string."""
    logprob: float
    """In nats, under the model itself: before penalty, temperature and filters."""
    steps: int
    """HRM steps that the row took for this token."""
    finish: str | None
    """None while the row goes on; "stop" (a string), "stop_token" or "length"."""
    recomputed: bool
    """Whether the window was full: the oldest tokens were dropped and the rest computed anew."""
    halted: bool = False
    """Whether the head decided these steps; else they were forced, or all that there are."""


@dataclass
class Generated:
    """Result of `generate` with details. B rows."""

    ids: Tensor
    """[B, T'] int64: each row's prompt followed at once by its new tokens, right-padded with END_OF_TEXT."""
    tokens: list[list[int]]
    """Of each row, the new tokens, those that made it stop included."""
    texts: list[str]
    """Of each row, the new text, without what made it stop."""
    logprobs: list[list[float]]
    """Nats, of each new token."""
    executed_steps: list[list[int]]
    """HRM steps taken for each new token."""
    finish: list[str]
    """"length", "stop" or "stop_token"; "length" too where no token was asked for."""
    recomputed: list[int]
    """Of each row, new tokens for which a full window was computed anew."""
    work: Work
    """Block applications, prompts included."""


class Generation(Iterator[Event]):
    """The new tokens of some rows, as they come. Leaving off leaves the cache usable."""

    def __init__(self, events: Iterator[Event], engine: Cached | Recomputing):
        self._events, self._engine, self._before = events, engine, replace(engine.work)

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def work(self) -> Work:
        """Block applications so far, prompts included, and whatever else used the same cache meanwhile."""
        return self._engine.work.since(self._before)


def stream(
    model: HRMForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    min_new_tokens: int = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: int | Sequence[int] | None = END_OF_TEXT,
    seed: int | Sequence[int] = 0,
    max_steps: int | None = None,
    force_steps: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    halt_bias: float | None = None,
    depth_update: str = "token",
    use_cache: bool = True,
    cache: HRMCache | None = None,
    batch_size: int | None = None,
    drop_oldest: int = 1,
    tokenizer: Tokenizer | None = None,
) -> Generation:
    """Continue each prompt, token by token; rows are independent of each other, whatever shares their batch.

    Args:
        prompts: ids of each row, at least one. max_new_tokens: of each row. sampling: how tokens are drawn.
        min_new_tokens: before these no stop token is drawn, and no stop string ends a row.
        stop: strings that end a row. stop_tokens: ids that do; None or () for none.
        seed: one number, with which each row draws differently, or one for each row. The number that a token is drawn
            at is a function of the seed, the token's number and, where all share one seed, the row's.
        max_steps, halt_bias: as in HRMForCausalLM.forward.
        force_steps: exact steps for every token; a list has a number for each row, or a list for each row with a number
            for each of its new tokens (the last goes on). 0 in a list lets the head decide.
        depth_update: "token" decides depth anew for every token, exactly as a forward pass over the row would, which
            can mean running earlier tokens through more steps; "turn" decides it for the prompt and keeps it.
        use_cache: False computes every window whole: the same numbers, slowly.
        cache: to use and leave filled: what a prompt has in common with what it holds is not computed again. Its
            positions are then the window. Default: a new one.
        batch_size: rows at a time; others wait for a place. Default: all, or what fits into memory.
        drop_oldest: tokens dropped when the window is full; 1 as published.
        tokenizer: makes `text`; default GPT-2's.

    Raises:
        ValueError: an option out of range, named with its limit; at the call, before anything is computed.
    """
    sampling = sampling or Sampling()
    sampling.check_vocabulary(model.config.vocab_size)
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    stop_tokens = (stop_tokens,) if isinstance(stop_tokens, Integral) else tuple(stop_tokens or ())
    rows = _rows(model, prompts, seed, force_steps, max_steps)
    _at_least("max_new_tokens", max_new_tokens, 0)
    _at_least("min_new_tokens", min_new_tokens, 0)
    if min_new_tokens > max_new_tokens > 0:
        raise ValueError(f"min_new_tokens {min_new_tokens} is more than max_new_tokens {max_new_tokens}")
    _at_least("batch_size", len(prompts) if batch_size is None else batch_size, 1)
    _at_least("drop_oldest", drop_oldest, 1)
    _check_stops(stop, stop_tokens)
    check_halt_bias(0.0 if halt_bias is None else halt_bias)
    if depth_update not in DEPTH_UPDATES:
        raise ValueError(f"depth_update {depth_update!r} is none of {', '.join(DEPTH_UPDATES)}")
    window = model.config.block_size if cache is None else cache.positions
    if drop_oldest > 1 and drop_oldest >= window:
        raise ValueError(f"drop_oldest {drop_oldest} must be below the window of {window} tokens")
    if cache is not None:
        check_model(model, cache)
        check_depths_fit(cache, [n or max_steps or model.config.hrm_max_steps for row in rows for n in row.forced])
    for row in rows:
        row.text = StoppedText(tokenizer or get_tokenizer(), stop)
        row.seen = seen_tokens(model, row.ids, sampling)

    options = {"max_steps": max_steps, "halt_bias": halt_bias}
    if use_cache and max_new_tokens:
        cache = cache or _new_cache(model, rows, max_new_tokens, max_steps, batch_size)
        engine, places = Cached(model, options, cache), cache.rows
    else:
        engine, places = Recomputing(model, options), len(rows)
    limits = Limits(max_new_tokens, min_new_tokens, stop_tokens, window, drop_oldest, depth_update == "turn")
    places = min(places, batch_size or places)
    return Generation(_run(model, engine, places, rows if max_new_tokens else [], sampling, limits), engine)


class Limits(NamedTuple):
    """Where rows end, as in `stream`."""

    max_new_tokens: int
    min_new_tokens: int
    stop_tokens: tuple[int, ...]
    window: int
    """Tokens that the model sees at most."""
    drop_oldest: int
    keep_depth: bool
    """Whether the depth that a row's first token has is that of all."""


@torch.no_grad()
def _run(
    model: HRMForCausalLM,
    engine: Cached | Recomputing,
    places: int,
    rows: list[Row],
    sampling: Sampling,
    limits: Limits,
) -> Iterator[Event]:
    waiting, active = deque(rows), []

    def draw_now(rows: list[Row], logits: Tensor) -> Tensor:
        return draw_rows(rows, logits, sampling, limits)

    while waiting or active:
        while waiting and len(active) < places:
            active.append(waiting.popleft())
        for row in active:
            row.recomputed = len(row.window) > limits.window
            if row.recomputed:
                row.start = len(row.ids) - limits.window + (limits.drop_oldest - 1 if row.n_new else 0)
        with evaluating(model):
            tokens, logprobs, steps, halted = engine.next(active, draw_now)
        if not all(map(math.isfinite, logprobs)):
            for row in active:
                engine.wipe(row)
            bad = next(row.number for row, logprob in zip(active, logprobs, strict=True) if not math.isfinite(logprob))
            raise ValueError(
                f"the model's logits are not finite (row {bad}): its weights are damaged, or too large for their type"
            )
        events = [
            event_of(row, int(token), logprob, executed, decided, limits)
            for row, token, logprob, executed, decided in zip(active, tokens, logprobs, steps, halted, strict=True)
        ]
        for row, event in zip(active, events, strict=True):
            if event.finish:
                engine.leave(row)
        active = [row for row, event in zip(active, events, strict=True) if not event.finish]
        yield from events


def draw_rows(rows: list[Row], logits: Tensor, sampling: Sampling, limits: Limits) -> Tensor:
    """[2, n]: the next token of each row and its log-probability, from logits [n, V] on the device."""
    uniform, seen, forbidden = None, None, None
    if sampling.temperature:
        uniform = [keyed_uniform(row.key[0], row.n_new, row.key[1]) for row in rows]
    if rows[0].seen is not None:
        seen = torch.stack([row.seen for row in rows])
    early = [i for i, row in enumerate(rows) if row.n_new < limits.min_new_tokens]
    if early and limits.stop_tokens:
        forbidden = torch.zeros(logits.shape, dtype=torch.bool)
        known = [token for token in limits.stop_tokens if token < logits.shape[1]]
        forbidden[torch.tensor(early)[:, None], torch.tensor(known, dtype=torch.int64)] = True
        forbidden = to_device(forbidden, logits.device)
    return draw(logits, uniform, sampling, seen, forbidden)


def seen_tokens(model: HRMForCausalLM, ids: Sequence[int], sampling: Sampling) -> Tensor | None:
    """[V] bool, the tokens that a repetition penalty lowers; None where there is no penalty."""
    if sampling.repetition_penalty == 1.0:
        return None
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
    seen[torch.tensor(ids, device=model.device)] = True
    return seen


def event_of(row: Row, token: int, logprob: float, executed: int, halted: bool, limits: Limits) -> Event:
    """The row with its new token."""
    row.ids.append(token)
    if row.seen is not None:
        row.seen[token] = True
    if limits.keep_depth:
        row.kept_depth = executed
    text, finish = "", None
    if token in limits.stop_tokens:
        finish = "stop_token"
    else:
        text, stopped = row.text.push(token, may_stop=row.n_new >= limits.min_new_tokens)
        finish = "stop" if stopped else "length" if row.n_new >= limits.max_new_tokens else None
    if finish in ("stop_token", "length"):
        text += row.text.finish()
    return Event(row.number, token, text, logprob, executed, finish, row.recomputed, halted)


def _rows(model: HRMForCausalLM, prompts, seed, force_steps, max_steps: int | None) -> list[Row]:
    config = model.config
    max_steps = config.hrm_max_steps if max_steps is None else max_steps
    if len(prompts) == 0:
        raise ValueError("no prompts were given; give at least one")
    for number, ids in enumerate(prompts):
        if len(ids) == 0:
            raise ValueError(f"prompt {number} is empty; give at least one token, such as {END_OF_TEXT}, end of text")
        check_ids(ids, config.vocab_size, f"prompt {number}: ")
    # one seed for all: each row a stream of its own; a seed for each: the same draws, whichever row has it
    shared = not isinstance(seed, Sequence)
    seeds = [seed] * len(prompts) if shared else seed
    for one in seeds:
        if not isinstance(one, Integral):
            raise ValueError(f"seed {one!r} must be an integer, or a list of one for each row")
    if len(seeds) != len(prompts):
        raise ValueError(f"seed has {len(seeds)} entries for {len(prompts)} rows; give one each, or one number")
    keys = [(one, TOKEN_STREAM + ((number << 8) if shared else 0)) for number, one in enumerate(seeds)]
    scheduled = isinstance(force_steps, Sequence) and any(isinstance(n, Sequence) for n in force_steps)
    if scheduled:
        if len(force_steps) != len(prompts) or not all(isinstance(one, Sequence) and len(one) for one in force_steps):
            raise ValueError(f"force_steps must have a list of at least one number for each of {len(prompts)} rows")
        forced = [checked_depths(one, max_steps, len(one)) for one in force_steps]
    else:
        forced = [[n] for n in checked_depths(force_steps, max_steps, len(prompts))]
    return [
        Row(number, list(ids), len(ids), key, depths, None)
        for number, (ids, key, depths) in enumerate(zip(prompts, keys, forced, strict=True))
    ]


def _check_stops(stop: tuple, stop_tokens: tuple) -> None:
    for one in stop:
        if not isinstance(one, str):
            raise ValueError(f"stop string {one!r} is no text; tokens go to stop_tokens")
    if "" in stop:
        raise ValueError("a stop string is empty, which every text contains; give at least one character")
    for token in stop_tokens:
        if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
            raise ValueError(f"stop token {token!r} is no id; ids begin at 0, and text goes to stop")


def _new_cache(
    model: HRMForCausalLM, rows: list[Row], max_new_tokens: int, max_steps: int | None, batch_size: int | None
) -> HRMCache:
    config = model.config
    # the last token drawn is never read
    positions = min(config.block_size, max(len(row.ids) for row in rows) + max(max_new_tokens - 1, 0))
    steps = config.hrm_max_steps if max_steps is None else max_steps
    depths = {n for row in rows for n in row.forced}
    steps = steps if 0 in depths else max(depths)
    n_rows, free = len(rows), room(model)
    if batch_size is not None:
        n_rows = min(n_rows, batch_size)
    elif free is not None:
        fit = int(SHARE_OF_MEMORY * free) // (positions * bytes_per_token(config, steps, model.compute_dtype))
        n_rows = max(1, min(n_rows, fit))
    cache = HRMCache(model, n_rows, positions, steps)
    cache.packed = PackedWeights(always=True)  # so that a row's bits do not depend on the batch
    return cache


def _at_least(name: str, value: int, least: int) -> None:
    if not is_int(value) or value < least:
        raise ValueError(f"{name} {value!r} must be an integer of at least {least}")


_stream = stream


def generate(
    model: HRMForCausalLM,
    ids_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    min_p: float = 0.0,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    stream: bool = False,
    details: bool = False,
    **options,
) -> Tensor | Generated | Generation:
    """Continue each row by up to `max_new_tokens` tokens.

    Args:
        ids_BT: [B, T] int64 prompts, right-padded where `lengths` ([B] prompt tokens per row, default T) says so.
        temperature, top_k, top_p, repetition_penalty, min_p: see hrm_model.sampling.Sampling.
        options: those of hrm_model.generate.stream: min_new_tokens, stop, stop_tokens, seed, max_steps, force_steps,
            halt_bias, depth_update, use_cache, cache, batch_size, drop_oldest, tokenizer.

    Returns:
        [B, T'] int64: each row's prompt followed at once by its new tokens, right-padded with END_OF_TEXT; with
        details, a Generated; with stream, an iterator over Events.

    Raises:
        ValueError: an option out of range, named with its limit.
    """
    if ids_BT.dim() != 2 or 0 in ids_BT.shape or ids_BT.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be [B, T] int64 with at least one token; got {tuple(ids_BT.shape)} {ids_BT.dtype}")
    prompts = [row[:n] for row, n in zip(ids_BT.tolist(), _prompt_lengths(lengths, ids_BT), strict=True)]
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, min_p)
    generation = _stream(model, prompts, max_new_tokens, sampling=sampling, **options)
    if stream and details:
        raise ValueError("stream and details exclude each other: a stream's events are the details")
    if stream:
        return generation
    events: list[list[Event]] = [[] for _ in prompts]
    for event in generation:
        events[event.row].append(event)
    tokens = [[event.token for event in row] for row in events]
    rows = [prompt + new for prompt, new in zip(prompts, tokens, strict=True)]
    longest = max(ids_BT.shape[1], *map(len, rows))
    ids = torch.tensor([row + [END_OF_TEXT] * (longest - len(row)) for row in rows], device=ids_BT.device)
    if not details:
        return ids
    return Generated(
        ids,
        tokens,
        texts=["".join(event.text for event in row) for row in events],
        logprobs=[[event.logprob for event in row] for row in events],
        executed_steps=[[event.steps for event in row] for row in events],
        finish=[row[-1].finish if row else "length" for row in events],
        recomputed=[sum(event.recomputed for event in row) for row in events],
        work=generation.work,
    )


def _prompt_lengths(lengths, ids_BT: Tensor) -> list[int]:
    if lengths is None:
        return [ids_BT.shape[1]] * ids_BT.shape[0]
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(lengths) != ids_BT.shape[0] or not all(n in range(1, ids_BT.shape[1] + 1) for n in lengths):
        raise ValueError(f"lengths {lengths} must be {ids_BT.shape[0]} numbers in 1..{ids_BT.shape[1]}")
    return lengths
