"""A run of train/pretrain.py as it comes, on text, with its picture and its sample."""

from __future__ import annotations

import gc
import json

import numpy as np
import torch
from pretrain_helpers import records, short_run, weights

from hrm_model import load_model
from train.pretrain import main


def test_it_learns_and_leaves_metrics_a_picture_checkpoints_and_its_origin(
    small_dataset, small_model, tmp_path, capsys
):
    out = tmp_path / "run"
    flags = short_run(small_dataset, small_model, out)
    flags[flags.index("--steps") + 1] = "40"
    assert main([*flags, "--eval-every", "20", "--save-every", "20"]) == 0
    train, evals = records(out, "train"), records(out, "eval")
    assert [r["step"] for r in train] == list(range(1, 41))
    assert [r["step"] for r in evals] == [20, 40]
    assert np.mean([r["loss"] for r in train[-5:]]) < train[0]["loss"] - 2
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] and evals[-1]["bits_per_byte"] > 0
    assert set(evals[-1]["loss_by_depth"]) == {"1", "2", "3"}
    assert sum(evals[-1]["depths"].values()) == 4 * 16, "a depth for every prefix"
    assert set(train[0]["depths"]) <= {"1", "2", "3"} and sum(train[0]["depths"].values()) == 8

    assert (out / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    origin = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert origin["run"]["steps"] == 40 and origin["versions"]["torch"] == torch.__version__
    model, config = load_model(out)
    assert config.n_embd == 8 and config.dropout == 0.1
    assert torch.equal(model.wte.weight, weights(out, 40)["wte.weight"])

    printed = capsys.readouterr().out
    for expected in ("parameters", "unigram", "bigram", "bits/byte", "tok/s", "left", "sample:", "done: val loss"):
        assert expected in printed
    for expected in (
        "depth random for 13 steps, then head, halting policy at 0.02 nats a step, steered to 1.5 steps",
        "(at the depth each prefix decides; unigram",
        "executed steps: mean ",
        "rivals: fixed depths at equal steps ",
    ):
        assert expected in printed
    assert "MFU" not in printed, "a CPU's peak is not known"


def test_figures_do_not_gather(small_dataset, small_model, tmp_path):
    from matplotlib.figure import Figure

    gc.collect()
    gc.disable()  # left to itself Python would collect them, sooner or later
    try:
        assert main(short_run(small_dataset, small_model, tmp_path / "run")) == 0
    finally:
        gc.enable()
    assert len(records(tmp_path / "run", "eval")) == 2
    assert sum(type(found) is Figure for found in gc.get_objects()) <= 1, "matplotlib itself keeps the newest"
