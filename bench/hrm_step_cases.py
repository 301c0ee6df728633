"""What bench/hrm_step.py times: batches whose rows stop at different steps, ways to run them, the check of numbers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hrm_kernels as ops
from bench.published import PublishedHRM
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.cache import free_bytes
from hrm_model.core import HRMCore
from hrm_model.host_loop import Batch
from hrm_model.training.device import compile_blocks

DRIVERS = {"fused-host": "host", "fused-graph": "graph", "fused-while": "while"}
NAMES = ("published", "reference", "compile", *DRIVERS)
DEPTHS = ("all-1", "one-deep", "bimodal", "half-deep", "uniform", "mostly-deep", "all-S", "all-S-given")

DEEP_SHARE = 0.19
"""Of the rows, that never halt in "bimodal". The published model halts a row after its first step or not at all, which
it counts as 0 and 16 steps: on HellaSwag 3.033 +- 6.263, and numbers that are 0 or 16 are so where 19 % are 16."""

ROW_LIMIT = 1e-4
"""In float32: a row's ||z_H - reference's|| / ||reference's||."""
MEAN_LIMIT, WORST_LIMIT = 1.2, 2.0
"""In bfloat16, against the same weights in float32: root mean square of the rows' errors over that of the bfloat16
reference, and the worst row over the reference's worst. Where an implementation rounds elsewhere than the reference a
row's error is larger or smaller by chance, the mean of several much less so; a row left out of a step is far off."""
CHECKED_ROWS = 8
"""At least so many rows are checked, a batch at a time, however small the batch."""


class Case(NamedTuple):
    """The depth of each row, and whether it is known beforehand."""

    name: str
    depths: tuple[int, ...]
    given: bool = False


