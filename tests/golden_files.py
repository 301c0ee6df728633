"""Reads tests/golden: numbers that the published code produced; each file's metadata explains them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from hrm_model import HRMConfig, HRMForCausalLM

NAMES = ("tiny_gqa", "head_dim_56", "no_rope_mha_gelu_bias")


@dataclass
class Golden:
    config: HRMConfig
    weights: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]

    def model(self) -> HRMForCausalLM:
        """A model with the golden weights, loaded strictly, in eval mode."""
        model = HRMForCausalLM(self.config)
        model.load_state_dict(self.weights, strict=True)
        return model.eval()

    def training_model(self) -> HRMForCausalLM:
        """The model of the training numbers: its head never halts, so that all steps run."""
        model = self.model().train()
        with torch.no_grad():
            model.hrm_core.q_head.weight.zero_()
            model.hrm_core.q_head.bias.copy_(torch.tensor([-5.0, 5.0]))
        return model


def load(name: str) -> Golden:
    path = Path(__file__).parent / "golden" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    numbers = {k: v for k, v in tensors.items() if not k.startswith("weights.")}
    return Golden(HRMConfig.from_dict(config), weights, numbers)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_gradients_match(model: HRMForCausalLM, numbers: dict[str, torch.Tensor]) -> int:
    """Compare every golden gradient; returns how many there were. 1e-8: some are mathematically zero (k_proj.bias)."""
    parameters = dict(model.named_parameters())
    compared = 0
    for key, expected in numbers.items():
        kind, _, name = key.removeprefix("train.").partition(".")
        if kind == "grad":
            found = parameters[name].grad
        elif kind == "grad_norm":
            found = parameters[name].grad.norm()
        elif kind == "grad_every_97th":
            found = parameters[name].grad.flatten()[::97]
        else:
            continue
        error = (found - expected).norm().item()
        assert error <= 1e-4 * expected.norm().item() + 1e-8, f"{key}: off by {error}"
        compared += 1
    return compared
