"""HRMCache as transformers wants a cache: rows of a batch with columns, some of them padding.

A column that the attention mask leaves out is not there: its row's text is what remains. So left padding, right padding
and holes cost nothing and change nothing, and a row's numbers are those it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..cache import HRMCache
from ..incremental import extend

if TYPE_CHECKING:
    from .modeling import CosmicFishHRMForCausalLM


class HRMGenerationCache(Cache):
    """What `generate` keeps between tokens. Memory is asked for when the first tokens come, and known by then.

    Args:
        model: whose texts these are.
        positions: tokens of a row to make room for; default and at most block_size. A row may grow beyond; of more than
            block_size tokens the newest are looked at.
        max_steps: most HRM steps of a token; default hrm_max_steps.
    """

    def __init__(self, model: CosmicFishHRMForCausalLM, positions: int | None = None, max_steps: int | None = None):
        super().__init__(layers=[])
        block_size = model.config.block_size
        self.model, self.positions, self.max_steps = model, min(positions or block_size, block_size), max_steps
        self.reset()

    def reset(self) -> None:
        """Forget all rows, and give the memory back."""
        self.inner: HRMCache | None = None
        self.columns = 0
        self._place: list[int] = []
        self._real: list[list[bool]] = []
        self.executed_steps: list[list[int]] = []
        """Of each row, HRM steps of each pass: one for the prompt and its first new token, then one a token."""

    def extend(self, ids_BT: Tensor, real_BT: Tensor | None, last_only: bool, **depth) -> tuple[Tensor, Tensor]:
        """Add columns to all rows.

        Args:
            ids_BT: [B, T] new ids. real_BT: [B, T] bool, False where a column is padding; None: none is.
            last_only: logits of each row's last column alone. depth: max_steps, force_steps, halt_bias.

        Returns:
            (logits [B, 1 or T, V], 0 where a column is padding; executed steps [B] int64).

        Raises:
            ValueError: another number of rows than before, or a row without any token.
        """
        n_rows, n_columns = ids_BT.shape
        if self.inner is None:
            self.inner = HRMCache(self.model, n_rows, self.positions, self.max_steps)
            self._place, self._real = list(range(n_rows)), [[] for _ in range(n_rows)]
            self.executed_steps = [[] for _ in range(n_rows)]
        if n_rows != len(self._place):
            raise ValueError(f"the batch has {n_rows} rows, and its cache {len(self._place)}; make a new cache")
        ids = ids_BT.tolist()
        real = [[True] * n_columns] * n_rows if real_BT is None else real_BT.tolist()
        new = {}
        for place, row, there in zip(self._place, ids, real, strict=True):
            tokens = [token for token, yes in zip(row, there, strict=True) if yes]
            if not tokens:
                raise ValueError("a row gets padding alone, and attention_mask must leave it at least one token")
            new[place] = self._windowed(place, tokens, last_only)
        keep = None if last_only else {place: len(tokens) for place, tokens in new.items()}
        if n_columns == 1:
            keep = None
        result = extend(self.model, self.inner, new, keep=keep, **depth)
        for row, there in enumerate(real):
            self._real[row] += there
            self.executed_steps[row].append(result.executed_steps[row])
        self.columns += n_columns
        steps = torch.tensor(result.executed_steps, device=ids_BT.device)
        if last_only or n_columns == 1:
            return result.logits[:, None], steps
        if real_BT is None:
            return result.logits.view(n_rows, n_columns, -1), steps
        logits = result.logits.new_zeros((n_rows, n_columns, result.logits.shape[-1]))
        logits[real_BT.bool()] = result.logits
        return logits, steps

    def _windowed(self, place: int, tokens: list[int], may_slide: bool) -> list[int]:
        """What is to be added to the row at `place`, after making room for it."""
        held = self.inner.ids(place)
        n = len(held) + len(tokens)
        if n > self.inner.positions < self.model.config.block_size:
            self._grow(self.inner.rows, min(2 * n, self.model.config.block_size))
        if n <= self.inner.positions:
            return tokens
        if not may_slide:
            raise ValueError(
                f"a row has {n} tokens, over {self.inner.positions}, the longest of this cache; "
                "ask for the last column's logits alone (logits_to_keep=1), or cut the row"
            )
        # all positions move, so nothing computed before holds: the published model recomputes its window, too
        self.inner.clear(place)
        return (held + tokens)[-self.inner.positions :]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a row may grow for ever, its window moves."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, *args, **options) -> tuple[int, int]:
        """(columns with the next one, 0)."""
        return self.columns + 1, 0

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self._place)

    is_compileable = False
    is_croppable = False  # not where a window has moved, and `generate` would go ahead and see
    is_initialized = property(lambda self: self.inner is not None)

    def __len__(self) -> int:
        return 1  # one for the whole model

    def __repr__(self) -> str:
        return f"HRMGenerationCache({len(self._place)} rows, {self.columns} columns)"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        rows = torch.as_tensor(indices)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        self._select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([row for row in range(len(self._place)) for _ in range(repeats)])

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; negative: drop so many."""
        kept = max(self.columns + max_length if max_length < 0 else min(max_length, self.columns), 0)
        for row, place in enumerate(self._place):
            dropped = sum(self._real[row][kept:])
            if self.inner.length(place) < sum(self._real[row]):
                raise ValueError(f"row {row} has outgrown its window, and what it dropped is gone; make a new cache")
            self.inner.truncate(place, self.inner.length(place) - dropped)
            del self._real[row][kept:]
        self.columns = kept

    def _select(self, rows: Sequence[int]) -> None:
        if self.inner is None:
            return
        if len(rows) > self.inner.rows:
            self._grow(len(rows), self.inner.positions)
        first: dict[int, int] = {}
        free = set(range(self.inner.rows)) - {self._place[row] for row in rows}
        places = []
        for row in rows:
            place = self._place[row]
            if place in first:  # a second row of the same: a copy, in a place that nobody keeps
                target = free.pop()
                self.inner.copy(place, [target])
                place = target
            first.setdefault(place, row)
            places.append(place)
        self._place = places
        self._real = [list(self._real[row]) for row in rows]
        self.executed_steps = [list(self.executed_steps[row]) for row in rows]

    def _grow(self, rows: int, positions: int) -> None:
        grown = HRMCache(self.model, rows, positions, self.inner.max_steps)
        for place in self._place:
            grown.copy(place, [place], cache=self.inner)
        self.inner = grown

    def __deepcopy__(self, memo) -> HRMGenerationCache:
        """A copy that goes its own way; the model is not copied."""
        other = copy(self)
        other.inner = None if self.inner is None else self.inner.clone()
        other._place = list(self._place)
        other._real, other.executed_steps = ([list(row) for row in rows] for rows in (self._real, self.executed_steps))
        return other
