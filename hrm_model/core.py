"""HRMCore: two recurrent levels, a loop in which each row runs for as long as it needs, and its training gradient.

One step, with x the input blocks' output:

    H_cycles times:  L_cycles times:  z_L <- L_level(z_L + (z_H + x))
                     z_H <- H_level(z_H + z_L)

The loop is host_loop.py, or hrm_kernels' where kernels run; both give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import hrm_kernels as ops

from .blocks import Attention, GeluMLP, GrownBlock, Linear, ReasoningBlock, RMSNorm, SwiGLU
from .config import HRMConfig
from .host_loop import Batch, host_loop, published_gradient

GRADIENTS = ("replay", "published")
Pasts = Iterator[ops.Past] | Iterator[ops.Forest]
"""What attention looks at in each block application of a step, in the order in which they come: what a cache holds, or
the same forest again and again."""


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
    row_steps: Tensor
    """[2] int64: row-steps that were computed without and with gradient."""


class Level(nn.Module):
    """One recurrent level: the injection is added once, then the layers run."""

    def __init__(self, config: HRMConfig, n_layers: int, n_grown: int):
        super().__init__()
        kinds = [ReasoningBlock] * (n_layers - n_grown) + [GrownBlock] * n_grown
        self.layers = nn.ModuleList(kind(config) for kind in kinds)

    def forward(
        self, z: Tensor, injection: Tensor, rotary: Tensor | None, lengths: Tensor | None, pasts: Pasts | None = None
    ) -> Tensor:
        z = z + injection
        for layer in self.layers:
            z = layer.apply_to(z, rotary, lengths, None if pasts is None else next(pasts))
        return z


class HRMCore(nn.Module):
    """The hierarchical reasoning module: per-row adaptive depth, memory that does not grow with steps."""

    def __init__(self, config: HRMConfig):
        super().__init__()
        self.config = config
        self.H_level = Level(config, config.hrm_H_layers, config.hrm_H_grown)
        self.L_level = Level(config, config.hrm_L_layers, config.hrm_L_grown)
        self.H_init = nn.Parameter(torch.empty(config.n_embd))
        self.L_init = nn.Parameter(torch.empty(config.n_embd))
        self.q_head = nn.Linear(config.n_embd, 2)
        sizes = config.n_head, config.kv_heads, config.hrm_H_cycles, config.hrm_L_cycles, config.eps
        self.kernels = ops.HRMLoop(*sizes)

    def step(
        self, x: Tensor, z_H: Tensor, z_L: Tensor, rotary: Tensor | None, lengths: Tensor | None,
        pasts: Pasts | None = None, window: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One HRM step on [B, T, C] tensors; returns (z_H, z_L). window: how many of its last level applications have a
        gradient, all by default; the others run without."""
        levels = ("L",) * self.config.hrm_L_cycles + ("H",)
        levels *= self.config.hrm_H_cycles
        without = 0 if window is None else max(len(levels) - window, 0)
        for number, level in enumerate(levels):
            if 0 < number == without:
                torch.clear_autocast_cache()  # see forward
            with torch.no_grad() if number < without else nullcontext():
                if level == "L":
                    z_L = self.L_level(z_L, z_H + x, rotary, lengths, pasts)
                else:
                    z_H = self.H_level(z_H, z_L, rotary, lengths, pasts)
        return z_H, z_L

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """H_init and L_init expanded to x's shape [B, T, C] (views)."""
        inits = self.H_init, self.L_init
        if not torch.is_grad_enabled():  # a view of a parameter made without gradient confuses torch's module hooks
            inits = tuple(p.detach() for p in inits)
        return tuple(p.to(x.dtype).expand_as(x) for p in inits)

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
        gradient_steps: int = 1,
        pooled: Tensor | None = None,
        window: int | None = None,
    ) -> CoreOutput:
        """Run every row to its own depth.

        Without gradient the loop's own states are the result. With gradient, the loop runs without and remembers each
        row's state before its last step; that step is then run once more, for all rows together, with gradient
        ("replay"). "published" gives gradient only to rows that run all `max_steps`, through that last step.

        With `gradient_steps` K > 1 the last K steps have a gradient, all of a row's where it runs fewer. Rows that
        decide are then run twice without gradient, first to find their depth (for which the host waits) and then to the
        state K steps before.

        Args:
            x: [B, T, C] output of the input blocks. rotary, lengths: as in hrm_kernels.
            forced: per row, the exact number of steps, or 0 to let the head decide.
            max_steps: S, the most steps of a row that decides; with 1 nothing is decided.
            halt_bias: added to q_halt.
            gradient: "replay" or "published". In both a row that is done is frozen; the published code as a whole,
                which goes on updating it, is bench/published.py.
            gradient_steps: K, for "replay".
            pooled: [B] int64, the leading tokens over which the mean of a row's decision runs; default its length.
            window: of the replayed step, how many of the last level applications have a gradient; default all.
        """
        batch = Batch(
            x, rotary, lengths,
            limit=[n or max_steps for n in forced],
            may_halt=[n == 0 and max_steps > 1 for n in forced],
            halt_bias=halt_bias, pooled=pooled,
        )  # fmt: skip
        if not torch.is_grad_enabled():
            found = self.loop(batch)
            return CoreOutput(found.z_H, found.q, found.executed, found.halted, _row_steps(found.executed, 0))
        if gradient == "published":
            exploration = self.config.hrm_exploration_prob if self.training else 0.0
            loop = published_gradient(self, batch, max_steps, exploration)
            found, counts = loop.result(), torch.tensor(loop.row_steps, device=x.device)
            return CoreOutput(found.z_H, found.q, found.executed, found.halted, counts)
        if gradient_steps > 1:
            return self.replay_several(batch, gradient_steps)
        found = self.loop(batch, before_last=True)
        # Autocast caches the low-precision copy of a weight until its region ends. In some torch releases copies made
        # in the loop have no gradient history, and the replay would silently reuse them (pytorch issue 112583): the
        # core's weights would then get no gradient. Casting them once more is all that this costs.
        torch.clear_autocast_cache()
        return self.replay(batch, found, window)

    def loop(self, batch: Batch, before_last: bool = False) -> ops.LoopResult:
        """Run every row without gradient: to its last step, or with `before_last` to the state before it.

        A row that does not decide has its last step at its limit, and with `before_last` that step is not run; one that
        decides to halt has run its last step by then, and what is returned is the state before it.
        """
        batch = batch.one_less() if before_last else batch
        with torch.no_grad():
            why_not = self.why_not_plain()
            weights = self.weights() if why_not is None else None
            driver = self.kernels.driver(weights, batch.x, why_not)
            if driver is None:
                return host_loop(self, batch, before_last)
            return self.kernels.run(
                weights, batch.x, self.H_init, self.L_init, batch.rotary, batch.lengths, batch.limit, batch.may_halt,
                batch.halt_bias, keep_before=before_last, dropout_p=self.config.dropout if self.training else 0.0,
                driver=driver, pooled=batch.pooled,
            )  # fmt: skip

    def unroll(self, x: Tensor, rotary: Tensor | None, lengths: Tensor | None, n_steps: int) -> Iterator[Tensor]:
        """z_H [B, T, C] after step 1, 2, .. n_steps, without gradient and without any decision. Nothing of earlier
        steps is kept here, and nobody waits for the device."""
        ones = [1] * len(x)
        with torch.no_grad():
            z_H, z_L = self.initial_state(x)
        for _ in range(n_steps):
            with torch.no_grad():  # not around the yield: the caller's mode is its own
                why_not = self.why_not_plain()
                weights = self.weights() if why_not is None else None
                driver = self.kernels.driver(weights, x, why_not)
                if driver is None:
                    z_H, z_L = self.step(x, z_H, z_L, rotary, lengths)
                else:
                    found = self.kernels.run(
                        weights, x, z_H, z_L, rotary, lengths, ones, [False] * len(x), driver=driver,
                        dropout_p=self.config.dropout if self.training else 0.0,
                    )  # fmt: skip
                    z_H, z_L = found.z_H, found.z_L
            yield z_H

    def replay(self, batch: Batch, found: ops.LoopResult, window: int | None = None) -> CoreOutput:
        """Each row's last step with gradient: once more where it halted in the loop, for the first time elsewhere. No
        synchronisation."""
        told = torch.tensor([batch.limit, batch.may_halt], dtype=torch.int64, device="cpu")
        limit, may_halt = ops.to_device(told, batch.x.device)
        executed = torch.where(found.halted, found.executed, limit)
        # Rows whose last step is the first start from the parameters themselves, which so get their gradient.
        first = (executed == 1)[:, None, None]
        init_H, init_L = self.initial_state(batch.x)
        z_H, z_L = torch.where(first, init_H, found.z_H), torch.where(first, init_L, found.z_L)
        z_H, z_L = self.step(batch.x, z_H, z_L, batch.rotary, batch.lengths, window=window)
        with torch.no_grad():
            q, halt = self.q_values(z_H, batch.halt_bias, batch.decides_on())
            # what a row decided in the loop stays: the replay may round elsewhere
            q = torch.where(found.halted[:, None], found.q, q)
            halted = found.halted | (halt & may_halt.bool())
        return CoreOutput(z_H, q, executed, halted, _row_steps(found.executed, len(executed)))

    def replay_several(self, batch: Batch, n: int) -> CoreOutput:
        """Each row's last n steps with gradient. The host waits for the depths, unless all are given."""
        depths, found = batch.limit, None
        if any(batch.may_halt):
            found = self.loop(batch)
            depths = found.executed.tolist()
        start = replace(
            batch, limit=[max(depth - n, 0) for depth in depths], may_halt=[False] * len(depths), pooled=None
        )
        states = self.loop(start)
        torch.clear_autocast_cache()  # see forward
        executed = ops.to_device(torch.tensor(depths, dtype=torch.int64, device="cpu"), batch.x.device)
        whole = (executed <= n)[:, None, None]  # rows that have a gradient in all their steps, the parameters included
        init_H, init_L = self.initial_state(batch.x)
        z_H, z_L = torch.where(whole, init_H, states.z_H), torch.where(whole, init_L, states.z_L)
        n = min(n, max(depths))
        for left in range(n, 0, -1):
            next_H, next_L = self.step(batch.x, z_H, z_L, batch.rotary, batch.lengths)
            runs = (executed >= left)[:, None, None]
            z_H, z_L = torch.where(runs, next_H, z_H), torch.where(runs, next_L, z_L)
        looped = states.executed
        if found is None:
            with torch.no_grad():
                q, _ = self.q_values(z_H, batch.halt_bias, batch.decides_on())
            halted = torch.zeros_like(executed, dtype=torch.bool)
        else:
            q, halted, looped = found.q, found.halted, looped + found.executed
        return CoreOutput(z_H, q, executed, halted, _row_steps(looped, n * len(depths)))

    def why_not_plain(self) -> str | None:
        """The loop's kernels see parameters, not modules: the reason if that would leave something out, else None."""
        for name, module in self.named_modules():
            in_shards = module is self and hasattr(module, "unshard")  # of FSDP2, which puts a class before a module's
            if type(module) not in _PLAIN and not in_shards:
                return f"{name} is a {type(module).__name__}, which the loop's kernels do not know"
            if module is not self and (module._forward_hooks or module._forward_pre_hooks):
                return f"{name} has a forward hook, which the loop's kernels would not call"
            if isinstance(module, Linear) and ops.is_narrow(module.weight, self.H_init.dtype):
                return f"{name} is quantised, and the loop's kernels read plain weights"
        return None

    def _apply(self, fn, recurse=True):
        self.kernels.release()  # parameters are about to move, or to change their type
        return super()._apply(fn, recurse)

    def weights(self) -> ops.LoopWeights:
        """The parameters, as the loop's kernels want them."""
        levels = (tuple(layer.weights() for layer in level.layers) for level in (self.L_level, self.H_level))
        return ops.LoopWeights(*levels, self.q_head.weight, self.q_head.bias)


_PLAIN = {HRMCore, Level, ReasoningBlock, Attention, SwiGLU, GeluMLP, RMSNorm, Linear, nn.Linear, nn.ModuleList}


def _row_steps(executed: Tensor, replayed: int) -> Tensor:
    looped = executed.sum()
    return torch.stack([looped, torch.full_like(looped, replayed)])
