"""Published .pt files load as they are, and nothing that is in them can run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import warnings
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from checkpoint_helpers import OURS, SMALL, adamw, published_config, same_bits, save_pt, small_model

from hrm_model.checkpoint import CheckpointError, load_model
from hrm_model.config import HRMConfig


def published_golden() -> tuple[dict, dict[str, torch.Tensor]]:
    """Config fields, those that the published class has, and weights."""
    golden = golden_files.load("no_rope_mha_gelu_bias")
    fields = dataclasses.asdict(golden.config)
    return {key: value for key, value in fields.items() if key not in OURS}, golden.weights


@pytest.mark.parametrize("weights_key", ["model_state_dict", "model", "state_dict"])
@pytest.mark.parametrize("config_key", ["config", "hrm_config", "model_config", "cosmicconf"])
def test_a_published_file_loads_although_its_config_class_is_gone(config_key, weights_key, tmp_path):
    fields, weights = published_golden()
    path = save_pt({config_key: published_config(fields), weights_key: weights, "iter_num": 7}, tmp_path / "best.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, config = load_model(path)
    assert config == HRMConfig.from_dict(fields)
    assert same_bits(model.state_dict(), weights)


def test_everything_a_training_file_carries_beside_the_model_is_ignored(tmp_path):
    fields, weights = published_golden()
    model = small_model()
    optimizer = adamw(model)
    model(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    content = {
        "config": {"learning_rate": 3e-4, "batch_size": 64},
        "cosmicconf": published_config(fields, n_layer=24, use_qk_norm=False),
        "model": {f"_orig_mod.module.{key}": value for key, value in weights.items()},
        "optimizer": optimizer.state_dict(),
        "best_val_loss": np.float64(3.25),
        "losses": np.arange(3.0),
        "args": argparse.Namespace(out_dir="out", when=np.int64(3)),
        "path": Path("out"),
        "rng": {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()},
    }
    path = save_pt(content, tmp_path / "training.pt")
    with pytest.warns(UserWarning, match="ignored 2 config attributes unknown to HRMConfig: n_layer, use_qk_norm"):
        loaded, config = load_model(path)
    assert config == HRMConfig.from_dict(fields)
    assert same_bits(loaded.state_dict(), weights)


def test_a_bare_state_dict_takes_the_config_beside_it(tmp_path):
    fields, weights = published_golden()
    path = save_pt(weights, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt has no config .* put the model's config\.json beside it"):
        load_model(path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert same_bits(load_model(path)[0].state_dict(), weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds an object of type list"),
        ({"config": SMALL, "epoch": 3}, r"has no weights: .* its keys: config, epoch"),
        ({"config": SMALL, "model": {"wte.weight": 3}}, "weight 'wte.weight' is of type int"),
        ({"config": SMALL, "model": {"a": torch.ones(1), "module.a": torch.ones(1)}}, "a is there twice"),
        ({"config": SMALL, "model": {"a": torch.ones(1)}}, "1 unexpected: a"),
        ({"config": SMALL | {"n_head": 3}, "model": {}}, r"\(config\): impossible configuration"),
        ({"config": SMALL | {"n_embd": np.int64(3)}, "model": {}}, "n_embd is an object of type numpy"),
    ],
)
def test_unusable_published_files_say_why(content, message, tmp_path):
    path = save_pt(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_truncated_published_file_is_an_error(tmp_path):
    path = save_pt({"config": SMALL, "model": small_model().state_dict()}, tmp_path / "cut.pt")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cut\.pt is no \.pt file that can be read"):
        load_model(path)


class Calls:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (lambda marker: Calls(os.system, f"echo > {marker}"), r"(posix|nt)\.system"),
        (lambda marker: Calls(exec, f"open({marker!r}, 'w')"), r"builtins\.exec"),
        (lambda marker: Calls(eval, f"open({marker!r}, 'w')"), r"builtins\.eval"),
        (lambda marker: Calls(open, marker, "w"), r"_?io\.open"),
        (lambda marker: Calls(subprocess.Popen, ["touch", marker]), r"(subprocess|commands)\.Popen"),
    ],
    ids=["os.system", "exec", "eval", "open", "Popen"],
)
def test_a_file_that_would_run_commands_is_refused_and_runs_none(attack, name, tmp_path):
    marker = tmp_path / "marker"
    content = {"config": SMALL, "model": small_model().state_dict(), "extra": attack(str(marker))}
    path = save_pt(content, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=rf"evil\.pt names {name}, which can run commands"):
        load_model(path)
    assert not marker.exists()


def test_functions_that_are_not_refused_by_name_are_not_called_either(tmp_path):
    marker = tmp_path / "marker"
    model = small_model()
    content = {"config": SMALL, "model": model.state_dict(), "extra": Calls(touch, str(marker))}
    loaded, _ = load_model(save_pt(content, tmp_path / "sly.pt"))
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert not marker.exists()
