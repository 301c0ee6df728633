"""Optimizer groups, learning rate, FLOP counts, metrics: the parts of the training loop on their own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.training.flops import known_peak, training_flops
from hrm_model.training.metrics import MetricsLog
from hrm_model.training.optim import build_optimizer, clip_gradients, parameter_groups
from hrm_model.training.recipes import RECIPES, TrainConfig
from hrm_model.training.schedule import learning_rate, set_learning_rates

SHAPE = dict(vocab_size=64, n_embd=32, block_size=16, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=2)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=2, hrm_H_cycles=2, hrm_L_cycles=1, hrm_max_steps=4)


def test_optimizer_holds_every_parameter_once_and_decays_only_block_matrices():
    model = HRMForCausalLM(HRMConfig(**SHAPE, bias=True, use_rotary=False))
    decayed, plain, head = parameter_groups(model, 0.1)
    ids = [id(p) for group in (decayed, plain, head) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert plain["weight_decay"] == head["weight_decay"] == 0.0 and decayed["weight_decay"] == 0.1
    assert all(
        names[id(p)].endswith(("proj.weight", "gate.weight", "up.weight", "down.weight")) for p in decayed["params"]
    )
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "hrm_core.H_init"} <= {names[id(p)] for p in plain["params"]}
    assert [names[id(p)] for p in head["params"]] == ["hrm_core.q_head.weight", "hrm_core.q_head.bias"]


def test_the_head_has_a_learning_rate_of_its_own():
    """Adam's first step is as long as its learning rate."""
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = TrainConfig.of_recipe("tiny", weight_decay=0.0, lr=0.006, head_lr=0.14)
    optimizer = build_optimizer(model, run)
    set_learning_rates(optimizer, 0.003, run)  # half way down the schedule
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        rate = 0.07 if "q_head" in name else 0.003
        assert torch.allclose(before[name] - p, torch.full_like(p, rate), atol=1e-6), name


def test_a_head_without_a_loss_is_left_as_it_is():
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = build_optimizer(model, TrainConfig.of_recipe("tiny"))
    ids = torch.randint(0, 64, (2, 8))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids, force_steps=[2, 3]).loss.backward()
        optimizer.step()
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert same == {"hrm_core.q_head.weight", "hrm_core.q_head.bias", "hrm_core.H_init", "hrm_core.L_init"}


def test_learning_rate_warms_up_and_follows_the_cosine():
    run = TrainConfig.of_recipe("tiny", lr=1.0, min_lr=0.1, warmup=10, steps=110)
    assert learning_rate(0, run) == pytest.approx(0.1)
    assert learning_rate(9, run) == learning_rate(10, run) == pytest.approx(1.0)
    assert learning_rate(60, run) == pytest.approx(0.55)
    assert learning_rate(110, run) == pytest.approx(0.1)
    assert all(learning_rate(s, run) >= learning_rate(s + 1, run) for s in range(10, 110))


def test_clipping_counts_exactly_this_steps_gradients_and_leaves_the_heads_to_its_own_limit():
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    ids = torch.randint(0, 64, (2, 8))
    model(ids, ids, force_steps=1).loss.backward()
    head = list(model.hrm_core.q_head.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in head)]
    assert len(others) == len(list(model.parameters())) - 2
    for p in head:
        p.grad.fill_(7.0)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in others))
    assert clip_gradients(model, 0.01).item() == pytest.approx(norm, rel=1e-5)
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in others))
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert clip_gradients(model, 0).item() == pytest.approx(0.01, rel=1e-3)
    assert all((p.grad == 7.0).all() for p in head)


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("depths", [[1, 1], [4, 4], [1, 3]])
def test_flops_agree_with_torchs_counter(depths, swiglu):
    """Matrix products only, as counted while they run. The counter sees whole attention squares where we count the
    causal half."""
    config = HRMConfig(**SHAPE, use_swiglu=swiglu)
    model, ids = HRMForCausalLM(config), torch.randint(0, 64, (2, 16))
    with FlopCounterMode(display=False) as counter:
        out = model(ids, ids, force_steps=depths)
        out.loss.backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "attention" not in op)
    blocks = [
        config.n_input_layers + config.n_output_layers + config.blocks_per_step + config.blocks_per_step * (n - 1) / 3
        for n in depths
    ]
    causal_attention = sum(3 * b * 2 * 16 * config.n_embd * 16 for b in blocks)
    escaped = 2 * ids.numel() * config.n_embd * config.vocab_size  # the counter overlooks addmm_, the loss's dw
    found = training_flops(config, 16, 2, out.row_steps.tolist())
    # 1e-4 is the halting head's share, which is not counted
    assert found == pytest.approx(products + escaped + causal_attention, rel=1e-4)


def test_row_steps_are_those_that_ran():
    """Given depths run once each; a row that halts by decision is looked at once more, except at the last step."""
    model, ids = HRMForCausalLM(HRMConfig(**SHAPE)), torch.randint(0, 64, (3, 8))
    assert model(ids, ids, force_steps=[1, 2, 4]).row_steps.tolist() == [0 + 1 + 3, 3]
    assert model(ids, ids, halt_bias=1e9).row_steps.tolist() == [3, 3]
    assert model(ids, ids, halt_bias=-1e9).row_steps.tolist() == [9, 3]
    assert model(ids, ids, max_steps=2, halt_bias=-1e9).row_steps.tolist() == [3, 3]
    assert model(ids, ids, force_steps=[2, 2, 4], gradient="published").row_steps.tolist() == [1 + 1 + 3 + 2, 1]
    with torch.no_grad():
        assert model(ids, force_steps=[1, 2, 4]).row_steps.tolist() == [7, 0]


def test_an_unknown_device_has_no_peak():
    assert known_peak("NVIDIA H200") == known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    for name in ("NVIDIA RTX A1000", "NVIDIA A10G", "NVIDIA GeForce RTX 3060", "AMD Instinct MI300X"):
        assert known_peak(name) is None, name


def test_metrics_of_a_resumed_run_forget_what_comes_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write({"kind": "train", "step": step, "loss": math.nan if step == 2 else 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=3)
    log.write({"kind": "train", "step": 4})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4] == [r["step"] for r in log.records]
    assert lines[1]["loss"] is None, "JSON has no nan"


def test_recipes_are_complete_and_base_is_the_published_one():
    for name in RECIPES:
        run = TrainConfig.of_recipe(name)
        assert run.model_config().dropout == run.dropout
    base = TrainConfig.of_recipe("base")
    assert (base.batch_size, base.accumulation, base.steps, base.warmup) == (64, 2, 200_000, 2000)
    assert (base.lr, base.min_lr, base.beta1, base.beta2, base.weight_decay) == (3e-4, 3e-5, 0.9, 0.95, 0.1)
    assert HRMForCausalLM(base.model_config()).num_parameters() == 82_767_554
