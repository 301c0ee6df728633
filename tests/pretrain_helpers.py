"""Runs of train/pretrain.py for tests: their flags, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from hrm_model import HRMConfig, HRMForCausalLM, save_model
from hrm_model.checkpoint import verify_checkpoint

SCRIPT = Path(__file__).parents[1] / "train" / "pretrain.py"


def short_run(dataset: Path, model: Path, out: Path) -> list[str]:
    """A run of 8 steps with dropout and accumulation. Depths are random for 3 steps; then the head decides for the half
    of the rows that do not explore. The price of a step is steered."""
    run = f"--recipe tiny --config {model} --data {dataset} --out {out} --steps 8"
    run += " --batch-size 4 --accumulation 2 --lr 0.01 --min-lr 0.001 --warmup 2 --dropout 0.1 --device cpu"
    run += " --halting policy --explore 0.5 --step-price 0.02 --target-steps 1.5"
    return (run + " --log-every 1 --eval-every 4 --eval-windows 4 --save-every 2 --sample-tokens 4").split()


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = checkpoint_of(run, step)
    verify_checkpoint(checkpoint)
    model, optimizer = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    # clones: what load_file returns is mapped from the file, and some tests damage that
    return {k: v.clone() for k, v in [*model.items(), *((f"optimizer/{k}", v) for k, v in optimizer.items())]}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"not bitwise equal: {different[:5]}"


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def decided(shape: Path, q: tuple[float, float], path: Path, **changes) -> Path:
    """A model whose head says q whatever it sees."""
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(shape.read_text()) | changes))
    with torch.no_grad():
        model.hrm_core.q_head.weight.zero_()
        model.hrm_core.q_head.bias.copy_(torch.tensor(q))
    return save_model(model, path)


def start_from(model: Path, flags: list[str]) -> None:
    """In `flags`, put a model in the place of the configuration."""
    at = flags.index("--config")
    flags[at : at + 2] = ["--init-from", str(model)]
