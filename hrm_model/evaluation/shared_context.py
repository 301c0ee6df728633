"""Continuations scored in batches, a context computed once for all that share it: the numbers of each row run alone.

Attention is causal, so the states of a context after s steps are the same in every row that begins with it. Rows that
share a context are therefore a tree (hrm_kernels/forest.py): one stem, a branch for each continuation. Every step is
run once for all trees of a batch together. Who decides how deep:

    row      the mean over context + continuation decides once for a row, as published; the whole row is looked at
    prefix   each prediction's depth is decided by the tokens before it ("causal protocol"); the last token is not read

A branch that is done leaves its tree, a tree without branches the batch. The output blocks run once for each depth in
use, over stem and the branches that stopped there, and the head only where a token is predicted.

Several halting biases are answered by the same steps: states do not depend on them, only where they are decoded. A
branch then leaves when it is done for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

import hrm_kernels as ops

from ..incremental import evaluating
from ..model import HRMForCausalLM
from .requests import Request, Score, cut_from_left

RULES = ("row", "prefix")
LOGIT_ROWS = 256
"""Logits that are there at a time: 256 x 50,304 float32 is 52 MB."""
HEAD_ROWS = 4096
"""Means that the halting head scores at once."""


Unit = tuple[int | None, int]
"""What is decided on: a choice, or None for the stem alone, and how many of its tokens are looked at."""
Stops = list[tuple[int, bool]]
"""Biases by which a unit is done, and whether the head decided it."""


class Tree:
    """A context and continuations of it, and what is known of them so far."""

    def __init__(self, context: Sequence[int], choices: Sequence[Sequence[int]], rule: str, n_biases: int = 1):
        self.context, self.choices = list(context), [list(choice) for choice in choices]
        read = [choice if rule == "row" else choice[:-1] for choice in self.choices]
        self.branches = {number: ids for number, ids in enumerate(read) if ids}
        """Of the choices that are read, by number; those that are done are taken out."""
        self.found: list[list[list[tuple[float, bool, int, bool]]]] = [[[] for _ in choices] for _ in range(n_biases)]
        """Of each bias, choice and token predicted: log-probability, whether it is the likeliest, steps, whether
        halted."""
        if rule == "row":
            self.open: dict[Unit, list[tuple[int, int]]] = {  # what is predicted then: choice and place in it
                (number, len(choice)): [(number, place) for place in range(len(choice))]
                for number, choice in enumerate(self.choices)
            }
        else:
            self.open = {(None, 0): [(number, 0) for number in range(len(choices))]}
            for number, choice in enumerate(self.choices):
                self.open |= {(number, place): [(number, place)] for place in range(1, len(choice))}
        self.undecided = {unit: list(range(n_biases)) for unit in self.open}
        """The biases by which each of these goes on."""

    def stop(self, stopped: dict[Unit, Stops]) -> bool:
        """Units are done by some biases. Whether one is by all."""
        for unit, stops in stopped.items():
            for bias, _ in stops:
                self.undecided[unit].remove(bias)
            if not self.undecided[unit]:
                del self.open[unit], self.undecided[unit]
        needed = {number for number, _ in self.open}
        self.branches = {number: ids for number, ids in self.branches.items() if number in needed}
        return any(unit not in self.open for unit in stopped)

    def scores(self, bias: int = 0) -> list[Score]:
        """Of each choice, when all of them are done."""
        result = []
        for found in self.found[bias]:
            logprobs, likeliest, steps, halted = zip(*found, strict=True)
            mean = sum(steps) / len(steps)
            result.append(Score(sum(logprobs), len(found), all(likeliest), mean, mean - sum(halted) / len(halted)))
        return result


def trees_of(request: Request, rule: str, block_size: int, n_biases: int = 1) -> list[tuple[Tree, list[int]]]:
    """A request's trees, each with the numbers of its choices: several where a long choice cuts the context shorter."""
    longest = block_size if rule == "row" else block_size + 1
    by_cut: dict[int, list[int]] = {}
    for number, choice in enumerate(request.choices):
        by_cut.setdefault(len(cut_from_left(request.context, choice, longest, request.where)), []).append(number)
    context, choices = request.context, request.choices
    return [
        (Tree(context[len(context) - kept :], [choices[number] for number in numbers], rule, n_biases), numbers)
        for kept, numbers in by_cut.items()
    ]


