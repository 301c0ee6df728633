"""A model that grows is the model that it was: characters, logits, functions, optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from continual_helpers import character_model

from hrm_model import HRMConfig, load_model, save_model
from hrm_model.continual.growth import GrowthRule, grow, layer_parameters, rows_for
from hrm_model.continual.tokenizer import UNKNOWN, CharTokenizer
from hrm_model.output_head import log_stablemax_weight

# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_ids_of_old_characters_stay_when_it_grows():
    first = CharTokenizer().grown("hello")
    second = first.grown("jello, world").grown("hello")
    assert first.characters == UNKNOWN + "ehlo"
    assert second.characters == first.characters + " ,djrw"
    assert second.extends(first) and not first.extends(second)
    assert second.encode("hello") == first.encode("hello") and second.decode(second.encode("jello")) == "jello"


def test_unknown_characters_are_read_as_one_and_counted():
    tokenizer = CharTokenizer().grown("abc")
    assert tokenizer.encode("a\u00e9b\u00e9z") == [1, 0, 2, 0, 0]
    assert tokenizer.unknown == {"\u00e9": 2, "z": 1}
    assert tokenizer.decode([1, 0]) == "a" + UNKNOWN


def test_a_file_is_read_back_and_a_changed_one_refused(tmp_path):
    tokenizer = CharTokenizer().grown("a\u03b2\n\U0001f600")
    tokenizer.save(tmp_path / "t.json")
    assert CharTokenizer.load(tmp_path / "t.json").characters == tokenizer.characters
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    (tmp_path / "t.json").write_text(text.replace("\u03b2", "\u03b3"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"was changed.*hrm recover"):
        CharTokenizer.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(text.replace("\u03b2", "\\ud800"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged.*hrm recover"):
        CharTokenizer.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged.*hrm recover"):
        CharTokenizer.load(tmp_path / "t.json")


def test_bytes_of_characters_are_utf8():
    tokenizer = CharTokenizer().grown("a\u03b2\u20ac\U0001f600")
    assert tokenizer.token_bytes().tolist() == [3, 1, 2, 3, 4]


# -- vocabulary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ("softmax", "stablemax"))
@pytest.mark.parametrize("n_chars", (51, 64, 65, 128, 300))
def test_logits_of_old_characters_are_the_same_to_the_bit(loss, n_chars):
    model = character_model(50, loss=loss)
    grown = grow(model, n_chars)
    assert grown.config.vocab_size == rows_for(n_chars) and grown.config.n_chars == n_chars
    ids = torch.randint(0, 50, (5, 32), generator=torch.Generator().manual_seed(1))
    for rows in (ids, ids[:1], ids[:, :1]):
        before, after = model(rows).logits, grown(rows).logits
        assert torch.equal(before[..., :50], after[..., :50])
        assert after[..., 50:n_chars].isfinite().all() and (after[..., n_chars:] == -math.inf).all()


def test_old_rows_are_the_same_and_the_model_grown_from_is_left_alone():
    model = character_model(50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = grow(model, 200).state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(grown[name][tuple(slice(n) for n in value.shape)], value)


def test_spare_rows_are_never_drawn_and_never_trained():
    model = character_model(3).train()
    ids = torch.randint(0, 3, (4, 16), generator=torch.Generator().manual_seed(0))
    model(ids, ids).loss.backward()
    assert not model.lm_head.weight.grad[3:].any() and not model.wte.weight.grad[3:].any()
    out = model.eval().generate(ids[:, :2], 20, temperature=50.0, seed=1)
    assert out.max() < 3


def test_it_never_shrinks_and_words_pieces_do_not_grow():
    with pytest.raises(ValueError, match="49 characters are fewer than the 50"):
        grow(character_model(50), 49)
    with pytest.raises(ValueError, match="n_chars 70 is neither null"):
        HRMConfig.preset("characters", n_chars=70)


def test_the_loss_is_the_cross_entropy_of_the_characters_in_use():
    model = character_model(50)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids, return_logits=True)
    expected = torch.nn.functional.cross_entropy(out.logits[..., :50].reshape(-1, 50), ids.reshape(-1))
    torch.testing.assert_close(out.loss, expected)


def test_stablemax_is_the_softmax_of_its_logits():
    x = torch.tensor([3.0, -2.0, 0.0, -1e6, 1e6], dtype=torch.float64)
    s = torch.where(x >= 0, 1 + x, 1 / (1 - x))
    torch.testing.assert_close(log_stablemax_weight(x).softmax(-1), s / s.sum())


# -- layers ------------------------------------------------------------------------------------------------------------


def test_the_function_is_preserved_to_the_bit_when_layers_come():
    model = character_model(50, hrm_max_steps=4)
    grown = grow(model, L=2, H=1)
    assert len(grown.hrm_core.L_level.layers) == 3 and len(grown.hrm_core.H_level.layers) == 2
    assert grown.num_parameters() == model.num_parameters() + 3 * layer_parameters(model.config)
    ids = torch.randint(0, 50, (3, 32), generator=torch.Generator().manual_seed(1))
    for depth in (1, 3, None):
        before, after = model(ids, force_steps=depth), grown(ids, force_steps=depth)
        assert torch.equal(before.logits, after.logits) and torch.equal(before.q_logits, after.q_logits)


def test_a_layer_without_its_gate_would_change_the_function():
    """What the gate is for: zeroed branches alone leave the norms."""
    model = character_model(50)
    grown = grow(model, L=1)
    layer = grown.hrm_core.L_level.layers[-1]
    with torch.no_grad():
        layer.gate_a.fill_(1.0)
        layer.attn.c_proj.weight.zero_()
        layer.mlp.down.weight.zero_()
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(ids).logits, grown(ids).logits, atol=1e-3)


def test_the_gate_learns_first_and_then_the_layer():
    grown = grow(character_model(50), L=1).train()
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    layer = grown.hrm_core.L_level.layers[-1]
    grown(ids, ids).loss.backward()
    assert layer.gate_a.grad.abs() > 0 and not layer.mlp.up.weight.grad.any()
    with torch.no_grad():
        layer.gate_a.fill_(0.1)
    grown(ids, ids).loss.backward()
    assert layer.mlp.up.weight.grad.any()


def test_a_grown_model_is_saved_and_loaded(tmp_path):
    grown = grow(character_model(50), 70, L=1, H=1).eval()
    save_model(grown, tmp_path / "m")
    loaded, config = load_model(tmp_path / "m")
    ids = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(1))
    assert config == grown.config and torch.equal(loaded(ids).logits, grown(ids).logits)


def test_generation_over_the_cache_knows_grown_layers():
    grown = grow(character_model(50), L=1)
    with torch.no_grad():
        grown.hrm_core.L_level.layers[-1].gate_a.fill_(0.7)
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    cached, whole = (grown.generate(ids, 12, temperature=0, use_cache=c) for c in (True, False))
    assert torch.equal(cached, whole)


def test_the_rule_counts_parameters_truly():
    config = HRMConfig.preset("characters")
    each = layer_parameters(config)
    assert each == 4 * 256 * 256 + 3 * 256 * 640 + 2 * 256 + 1
    rule = GrowthRule()
    assert [rule.due(n, 0) for n in (0, 2_999_999, 3_000_000, 9_500_000)] == [0, 0, 1, 3] and rule.due(
        9_500_000, 3
    ) == 0
    plan = rule.plan(config, 1)
    assert (plan.L, plan.H, plan.parameters) == (1, 0, each), "at this width one layer is what a million holds"
    plan = GrowthRule(params=2_300_000).plan(config, 1)
    assert (plan.L, plan.H) == (2, 1) and 2.26e6 < plan.parameters < 2.27e6
    later = HRMConfig.preset("characters", hrm_L_layers=5, hrm_L_grown=2)
    assert rule.plan(later, 1).H == 1, "the third layer is H's"
    with pytest.raises(ValueError, match="growth-order 'LX'"):
        GrowthRule(order="LX")


# -- cycles chosen per call --------------------------------------------------------------------------------------------


def test_cycles_are_chosen_per_call_on_the_same_weights():
    model = character_model(50)
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    other = model.with_cycles(3, 1)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    alone = character_model(50, hrm_H_cycles=3, hrm_L_cycles=1)
    alone.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, alone(ids).logits)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="hrm_H_cycles 0"):
        model.with_cycles(0, 1)


def test_the_default_is_the_described_model():
    config = HRMConfig.preset("characters")
    assert (config.n_embd, config.n_head, config.hrm_L_layers, config.hrm_H_layers) == (256, 8, 3, 3)
    assert (config.hidden, config.embed_scale, config.hrm_max_steps) == (640, 16.0, 8)
    model = character_model(50, n_embd=64, n_head=4)
    assert model.config.init == "truncated"
