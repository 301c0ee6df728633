"""Models, optimizers and damage for the tests of checkpoints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from hrm_model.config import HRMConfig
from hrm_model.model import HRMForCausalLM

ROOT = Path(__file__).parent.parent
SMALL = dict(
    vocab_size=61, n_embd=16, block_size=16, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1
) | dict(hrm_H_layers=1, hrm_L_layers=1, hrm_max_steps=2)
OURS = {"halt_bias", "halting", "mlp_hidden", "tie_embeddings", "embed_scale", "loss"}
"""Fields that the published configuration lacks."""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux' fork and resource limits")


def small_model(seed: int = 0, **changes) -> HRMForCausalLM:
    torch.manual_seed(seed)
    return HRMForCausalLM(HRMConfig(**SMALL | changes))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 6))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.linspace(-1, 1, 24).reshape(4, 6) * (step + 1)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def flip_byte(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())


def run_python(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def published_config(fields: dict, **extra) -> object:
    """An object of a dataclass whose module exists only inside this function, as in their files."""
    module = types.ModuleType("cosmic_module")
    sys.modules["cosmic_module"] = module
    cls = dataclasses.make_dataclass("CosmicConfig", [*fields, *extra])
    cls.__module__ = "cosmic_module"
    module.CosmicConfig = cls
    return cls(**fields, **extra)


def save_pt(content: object, path: Path) -> Path:
    torch.save(content, path)
    sys.modules.pop("cosmic_module", None)
    return path
