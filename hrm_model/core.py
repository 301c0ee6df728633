"""HRMCore: two recurrent levels, the loop in which each row runs for as long as it needs, and its training gradient.

One step, with x the input blocks' output:

    H_cycles times:  L_cycles times:  z_L <- L_level(z_L + (z_H + x))
                     z_H <- H_level(z_H + z_L)

After a step q = q_head(mean over real tokens of z_H) = [halt, continue], and a row with q_halt + bias > q_continue is
done: it leaves the batch, so its state never changes again and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hrm_kernels as ops

from .blocks import ReasoningBlock
from .config import HRMConfig

GRADIENTS = ("replay", "published")


@dataclass
class CoreOutput:
    """What the loop did. B rows, T positions, C channels."""

    z_H: Tensor
    """[B, T, C] slow state of each row after its last step."""
    q_logits: Tensor
    """[B, 2] float32, [halt, continue] after each row's last step."""
    executed_steps: Tensor
    """[B] int64, steps run."""
    halted: Tensor
    """[B] bool, whether the row stopped by the head's decision."""
    row_steps: tuple[int, int]
    """Row-steps that were computed without and with gradient."""


class Level(nn.Module):
    """One recurrent level: the injection is added once, then the layers run."""

    def __init__(self, config: HRMConfig, n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(ReasoningBlock(config) for _ in range(n_layers))

    def forward(self, z: Tensor, injection: Tensor, rotary: Tensor | None, lengths: Tensor | None) -> Tensor:
        z = z + injection
        for layer in self.layers:
            z = layer(z, rotary, lengths)
        return z


class HRMCore(nn.Module):
    """The hierarchical reasoning module: per-row adaptive depth, memory that does not grow with steps."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.config = config
        self.H_level = Level(config, config.hrm_H_layers)
        self.L_level = Level(config, config.hrm_L_layers)
        self.H_init = nn.Parameter(torch.empty(config.n_embd))
        self.L_init = nn.Parameter(torch.empty(config.n_embd))
        self.q_head = nn.Linear(config.n_embd, 2)

    def step(
        self, x: Tensor, z_H: Tensor, z_L: Tensor, rotary: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One HRM step on [B, T, C] tensors; returns (z_H, z_L)."""
        for _ in range(self.config.hrm_H_cycles):
            for _ in range(self.config.hrm_L_cycles):
                z_L = self.L_level(z_L, z_H + x, rotary, lengths)
            z_H = self.H_level(z_H, z_L, rotary, lengths)
        return z_H, z_L

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """H_init and L_init expanded to x's shape [B, T, C] (views)."""
        return self.H_init.to(x.dtype).expand_as(x), self.L_init.to(x.dtype).expand_as(x)

    def q_values(self, z_H: Tensor, halt_bias: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(q [B, 2], decision [B] bool) for the state [B, T, C] after a step."""
        return ops.halting(z_H, self.q_head.weight, self.q_head.bias, halt_bias, lengths)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        lengths: Tensor | None,
        forced: list[int],
        max_steps: int,
        halt_bias: float,
        gradient: str = "replay",
    ) -> CoreOutput:
        """Run every row to its own depth.

        Without gradient the loop's own states are the result. With gradient, the loop runs without and remembers each
        row's state before its last step; that step is then run once more, for all rows together, with gradient
        ("replay"). "published" gives gradient only to rows that run all `max_steps`, through that last step.

        Args:
            x: [B, T, C] output of the input blocks. rotary, lengths: as in hrm_kernels.
            forced: per row, the exact number of steps, or 0 to let the head decide.
            max_steps: S, the most steps of a row that decides; with 1 nothing is decided.
            halt_bias: added to q_halt.
            gradient: "replay" or "published". In both a row that is done is frozen; the published code as a whole,
                which goes on updating it, is bench/published.py.
        """
        may_halt = [n == 0 and max_steps > 1 for n in forced]
        loop = _Loop(self, x, rotary, lengths, halt_bias, may_halt, max_steps)
        depth = [n or max_steps for n in forced]
        if not torch.is_grad_enabled():
            loop.run(depth)
            return loop.output()

        if gradient == "published" and self.training:
            loop.exploration = self.config.hrm_exploration_prob
        with torch.no_grad():
            loop.run([n - 1 for n in depth], keep_before=gradient == "replay")
        # Autocast caches the low-precision copy of a weight until its region ends. In some torch releases copies made
        # in the loop have no gradient history, and the replay would silently reuse them (pytorch issue 112583): the
        # core's weights would then get no gradient. Casting them once more is all that this costs.
        torch.clear_autocast_cache()
        if gradient == "replay":
            loop.run_last(list(range(len(depth))), depth)
        else:
            undecided = [row for row in range(len(depth)) if not loop.halted[row]]
            with torch.no_grad():
                loop.run_last([row for row in undecided if depth[row] < max_steps], depth)
            loop.run_last([row for row in undecided if depth[row] == max_steps], depth)
        return loop.output()


class _Loop:
    """The rows of one batch on their way through the steps; z_H, z_L, q, executed, halted are kept by row."""

    def __init__(
        self,
        core: HRMCore,
        x: Tensor,
        rotary: Tensor | None,
        lengths: Tensor | None,
        halt_bias: float,
        may_halt: list[bool],
        max_steps: int,
    ):
        self.core, self.x, self.rotary, self.lengths = core, x, rotary, lengths
        self.halt_bias, self.may_halt, self.max_steps = halt_bias, may_halt, max_steps
        self.exploration = 0.0
        self.z_H, self.z_L = core.initial_state(x)
        self.q = torch.zeros(len(x), 2, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        self.row_steps = [0, 0]
        self.executed = [0] * len(x)
        self.halted = [False] * len(x)

    def run(self, limit: list[int], keep_before: bool = False) -> None:
        """Step row r until its decision or limit[r] steps, then keep its state: of a row that decides to halt the
        one before its last step if `keep_before`, else the one after. A row that is done leaves the batch."""
        live = [row for row, n in enumerate(limit) if n > 0]
        x, lengths, z_H, z_L = _pick(live, self.x, self.lengths, self.z_H, self.z_L)
        while live:
            before = z_H, z_L
            z_H, z_L = self._step(x, z_H, z_L, lengths)
            for row in live:
                self.executed[row] += 1
            self._decide(live, z_H, lengths)
            halted = [i for i, row in enumerate(live) if self.halted[row]]
            ended = [i for i, row in enumerate(live) if not self.halted[row] and self.executed[row] == limit[row]]
            self._keep([live[i] for i in halted], *_pick(halted, *(before if keep_before else (z_H, z_L))))
            self._keep([live[i] for i in ended], *_pick(ended, z_H, z_L))
            stay = [i for i, row in enumerate(live) if not self.halted[row] and self.executed[row] < limit[row]]
            live = [live[i] for i in stay]
            x, lengths, z_H, z_L = _pick(stay, x, lengths, z_H, z_L)

    def run_last(self, rows: list[int], depth: list[int]) -> None:
        """Run the last step of `rows` from their kept states: again for those that halted, for the first time for
        the others, whose step number depth[row] it is."""
        if not rows:
            return
        x, lengths, z_H, z_L = _pick(rows, self.x, self.lengths, self.z_H, self.z_L)
        from_init = [(self.executed[row] if self.halted[row] else depth[row]) == 1 for row in rows]
        if any(from_init):
            # These rows start from the parameters themselves, which so get their gradient.
            mask = torch.tensor(from_init, device=x.device)[:, None, None]
            init_H, init_L = self.core.initial_state(x)
            z_H, z_L = torch.where(mask, init_H, z_H), torch.where(mask, init_L, z_L)
        z_H, z_L = self._step(x, z_H, z_L, lengths)
        self._keep(rows, z_H, z_L)
        undecided = [i for i, row in enumerate(rows) if not self.halted[row]]
        for i in undecided:
            self.executed[rows[i]] = depth[rows[i]]
        with torch.no_grad():
            self._decide([rows[i] for i in undecided], *_pick(undecided, z_H, lengths))

    def _step(self, x: Tensor, z_H: Tensor, z_L: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        self.row_steps[torch.is_grad_enabled()] += len(x)
        return self.core.step(x, z_H, z_L, self.rotary, lengths)

    def _decide(self, rows: list[int], z_H: Tensor, lengths: Tensor | None) -> None:
        if not rows:
            return
        q, halt = self.core.q_values(z_H, self.halt_bias, lengths)
        self.q = _put(self.q, rows, q)
        if any(self.may_halt[row] for row in rows):
            least = self._least_steps()
            # The only place where the host waits for the device; never reached when every depth is given.
            for row, decided in zip(rows, halt.tolist(), strict=True):
                self.halted[row] = decided and self.may_halt[row] and self.executed[row] >= least

    def _least_steps(self) -> int:
        """Steps before which no row may halt. The published exploration: one draw a step for the whole batch."""
        if self.exploration == 0 or torch.rand(()).item() >= self.exploration:
            return 1
        return int(torch.randint(2, self.max_steps + 1, ()))

    def _keep(self, rows: list[int], z_H: Tensor, z_L: Tensor) -> None:
        if rows:
            self.z_H, self.z_L = _put(self.z_H, rows, z_H), _put(self.z_L, rows, z_L)

    def output(self) -> CoreOutput:
        device = self.x.device
        executed = torch.tensor(self.executed, dtype=torch.int64, device=device)
        halted = torch.tensor(self.halted, dtype=torch.bool, device=device)
        return CoreOutput(self.z_H, self.q, executed, halted, tuple(self.row_steps))


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
