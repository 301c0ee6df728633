"""Texts of a few thousand characters and models that learn them in milliseconds a step."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.continual import command
from hrm_model.continual.training import ContinualTraining

SHAPE = dict(vocab_size=64, n_chars=1, tie_embeddings=False, init="truncated", use_gqa=False, n_input_layers=0)
SHAPE |= dict(n_output_layers=0, hrm_H_layers=1, hrm_L_layers=1, hrm_max_steps=1, n_embd=16, n_head=2, mlp_hidden=40)
SHAPE |= dict(embed_scale=4.0, halt_bias=0.0)
ENGLISH = "".join(f"The {n}th sheep went over the hill, and then it slept. " for n in range(80))
GREEK = "".join(
    f"\u03b1\u03b2\u03b3 {n} \u03bb\u03cc\u03b3\u03bf\u03c2 \u03ba\u03b1\u03b9 \u03bd\u03bf\u03cd\u03c2\n"
    for n in range(180)
)
SYMBOLS = "".join(chr(0x2200 + n % 70) + chr(0x2500 + n % 40) + " " for n in range(1200))


def character_model(n_chars: int = 50, seed: int = 0, **shape) -> HRMForCausalLM:
    """With weights that are none of those that models begin with: gates, norms and head as after training."""
    config = HRMConfig(**SHAPE | dict(n_chars=n_chars, block_size=32, hrm_H_cycles=2, hrm_L_cycles=2) | shape)
    torch.manual_seed(seed)
    model = HRMForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


class Classroom:
    """A folder with texts and models."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, content in (("english", ENGLISH), ("greek", GREEK), ("symbols", SYMBOLS)):
            (folder / f"{name}.txt").write_text(content, encoding="utf-8")
        (folder / "shape.json").write_text(json.dumps(SHAPE), encoding="utf-8")

    def flags(self, text: str, **more) -> dict:
        """Flags of a lesson of 6 steps."""
        path = text if "/" in text else str(self.folder / f"{text}.txt")
        given = dict(
            recipe="tiny", text=path, models=str(self.folder / "models"), config=str(self.folder / "shape.json")
        )
        given |= dict(
            steps=6, batch_size=4, eval_windows=2, log_every=2, sample_tokens=0, save_epochs=0.001, eval_epochs=9.0
        )
        return given | dict(growth_chars=0, on_interrupt="pause") | more

    def learn(self, text: str, **more) -> int:
        """The command's exit status."""
        return command.run(self.flags(text, seq_length=24, **more))

    def training(self, text: str, **more) -> ContinualTraining:
        """The same, ready to be called."""
        return ContinualTraining(command.prepare(self.flags(text, seq_length=24, **more)))

    def model(self, name: str = "model") -> Path:
        return self.folder / "models" / name
