"""Attention of texts that share their beginnings: each token sees the stem of its tree and its own branch up to itself.

    tree b:  stem  s_1 .. s_n   branches  b_11 b_12 ..   b_21 b_22 ..
             a stem token sees the stem up to itself; a branch token sees all of the stem, and its branch up to itself

so that a branch's numbers are those of the row stem + branch, and the stem is computed once for all its branches.
Tokens of all trees lie one after the other in [1, N, ..], without padding; attention alone is padded, to the largest
tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfer import to_device


@dataclass(frozen=True)
class Forest:
    """N tokens of B trees, in the order tree by tree, stem first, then branch by branch."""

    position: Tensor
    """[N] int64, in the row that the token belongs to; a branch goes on where the stem ends."""
    place: Tensor
    """[B, T] int64: token of each place of the padded trees; 0 where there is none."""
    of_token: Tensor
    """[N] int64: where each token is in the padded trees, flattened."""
    seen: Tensor
    """[B, 1, T, T] bool: whether the token at the second-last place sees the last."""

    @classmethod
    def of(cls, trees: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> Forest:
        """Trees by their sizes: (tokens of the stem, tokens of each branch).

        Raises:
            ValueError: no trees, or a stem or branch without tokens.
        """
        if not trees:
            raise ValueError("a forest has no trees; give at least one")
        for stem, branches in trees:
            if stem < 1 or any(size < 1 for size in branches):
                raise ValueError(f"a tree of stem {stem} and branches {list(branches)} has an empty part; leave it out")
        totals = [stem + sum(branches) for stem, branches in trees]
        longest = max(totals)
        # Part 0 is the stem, 1.. the branches; padding has part -1, sees the first token only, and is seen by nobody:
        # a row of a softmax without any entry would be nan.
        part = torch.full((len(trees), longest), -1, dtype=torch.int64, device="cpu")
        position = torch.zeros_like(part)
        for tree, (stem, branches) in enumerate(trees):
            at = 0
            for number, size in enumerate((stem, *branches)):
                part[tree, at : at + size] = number
                position[tree, at : at + size] = torch.arange(size) + (stem if number else 0)
                at += size
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        key, query = part[:, None, :], part[:, :, None]
        seen = causal & ((key == query) | (key == 0)) & (key >= 0)
        seen[:, :, 0] |= part < 0
        real = part >= 0
        of_token = real.flatten().nonzero().flatten()
        place = torch.zeros(part.numel(), dtype=torch.int64)
        place[of_token] = torch.arange(len(of_token))
        told = position.flatten()[of_token], place.view(part.shape), of_token, seen[:, None]
        return cls(*(to_device(t, device) for t in told))

    @property
    def size(self) -> int:
        """N."""
        return self.of_token.shape[0]


def forest_attention(qkv: Tensor, forest: Forest, n_head: int, n_kv_head: int) -> Tensor:
    """Grouped-query attention of the forest's tokens over each other, without gradient or dropout.

    Args:
        qkv: [1, N, (H + 2K) * D] from `qkv_rope`.
    Returns:
        [1, N, H*D].
    """
    heads = qkv[0][forest.place].unflatten(-1, (n_head + 2 * n_kv_head, -1)).transpose(1, 2)
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=forest.seen, enable_gqa=n_kv_head != n_head)
    return out.transpose(1, 2).reshape(-1, n_head * out.shape[-1])[forest.of_token][None]
