"""Rows on their way to an end, and where their logits come from: a cache, or a forward pass over every window.

Both give the same numbers. The cache's places are taken by one row after another; what a prompt has in common with
what a place holds, or with another row, is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import HRMCache, Work, agree
from .incremental import Extending, extend
from .model import HRMForCausalLM
from .stops import StoppedText

READ_AT_ONCE = 128
"""Tokens of a prompt in a pass. Passes end at multiples of it, so that how a prompt is cut depends on nothing else."""
WORTH_COPYING = 8
"""Tokens that a prompt must have in common with another row's, beyond what its own place holds, to be copied from
it."""


@dataclass
class Row:
    """A prompt on its way."""

    number: int
    ids: list[int]
    """Prompt and new tokens."""
    n_prompt: int
    key: tuple[int, int]
    """(seed, stream) of its draws."""
    forced: list[int]
    """Depth for each new token, the last for all that follow; 0 lets the head decide."""
    text: StoppedText | None
    start: int = 0
    """The window is the ids from here on."""
    recomputed: bool = False
    """Whether the window has just been cut, so that nothing computed before holds."""
    slot: int = -1
    """Place in the cache; -1 while it has none."""
    kept_depth: int = 0
    """Depth that was decided once for all tokens; 0 while none was."""
    seen: Tensor | None = None
    """[V] bool, tokens that are in the row; None where nobody asks."""

    @property
    def n_new(self) -> int:
        """Tokens that were drawn."""
        return len(self.ids) - self.n_prompt

    @property
    def window(self) -> list[int]:
        """What the model sees of it."""
        return self.ids[self.start :]

    def depth(self) -> int:
        """What the next token is forced to, 0 where the head decides."""
        return self.kept_depth or self.forced[min(self.n_new, len(self.forced) - 1)]


Draw = Callable[[list[Row], Tensor], Tensor]
"""(rows, their logits [n, V]) -> [2, n]: tokens and log-probabilities."""


class Recomputing:
    """Every token from a forward pass over its whole window.

    Args:
        options: max_steps and halt_bias, as in HRMForCausalLM.forward.
    """

    def __init__(self, model: HRMForCausalLM, options: dict):
        self.model, self.options, self.work = model, options, Work()

    def next(self, rows: list[Row], draw: Draw) -> tuple[list[float], list[float], list[int], list[bool]]:
        """(tokens, log-probabilities, executed steps, whether the head decided them), one of each row."""
        windows = [row.window for row in rows]
        sizes = [len(window) for window in windows]
        padded = torch.tensor([window + [0] * (max(sizes) - len(window)) for window in windows])
        model, uneven = self.model, len(set(sizes)) > 1
        out = model(
            padded.to(model.device),
            lengths=sizes if uneven else None,
            force_steps=[row.depth() for row in rows],
            **self.options,
        )
        executed = out.executed_steps.tolist()
        config = model.config
        self.work.input += sum(sizes) * config.n_input_layers
        self.work.core += sum(n * d for n, d in zip(sizes, executed, strict=True)) * config.blocks_per_step
        self.work.output += sum(sizes) * config.n_output_layers
        tokens, logprobs = draw(rows, out.logits[torch.arange(len(sizes)), torch.tensor(sizes) - 1]).tolist()
        return tokens, logprobs, executed, (out.executed_steps > out.steps_taken).tolist()

    def leave(self, row: Row) -> None:
        """The row is finished."""

    def wipe(self, row: Row) -> None:
        """The row's numbers are not finite."""


class Cached:
    """Every token from what the cache holds of its row.

    Args:
        options: max_steps and halt_bias, as in HRMForCausalLM.forward.
    """

    def __init__(self, model: HRMForCausalLM, options: dict, cache: HRMCache):
        self.model, self.options, self.cache = model, options, cache
        self._free = set(range(cache.rows))

    @property
    def work(self) -> Work:
        """All that the cache's rows have cost so far."""
        return self.cache.work

    def next(self, rows: list[Row], draw: Draw) -> tuple[list[float], list[float], list[int], list[bool]]:
        """(tokens, log-probabilities, executed steps, whether the head decided them), one of each row."""
        donors: dict[int, int] = {}
        came: list[Row] = []
        for row in rows:
            if row.slot < 0:
                self._settle(row, came, donors)
                came.append(row)
        found = self._extend([row for row in rows if row.number not in donors], draw)
        if donors:
            followers = [row for row in rows if row.number in donors]
            for row in followers:
                donor = donors[row.number]
                self.cache.copy(donor, [row.slot], self.cache.common(donor, row.window))
            found |= self._extend(followers, draw)
        return tuple(zip(*(found[row.number] for row in rows), strict=True))

    def _settle(self, row: Row, came: list[Row], donors: dict[int, int]) -> None:
        """Give a row the free place that holds most of it already; note where more of it lies, or will."""
        cache, window = self.cache, row.window
        there = {slot: cache.common(slot, window) for slot in range(cache.rows)}
        # of places with as much in common the emptiest, so that no other text is lost for nothing
        row.slot = max(sorted(self._free), key=lambda slot: (there[slot], -cache.length(slot)))
        self._free.discard(row.slot)
        own = there.pop(row.slot)
        there |= {other.slot: agree(other.window, window) for other in came if other.number not in donors}
        most = max(there, key=there.__getitem__, default=None)
        if most is not None and there[most] >= own + WORTH_COPYING:
            donors[row.number] = most

    def _extend(self, rows: list[Row], draw: Draw) -> dict[int, tuple[float, float, int, bool]]:
        """Of each row by its number: token, log-probability, executed steps, whether the head decided them."""
        new = {}
        for row in rows:
            window, held = row.window, self.cache.length(row.slot)
            if self.cache.ids(row.slot) != window[:-1]:
                # at least the last token is run: its logits are what is wanted
                held = min(self.cache.common(row.slot, window), len(window) - 1)
                self.cache.truncate(row.slot, held)
            new[row.slot] = window[held:]
        self._read_ahead(rows, new)
        forced = [row.depth() for row in rows]
        work = Extending(self.model, self.cache, new, force_steps=forced, **self.options)
        result, drawn, again = work.finish(draw(rows, work.logits))
        if again:
            redrawn = draw([rows[i] for i in again], result.logits[again]).tolist()
            for place, *values in zip(again, *redrawn, strict=True):
                drawn[0][place], drawn[1][place] = values
        numbers = [row.number for row in rows]
        return dict(zip(numbers, zip(*drawn, result.executed_steps, result.halted, strict=True), strict=True))

    def _read_ahead(self, rows: list[Row], new: dict[int, list[int]]) -> None:
        """All but the last pass of long prompts; `new` keeps what is left. Whoever drops a token each time (a full
        window) reads all at once: there it would only cost."""
        while True:
            early = {}
            for row in rows:
                room = READ_AT_ONCE - self.cache.length(row.slot) % READ_AT_ONCE
                if len(new[row.slot]) > room and not row.recomputed:
                    early[row.slot], new[row.slot] = new[row.slot][:room], new[row.slot][room:]
            if not early:
                return
            forced = [row.depth() for row in rows if row.slot in early]
            extend(self.model, self.cache, early, force_steps=forced, **self.options)

    def leave(self, row: Row) -> None:
        """The row is finished; its place may go to another."""
        self._free.add(row.slot)

    def wipe(self, row: Row) -> None:
        """The row's numbers are not finite."""
        self.cache.wipe(row.slot)
