"""What bench/generate.py times, and how: which depth each token takes, rows over a cache, ways to recompute them."""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hrm_kernels as ops
from bench.common import device_activity, event_times, interleaved, wait
from bench.published import PublishedHRM
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.cache import HRMCache
from hrm_model.incremental import Extended, extend
from hrm_model.keyed import DEPTH_STREAM, keyed_integers
from hrm_model.training.device import compile_blocks

CACHED_LIMIT = 1e-5
"""In float32: largest difference of a logit from the recomputed one's, over max(1, largest logit)."""
OTHERS_LIMIT = 1e-4
"""The same for other ways to recompute, which round elsewhere."""
ROUNDING_LIMIT = 2.0
"""In other types, against the same weights in float32: error of the logits over the recomputed ones' own error, both
root mean squares."""

PREFILLS = 5
"""At most so many are timed."""
# -- depths ------------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Which depth each token of each row takes."""

    choices: tuple[int, ...]
    """A draw is one of these, each as likely."""
    update: str = "token"
    """"token" draws for every token; "turn" keeps a row's first draw."""

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Of "4", "1-7" (uniform) or "1|16" (one of them). Raises ValueError."""
        if found := re.fullmatch(r"(\d+)-(\d+)", text):
            choices = tuple(range(int(found[1]), int(found[2]) + 1))
        elif re.fullmatch(r"\d+(\|\d+)*", text):
            choices = tuple(sorted({int(n) for n in text.split("|")}))
        else:
            choices = ()
        if not choices or choices[0] < 1:
            raise ValueError(f"{text!r} is no schedule of depths; give one like 4, 1-7 or 1|16")
        return cls(choices)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        first, last = self.choices[0], self.choices[-1]
        if len(self.choices) > 2 and self.choices == tuple(range(first, last + 1)):
            return f"{first}-{last}"
        return "|".join(map(str, self.choices))

    @property
    def mode(self) -> str:
        """depth_update, or "fixed" where it makes no difference."""
        return self.update if len(self.choices) > 1 else "fixed"

    def depths(self, n_rows: int, n_tokens: int, seed: int = 0) -> list[list[int]]:
        """[n_tokens][n_rows]: a function of the seed, the row's number and the token's, whatever the others are."""
        n_draws = n_tokens if self.update == "token" else 1
        rows = []
        for row in range(n_rows):
            drawn = keyed_integers(seed, range(n_draws), 0, len(self.choices) - 1, DEPTH_STREAM + (row << 8)).tolist()
            rows.append([self.choices[drawn[min(t, n_draws - 1)]] for t in range(n_tokens)])
        return [list(depths) for depths in zip(*rows, strict=True)]


def within(schedule: Schedule, config: HRMConfig) -> Schedule:
    """No deeper than the model may go."""
    return schedule._replace(choices=tuple(sorted({min(n, config.hrm_max_steps) for n in schedule.choices})))


class Plan(NamedTuple):
    """New tokens of a batch: those that bring the cache into its steady state, then those that count."""

    schedule: Schedule
    start: int
    """Tokens of each row before the first of them; after the last it is full."""
    n_warm: int
    depths: list[list[int]]
    """[n_warm + counted][rows]"""

    @property
    def counted(self) -> list[int]:
        """Numbers of the tokens that count."""
        return list(range(self.n_warm, len(self.depths)))


def plans(fixed: Sequence[int], varying: Sequence[Schedule], n_rows: int, context: int, n_tokens: int) -> list[Plan]:
    """One for each fixed depth, and two for each schedule, by token and by turn.

    Where depths change from token to token at most `n_tokens` count and those before them are four times as many as
    there are depths; each at most a quarter of the context, so that at least half of it is prompt. Elsewhere one token
    is like the next, and fewer do.
    """
    n_tokens = min(n_tokens, context // 4)
    n_warm = min(4 * max((len(schedule.choices) for schedule in varying), default=0), context // 4)
    schedules = [Schedule((depth,)) for depth in fixed]
    schedules += [schedule._replace(update=update) for schedule in varying for update in ("token", "turn")]
    found = []
    for schedule in schedules:
        warm, counted = (n_warm, n_tokens) if schedule.mode == "token" else (min(2, context // 4), min(16, n_tokens))
        found.append(Plan(schedule, context - warm - counted, warm, schedule.depths(n_rows, warm + counted)))
    return found


def jumps(depths: Sequence[Sequence[int]], rows: Sequence[int], among: Sequence[int]) -> list[int]:
    """Of the tokens `among`, the last, and the deepest rise and fall of these rows' depths from one token to the
    next."""
    found = {among[-1]}
    for row in rows:
        steps = {t: depths[t][row] - depths[t - 1][row] for t in among if t}
        found |= {t for most in (max, min) if steps and steps[t := most(steps, key=steps.__getitem__)]}
    return sorted(found)


def sample(depths: Sequence[Sequence[int]], among: Sequence[int], n: int) -> list[int]:
    """At least n of the tokens `among` (or all), from shallow to deep as these are, of the same mean depth within 5 %;
    more than n where n cannot have it."""
    ordered = sorted(among, key=lambda t: (sum(depths[t]), t))
    mean = mean_depth(depths, among)
    for k in range(min(n, len(among)), len(among)):
        found = [ordered[(2 * i + 1) * len(ordered) // (2 * k)] for i in range(k)]
        if abs(mean_depth(depths, found) - mean) <= 0.05 * mean:
            return sorted(found)
    return list(among)


def mean_depth(depths: Sequence[Sequence[int]], among: Sequence[int]) -> float:
    """Of these tokens of all rows."""
    return statistics.mean(depth for t in among for depth in depths[t])


def applications(config: HRMConfig, depth: float) -> float:
    """Of blocks to a token that takes so many steps, once."""
    return config.n_input_layers + depth * config.blocks_per_step + config.n_output_layers


# -- implementations ---------------------------------------------------------------------------------------------------


class NoRoom(Exception):
    """The cache does not fit into memory."""


class Growing:
    """Rows of given tokens, as many as the context has, over a cache."""

    def __init__(self, model: HRMForCausalLM, n_rows: int, context: int, deepest: int):
        generator = torch.Generator().manual_seed(n_rows * 10_000 + context)
        ids = torch.randint(0, model.config.vocab_size, (n_rows, context), generator=generator)
        self.model, self.context, self.rows = model, context, range(n_rows)
        self.ids_BT, self._ids = ids.to(model.device), ids.tolist()
        try:
            self.cache = HRMCache(model, n_rows, context, deepest)
        except ValueError as error:
            raise NoRoom(str(error)) from error

    def to(self, n: int, depths: Sequence[int]) -> Extended:
        """Extend every row to n tokens, at these depths."""
        new = {row: self._ids[row][self.cache.length(row) : n] for row in self.rows}
        return extend(self.model, self.cache, new, force_steps=depths)

    def cut(self, n: int) -> None:
        """Keep n tokens of every row."""
        for row in self.rows:
            self.cache.truncate(row, n)

    def last(self, depth: int) -> None:
        """Each row's last token (again), at this depth."""
        self.cut(self.context - 1)
        self.to(self.context, [depth] * len(self.rows))

    def begin(self, plan: Plan, n_prompt: int) -> None:
        """To where a plan starts, from the `n_prompt` tokens that all have in common."""
        self.cut(n_prompt)
        if plan.start > n_prompt:
            self.to(plan.start, plan.depths[0])


