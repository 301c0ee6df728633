"""hrm convert: one folder of any checkpoint, and proof that it is the same model."""

from __future__ import annotations

import json

import pytest
import torch

from hrm_model import HRMConfig, HRMForCausalLM, load_model, save_model
from hrm_model.checkpoint import save_checkpoint
from hrm_model.cli import main


@pytest.fixture
def run(small_model, tmp_path):
    """A run of one checkpoint with an average, and (weights, average)."""
    config = HRMConfig.from_dict(json.loads(small_model.read_text()))
    torch.manual_seed(0)
    model, other = HRMForCausalLM(config), HRMForCausalLM(config)
    save_checkpoint(tmp_path / "run", 3, model, None, {}, average=dict(other.named_parameters()))
    return tmp_path / "run", model.state_dict(), other.state_dict()


@pytest.mark.parametrize(("weights", "which"), [("model", 1), ("ema", 2)])
def test_weights_and_averages_become_a_folder_with_the_same_tensors(run, tmp_path, capsys, weights, which):
    assert main(["convert", str(run[0]), str(tmp_path / "out"), "--weights", weights]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["logits_off"] == 0 and told["same_steps"]
    found, _ = load_model(tmp_path / "out")
    assert all(torch.equal(t, run[which][name]) for name, t in found.state_dict().items())


def test_a_smaller_dtype_halves_the_file_and_says_what_rounding_does(run, tmp_path, capsys):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        assert main(["convert", str(run[0]), str(tmp_path / dtype), "--dtype", dtype]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes["float32"] and 0 < told["logits_off"] < 0.1
    found, _ = load_model(tmp_path / "bfloat16")
    assert all(torch.equal(t, run[1][name].bfloat16().float()) for name, t in found.state_dict().items())


def test_what_is_in_the_way_stays_and_a_missing_average_is_named(run, tmp_path, capsys):
    source = save_model(load_model(run[0])[0], tmp_path / "model")
    assert main(["convert", str(run[0]), str(source)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--weights", "ema"]) == 1
    assert "has no averaged weights" in capsys.readouterr().err and not (tmp_path / "out").exists()
