"""Memory of sequences that grow: what a new token needs of those before it, so that none of them is computed twice.

Attention is causal, so the state of a position after a step does not depend on what follows. What changes as a row
grows is only how many steps the whole of it takes. Therefore, for every position,

    keys and values of each block application: input block; (step, cycle, level, layer); (depth, output block)
    x, the input blocks' output; z_H after each step; z_L after its latest step
    and per row and step the sum of z_H over positions, for the halting head's mean

are kept. A row that goes deeper than ever before runs its earlier positions through the missing step first, from z_H
and z_L as they were left (backfill); the output blocks read z_H of the depth that the row now has, at all positions,
so their keys and values are kept for each depth and filled when it is first needed (refill). hrm_model/incremental.py
does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import hrm_kernels as ops

from .config import HRMConfig, is_int

if TYPE_CHECKING:
    from .model import LanguageModel
    from .newest import NewestDecoder


@dataclass
class Work:
    """Applications of one block to one token, counted as they are run."""

    input: int = 0
    core: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.input + self.core + self.output

    def since(self, before: Work) -> Work:
        """What was added."""
        return Work(self.input - before.input, self.core - before.core, self.output - before.output)


def bytes_per_token(
    config: HRMConfig,
    max_steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> int:
    """Memory that one token of one row takes in a cache, in bytes.

    Args:
        max_steps: steps that the cache has room for, default hrm_max_steps. dtype: of states. kv_dtype: of keys and
            values, where autocast makes them narrower than states.
    """
    steps = config.hrm_max_steps if max_steps is None else max_steps
    blocks = config.n_input_layers + steps * (config.blocks_per_step + config.n_output_layers)
    keys_and_values = blocks * 2 * config.kv_heads * config.head_dim
    states = (2 + steps) * config.n_embd
    return keys_and_values * (kv_dtype or dtype).itemsize + states * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that can still be asked for; None where it cannot be read."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type not in ("cpu", "mps"):  # mps shares the host's
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min(free, _left_in_container(free))


def _left_in_container(free: int) -> int:
    """What a control group's limit leaves, pages of files that it can give back included; `free` without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(held["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return free


def room(model: LanguageModel) -> int | None:
    """Bytes that a cache of this model may take, in full; None where that cannot be read. On a CPU packed copies of the
    weights come beside it."""
    free = free_bytes(model.device)
    if free is None or model.device.type != "cpu" or model.compute_dtype != torch.float32:
        return free
    return max(0, free - 4 * model.num_parameters())


