"""Tasks whose needed depth is known, and the small models that learn them.

A row's answer takes k operations one after the other, k of 1..6 drawn anew for each row. The models are made of the
core alone, one block a level and one cycle, without input and output blocks: a step can hardly do more than one
operation, so a row needs more steps the larger its k is.

    permutations  a start among 5 things, then k swaps; after each swap: where is the start now?
    pointers      layers of 6 nodes with one pointer from each node to the next layer: a start, then for each of k
                  layers a token that names its pointers, one of 20 sets; after each hop: at which node?
    delayed       pointers, but only the answer after the last hop counts for the decision: until nearly as many steps
                  as hops, a step gains next to nothing
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.model import IGNORE

S = 8
MOST_OPERATIONS = 6
THINGS = 5
NODES = 6
POINTER_SETS = 20


@dataclass(frozen=True)
class Rows:
    """A batch of a task. B rows, T positions, right-padded."""

    ids: Tensor
    """[B, T] int64"""
    targets: Tensor
    """[B, T] int64, what the model is trained on."""
    rewards: Tensor
    """[B, T] int64, the targets that count for the decision to stop."""
    lengths: Tensor
    """[B] int64"""
    needed: Tensor
    """[B] int64, k: operations to be made one after the other."""

    def __getitem__(self, which: Tensor) -> Rows:
        return Rows(*(t[which] for t in vars(self).values()))


def permutations(generator: torch.Generator, n: int) -> Rows:
    """n rows: start, swap 1, .. swap k; targets from the first swap on."""
    swaps = list(itertools.combinations(range(THINGS), 2))
    table = torch.arange(THINGS).repeat(len(swaps), 1)
    for i, (a, b) in enumerate(swaps):
        table[i, a], table[i, b] = b, a
    return _walk(generator, n, table, False)


def _pointer_sets() -> Tensor:
    """[20, 6]: where each set points to from each node. At most two nodes of a set point to the same one: a set that
    forgot its node would spare a row the hops before it."""
    generator = torch.Generator().manual_seed(99)
    drawn = torch.randint(0, NODES, (400, NODES), generator=generator)
    distinct = torch.tensor([len(set(pointers)) for pointers in drawn.tolist()])
    return drawn[distinct >= NODES - 1][:POINTER_SETS]


def pointers(generator: torch.Generator, n: int, delayed: bool = False) -> Rows:
    """n rows: start, pointers of layer 1, .. of layer k; targets from the first hop on."""
    return _walk(generator, n, _pointer_sets(), delayed)


def _walk(generator: torch.Generator, n: int, moves: Tensor, delayed: bool) -> Rows:
    """n rows: a start, then k of `moves` [M, P], where each goes from each of P places; targets the places."""
    n_moves, n_places = moves.shape
    needed = torch.randint(1, MOST_OPERATIONS + 1, (n,), generator=generator)
    at = torch.randint(0, n_places, (n,), generator=generator)
    drawn = torch.randint(0, n_moves, (n, MOST_OPERATIONS), generator=generator)
    ids = torch.cat([(n_moves + at)[:, None], drawn], 1)
    targets = torch.full_like(ids, IGNORE)
    for j in range(MOST_OPERATIONS):
        at = moves[drawn[:, j], at]
        targets[:, j + 1] = torch.where(j < needed, n_moves + at, IGNORE)
    padding = torch.arange(ids.shape[1]) >= needed[:, None] + 1
    rewards = targets
    if delayed:
        rewards = torch.where(torch.arange(ids.shape[1]) == needed[:, None], targets, IGNORE)
    return Rows(ids.masked_fill(padding, 0), targets, rewards, needed + 1, needed)


TASKS: dict[str, Callable[[torch.Generator, int], Rows]] = {
    "permutations": permutations,
    "pointers": pointers,
    "delayed": lambda generator, n: pointers(generator, n, delayed=True),
}


def make_model(seed: int, halting: str) -> HRMForCausalLM:
    """A model of some 85,000 parameters. Its matrices start at 1 / sqrt(inputs): at this width the usual 0.02 leaves
    attention nothing to look at for thousands of steps."""
    config = HRMConfig(
        vocab_size=32, n_embd=64, block_size=16, n_head=4, n_kv_head=4, n_input_layers=0, n_output_layers=0,
        hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=S, mlp_hidden=128,
        embed_scale=30.0, halt_bias=0.0, halting=halting,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = HRMForCausalLM(config)
    with torch.no_grad():
        for name, p in model.hrm_core.named_parameters():
            if p.dim() == 2 and "q_head" not in name:
                p.normal_(0, p.shape[1] ** -0.5)
        model.wte.weight.normal_(0, 1 / 30)
    return model