Recomputed = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]
"""(ids [B, T], the depth of each row) -> (logits [B, V] after the last token, executed steps [B])."""


def plain(model: HRMForCausalLM) -> Recomputed:
    """A forward pass over the whole rows: logits of every position, as it gives them."""

    def run(ids_BT: Tensor, depths: Sequence[int]) -> tuple[Tensor, Tensor]:
        # every window has another length, for which a graph of the loop would have to be made anew
        graphless = {} if ops.current_backend() == "reference" else {"hrm_loop": "host"}
        with ops.use_backend(ops.current_backend(), **graphless):
            out = model(ids_BT, force_steps=list(depths))
        return out.logits[:, -1], out.executed_steps

    return run


def compiled(model: HRMForCausalLM) -> Recomputed:
    """The same, its blocks by torch.compile. The weights are the model's."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    compile_blocks(model)
    return plain(model)


def published(model: HRMForCausalLM) -> Recomputed:
    """The published behaviour, where all rows take the same depth; it knows no other."""

    class AtDepth(PublishedHRM):
        depth = 0

        def reason(self, x: Tensor):
            return super().reason(x, self.depth, -math.inf)

    theirs = AtDepth(model)

    def run(ids_BT: Tensor, depths: Sequence[int]) -> tuple[Tensor, Tensor]:
        (theirs.depth,) = set(depths)
        out = theirs(ids_BT)
        return out.logits[:, -1], out.executed_steps

    return run


# -- numbers -----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """How far logits are off, and as what share of the limit; more than 1 is wrong."""

    error: float
    of_limit: float


def judge(found: Tensor, expected: Tensor, wide: Tensor | None, limit: float) -> Found:
    """Of logits [..., V] against the recomputed ones; `wide` are those in float32 where these are not."""
    found, expected = found.float(), expected.float()
    if not found.isfinite().all():
        return Found(math.inf, math.inf)
    if wide is None:
        error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        return Found(error, error / limit)
    off, own, size = (t.square().mean().sqrt().item() for t in (found - wide, expected - wide, wide))
    return Found(off / size, off / own / ROUNDING_LIMIT if own else math.inf)


class Check:
    """Holds logits and steps to the recomputed ones; `found` is of the worst, by name."""

    def __init__(self, recompute: Recomputed, wide: Recomputed | None):
        self.recompute, self.wide = recompute, wide
        self.found: dict[str, Found] = {}

    def see(self, name: str, logits: Tensor, steps: Sequence[int], truth: tuple[Tensor, Tensor], wide=None) -> None:
        """One more result of that name."""
        limit = CACHED_LIMIT if name == "cached" else OTHERS_LIMIT
        result = judge(logits, truth[0], wide, limit)
        if list(steps) != truth[1].tolist():
            result = result._replace(of_limit=math.inf)
        if name not in self.found or not result.of_limit <= self.found[name].of_limit:
            self.found[name] = result

    def wrong(self) -> list[str]:
        """Names."""
        return [name for name, found in self.found.items() if not found.of_limit <= 1]

    def run(self, growing: Growing, plan: Plan, n_prompt: int, others: dict[str, Recomputed]) -> None:
        """The whole plan over the cache; where depths jump, and at its end, the first row and the last recomputed."""
        rows = sorted({growing.rows[0], growing.rows[-1]})
        growing.begin(plan, n_prompt)
        at = jumps(plan.depths, rows, plan.counted)
        for t, depths in enumerate(plan.depths):
            out = growing.to(plan.start + t + 1, depths)
            if t not in at:
                continue
            case = growing.ids_BT[rows, : plan.start + t + 1], [depths[row] for row in rows]
            truth = self.recompute(*case)
            wide = self.wide and self.wide(*case)[0]
            self.see("cached", out.logits[rows], [out.executed_steps[row] for row in rows], truth, wide)
            for name, other in others.items():
                logits, executed = other(*case)
                self.see(name, logits, executed.tolist(), truth, wide)


# -- times -------------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """(what the call returns, its seconds)."""
    wait(device)
    begin = time.perf_counter()
    result = call()
    wait(device)
    return result, time.perf_counter() - begin


class Bench:
    """One model, ways to run it, and what was found."""

    def __init__(self, model: HRMForCausalLM, options: argparse.Namespace):
        self.model, self.config, self.device, self.options = model, model.config, model.device, options
        self.recompute = plain(model)
        self.wide = None if model.wte.weight.dtype == torch.float32 else plain(copy.deepcopy(model).float())
        self.others: dict[str, Recomputed] = {"published": published(model)}
        if options.compile:
            self.others["compile"] = compiled(model)
        self.cells: list[dict[str, Any]] = []
        """Times and counts of each plan at each size."""
        self.once: list[dict[str, Any]] = []
        """Of each size, what is paid before the first token."""
        self.wrong: list[str] = []
        """Sizes and implementations."""
        self.skipped: dict[str, str] = {}
        """Size -> why it is left out."""
        self.failed: dict[str, str] = {}
        """Implementation -> the error."""

    def size(self, context: int, n_rows: int) -> None:
        """Check and time everything at one size; prints how far numbers are off."""
        options, where = self.options, f"context {context}, batch {n_rows}"
        todo = plans(options.depths, options.varying, n_rows, context, options.tokens)
        deepest = max(max(plan.schedule.choices) for plan in todo)
        n_prompt = min(plan.start for plan in todo)
        try:
            growing = Growing(self.model, n_rows, context, deepest)
            forward_of_1 = self._warm(growing)
            once = {"context": context, "batch": n_rows, "cache_bytes": growing.cache.nbytes}
            once |= self._prefill(growing) | self._first_uses(growing, n_prompt, todo)
            check = Check(self.recompute, self.wide)
            for plan in todo:
                check.run(growing, plan, n_prompt, self._others(plan))
            cells = []
            if not check.wrong():
                cells = [self._cell(growing, plan, n_prompt, forward_of_1, check) for plan in todo]
            once |= self._packing(growing) | self._device_figures(growing, deepest)
        except NoRoom as error:
            self.skipped[where] = str(error)
            return
        except torch.OutOfMemoryError as error:
            self.skipped[where] = str(error).partition("\n")[0]
            return
        for name, found in check.found.items():
            verdict = f"logits off by {found.error:.1e}, {found.of_limit:.1%} of the limit"
            print(f"{name:<11}{'WRONG: ' * (name in check.wrong())}{verdict}", flush=True)
        self.wrong += [f"{where}, {name}" for name in check.wrong()]
        once["checks"] = {name: found._asdict() for name, found in check.found.items()}
        self.once.append(once)
        self.cells += [{"context": context, "batch": n_rows} | cell for cell in cells]

    def _others(self, plan: Plan) -> dict[str, Recomputed]:
        """Those beside the baseline that can run it."""
        fixed = len(plan.schedule.choices) == 1
        return {name: call for name, call in self.others.items() if fixed or name != "published"}

    def _warm(self, growing: Growing) -> float:
        """Run what recomputes once or twice; seconds of a forward pass of one step."""
        depths = [1] * len(growing.rows)
        for name, call in list(self.others.items()):
            try:
                call(growing.ids_BT, depths)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the others are still worth having
                self.failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                del self.others[name]
        forward = partial(self.recompute, growing.ids_BT, depths)
        _, seconds = timed(forward, self.device)
        return seconds if seconds > 1 else timed(forward, self.device)[1]

    def _prefill(self, growing: Growing) -> dict[str, Any]:
        """A prompt as long as the context into an empty cache, and a forward pass over it, in turns."""
        depth, rows = statistics.median_low(self.options.depths), len(growing.rows)
        prefill = partial(growing.to, growing.context, [depth] * rows)
        forward = partial(self.recompute, growing.ids_BT, [depth] * rows)
        growing.to(growing.context, [1] * rows)  # memory that nobody wrote to yet is slow
        cached, recompute = [], []
        spent = 0.0
        while len(cached) < 3 or (len(cached) < PREFILLS and spent * (1 + 1 / len(cached)) <= self.options.seconds):
            growing.cut(0)
            cached.append(timed(prefill, self.device)[1])
            recompute.append(timed(forward, self.device)[1])
            spent += cached[-1] + recompute[-1]
        growing.cut(0)
        ms = {"cached_ms": statistics.median(cached) * 1e3, "recompute_ms": statistics.median(recompute) * 1e3}
        found = {"tokens": growing.context, "depth": depth, "repeats": len(cached)} | ms
        return {"prefill": found | {"speedup": ms["recompute_ms"] / ms["cached_ms"]}}

    def _first_uses(self, growing: Growing, n_prompt: int, todo: list[Plan]) -> dict[str, Any]:
        """Fill the cache with the prompt at one step, then take it to every depth that is needed, the shallowest first:
        what each costs, once."""
        found, before, rows = [], 0, len(growing.rows)
        for depth in sorted({1, *(depth for plan in todo for depth in plan.schedule.choices)}):
            work = growing.cache.work.total
            n = n_prompt + (before > 0)  # the prompt itself, then one token that is cut off again
            _, seconds = timed(partial(growing.to, n, [depth] * rows), self.device)
            growing.cut(n_prompt)
            count = (growing.cache.work.total - work) / rows
            found.append({"from": before, "to": depth, "ms": seconds * 1e3, "applications": count})
            before = depth
        return {"prompt": n_prompt, "first_uses": found}

    def _cell(
        self, growing: Growing, plan: Plan, n_prompt: int, forward_of_1: float, check: Check
    ) -> dict[str, Any]:  # fmt: skip
        """Times and counts of one plan, the cache's tokens and recomputed ones in turns."""
        config, schedule, rows = self.config, plan.schedule, len(growing.rows)
        others = {"recompute": self.recompute, **self._others(plan)}
        mean = mean_depth(plan.depths, plan.counted)
        guess = forward_of_1 * applications(config, mean) / applications(config, 1)
        picked = sample(plan.depths, plan.counted, max(1, int(self.options.seconds / guess)))
        times: dict[str, list[float]] = {name: [] for name in ("cached", *others)}

        growing.begin(plan, n_prompt)
        for t in range(plan.n_warm):
            growing.to(plan.start + t + 1, plan.depths[t])
        before = copy.copy(growing.cache.work)
        for t in plan.counted:
            n, depths = plan.start + t + 1, plan.depths[t]
            out, seconds = timed(partial(growing.to, n, depths), self.device)
            times["cached"].append(seconds)
            if t not in picked:
                continue
            results = {}
            for name, call in others.items():
                results[name], seconds = timed(partial(call, growing.ids_BT[:, :n], depths), self.device)
                times[name].append(seconds)
            if self.wide is None:
                truth = results.pop("recompute")
                check.see("cached", out.logits, out.executed_steps, truth)
                for name, (logits, executed) in results.items():
                    check.see(name, logits, executed.tolist(), truth)
        n, after = len(plan.counted) * rows, growing.cache.work
        of = {kind: (getattr(after, kind) - getattr(before, kind)) / n for kind in ("input", "core", "output")}
        cell = {
            "depth": schedule.name, "depth_update": schedule.mode, "mean_depth": mean,
            "tokens_before": plan.n_warm, "tokens_counted": len(plan.counted), "tokens_recomputed": len(picked),
            "mean_depth_recomputed": mean_depth(plan.depths, picked),
            "applications": sum(of.values()), "applications_of": of,
            "applications_of_mean_depth": applications(config, mean),
            "applications_of_deepest": applications(config, max(schedule.choices)),
        }  # fmt: skip
        own = statistics.mean(times["cached"])
        for name in ("cached", "recompute", "published", "compile"):
            seconds = statistics.mean(times[name]) if times.get(name) else None
            cell |= {f"{name}_ms": seconds and seconds * 1e3, f"{name}_tokens_per_s": seconds and rows / seconds}
            if name != "cached":
                cell["speedup" if name == "recompute" else f"speedup_vs_{name}"] = seconds and seconds / own
        return cell

    def _packing(self, growing: Growing) -> dict[str, Any]:
        """Milliseconds of the last token with the weights in the cache's own layout and in the model's, in turns."""
        if self.device.type != "cpu" or self.wide is not None:
            return {}
        cache, depth = growing.cache, statistics.median_low(self.options.depths)
        packed = cache.packed

        def token(layout) -> None:
            cache.packed = layout
            growing.last(depth)

        times = interleaved({"packed_ms": partial(token, packed), "plain_ms": partial(token, None)}, 5, self.device)
        cache.packed = packed
        found = {name: statistics.median(of) * 1e3 for name, of in times.items()}
        return {"weights": {"depth": depth} | found}

    def _device_figures(self, growing: Growing, deepest: int) -> dict[str, Any]:
        """Of a CUDA device: time of an HRM step, kernels and waits of the host, for the last token of every row."""
        if self.device.type != "cuda":
            return {}
        growing.last(deepest)
        found: dict[str, Any] = {"depth": deepest, "step_ms": None}
        if deepest > 1:
            times = event_times({str(depth): partial(growing.last, depth) for depth in (1, deepest)}, 5)
            shallow, deep = (statistics.median(of) * 1e3 for of in times.values())
            found["step_ms"] = (deep - shallow) / (deepest - 1)
        depths = [deepest] * len(growing.rows)
        growing.cut(growing.context - 1)
        calls = {"cached": partial(growing.to, growing.context, depths)}
        calls["recompute"] = partial(self.recompute, growing.ids_BT, depths)
        for name, call in calls.items():
            activity = device_activity(call, self.device)
            found[f"{name}_kernels"] = activity and activity.kernels
            found[f"{name}_host_waits"] = activity and activity.waits
        return {"device": found}