def cases(n_rows: int, max_steps: int, names: Sequence[str] = DEPTHS) -> list[Case]:
    """Those of `names` that differ for `n_rows`; rows in an order that depends on n_rows alone."""

    def deep(n: int) -> list[int]:
        return [max_steps] * n + [1] * (n_rows - n)

    lists = {"all-1": deep(0), "all-S": deep(n_rows), "one-deep": deep(1), "bimodal": deep(round(DEEP_SHARE * n_rows))}
    lists |= {"half-deep": deep(n_rows // 2), "mostly-deep": deep(n_rows - n_rows // 4)}
    if n_rows >= max_steps:
        lists["uniform"] = [1 + i * max_steps // n_rows for i in range(n_rows)]
    elif n_rows > 1:  # evenly from 1 to S, the upper half the lower's mirror image
        half = [1 + i * (max_steps - 1) // (n_rows - 1) for i in range((n_rows + 1) // 2)]
        lists["uniform"] = half + [max_steps + 1 - n for n in reversed(half[: n_rows // 2])]
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows)).tolist()
    distinct = {tuple(sorted(depths)): name for name, depths in reversed(lists.items()) if name in names}
    found = [Case(name, tuple(lists[name][i] for i in order)) for name in distinct.values()]
    if "all-S-given" in names:
        found.append(Case("all-S-given", (max_steps,) * n_rows, given=True))
    return sorted(found, key=lambda case: DEPTHS.index(case.name))


class Start(NamedTuple):
    """What a loop starts from: batches [B, T, C] of the input blocks' output, of which the first is timed."""

    xs: list[Tensor]
    rotary: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: HRMForCausalLM, n_rows: int, n_tokens: int) -> Start:
        """Of random tokens, the same for every call."""
        generator = torch.Generator().manual_seed(1)
        rotary, xs = model.rotary(n_tokens), []
        with ops.use_backend("reference"):
            for _ in range(math.ceil(CHECKED_ROWS / n_rows)):
                ids = torch.randint(0, model.config.vocab_size, (n_rows, n_tokens), generator=generator)
                x = model.embed(ids.to(model.device))
                for block in model.input_blocks:
                    x = block(x, rotary, None)
                xs.append(x)
        return cls(xs, rotary)


class Work(NamedTuple):
    """What is timed: the loop of that name runs each row for so many steps."""

    name: str
    executed: tuple[int, ...]
    given: bool


class Loop:
    """One way to run the loop. Weights are the model's; scratch memory, graphs and compiled blocks its own."""

    def __init__(self, name: str, model: HRMForCausalLM):
        self.name = name
        self.published = PublishedHRM(model) if name == "published" else None
        self.core = copy.deepcopy(model.hrm_core, {id(p): p for p in model.hrm_core.parameters()})
        self.backend = {"hrm_loop": DRIVERS[name]} if name in DRIVERS else {}
        if name == "compile":
            compile_blocks(self.core)

    def work(self, case: Case) -> Work:
        """What it does in this case: the published loop knows neither a row that is done nor a depth that is given."""
        if self.published:
            return Work(self.name, (max(case.depths),) * len(case.depths), False)
        return Work(self.name, case.depths, case.given)

    @torch.no_grad()
    def run(self, x: Tensor, start: Start, work: Work) -> tuple[Tensor, Tensor]:
        """(z_H [B, T, C], steps run [B]) from x, one of start's batches or like it."""
        most, n_rows = self.core.config.hrm_max_steps, len(x)
        all_halt = not work.given and max(work.executed) == 1 < most
        bias, limit = (math.inf, [most] * n_rows) if all_halt else (-math.inf, list(work.executed))
        if self.published:
            z_H, _, _, executed = self.published.reason(x, max(limit), bias)
            return z_H, executed
        with ops.use_backend("auto" if self.backend else "reference", **self.backend):
            found = self.core.loop(Batch(x, start.rotary, None, limit, [not work.given] * n_rows, bias))
        return found.z_H, found.executed

    def prepare(self, n_tokens: int) -> None:
        """Make what does not belong to the loop."""
        if self.published:
            self.published.set_positions(n_tokens)

    def release(self) -> None:
        """Give scratch memory and graphs back."""
        self.core.kernels.release()


def why_not(name: str, core: HRMCore, x: Tensor, asked: bool) -> str | None:
    """Why the loop of that name is left out for x, if it is; `asked` says whether it was named."""
    if name in DRIVERS:
        with ops.use_backend("auto", hrm_loop=DRIVERS[name]):
            try:
                core.kernels.driver(core.weights(), x)
            except ops.BackendError as error:
                return str(error)
    if x.device.type != "cuda" and not asked and name not in ("published", "reference"):
        return f"on {x.device.type} only where --implementations names it"
    return None


def bytes_needed(config: HRMConfig, n_rows: int, n_tokens: int, n_loops: int) -> int:
    """Memory for a size, rather too much than too little: the eager loop's at its widest, in an MLP in float32, and
    beside it scratch memory of each of `n_loops`."""
    eager = 8 * config.n_embd + 4 * config.hidden
    scratch = 10 * config.n_embd + config.hidden
    return 4 * n_rows * n_tokens * (eager + n_loops * scratch)


def kernels_of_a_step(config: HRMConfig, dtype: torch.dtype, n_rows: int, n_tokens: int) -> int:
    """Kernels that a step of the fused loop starts, counted without running them."""
    from hrm_kernels.kernels.hrm_step import Sizes, Space, step
    from hrm_kernels.kernels.launch import record

    with torch.device("meta"):
        core = HRMCore(config).to(dtype)
        x = torch.empty(n_rows, n_tokens, config.n_embd, dtype=dtype)
        rotary = torch.empty(n_tokens, config.head_dim // 2, 2) if config.use_rotary else None
        weights = core.weights()
        sizes = Space.sizes(x, dtype, weights.L[0], rotary, None, False)
        space = Space.of({name: torch.empty(size, dtype=of) for name, (size, of) in sizes.items()}, x)
    cycles = config.hrm_H_cycles, config.hrm_L_cycles
    with record() as launches:
        step(space, weights, Sizes(config.n_head, config.kv_heads, *cycles, config.eps, 0.0, 0.0))
    return len(launches)


def row_errors(found: Tensor, truth: Tensor) -> Tensor:
    """||found - truth|| / ||truth|| of each row of [B, T, C]."""
    return torch.linalg.vector_norm(found - truth, dim=(1, 2)) / torch.linalg.vector_norm(truth, dim=(1, 2))


def judge(errors: Tensor, own: Tensor | None) -> tuple[float, float]:
    """(worst row, the largest share of a limit that is used) of rows whose errors are these; `own` are the bfloat16
    reference's. More than 1 is wrong."""
    worst = errors.max().item()
    if not errors.isfinite().all():
        return math.inf, math.inf
    if own is None:
        return worst, worst / ROW_LIMIT
    mean = (errors.square().mean() / own.square().mean()).sqrt().item()
    return worst, max(mean / MEAN_LIMIT, worst / own.max().item() / WORST_LIMIT)


def check(loops: list[Loop], reference: Loop, wide: Loop | None, start: Start, todo: list[Case]) -> dict[str, Any]:
    """Hold every work of `todo` to the reference at equal depths; `wide` is the reference in float32 where the others
    are not.

    Returns:
        Name -> of the work that is nearest to its limit "error" of the worst row, and "of_limit", above 1 if it is
        wrong; or "failed", why it did not run.
    """
    works: dict[tuple, dict[str, Loop]] = {}
    for loop, case in itertools.product(loops, todo):
        loop.prepare(start.xs[0].shape[1])
        works.setdefault(loop.work(case)[1:], {})[loop.name] = loop
    found: dict[str, dict[str, Any]] = {loop.name: {"error": 0.0, "of_limit": 0.0} for loop in loops}
    for key, group in works.items():
        expected = [reference.run(x, start, Work("reference", *key)) for x in start.xs]
        truth, own = [z for z, _ in expected], None
        if wide:
            truth = [wide.run(x.float(), start, Work("reference", *key))[0] for x in start.xs]
            own = torch.cat([row_errors(z, t) for (z, _), t in zip(expected, truth, strict=True)])
        for name, loop in group.items():
            if "failed" in found[name]:
                continue
            try:
                ran = expected if loop is reference else [loop.run(x, start, Work(name, *key)) for x in start.xs]
                steps = [tuple(executed.tolist()) for _, executed in ran]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the others are still worth having
                found[name] = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
                continue
            error, of_limit = judge(torch.cat([row_errors(z, t) for (z, _), t in zip(ran, truth, strict=True)]), own)
            of_limit = of_limit if set(steps) == {key[0]} else math.inf
            if of_limit > found[name]["of_limit"]:
                found[name] = {"error": error, "of_limit": of_limit}
    return found


class Bench:
    """The loops that can run, at any size, and what was found of them."""

    def __init__(
        self,
        config: HRMConfig,
        dtype: torch.dtype,
        device: torch.device,
        asked: Sequence[str] | None,
        depths: Sequence[str],
    ):
        """`asked`: implementations, None for what makes sense on the device; `depths`: names of cases."""
        torch.manual_seed(0)
        self.config, self.depths = config, depths
        self.model = HRMForCausalLM(config).to(device, dtype).eval()
        self.reference = Loop("reference", self.model)
        self.wide = None if dtype == torch.float32 else Loop("reference", copy.deepcopy(self.model).float())
        self.loops: list[Loop] = []
        self.skipped: dict[str, str] = {}
        """Implementation or size -> why it is left out."""
        self.failed: dict[str, str] = {}
        """Size and implementation -> the error."""
        self.wrong: list[str] = []
        """Sizes and implementations."""
        x = Start.of(self.model, 1, 1).xs[0]
        for name in (name for name in NAMES if name in (asked or NAMES)):
            if reason := why_not(name, self.reference.core, x, bool(asked)):
                self.skipped[name] = reason
            else:
                self.loops.append(self.reference if name == "reference" else Loop(name, self.model))

    def cases(self, size: tuple[int, int]) -> list[Case]:
        """Of one size (rows, tokens), those that were asked for."""
        return cases(size[0], self.config.hrm_max_steps, self.depths)

    def at(self, size: tuple[int, int], call: Callable[[Start], Any]) -> Any:
        """`call` at one size; None where the size is left out."""
        where, device = f"{size[0]} x {size[1]}", self.model.device
        needed, free = bytes_needed(self.config, *size, len(self.loops)), free_bytes(device)
        try:
            if not self.cases(size):
                self.skipped[where] = "none of --depths can be had with so few rows"
            elif free is not None and needed > free:
                self.skipped[where] = f"may need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            else:
                return call(Start.of(self.model, *size))
        except torch.OutOfMemoryError as error:
            self.skipped[where] = str(error).partition("\n")[0]
        finally:
            for loop in self.loops:
                loop.release()
        return None

    def check(self, size: tuple[int, int]) -> None:
        """Hold the numbers at one size; prints what it finds. An implementation that fails is left out from then on."""
        found = self.at(size, lambda start: check(self.loops, self.reference, self.wide, start, self.cases(size)))
        for name, one in (found or {}).items():
            where = f"{size[0]} x {size[1]} {name}"
            if "failed" in one:
                verdict = f"FAILED: {one['failed']}"
                self.failed[where] = one["failed"]
                self.loops = [loop for loop in self.loops if loop.name != name]
            else:
                verdict = f"a row off by {one['error']:.1e}, {one['of_limit']:.1%} of the limit"
            if one.get("of_limit", 0) > 1:
                self.wrong.append(where)
                verdict = f"WRONG: {verdict}"
            print(f"{where}: {verdict}", flush=True)
