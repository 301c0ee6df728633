"""The model with Hugging Face's interface has the numbers, the texts and the gradients of our own."""

from __future__ import annotations

import copy
import json

import golden_files
import pytest
import torch
from small_models import SHAPE, thinker

pytest.importorskip("transformers")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hrm_model import HRMConfig, load_model, save_model
from hrm_model.hf import CosmicFishHRMConfig, CosmicFishHRMForCausalLM, HRMGenerationCache
from hrm_model.hf.modeling import CACHE
from hrm_model.tensors import TIED

LEFT = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model whose depth moves, and the same from its folder through AutoModelForCausalLM; both in float64."""
    path = tmp_path_factory.mktemp("thinker") / "model"
    ours = thinker()
    save_model(ours, path)
    return ours, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def ids_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, n, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize("name", golden_files.NAMES)
def test_a_published_folder_gives_the_logits_of_load_model_exactly(name, tmp_path):
    golden = golden_files.load(name)
    save_model(golden.model(), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    ours, config = load_model(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs) is CosmicFishHRMForCausalLM and theirs.config.hrm() == config
    assert theirs.lm_head.weight is theirs.wte.weight and theirs.dtype == torch.float32 and not theirs.training
    ids = torch.randint(0, config.vocab_size, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(ids), theirs(input_ids=ids)
    assert found.logits.equal(expected.logits) and found.q_logits.equal(expected.q_logits)
    assert found.executed_steps.equal(expected.executed_steps) and found.steps_taken.equal(expected.steps_taken)


def test_a_folder_with_pytorch_model_bin_loads_in_both_interfaces(tmp_path):
    ours = thinker().float()
    save_model(ours, tmp_path / "model")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    torch.save(ours.state_dict(), folder / "pytorch_model.bin")
    ids = ids_of(2, 9)
    with torch.no_grad():
        expected = ours(ids).logits
        assert load_model(folder)[0](ids).logits.equal(expected)
        assert AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits.equal(expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_comes_back_in_both_interfaces(tied, dtype, tmp_path):
    config = CosmicFishHRMConfig(**SHAPE, tie_embeddings=tied)
    torch.manual_seed(0)
    model = CosmicFishHRMForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    ours, _ = load_model(tmp_path / "saved", dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor) and ours.state_dict()[name].equal(tensor), name
    assert again.dtype == dtype and json.loads((tmp_path / "saved/config.json").read_text())["tie_embeddings"] is tied
    assert (again.lm_head.weight is again.wte.weight) is tied
    assert AutoConfig.from_pretrained(tmp_path / "saved").hrm() == HRMConfig(**SHAPE, tie_embeddings=tied)


@pytest.mark.parametrize("dropped", TIED)
def test_one_key_of_a_tied_pair_serves_both(dropped, tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(thinker(dtype=torch.float32), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = weights.pop(dropped)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    if dropped == "wte.weight" and transformers.__version__ < "5":
        with pytest.raises(ValueError, match="which transformers 4 does not tie"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.wte.weight and model.wte.weight.equal(kept)


def test_new_models_start_as_ours_do():
    config = HRMConfig.preset("tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CosmicFishHRMConfig.of(config))
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "down.weight")):
            assert abs(p.std() / (0.02 / 8**0.5) - 1) < 0.05, name
        elif p.dim() > 1 or "_init" in name:
            assert abs(p.std() / 0.02 - 1) < 0.25, name
        else:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


def test_weights_that_a_file_lacks_are_new_and_the_others_stay(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(thinker(dtype=torch.float32), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lacking = ["hrm_core.H_init", "hrm_core.q_head.weight", "input_blocks.0.mlp.down.weight"]
    kept = {name: weight for name, weight in weights.items() if name not in lacking}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert set(told["missing_keys"]) == set(lacking)
    assert all(model.state_dict()[name].equal(weight) for name, weight in kept.items())
    assert all(0 < model.state_dict()[name].abs().max() < 0.2 for name in lacking)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(pair, side):
    ours, theirs = pair
    ids = ids_of(3, 5)
    holes = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 1], [1] * 5])
    mask = {"left": LEFT, "right": LEFT.flip(1), "holes": holes}[side]
    found = theirs(input_ids=ids, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        alone = ours(ids[row, real][None])
        torch.testing.assert_close(found.logits[row, real], alone.logits[0], rtol=0, atol=1e-12)
        assert found.executed_steps[row] == alone.executed_steps[0] and not found.logits[row, ~real].any()
        last = theirs(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits[row]
        assert last.equal(found.logits[row, -2:])


def test_greedy_text_is_that_of_our_own_generate_with_and_without_cache(pair):
    ours, theirs = pair
    ids = ids_of(2, 6, seed=4)
    expected = ours.generate(ids, 12, temperature=0, stop_tokens=None, details=True)
    found = greedy(theirs, ids, 12, return_dict_in_generate=True)
    assert found.sequences.equal(expected.ids) and greedy(theirs, ids, 12, use_cache=False).equal(expected.ids)
    assert found[CACHE].executed_steps == expected.executed_steps
    assert len({n for row in expected.executed_steps for n in row}) > 2, "depth must move, or nothing is shown"


def test_left_padded_rows_say_what_they_say_alone(pair):
    ours, theirs = pair
    ids = ids_of(3, 5)
    for cached in (True, False):
        found = greedy(theirs, ids, 6, attention_mask=LEFT, use_cache=cached)
        for row, real in enumerate(LEFT.bool()):
            alone = ours.generate(ids[row, real][None], 6, temperature=0, stop_tokens=None)
            assert found[row, 5:].tolist() == alone[0, int(real.sum()) :].tolist()


def test_a_text_beyond_the_window_goes_on_as_ours_does(pair):
    ours, theirs = pair
    block = SHAPE["block_size"]
    for n_prompt in (block - 4, block + 3):
        ids = ids_of(2, n_prompt)
        expected = ours.generate(ids, 8, temperature=0, stop_tokens=None)
        assert greedy(theirs, ids, 8).equal(expected) and greedy(theirs, ids, 8, use_cache=False).equal(expected)


@pytest.mark.parametrize(
    "options", [dict(force_steps=3), dict(max_steps=2), dict(halt_bias=0.5), dict(force_steps=7, max_steps=7)]
)
def test_depth_options_reach_generate_and_forward(pair, options):
    ours, theirs = pair
    ids = ids_of(2, 6)
    expected = ours.generate(ids, 8, temperature=0, stop_tokens=None, details=True, **options)
    found = greedy(theirs, ids, 8, return_dict_in_generate=True, **options)
    assert found.sequences.equal(expected.ids) and found[CACHE].executed_steps == expected.executed_steps
    assert theirs(input_ids=ids, **options).logits.equal(ours(ids, **options).logits)


def test_beam_search_with_a_cache_is_beam_search_without(pair):
    _, theirs = pair
    ids = ids_of(3, 5)
    for options in (dict(num_beams=4), dict(num_beams=3, num_return_sequences=2, length_penalty=0.0)):
        found = [greedy(theirs, ids, 6, attention_mask=LEFT, use_cache=c, **options) for c in (True, False)]
        assert found[0].equal(found[1])
    assert len(found[0].unique(dim=0)) == 6


def test_sampling_draws_the_same_with_and_without_a_cache(pair):
    _, theirs = pair
    texts = []
    for cached in (True, False):
        torch.manual_seed(0)
        texts.append(
            theirs.generate(ids_of(2, 5), max_new_tokens=10, do_sample=True, top_k=9, temperature=1.3, use_cache=cached,
                            num_return_sequences=3, eos_token_id=None, pad_token_id=0)
        )  # fmt: skip
    assert texts[0].equal(texts[1]) and len(texts[0].unique(dim=0)) > 2


def test_logits_over_a_cache_are_those_of_the_whole_row(pair):
    _, theirs = pair
    ids, mask = ids_of(3, 9), torch.cat((LEFT, torch.ones(3, 4, dtype=torch.long)), 1)
    first = theirs(input_ids=ids[:, :5], attention_mask=LEFT, use_cache=True)
    whole = theirs(input_ids=ids[:, :5], attention_mask=LEFT)
    torch.testing.assert_close(first.logits, whole.logits, rtol=0, atol=1e-12)
    assert first.executed_steps.equal(whole.executed_steps)
    then = theirs(input_ids=ids[:, 5:], attention_mask=mask, **{CACHE: first[CACHE]})
    whole = theirs(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(then.logits, whole.logits[:, 5:], rtol=0, atol=1e-12)
    assert then.executed_steps.equal(whole.executed_steps)


def test_a_cache_is_copied_cut_reordered_and_widened(pair):
    _, theirs = pair
    ids = ids_of(3, 8)
    cache = theirs(input_ids=ids[:, :5], attention_mask=LEFT, use_cache=True)[CACHE]
    kept = copy.deepcopy(cache)
    assert kept.model is cache.model and isinstance(kept, HRMGenerationCache)

    def next_logits(cache, ids, mask):
        return theirs(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits

    mask = torch.cat((LEFT, torch.ones(3, 3, dtype=torch.long)), 1)
    expected = theirs(input_ids=ids, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(next_logits(cache, ids[:, 5:], mask), expected, rtol=0, atol=1e-12)
    cache.crop(5)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(next_logits(cache, ids[:, 5:], mask), expected, rtol=0, atol=1e-12)
    order = torch.tensor([2, 2, 0])
    kept.reorder_cache(order)
    torch.testing.assert_close(next_logits(kept, ids[order, 5:], mask[order]), expected[order], rtol=0, atol=1e-12)
    kept.crop(-3)
    kept.batch_repeat_interleave(2)
    order = order.repeat_interleave(2)
    torch.testing.assert_close(next_logits(kept, ids[order, 5:], mask[order]), expected[order], rtol=0, atol=1e-12)


def test_generate_goes_on_from_a_cache(pair):
    _, theirs = pair
    ids = ids_of(2, 6)
    first = greedy(theirs, ids, 5, return_dict_in_generate=True)
    again = greedy(theirs, first.sequences, 5, **{CACHE: first[CACHE]})
    assert again.equal(greedy(theirs, ids, 10))


def test_loss_is_that_of_shifted_targets_and_gradients_are_ours(pair):
    ours, theirs = (copy.deepcopy(model).train() for model in pair)
    ids = ids_of(3, 5)
    labels = ids.masked_fill(LEFT == 0, -100)
    labels[1, 2] = -100
    out = theirs(input_ids=ids, attention_mask=LEFT, labels=labels, force_steps=2)
    right, targets = torch.zeros_like(ids), torch.full_like(ids, -1)
    lengths = LEFT.sum(1).tolist()
    for row, n in enumerate(lengths):
        right[row, :n] = ids[row, 5 - n :]
        targets[row, : n - 1] = labels[row, 5 - n + 1 :].masked_fill(labels[row, 5 - n + 1 :] == -100, -1)
    expected = ours(right, targets, lengths, force_steps=2)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-12)
    known = labels[:, 1:].masked_fill(LEFT[:, :-1] == 0, -100)  # nothing comes before a row's first token
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), known.flatten())
    torch.testing.assert_close(out.loss.double(), by_hand, rtol=0, atol=1e-6)
    n = int((targets >= 0).sum())
    summed = theirs(input_ids=ids, attention_mask=LEFT, labels=labels, force_steps=2, num_items_in_batch=2 * n)
    torch.testing.assert_close(summed.loss, out.loss / 2, rtol=1e-6, atol=0)
    out.loss.backward()
    expected.loss.backward()
    gradients = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-9, atol=1e-12, msg=name)
    assert theirs(input_ids=ids, labels=ids, skip_logits=True).logits is None


def test_gradient_checkpointing_gives_the_same_gradients(pair):
    model = copy.deepcopy(pair[1]).train()
    ids, gradients = ids_of(2, 6), []
    for on in (False, True):
        switch = "enable" if on else "disable"
        names = f"activation_checkpointing_{switch}", f"gradient_checkpointing_{switch}"  # since and before 5.2x
        getattr(model, next(name for name in names if hasattr(model, name)))()
        assert all(block.recompute is on for block in (*model.input_blocks, *model.hrm_core.H_level.layers))
        model.zero_grad()
        model(input_ids=ids, labels=ids, force_steps=2).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_trainer_fits_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = CosmicFishHRMForCausalLM(CosmicFishHRMConfig(**SHAPE | {"n_embd": 32}))
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(12)[None] * 7 + torch.arange(16)[:, None]) % 60]
    options = dict(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=12,
        learning_rate=1e-2, save_steps=12, logging_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 3.5 < losses[0] < 4.3 and losses[-1] < losses[0] - 1, losses
    saved, _ = load_model(tmp_path / "run" / "checkpoint-12")
    assert saved.wte.weight.equal(model.wte.weight.float().cpu())
    assert trainer.evaluate()["eval_loss"] < losses[0] - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(inputs_embeds=torch.zeros(1, 2, 16)), "input_ids are missing"),
        (lambda m: m(input_ids=torch.tensor([[3, 99]])), "token id 99 is outside 0..60"),
        (lambda m: m(input_ids=ids_of(1, 40)), "sequence of 40 tokens is over block_size 32"),
        (lambda m: m(input_ids=ids_of(2, 3), attention_mask=torch.ones(2, 4)), "attention_mask has shape"),
        (lambda m: m(input_ids=ids_of(2, 3), attention_mask=torch.tensor([[0] * 3, [1] * 3])), "without any token"),
        (lambda m: m(input_ids=ids_of(2, 3), labels=ids_of(2, 4)), "labels have shape"),
        (lambda m: m(input_ids=ids_of(1, 3), labels=torch.tensor([[1, -1, 2]])), "label is below 0; use -100"),
        (lambda m: m(input_ids=ids_of(1, 3), token_type_ids=ids_of(1, 3)), "token_type_ids has no meaning"),
        (lambda m: m(input_ids=ids_of(1, 3), output_hidden_states=True), "hidden states are not kept"),
        (lambda m: m(input_ids=ids_of(1, 3), force_steps=9), "force_steps 9 is outside 1..5"),
        (lambda m: m(input_ids=ids_of(1, 3), labels=ids_of(1, 3), use_cache=True), "labels need a pass without"),
        (lambda m: greedy(m, ids_of(1, 3), 2, cache_implementation="static"), "cache_implementation 'static'"),
        (lambda m: CosmicFishHRMConfig(n_embd=450), "n_embd 450 is not divisible by n_head 8"),
    ],
)  # fmt: skip
def test_bad_input_is_named(pair, call, message):
    with pytest.raises(ValueError, match=message):
        call(pair[1])


def test_assisted_generation_is_refused_by_transformers_itself(pair):
    with pytest.raises(ValueError, match="stateful"):
        greedy(pair[1], ids_of(1, 3), 3, assistant_model=copy.deepcopy(pair[1]))


def test_embeddings_can_be_resized(pair):
    model = copy.deepcopy(pair[1])
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model.lm_head.weight is model.wte.weight
    assert model(input_ids=torch.tensor([[65, 3]])).logits.shape == (1, 2, 70)
