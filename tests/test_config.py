"""HRMConfig: published and Hugging Face keys, and faults named all at once."""

from __future__ import annotations

import json

import pytest

from hrm_model import HRMConfig


def test_defaults_are_the_published_model():
    config = HRMConfig()
    assert (config.n_embd, config.head_dim, config.kv_heads, config.hidden) == (448, 56, 4, 1792)
    assert config.blocks_per_step == 24
    assert (config.halt_bias, config.halting, config.tie_embeddings, config.embed_scale) == (
        0.35,
        "published",
        True,
        1,
    )


def test_config_json_round_trip_keeps_every_field():
    config = HRMConfig(n_embd=64, n_head=2, n_kv_head=1, mlp_hidden=100, halt_bias=-0.5, dropout=0.25)
    assert HRMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_published_config_json_with_hugging_face_keys_is_accepted():
    published = {"model_type": "cosmicfish_hrm", "architectures": ["HRMCosmicFish"], "torch_dtype": "float32"}
    published |= {
        "vocab_size": 50304,
        "n_embd": 448,
        "hrm_exploration_prob": 0.05,
        "forward_dtype": "bfloat16",
    }
    published |= {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "tie_word_embeddings": True,
    }
    assert HRMConfig.from_dict(published) == HRMConfig(hrm_exploration_prob=0.05)


def test_unknown_key_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown configuration key 'n_embed'; did you mean 'n_embd'\?"):
        HRMConfig.from_dict({"n_embed": 448})


def test_another_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type 'llama'"):
        HRMConfig.from_dict({"model_type": "llama"})


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        HRMConfig(n_embd=450, n_head=8, n_kv_head=3, dropout=1.0, hrm_max_steps=0, eps=0.0, loss="hinge")
    text = str(error.value)
    assert "n_embd 450 is not divisible by n_head 8; nearest: 448, 456" in text
    assert "n_head 8 is not divisible by n_kv_head 3; use one of 1, 2, 4, 8" in text
    assert "dropout 1.0 is outside 0 <= dropout < 1" in text
    assert "hrm_max_steps 0 is below its minimum 1" in text
    assert "eps 0.0 is not positive" in text
    assert "loss 'hinge' is none of softmax" in text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_embd", 448.0, "n_embd 448.0 is not an integer"),
        ("n_head", True, "n_head True is not an integer"),
        ("bias", 1, "bias 1 is not true or false"),
        ("halt_bias", float("nan"), "halt_bias nan is not a finite number"),
        ("halt_bias", "high", "halt_bias 'high' is not a finite number"),
        ("mlp_hidden", 0, "mlp_hidden 0 is neither null"),
        ("n_head", 64, "n_embd / n_head = 7 is odd"),
        ("hrm_L_cycles", 0, "hrm_L_cycles 0 is below its minimum 1"),
        ("hrm_exploration_prob", 1.5, "outside 0..1"),
        ("forward_dtype", "int8", "forward_dtype 'int8' is none of"),
        ("halting", "magic", "halting 'magic' is none of"),
    ],
)
def test_impossible_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        HRMConfig(**{field: value})


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ValueError, match="no preset 'huge'; there are tiny, small, base"):
        HRMConfig.preset("huge")
