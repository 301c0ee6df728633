"""How a trained model becomes larger without becoming another one: more characters, more layers.

vocabulary   rows of wte and lm_head, 64 at a time; n_chars moves the border between real and spare rows.
             Old rows, and old characters' logits, stay the same to the last bit (output_head.py).
layers       at the end of a level, behind a gate at 0 (blocks.GrownBlock): the function stays the same to the bit.
optimizer    moments of old numbers stay; new rows and new layers begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import VOCAB_BLOCK, HRMConfig
from ..model import HRMForCausalLM
from ..tensors import SavedOptimizer


@dataclass(frozen=True)
class GrowthRule:
    """When a model gets layers, and how many: after every `chars` characters as many as `params` holds, at least one,
    in the repeating order of `order`."""

    chars: int = 3_000_000
    """Characters of different texts for one growth; 0: never."""
    params: int = 1_000_000
    """Parameters of one growth."""
    order: str = "LLH"
    """Levels that get the layers, in turn."""

    def __post_init__(self):
        if self.chars < 0 or self.params < 1:
            raise ValueError(f"--growth-chars {self.chars} and --growth-params {self.params} must be at least 0 and 1")
        if not self.order or set(self.order) - {"L", "H"}:
            raise ValueError(f"--growth-order {self.order!r} is no sequence of L and H, such as LLH")

    def due(self, characters: int, growths: int) -> int:
        """How many growths are missing after so many characters and growths."""
        return max(0, characters // self.chars - growths) if self.chars else 0

    def plan(self, config: HRMConfig, growths: int) -> LayerPlan:
        """The layers of so many growths for a model of `config`."""
        each = layer_parameters(config)
        n = growths * max(1, self.params // each)
        first = config.hrm_L_grown + config.hrm_H_grown
        L = self._L_before(first + n) - self._L_before(first)
        return LayerPlan(L, n - L, each)

    def _L_before(self, n: int) -> int:
        """L's layers among the first n of the endless order."""
        whole, rest = divmod(n, len(self.order))
        return whole * self.order.count("L") + self.order[:rest].count("L")


@dataclass(frozen=True)
class LayerPlan:
    """Layers to add to each level, and the parameters of one."""

    L: int
    H: int
    each: int

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return (self.L + self.H) * self.each

    def __str__(self) -> str:
        return f"{self.L} L + {self.H} H layers, {self.parameters:,} parameters ({self.each:,} each)"


def layer_parameters(config: HRMConfig) -> int:
    """Parameters of one layer that is added, its gate included."""
    from ..blocks import GrownBlock

    with torch.device("meta"):
        return sum(p.numel() for p in GrownBlock(config).parameters())


def rows_for(n_chars: int) -> int:
    """Rows of a vocabulary that holds so many characters: a multiple of 64."""
    return -(-n_chars // VOCAB_BLOCK) * VOCAB_BLOCK


@torch.no_grad()
def grow(model: HRMForCausalLM, n_chars: int | None = None, L: int = 0, H: int = 0) -> HRMForCausalLM:
    """A larger model with the weights of `model`, which stays as it is.

    Args:
        n_chars: characters from now on, at least as many as before; default as before. L, H: layers to add to each
            level.

    Raises:
        ValueError: fewer characters than before, or a model without a vocabulary of characters.
    """
    old = model.config
    if old.n_chars is None:
        raise ValueError("this model has no characters: its vocabulary is made of words' pieces and cannot grow")
    n_chars = old.n_chars if n_chars is None else n_chars
    if n_chars < old.n_chars:
        raise ValueError(f"{n_chars} characters are fewer than the {old.n_chars} that the model has; it only grows")
    config = replace(
        old, n_chars=n_chars, vocab_size=max(old.vocab_size, rows_for(n_chars)),
        hrm_L_layers=old.hrm_L_layers + L, hrm_L_grown=old.hrm_L_grown + L,
        hrm_H_layers=old.hrm_H_layers + H, hrm_H_grown=old.hrm_H_grown + H,
    )  # fmt: skip
    grown = HRMForCausalLM(config).to(model.device)
    values = grown.state_dict()
    for name, before in model.state_dict().items():
        values[name][tuple(slice(n) for n in before.shape)] = before  # what grows does so in its rows
    return grown.train(model.training)


def grow_optimizer(saved: SavedOptimizer, model: HRMForCausalLM, groups: Sequence[dict]) -> SavedOptimizer:
    """The state of an optimizer over the smaller model as one over `model`: moments of new rows are 0, new parameters
    have none yet. Hyperparameters are those of `groups`, the new optimizer's.

    An Adam step of a new row in an old table divides its two moments without much correction for their start: its first
    updates are at most (1 - beta1) / sqrt(1 - beta2) = 0.45 of a rate at the betas 0.9 and 0.95.
    """
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    slots = {
        name: {slot: _padded(value, parameters[name]) for slot, value in of_name.items()}
        for name, of_name in saved.slots.items()
        if name in parameters
    }
    of_groups = [{"params": [names[id(p)] for p in group["params"]]} for group in groups]
    return replace(saved, groups=of_groups, slots=slots)


def _padded(value: Tensor | float, like: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape == like.shape:
        return value
    larger = torch.zeros(like.shape, dtype=value.dtype)
    larger[tuple(slice(n) for n in value.shape)] = value
    return larger
