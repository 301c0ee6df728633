"""The loop over steps as the host runs it: the reference that the kernels' loop (hrm_kernels/loop.py) is held to.

After a step q = q_head(mean over real tokens of z_H) = [halt, continue], and a row with q_halt + bias > q_continue is
done: it leaves the batch, so its state never changes again and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import hrm_kernels as ops

if TYPE_CHECKING:
    from .core import HRMCore


@dataclass(frozen=True)
class Batch:
    """What a loop starts from. B rows, T positions, C channels."""

    x: Tensor
    """[B, T, C] output of the input blocks."""
    rotary: Tensor | None
    """float32 [T, D/2, 2], the same for every row."""
    lengths: Tensor | None
    """[B] int64."""
    limit: list[int]
    """Per row, the steps after which it is done whatever it decides."""
    may_halt: list[bool]
    """Per row, whether the head's decision counts."""
    halt_bias: float
    """Added to q_halt."""
    pooled: Tensor | None = None
    """[B] int64: leading tokens over which the decision's mean runs, where that is not the whole row."""

    def decides_on(self) -> Tensor | None:
        """[B] int64, the tokens that a decision looks at; None for all."""
        return self.lengths if self.pooled is None else self.pooled

    def one_less(self) -> Batch:
        """Every limit one step less."""
        return replace(self, limit=[n - 1 for n in self.limit])


class HostLoop:
    """The rows of a batch on their way through the steps; z_H, z_L, q, executed, halted are kept by row."""

    def __init__(self, core: HRMCore, batch: Batch):
        self.core, self.batch, x = core, batch, batch.x
        self.exploration, self.max_steps = 0.0, max(batch.limit)
        self.z_H, self.z_L = core.initial_state(x)
        self.q = torch.zeros(len(x), 2, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        self.row_steps = [0, 0]
        self.executed = [0] * len(x)
        self.halted = [False] * len(x)

    def run(self, limit: list[int], keep_before: bool = False) -> None:
        """Step row r until its decision or limit[r] steps, then keep its state: of a row that decides to halt the
        one before its last step if `keep_before`, else the one after. A row that is done leaves the batch."""
        live = [row for row, n in enumerate(limit) if n > 0]
        kept = self.batch.x, self.batch.lengths, self.batch.decides_on(), self.z_H, self.z_L
        x, lengths, pooled, z_H, z_L = _pick(live, *kept)
        while live:
            before = z_H, z_L
            z_H, z_L = self._step(x, z_H, z_L, lengths)
            for row in live:
                self.executed[row] += 1
            self._decide(live, z_H, pooled)
            halted = [i for i, row in enumerate(live) if self.halted[row]]
            ended = [i for i, row in enumerate(live) if not self.halted[row] and self.executed[row] == limit[row]]
            self._keep([live[i] for i in halted], *_pick(halted, *(before if keep_before else (z_H, z_L))))
            self._keep([live[i] for i in ended], *_pick(ended, z_H, z_L))
            stay = [i for i, row in enumerate(live) if not self.halted[row] and self.executed[row] < limit[row]]
            live = [live[i] for i in stay]
            x, lengths, pooled, z_H, z_L = _pick(stay, x, lengths, pooled, z_H, z_L)

    def run_last(self, rows: list[int]) -> None:
        """Run the last step of `rows`, of which none has halted, from their kept states."""
        if not rows:
            return
        kept = self.batch.x, self.batch.lengths, self.batch.decides_on(), self.z_H, self.z_L
        x, lengths, pooled, z_H, z_L = _pick(rows, *kept)
        z_H, z_L = self._step(x, z_H, z_L, lengths)
        self._keep(rows, z_H, z_L)
        for row in rows:
            self.executed[row] += 1
        with torch.no_grad():
            self._decide(rows, z_H, pooled)

    def _step(self, x: Tensor, z_H: Tensor, z_L: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        self.row_steps[torch.is_grad_enabled()] += len(x)
        return self.core.step(x, z_H, z_L, self.batch.rotary, lengths)

    def _decide(self, rows: list[int], z_H: Tensor, pooled: Tensor | None) -> None:
        q, halt = self.core.q_values(z_H, self.batch.halt_bias, pooled)
        self.q = _put(self.q, rows, q)
        may_halt = self.batch.may_halt
        if any(may_halt[row] for row in rows):
            least = self._least_steps()
            # The only place where the host waits for the device; never reached when every depth is given.
            for row, decided in zip(rows, halt.tolist(), strict=True):
                self.halted[row] = decided and may_halt[row] and self.executed[row] >= least

    def _least_steps(self) -> int:
        """Steps before which no row may halt. The published exploration: one draw a step for the whole batch."""
        if self.exploration == 0 or torch.rand(()).item() >= self.exploration:
            return 1
        return int(torch.randint(2, self.max_steps + 1, ()))

    def _keep(self, rows: list[int], z_H: Tensor, z_L: Tensor) -> None:
        if rows:
            self.z_H, self.z_L = _put(self.z_H, rows, z_H), _put(self.z_L, rows, z_L)

    def result(self) -> ops.LoopResult:
        """As the kernels' loop has it."""
        device = self.batch.x.device
        executed = torch.tensor(self.executed, dtype=torch.int64, device=device)
        halted = torch.tensor(self.halted, dtype=torch.bool, device=device)
        return ops.LoopResult(self.z_H, self.z_L, self.q, executed, halted)


def host_loop(core: HRMCore, batch: Batch, keep_before: bool) -> ops.LoopResult:
    """Step every row of `batch` until its decision or its limit; keep_before as in HostLoop.run."""
    loop = HostLoop(core, batch)
    loop.run(batch.limit, keep_before)
    return loop.result()


def published_gradient(core: HRMCore, batch: Batch, max_steps: int, exploration: float) -> HostLoop:
    """The authors' gradient: only rows that run all `max_steps` have one, through that last step."""
    loop = HostLoop(core, batch)
    loop.exploration, loop.max_steps = exploration, max_steps
    with torch.no_grad():
        loop.run(batch.one_less().limit)
    torch.clear_autocast_cache()  # see HRMCore.forward
    undecided = [row for row, halted in enumerate(loop.halted) if not halted]
    with torch.no_grad():
        loop.run_last([row for row in undecided if batch.limit[row] < max_steps])
    loop.run_last([row for row in undecided if batch.limit[row] == max_steps])
    return loop


def _pick(index: list[int], *tensors: Tensor | None) -> list[Tensor | None]:
    """Rows `index` (ascending, distinct) of each tensor; a tensor that they cover is passed on without a copy."""
    return [
        t if t is None or len(t) == len(index) else t[torch.tensor(index, dtype=torch.int64, device=t.device)]
        for t in tensors
    ]


def _put(into: Tensor, index: list[int], values: Tensor) -> Tensor:
    """`into` with its rows `index` replaced by `values`."""
    if len(into) == len(index):
        return values
    return into.index_copy(0, torch.tensor(index, device=into.device), values)
