"""The loss of a batch of which only some positions have a target."""

from __future__ import annotations

import pytest
import torch

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.model import IGNORE

SHAPE = dict(vocab_size=64, n_embd=32, block_size=16, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=3)


@pytest.fixture
def batch():
    """A model, ids, targets of which a quarter count, and lengths."""
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    ids = torch.randint(0, 64, (4, 12))
    targets = torch.randint(0, 64, (4, 12)).masked_fill(torch.rand(4, 12) > 0.25, IGNORE)
    lengths = torch.tensor([12, 9, 12, 5])
    targets[torch.arange(12) >= lengths[:, None]] = IGNORE
    assert 4 < (targets != IGNORE).sum() < 24
    return model, ids, targets, lengths


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_decoding_only_the_rows_with_a_target_changes_neither_loss_nor_gradient(batch, reduction):
    model, ids, targets, lengths = batch
    rows = (targets.ravel() != IGNORE).nonzero()[:, 0]
    found = []
    for loss_rows in (None, rows):
        model.zero_grad()
        out = model(ids, targets, lengths, force_steps=2, reduction=reduction, z_loss=0.1, loss_rows=loss_rows)
        out.loss.backward()
        found.append((out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, gradients), (of_rows, gradients_of_rows) = found
    torch.testing.assert_close(of_rows, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_rows[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_sums_of_parts_divided_by_all_targets_are_the_mean_of_the_whole(batch):
    """A mean of means is not, where parts have unequal numbers of targets."""
    model, ids, targets, lengths = batch
    whole = model(ids, targets, lengths, force_steps=2).loss
    parts = [slice(0, 1), slice(1, 4)]
    sums = [model(ids[p], targets[p], lengths[p], force_steps=2, reduction="sum").loss for p in parts]
    means = [model(ids[p], targets[p], lengths[p], force_steps=2).loss for p in parts]
    torch.testing.assert_close(sum(sums) / (targets != IGNORE).sum(), whole, rtol=1e-6, atol=1e-6)
    assert abs(sum(means) / 2 - whole) > 1e-3


def test_an_unknown_reduction_is_refused(batch):
    model, ids, targets, lengths = batch
    with pytest.raises(ValueError, match="reduction 'none' is none of mean, sum"):
        model(ids, targets, lengths, reduction="none")