@torch.no_grad()
@ops.shared_casts()
def score_trees(
    model: HRMForCausalLM,
    trees: Sequence[Tree],
    *,
    rule: str,
    max_steps: int,
    halt_biases: Sequence[float],
    n_ids: int,
    packed: ops.PackedWeights,
) -> None:
    """Run trees to their end, together; their `found` is filled in.

    Args:
        rule: see above. max_steps: as in HRMForCausalLM.forward. halt_biases: as many as the trees have. n_ids: the
            first of the vocabulary's ids, which share the probability. packed: keeps, on a CPU, copies of the weights
            in a faster layout.
    """
    core = model.hrm_core
    with evaluating(model), ops.packed_weights(packed):
        layout = Layout(trees, model.device)
        ids = ops.to_device(torch.tensor([layout.ids()], dtype=torch.int64, device="cpu"), model.device)
        rotary = layout.rotary(model)
        x = model.embed(ids, layout.forest.position)
        for block in model.input_blocks:
            x = block.apply_to(x, rotary, None, layout.forest)
        z_H, z_L = core.initial_state(x)
        for step in range(1, max_steps + 1):
            z_H, z_L = core.step(x, z_H, z_L, rotary, None, repeat(layout.forest))
            never = [False] * len(halt_biases)
            halt = layout.decisions(core, z_H, halt_biases) if max_steps > 1 else [never] * len(layout.units)
            last = step == max_steps
            stopped: dict[int, dict[Unit, Stops]] = {}
            for (tree, unit), halted in zip(layout.units, halt, strict=True):
                stops = [(b, halted[b]) for b in layout.trees[tree].undecided[unit] if halted[b] or last]
                if stops:
                    stopped.setdefault(tree, {})[unit] = stops
            if stopped:
                _predict(model, layout, z_H, stopped, step, n_ids)
                if not any([layout.trees[tree].stop(units) for tree, units in stopped.items()]):
                    continue
                kept = layout.left()
                if kept is None:
                    return
                layout, tokens = kept
                rotary = layout.rotary(model)
                x, z_H, z_L = (t.index_select(1, tokens) for t in (x, z_H, z_L))


class Layout:
    """Trees that still run, as packed tokens."""

    def __init__(self, trees: Sequence[Tree], device: torch.device, only: Sequence[set[int]] | None = None):
        self.trees, self.device = list(trees), device
        self.branches = [
            [number for number in tree.branches if only is None or number in only[i]]
            for i, tree in enumerate(self.trees)
        ]
        self.start: list[dict[int | None, int]] = []
        """Of each tree, where its stem (None) and its branches begin among all tokens."""
        at, sizes = 0, []
        for tree, numbers in zip(self.trees, self.branches, strict=True):
            start, at = {None: at}, at + len(tree.context)
            for number in numbers:
                start[number], at = at, at + len(tree.branches[number])
            self.start.append(start)
            sizes.append((len(tree.context), [len(tree.branches[number]) for number in numbers]))
        self.n_tokens = at
        self.forest = ops.Forest.of(sizes, device)
        self.units = [(i, unit) for i, tree in enumerate(self.trees) for unit in tree.open]

    def ids(self) -> list[int]:
        """Of all tokens."""
        found: list[int] = []
        for tree, numbers in zip(self.trees, self.branches, strict=True):
            found += tree.context
            for number in numbers:
                found += tree.branches[number]
        return found

    def rotary(self, model: HRMForCausalLM) -> Tensor | None:
        """[1, N, D/2, 2], or None with learned positions."""
        if not model.config.use_rotary:
            return None
        return ops.rope_table(self.forest.position, model.config.head_dim)[None]

    def decisions(self, core, z_H: Tensor, halt_biases: Sequence[float]) -> list[list[bool]]:
        """Whether each unit halts now, by each bias, from the mean over its tokens. Waits for the device."""
        bounds, lengths = [], []
        for tree, (number, size) in self.units:
            stem = self.start[tree][None]
            end = stem + len(self.trees[tree].context)
            branch = end if number is None else self.start[tree][number]
            bounds.append((stem, end, branch, branch + size))
            lengths.append(end - stem + size)
        told = ops.to_device(torch.tensor(bounds, dtype=torch.int64, device="cpu"), self.device)
        n = ops.to_device(torch.tensor(lengths, device="cpu"), self.device)
        # Sums up to each token, in double precision: a difference of two then rounds no worse than a mean at once.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        up_to = torch.zeros(self.n_tokens + 1, z_H.shape[-1], dtype=wide, device=self.device)
        torch.cumsum(z_H[0].to(wide), 0, out=up_to[1:])
        a, b, c, d = (up_to[column] for column in told.unbind(1))
        means = ((b - a + d - c) / n[:, None]).to(torch.promote_types(z_H.dtype, torch.float32))
        parts = means[:, None].split(HEAD_ROWS)
        return torch.stack(
            [torch.cat([core.q_values(part, bias, None)[1] for part in parts]) for bias in halt_biases], 1
        ).tolist()

    def tokens_of(self, of: int, numbers: Sequence[int]) -> list[int]:
        """Where a tree's stem and some of its branches are."""
        tree, start = self.trees[of], self.start[of]
        found = list(range(start[None], start[None] + len(tree.context)))
        for number in numbers:
            found += range(start[number], start[number] + len(tree.branches[number]))
        return found

    def left(self) -> tuple[Layout, Tensor] | None:
        """What is left when units are done, and where its tokens were; None where nothing is."""
        left = [i for i, tree in enumerate(self.trees) if tree.open]
        if not left:
            return None
        tokens = [token for i in left for token in self.tokens_of(i, list(self.trees[i].branches))]
        index = ops.to_device(torch.tensor(tokens, dtype=torch.int64, device="cpu"), self.device)
        return Layout([self.trees[i] for i in left], self.device), index


