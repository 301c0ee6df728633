"""A saved model comes back to the same bits, and one that does not fit or is damaged is named."""

from __future__ import annotations

import json
import os

import golden_files
import pytest
import torch
from checkpoint_helpers import flip_byte, same_bits, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hrm_model.checkpoint import CheckpointError, load_model, save_model, verify_checkpoint
from hrm_model.config import HRMConfig
from hrm_model.model import HRMForCausalLM


@pytest.mark.parametrize("name", golden_files.NAMES)
def test_golden_weights_come_back_bitwise(name, tmp_path):
    golden = golden_files.load(name)
    model = golden.model()
    save_model(model, tmp_path / "model")
    loaded, config = load_model(tmp_path / "model")
    assert config == model.config
    assert same_bits(loaded.state_dict(), golden.weights)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.wte.weight


def test_a_saved_model_has_both_tied_keys_and_the_published_config(tmp_path):
    golden = golden_files.load("tiny_gqa")
    model = golden.model()
    save_model(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == golden.weights.keys()
        assert file.metadata() == {"format": "pt"}
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["model_type"] == "cosmicfish_hrm"
    assert written["n_embd"] == model.config.n_embd
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_the_base_model_has_the_published_187_keys(tmp_path):
    with torch.device("meta"):
        keys = HRMForCausalLM(HRMConfig.preset("base")).state_dict().keys()
    assert len(keys) == 187
    assert {"wte.weight", "lm_head.weight"} <= keys


def test_bfloat16_files_load_into_float32_unless_asked(tmp_path):
    model = golden_files.load("tiny_gqa").model()
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = {key: value.bfloat16() for key, value in model.state_dict().items()}
    assert same_bits(load_model(tmp_path / "half", dtype=torch.bfloat16)[0].state_dict(), rounded)
    widened = {key: value.float() for key, value in rounded.items()}
    assert same_bits(load_model(tmp_path / "half")[0].state_dict(), widened)


def test_an_untied_model_keeps_two_embeddings(tmp_path):
    model = small_model(tie_embeddings=False)
    save_model(model, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert not loaded.lm_head.weight.equal(loaded.wte.weight)


def test_loading_leaves_the_random_state_alone(tmp_path):
    save_model(small_model(), tmp_path / "model")
    before = torch.get_rng_state()
    load_model(tmp_path / "model")
    assert torch.get_rng_state().equal(before)


def test_an_existing_target_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "model"
    save_model(small_model(0), target)
    with pytest.raises(CheckpointError, match=r"model already exists; .*overwrite=True"):
        save_model(small_model(1), target)
    assert same_bits(load_model(target)[0].state_dict(), small_model(0).state_dict())
    save_model(small_model(1), target, overwrite=True)
    assert same_bits(load_model(target)[0].state_dict(), small_model(1).state_dict())
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_a_directory_with_other_files_is_never_replaced(tmp_path):
    target = tmp_path / "model"
    save_model(small_model(), target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which no save wrote"):
        save_model(small_model(), target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_wrong_keys_are_listed_in_one_error(tmp_path):
    path = tmp_path / "model"
    model = small_model()
    save_model(model, path)
    (path / "manifest.json").unlink()
    weights = {k: v for k, v in load_file(path / "model.safetensors").items() if "mlp" not in k}
    weights |= {"ln_f.weight": torch.ones(5), "extra.weight": torch.ones(1)}
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "12 missing: input_blocks.0.mlp" in message and "and 4 more" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: ln_f.weight (file [5], model [16])" in message
    assert str(path / "model.safetensors") in message


@pytest.mark.parametrize("dropped", ["wte.weight", "lm_head.weight"])
def test_one_key_of_a_tied_pair_serves_both(dropped, tmp_path):
    path = tmp_path / "model"
    save_model(small_model(), path)
    (path / "manifest.json").unlink()
    weights = load_file(path / "model.safetensors")
    kept = weights.pop(dropped)
    save_file(weights, path / "model.safetensors")
    loaded, _ = load_model(path)
    assert loaded.wte.weight.equal(kept)
    assert loaded.lm_head.weight is loaded.wte.weight


def test_a_tied_pair_that_differs_is_an_error(tmp_path):
    path = tmp_path / "model"
    save_model(small_model(), path)
    (path / "manifest.json").unlink()
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ, but the config ties them"):
        load_model(path)


def test_truncated_weights_are_named_with_and_without_a_manifest(tmp_path):
    path = tmp_path / "model"
    save_model(small_model(), path)
    whole = (path / "model.safetensors").stat().st_size
    os.truncate(path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is 5,000 bytes, its manifest says {whole:,}"):
        load_model(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(5,000 bytes\) cannot be read as safetensors"):
        load_model(path)


def test_a_flipped_byte_is_found(tmp_path):
    path = tmp_path / "model"
    save_model(small_model(), path)
    verify_checkpoint(path)
    flip_byte(path / "model.safetensors")
    for check in (load_model, verify_checkpoint):
        with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
            check(path)


def test_paths_that_are_no_model_say_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "absent")
    (tmp_path / "README.md").touch()
    with pytest.raises(CheckpointError, match=r"neither config\.json .* but README\.md"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no \.pt file"):
        load_model(tmp_path / "README.md")
    save_file({}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json beside it"):
        load_model(tmp_path / "weights.safetensors")
