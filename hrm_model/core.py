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
            gradient: "replay" or "published".
        """
        may_halt = [depth == 0 and max_steps > 1 for depth in forced]
        limit = [depth or max_steps for depth in forced]
        with_gradient = torch.is_grad_enabled()
        exploring = gradient == "published" and with_gradient and self.training
        run = _Loop(self, rotary, halt_bias, may_halt, exploring and self.config.hrm_exploration_prob, max_steps)
        if not with_gradient:
            run(x, lengths, limit)
            return run.output()

        keep_before = gradient == "replay"
        with torch.no_grad():
            run(x.detach(), lengths, [n - 1 for n in limit], keep_before)
        # Autocast caches the low-precision copy of a weight until its region ends. Copies made in the loop have no
        # gradient, and the replay would silently reuse them: the core's weights would then get none.
        torch.clear_autocast_cache()
        if keep_before:
            self._replay(run, x, lengths, list(range(len(limit))))
        else:
            undecided = [row for row in range(len(limit)) if not run.halted[row]]
            with torch.no_grad():
                self._replay(run, x, lengths, [row for row in undecided if limit[row] < max_steps])
            self._replay(run, x, lengths, [row for row in undecided if limit[row] == max_steps])
        return run.output()

    def _replay(self, run: _Loop, x: Tensor, lengths: Tensor | None, rows: list[int]) -> None:
        """Run the last step of `rows` from their remembered states, writing their final z_H and q into `run`."""
        if not rows:
            return
        first = torch.tensor([run.executed[row] <= 1 if run.halted[row] else run.executed[row] == 0 for row in rows])
        index = torch.tensor(rows, device=x.device)
        whole = len(rows) == x.shape[0]
        x, z_H, z_L = (t if whole else t[index] for t in (x, run.z_H, run.z_L))
        lengths = lengths if whole or lengths is None else lengths[index]
        if first.any():
            # Rows at their first step start from the parameters themselves, which so get a gradient.
            init_H, init_L = self.initial_state(x)
            mask = first.to(x.device)[:, None, None]
            z_H, z_L = torch.where(mask, init_H, z_H), torch.where(mask, init_L, z_L)
        z_H, _ = self.step(x, z_H, z_L, rotary=run.rotary, lengths=lengths)
        run.z_H = z_H if whole else run.z_H.index_copy(0, index, z_H)
        with torch.no_grad():
            q, halt = self.q_values(z_H, run.halt_bias, lengths)
        for slot, (row, decided) in enumerate(zip(rows, halt.tolist(), strict=True)):
            if not run.halted[row]:  # this was the row's step number `limit`, not run before
                run.executed[row] += 1
                run.q[row] = q[slot]
                run.halted[row] = run.may_halt[row] and decided and not run.explores(run.executed[row])


class _Loop:
    """The loop without gradient, and where each row's results are kept when it leaves."""

    def __init__(
        self,
        core: HRMCore,
        rotary: Tensor | None,
        halt_bias: float,
        may_halt: list[bool],
        exploration: float,
        max_steps: int,
    ):
        self.core, self.rotary, self.halt_bias, self.may_halt = core, rotary, halt_bias, may_halt
        self.exploration, self.max_steps = exploration, max_steps
        self.executed = [0] * len(may_halt)
        self.halted = [False] * len(may_halt)
        self.z_H: Tensor
        self.z_L: Tensor
        self.q: Tensor

    def explores(self, step: int) -> bool:
        """The published exploration: one draw a step for the whole batch that forbids halting before a random step."""
        if not self.exploration or torch.rand(()).item() >= self.exploration:
            return False
        return step < torch.randint(2, self.max_steps + 1, ()).item()

    def __call__(self, x: Tensor, lengths: Tensor | None, limit: list[int], keep_before: bool = False) -> None:
        """Run row r for at most limit[r] steps; keep the state after its last step, or, for rows that halt by
        decision and `keep_before`, before it."""
        live = list(range(x.shape[0]))
        z_H, z_L = self.core.initial_state(x)
        # Rows are written once, when they leave. A row that never leaves a batch of equals is not copied at all.
        self.z_H, self.z_L = torch.empty_like(x), torch.empty_like(x)
        self.q = torch.zeros(x.shape[0], 2, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

        def leave(slots: list[int], state_H: Tensor, state_L: Tensor) -> None:
            nonlocal live, x, z_H, z_L, lengths
            if not slots:
                return
            if len(slots) == len(self.may_halt):
                self.z_H, self.z_L, live = state_H, state_L, []
                return
            gone = set(slots)
            index = torch.tensor(slots, device=x.device)
            rows = torch.tensor([live[i] for i in slots], device=x.device)
            self.z_H.index_copy_(0, rows, state_H[index])
            self.z_L.index_copy_(0, rows, state_L[index])
            stay = [i for i in range(len(live)) if i not in gone]
            live = [live[i] for i in stay]
            if live:
                index = torch.tensor(stay, device=x.device)
                x, z_H, z_L = x[index], z_H[index], z_L[index]
                lengths = None if lengths is None else lengths[index]

        leave([i for i, row in enumerate(live) if limit[row] == 0], z_H, z_L)
        while live:
            before = z_H, z_L
            z_H, z_L = self.core.step(x, z_H, z_L, self.rotary, lengths)
            for row in live:
                self.executed[row] += 1
            q, halt = self.core.q_values(z_H, self.halt_bias, lengths)
            self.q[torch.tensor(live, device=x.device)] = q
            deciding = any(self.may_halt[row] for row in live)
            if deciding and not self.explores(self.executed[live[0]]):
                # The only place where the host waits for the device, and only if some row may halt.
                halt = halt.tolist()
                done = [i for i, row in enumerate(live) if halt[i] and self.may_halt[row]]
                for i in done:
                    self.halted[live[i]] = True
                leave(done, *(before if keep_before else (z_H, z_L)))
            leave([i for i, row in enumerate(live) if limit[row] == self.executed[row]], z_H, z_L)

    def output(self) -> CoreOutput:
        device = self.z_H.device
        executed = torch.tensor(self.executed, dtype=torch.int64, device=device)
        halted = torch.tensor(self.halted, dtype=torch.bool, device=device)
        return CoreOutput(self.z_H, self.q, executed, halted)