def _predict(
    model: HRMForCausalLM, layout: Layout, z_H: Tensor, stopped: dict[int, dict[Unit, Stops]], steps: int, n_ids: int
) -> None:
    """Decode what has stopped, and note what it says of its choices' tokens."""
    which = list(stopped)
    only = [{number for number, _ in stopped[i] if number is not None} for i in which]
    part = Layout([layout.trees[i] for i in which], layout.device, only)
    tokens = [t for i, numbers in zip(which, part.branches, strict=True) for t in layout.tokens_of(i, numbers)]
    index = ops.to_device(torch.tensor(tokens, dtype=torch.int64, device="cpu"), layout.device)
    h = model.decode(z_H.index_select(1, index), part.rotary(model), None, repeat(part.forest))[0]

    asked: dict[int, list[tuple[Tree, int, int, Stops]]] = {}
    for here, i in enumerate(which):
        tree, start = part.trees[here], part.start[here]
        for unit, stops in stopped[i].items():
            for number, place in tree.open[unit]:
                row = start[number] + place - 1 if place else start[None] + len(tree.context) - 1
                asked.setdefault(row, []).append((tree, number, tree.choices[number][place], stops))
    for rows in (list(asked)[i : i + LOGIT_ROWS] for i in range(0, len(asked), LOGIT_ROWS)):
        at = ops.to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), layout.device)
        logits = model.lm_head(h.index_select(0, at))[:, :n_ids]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        entries = [(i, entry) for i, row in enumerate(rows) for entry in asked[row]]
        told = [[i for i, _ in entries], [entry[2] for _, entry in entries]]
        row_of, target = ops.to_device(torch.tensor(told, dtype=torch.int64, device="cpu"), layout.device)
        chosen, most = logits[row_of, target], logits.amax(-1)
        best = chosen == most[row_of]
        looked_at = best.nonzero()[:, 0]  # of equals the first, as generation draws; in few rows, as argmax is slow
        best[looked_at] = logits[row_of[looked_at]].argmax(-1) == target[looked_at]
        # in place: a vocabulary of logits is the largest thing here, and each pass over it counts
        whole = logits.sub_(most[:, None]).exp_().sum(-1).log_().add_(most)
        logprob = chosen - whole[row_of]
        for (_, (tree, number, _, stops)), p, is_best in zip(entries, logprob.tolist(), best.tolist(), strict=True):
            for bias, halted in stops:
                tree.found[bias][number].append((p, is_best, steps, halted))
