"""A training run comes back to the same bits, and what is damaged is named and passed over."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from checkpoint_helpers import adamw, flip_byte, net, same_bits, small_model, steps, train
from torch import nn

from hrm_model.checkpoint import (
    CheckpointError,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
    verify_checkpoint,
)


def test_a_restored_run_continues_to_the_same_bits(tmp_path):
    straight = net()
    straight_optimizer = adamw(straight)
    train(straight, straight_optimizer, range(10))

    first = net()
    optimizer = adamw(first)
    train(first, optimizer, range(4))
    optimizer.param_groups[0]["lr"] = 1e-2
    path = save_checkpoint(tmp_path, 4, first, optimizer, {"val_loss": 2.5})

    resumed = net(seed=99)
    resumed_optimizer = adamw(resumed, lr=0.5)
    torch.manual_seed(1234)
    assert load_checkpoint(path, resumed, resumed_optimizer) == {"val_loss": 2.5, "step": 4}
    train(resumed, resumed_optimizer, range(4, 10))
    assert same_bits(resumed.state_dict(), straight.state_dict())
    for theirs, ours in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert same_bits(straight_optimizer.state[theirs], resumed_optimizer.state[ours])
    for theirs, ours in zip(straight_optimizer.param_groups, resumed_optimizer.param_groups, strict=True):
        assert {k: v for k, v in theirs.items() if k != "params"} == {k: v for k, v in ours.items() if k != "params"}


def test_a_restored_model_continues_to_the_same_bits(tmp_path):
    def advance(model, optimizer, steps):
        model.train()
        for step in steps:
            ids = (torch.arange(24).reshape(2, 12) * (step + 3)) % 61
            optimizer.zero_grad()
            model(ids, ids.roll(-1, 1)).loss.backward()
            optimizer.step()

    straight = small_model(dropout=0.1)
    straight_optimizer = adamw(straight)
    advance(straight, straight_optimizer, range(4))

    first = small_model(dropout=0.1)
    optimizer = adamw(first)
    advance(first, optimizer, range(2))
    path = save_checkpoint(tmp_path, 2, first, optimizer, {})

    resumed = small_model(seed=7, dropout=0.1)
    resumed_optimizer = adamw(resumed)
    load_checkpoint(path, resumed, resumed_optimizer)
    advance(resumed, resumed_optimizer, range(2, 4))
    assert same_bits(resumed.state_dict(), straight.state_dict())


def test_random_state_can_be_left_alone(tmp_path):
    model = net()
    path = save_checkpoint(tmp_path, 0, model, None, {})
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    load_checkpoint(path, model, restore_rng=False)
    assert torch.get_rng_state().equal(expected)
    load_checkpoint(path, model)
    assert not torch.get_rng_state().equal(expected)


def test_optimizer_state_belongs_to_names_not_positions(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    path = save_checkpoint(tmp_path, 3, model, optimizer, {})
    other = net(1)
    reversed_optimizer = torch.optim.AdamW(list(other.parameters())[::-1], lr=1e-2)
    load_checkpoint(path, other, reversed_optimizer)
    for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(optimizer.state[theirs], reversed_optimizer.state[ours])


def test_state_keeps_numbers_exactly_and_refuses_the_rest(tmp_path):
    state = {
        "val_loss": np.float32(0.1),
        "tokens": torch.tensor(2**40),
        "nan": float("nan"),
        "text": "Δ",
        "none": None,
    }
    path = save_checkpoint(tmp_path, 1, net(), None, state)
    loaded = load_checkpoint(path, net())
    assert loaded["val_loss"] == float(np.float32(0.1))
    assert loaded["tokens"] == 2**40
    assert loaded["nan"] != loaded["nan"]
    assert (loaded["text"], loaded["none"]) == ("Δ", None)
    with pytest.raises(ValueError, match=r"state\['data'\]\['x'\] is of type Tensor, which JSON cannot hold"):
        save_checkpoint(tmp_path, 2, net(), None, {"data": {"x": torch.ones(2)}})
    with pytest.raises(ValueError, match="keep_last 0"):
        save_checkpoint(tmp_path, 2, net(), None, {}, keep_last=0)
    with pytest.raises(ValueError, match="step -1"):
        save_checkpoint(tmp_path, -1, net(), None, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_another_config_is_an_error_that_lists_the_fields(tmp_path):
    path = save_checkpoint(tmp_path, 1, small_model(), None, {})
    other = small_model(n_embd=32, dropout=0.5)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, other)
    assert "dropout: checkpoint 0.0, model 0.5" in str(caught.value)
    assert "n_embd: checkpoint 16, model 32" in str(caught.value)
    assert "vocab_size" not in str(caught.value)


def test_a_failed_load_changes_nothing(tmp_path):
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    path = save_checkpoint(tmp_path, 2, model, optimizer, {})
    target = net(3)
    wide = nn.Sequential(nn.Linear(6, 12), nn.Dropout(), nn.Linear(13, 6))
    ungrouped = torch.optim.AdamW(target.parameters())
    weights = {key: value.clone() for key, value in target.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="2 parameter groups, the optimizer 1"):
        load_checkpoint(path, target, ungrouped)
    with pytest.raises(CheckpointError, match="state of AdamW, not of SGD"):
        load_checkpoint(path, target, torch.optim.SGD(target.parameters()))
    with pytest.raises(CheckpointError, match=r"1 of another shape: 2\.weight"):
        load_checkpoint(path, wide)
    flip_byte(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has sha256"):
        load_checkpoint(path, target, ungrouped)
    assert same_bits(target.state_dict(), weights)
    assert not ungrouped.state
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), r"has no manifest\.json: its save was interrupted"),
        (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
        (
            lambda p: os.truncate(p / "model.safetensors", 100),
            r"model\.safetensors is 100 bytes, its manifest says \d",
        ),
        (
            lambda p: flip_byte(p / "state.json", 3),
            r"state\.json has sha256 [0-9a-f]{16}\.\.\., its manifest says",
        ),
        (lambda p: (p / "manifest.json").write_text('{"a'), r"manifest\.json is not readable as JSON"),
        (lambda p: (p / "manifest.json").write_text("{}"), r"lists no config\.json"),
        (lambda p: (p / "manifest.json").write_text('{"../x": {}}'), r"bad entry for '\.\./x'"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_serves(damage, message, tmp_path):
    first = save_checkpoint(tmp_path, 1, small_model(1), None, {"val_loss": 3.0})
    second = save_checkpoint(tmp_path, 2, small_model(2), None, {"val_loss": 2.0})
    assert latest_checkpoint(tmp_path) == second
    damage(second)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify_checkpoint(second)
    assert str(second) in str(caught.value)
    with pytest.warns(UserWarning, match=r"skipped broken checkpoint step-00000002: .*" + message):
        assert latest_checkpoint(tmp_path) == first
    lines: list[str] = []
    assert latest_checkpoint(tmp_path, lines.append) == first
    assert len(lines) == 1
    assert best_checkpoint(tmp_path) == first
    with pytest.warns(UserWarning, match="skipped broken checkpoint step-00000002"):
        model, _ = load_model(tmp_path)
    assert same_bits(model.state_dict(), small_model(1).state_dict())


def test_a_run_without_an_intact_checkpoint_says_so(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, 1, small_model(), None, {})
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no intact checkpoint\n.*step-00000001: .*config\.json is missing"):
        load_model(tmp_path)


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    model = net()
    losses = [3.0, 1.5, float("nan"), 1.5, 2.0, 2.5, float("inf"), 2.2]
    for step, loss in enumerate(losses):
        save_checkpoint(tmp_path, step, model, None, {"val_loss": loss}, keep_last=2)
    assert steps(tmp_path) == [3, 6, 7]
    assert best_checkpoint(tmp_path).name == "step-00000003"
    save_checkpoint(tmp_path, 8, model, None, {}, keep_last=1, best=6)
    assert steps(tmp_path) == [6, 8]


def test_broken_checkpoints_do_not_count_as_kept(tmp_path):
    model = net()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, None, {}, keep_last=3)
    flip_byte(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    save_checkpoint(tmp_path, 4, model, None, {}, keep_last=2)
    assert steps(tmp_path) == [2, 3, 4]
    save_checkpoint(tmp_path, 5, model, None, {}, keep_last=2)
    assert steps(tmp_path) == [4, 5]


def test_a_run_taken_back_keeps_what_it_just_wrote(tmp_path):
    for step in (10, 20, 5):
        save_checkpoint(tmp_path, step, net(), None, {}, keep_last=1)
    assert steps(tmp_path) == [5, 20]


def test_a_step_saved_again_replaces_the_broken_one(tmp_path):
    path = save_checkpoint(tmp_path, 1, net(1), None, {})
    flip_byte(path / "model.safetensors")
    save_checkpoint(tmp_path, 1, net(2), None, {})
    restored = net(3)
    load_checkpoint(path, restored)
    assert same_bits(restored.state_dict(), net(2).state_dict())


def test_wrapped_models_are_saved_under_their_own_names(tmp_path):
    model = net()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    optimizer = adamw(wrapped)
    train(model, optimizer, range(2))
    path = save_checkpoint(tmp_path, 1, wrapped, optimizer, {})
    plain = net(4)
    plain_optimizer = adamw(plain)
    load_checkpoint(path, plain, plain_optimizer)
    assert same_bits(plain.state_dict(), model.state_dict())
    assert same_bits(plain_optimizer.state[plain[0].weight], optimizer.state[model[0].weight])