class HRMCache:
    """Room for `rows` sequences of up to `positions` tokens and `max_steps` steps; all of it is asked for at once, so
    that it never grows. (A CPU hands memory out when it is first written to, so rows that stay short or shallow take
    less.)

    Args:
        model: whose rows these are. Its weights' type and device are the cache's; make the cache under the autocast
            that it is used under, and another one when the weights have changed.
        rows: sequences at a time. positions: default and at most block_size. max_steps: S, default hrm_max_steps.

    Raises:
        ValueError: sizes out of range, or more memory than there is; the message names both.
    """

    def __init__(self, model: LanguageModel, rows: int = 1, positions: int | None = None, max_steps: int | None = None):
        config = model.config
        self.model, self.config, self.device = model, config, model.device
        self.rows = _at_least_one("rows", rows)
        self.positions = _at_least_one("positions", config.block_size if positions is None else positions)
        self.max_steps = _at_least_one("max_steps", config.hrm_max_steps if max_steps is None else max_steps)
        if self.positions > config.block_size:
            raise ValueError(f"positions {positions} are more than block_size {config.block_size}, the model's longest")
        dtype = model.compute_dtype
        kind = self.device.type
        kv_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        self.bytes_per_token = bytes_per_token(config, self.max_steps, dtype, kv_dtype)
        self._check_room(model)

        with torch.inference_mode(False):  # memory made within it could not be written to outside it
            self._allocate(model, dtype, kv_dtype)
        self._ids: list[list[int]] = [[] for _ in range(self.rows)]
        self.done = [[0] * self.max_steps for _ in range(self.rows)]
        """Of each row and step, how many positions have run it; never rises with the step."""
        self.decoded = [[0] * self.max_steps for _ in range(self.rows)]
        """Of each row and depth, how many positions have gone through the output blocks."""
        self.work = Work()
        self._doubted: set[int] = set()
        self._decoders: dict[tuple, NewestDecoder | None] = {}
        self.packed = ops.PackedWeights()
        """On a CPU, a copy of the weights in a faster layout, made as they are used."""

    def _allocate(self, model: LanguageModel, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        config, kind = self.config, self.device.type
        r, p, c, s = self.rows, self.positions, config.n_embd, self.max_steps
        one = (2, config.kv_heads, config.head_dim)
        state = {"dtype": dtype, "device": self.device}
        kv = {"dtype": kv_dtype, "device": self.device}
        self.x, self.z_L = (torch.empty((r, p, c), **state) for _ in range(2))
        self.z_H = torch.empty((s, r, p, c), **state)
        # sums over hundreds of positions, one at a time: in double precision they round no worse than a mean at once
        wide = torch.float32 if kind == "mps" else torch.float64
        self.sums = torch.zeros((s, r, c), dtype=wide, device=self.device)
        # zeros: a weight of 0 on memory that nobody wrote would be 0 times nan
        self.kv_input = torch.zeros((config.n_input_layers, r, p, *one), **kv)
        self.kv_core = torch.zeros((s, config.blocks_per_step, r, p, *one), **kv)
        self.kv_output = torch.zeros((config.n_output_layers, s * r, p, *one), **kv)
        self.rotary = model.rotary(p)

    def _check_room(self, model: LanguageModel) -> None:
        wanted, free = self.rows * self.positions * self.bytes_per_token, room(model)
        if free is not None and wanted > free:
            raise ValueError(
                f"a cache of {self.rows} rows x {self.positions} positions x {self.max_steps} steps takes "
                f"{wanted / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on {self.device}, which is "
                f"{free // self.bytes_per_token} positions in all; take fewer rows, shorter ones or a smaller max_steps"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the cache has asked for."""
        tensors = self.x, self.z_L, self.z_H, self.sums, self.kv_input, self.kv_core, self.kv_output
        return sum(t.nbytes for t in tensors)

    def ids(self, row: int) -> list[int]:
        """The tokens that a row holds."""
        return list(self._ids[self._row(row)])

    def length(self, row: int) -> int:
        """How many they are."""
        return len(self._ids[self._row(row)])

    def common(self, row: int, ids: Sequence[int]) -> int:
        """How many of its first tokens a row shares with `ids`."""
        return agree(self._ids[self._row(row)], ids)

    def append(self, new: Mapping[int, Sequence[int]]) -> None:
        """Note ids at the ends of rows; what is computed of them is hrm_model/incremental.py's."""
        for row, ids in new.items():
            self._ids[self._row(row)] += ids

    def decoder(self) -> NewestDecoder | None:
        """What starts new tokens without waiting, where kernels do; made once for each choice of kernels."""
        told = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
        key = *ops.choices(), *told, torch.is_autocast_enabled(self.device.type)
        known = self._decoders.get(key)
        if key not in self._decoders or (known is not None and not known.fits()):
            from .newest import NewestDecoder

            self._decoders[key] = NewestDecoder.of(self.model, self)
        return self._decoders[key]

    def clear(self, row: int) -> None:
        """Forget a row, to give its place to another sequence."""
        self.truncate(row, 0)

    def truncate(self, row: int, n: int) -> None:
        """Keep a row's first n tokens. What was computed for them stays right, whatever had followed."""
        n = self._count(row, n)
        self.doubt([row])
        for counts in (self.done, self.decoded):
            counts[row] = [min(count, n) for count in counts[row]]
        del self._ids[row][n:]

    @torch.no_grad()
    def copy(self, source: int, targets: Sequence[int], n: int | None = None, cache: HRMCache | None = None) -> None:
        """Make the first n tokens of row `source` (default all) the contents of rows `targets`: several continuations
        share what was computed once. cache: whose row that is, of the same model and with as many steps; default
        this one's."""
        c = self if cache is None else cache
        n = c._count(source, c.length(source) if n is None else n)
        for row in targets:
            self._row(row)
        for row in targets:
            if c is self and row == source:
                continue
            self.clear(row)  # first, so that a row that is interrupted here is an empty one
            done, decoded = ([min(count, n) for count in counts[source]] for counts in (c.done, c.decoded))
            for mine, theirs in ((self.x, c.x), (self.z_L, c.z_L)):
                mine[row, :n] = theirs[source, :n]
            self.kv_input[:, row, :n] = c.kv_input[:, source, :n]
            for s in range(self.max_steps):
                self.z_H[s, row, : done[s]] = c.z_H[s, source, : done[s]]
                self.kv_core[s, :, row, : done[s]] = c.kv_core[s, :, source, : done[s]]
                to, of = s * self.rows + row, s * c.rows + source
                self.kv_output[:, to, : decoded[s]] = c.kv_output[:, of, : decoded[s]]
            self._ids[row] = c._ids[source][:n]
            self.done[row], self.decoded[row] = done, decoded

    def clone(self) -> HRMCache:
        """Another cache of the same model with the same contents."""
        other = copy(self)
        for name in ("x", "z_L", "z_H", "sums", "kv_input", "kv_core", "kv_output"):
            setattr(other, name, getattr(self, name).clone())
        for name in ("_ids", "done", "decoded"):
            setattr(other, name, [list(row) for row in getattr(self, name)])
        other.work, other._doubted = replace(self.work), set(self._doubted)
        other._decoders, other.packed = {}, ops.PackedWeights()
        return other

    def wipe(self, row: int) -> None:
        """Forget a row and what its memory holds: what is not finite would be, for whoever comes next, 0 times nan."""
        self.clear(row)
        for t in (self.x, self.z_L, *self.z_H, *self.kv_input, *self.kv_core.flatten(0, 1)):
            t[row].zero_()
        self.kv_output[:, row :: self.rows].zero_()

    def doubt(self, rows: Iterable[int]) -> None:
        """Sums of these rows are made again before they are used, unless `trust` is told that they are right: whoever
        is interrupted in between leaves nothing wrong behind."""
        self._doubted.update(rows)

    def trust(self, rows: Iterable[int]) -> None:
        """Sums of these rows are of all positions that have run each step."""
        self._doubted.difference_update(rows)

    @torch.no_grad()
    def settle(self, rows: Iterable[int]) -> None:
        """Make the sums that are in doubt again."""
        for row in self._doubted.intersection(rows):
            for s, count in enumerate(self.done[row]):
                self.sums[s, row] = self.z_H[s, row, :count].sum(0, dtype=self.sums.dtype)
            self._doubted.discard(row)

    def _row(self, row: int) -> int:
        if row not in range(self.rows):
            raise ValueError(f"row {row} is outside 0..{self.rows - 1}, the cache's rows")
        return row

    def _count(self, row: int, n: int) -> int:
        if n < 0:
            raise ValueError(f"{n} tokens of row {row} cannot be kept; give a number of at least 0")
        return min(n, self.length(row))


def agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _at_least_one(name: str, value: int) -> int:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} {value!r} must be an integer of at least 1")
    return value
