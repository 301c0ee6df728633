"""The controller over a frozen language model: what goes in, what comes out, what has a gradient."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from hybrid_models import FAMILIES, collator, hybrid, language_model, rows, tokenizer

from hrm_model.halting import head_loss
from hrm_model.hybrid import HybridConfig, HybridModel, LanguageModel, load_language_model
from hrm_model.hybrid.generate import answer_texts, generate
from hrm_model.hybrid.language_model import check_tokenizer
from hrm_model.hybrid.losses import token_losses
from hrm_model.hybrid.pooling import mean_and_last
from hrm_model.hybrid.tasks import Example
from hrm_model.hybrid.whitening import whiten
from hrm_model.sampling import Sampling

EXAMPLES = [Example("12+34=", "46", "t"), Example("7+8=", "15", "t"), Example("100+1=", "101", "t")]
GREEDY = Sampling(temperature=0)


# -- the language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injector", ["grb", "cab"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_closed_gates_the_logits_are_the_language_models_own_to_the_bit(family, injector):
    model = hybrid(family, injector=injector)
    ids, mask, prompts = rows()
    own = model.language.model(input_ids=ids, attention_mask=mask).logits
    assert not torch.equal(model(ids, mask, prompts), own), "open gates have to make a difference"
    model.shut_gates()
    assert torch.equal(model(ids, mask, prompts), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_before_the_final_norm(family):
    language = language_model(family)
    ids, mask, _ = rows()
    h = language.encode(ids, mask)
    seen = []
    handle = language.norm.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    language.model(input_ids=ids, attention_mask=mask)
    handle.remove()
    assert torch.equal(h, seen[0][0]) and not torch.allclose(h, seen[0][1], atol=0.1)


def test_models_of_another_build_are_refused():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"no final norm and head found in Strange \(it has encoder, head\).*Llama"):
        LanguageModel(Strange())


def test_models_that_do_more_to_their_logits_are_refused():
    made = FAMILIES["Llama"]()

    class Capped(type(made)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 5 * (out.logits / 5).tanh()
            return out

    made.__class__ = Capped
    with pytest.raises(ValueError, match="Capped does more to its logits"):
        LanguageModel(made)


def test_a_tokenizer_needs_an_end_and_a_padding_token():
    check_tokenizer(tokenizer())
    with pytest.raises(ValueError, match="no end-of-text token"):
        check_tokenizer(tokenizer(eos=False))
    with pytest.raises(ValueError, match="--pad-token '<eos>'"):
        check_tokenizer(tokenizer(pad=False))


def test_a_model_that_is_not_there_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the directory is damaged or of another kind"):
        load_language_model(str(tmp_path), torch.device("cpu"))


# -- pooling -----------------------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_and_the_last_state_of_the_prompt_alone():
    h = torch.randn(3, 7, 4)
    prompt = torch.zeros(3, 7, dtype=torch.bool)
    prompt[0, :3] = prompt[1, 2:7] = prompt[2, 6:] = True  # padded right, left, and one token
    mean, last = mean_and_last(h, prompt)
    for row, (begin, end) in enumerate([(0, 3), (2, 7), (6, 7)]):
        torch.testing.assert_close(mean[row], h[row, begin:end].mean(0))
        assert torch.equal(last[row], h[row, end - 1])
    h[~prompt] = float("nan")
    assert all(map(torch.equal, mean_and_last(h, prompt), (mean, last)))
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        mean_and_last(h, torch.tensor([[True] * 7, [False] * 7, [True] * 7]))


def test_the_controller_sees_neither_answer_nor_padding():
    model = hybrid()
    ids, mask, prompts = rows()
    x = model.pool(model.language.encode(ids, mask), prompts)
    other = torch.where(prompts, ids, 5)
    torch.testing.assert_close(model.pool(model.language.encode(other, mask), prompts), x)


def test_a_whitened_map_keeps_what_tells_vectors_apart():
    linear = nn.Linear(8, 16)
    torch.manual_seed(0)
    common = torch.randn(8) * 100
    sample = common + torch.randn(400, 3) * torch.tensor([1.0, 0.1, 0.01]) @ torch.randn(3, 8)  # three directions
    whiten(linear, sample)
    y = linear(sample).detach()
    assert y.mean(0).abs().max() < 2e-2 and y.pow(2).mean().item() == pytest.approx(1, abs=1e-2)
    s = torch.linalg.svdvals(y)
    assert (s[:3] / s[0] > 0.97).all() and s[3] / s[0] < 1e-2, "each direction counts as much as the others"
    half, narrow = nn.Linear(8, 16), nn.Linear(8, 2)
    whiten(half, sample, power=0.5)
    s = torch.linalg.svdvals(half(sample).detach())
    spread = torch.linalg.svdvals((sample - sample.mean(0)).double())[:3].sqrt()
    torch.testing.assert_close(s[:3] / s[0], (spread / spread[0]).float(), rtol=2e-2, atol=0)
    whiten(narrow, sample, power=0.5)
    y = narrow(sample).detach()
    assert y.pow(2).mean().item() == pytest.approx(1, abs=1e-2), "fewer outputs than directions: the strongest"
    s = torch.linalg.svdvals(y)
    torch.testing.assert_close(s / s[0], (spread[:2] / spread[0]).float(), rtol=2e-2, atol=0)
    before = linear.weight.clone()
    whiten(linear, common.expand(9, 8))
    assert torch.equal(linear.weight, before), "there is nothing to tell apart"


def test_pooling_and_injector_are_fitted_to_examples():
    model, batch = hybrid(injector="cab"), collator()(EXAMPLES)
    h = model.language.encode(batch.ids, batch.mask)
    model.fit([batch, batch])
    x = model.pool(h, batch.prompt)
    assert x.mean(0).abs().max() < 1e-2 and x.pow(2).mean().item() == pytest.approx(1, rel=1e-2)
    states = torch.cat([h[row, n - 1 : m - 1] for row, (n, m) in enumerate(zip((6, 4, 6), (9, 7, 10), strict=True))])
    sizes = states.pow(2).mean(-1).sqrt()
    assert model.injector.size.item() == pytest.approx(sizes.median().item())
    queries = model.injector.query(states / sizes[:, None]).detach()
    assert queries.mean(0).abs().max() < 1e-2 and queries.pow(2).mean().item() == pytest.approx(1, rel=2e-2)
    assert "injector.size" in model.state_dict(), "a checkpoint has it"


# -- the loop ----------------------------------------------------------------------------------------------------------


def reference_segment(core, x, z_H, z_L, inner_T):
    """A segment written out: all L micro-steps but the last without gradient, then H."""
    with torch.no_grad():
        for _ in range(inner_T - 1):
            z_L = core.L_level(z_L, z_H + x, None, None)
    z_L = core.L_level(z_L, z_H + x, None, None)
    return core.H_level(z_H, z_L, None, None), z_L


@pytest.mark.parametrize("inner_T", [1, 3])
def test_a_segment_has_the_gradient_of_its_last_micro_step(inner_T):
    model = hybrid(inner_T=inner_T)
    core, x = model.controller.hrm_core, torch.randn(3, 1, 16, requires_grad=True)
    z_H, z_L = core.initial_state(x)
    found, wanted = model.controller.segment(x, z_H, z_L), reference_segment(core, x, z_H, z_L, inner_T)
    parameters = [x, *core.L_level.parameters(), *core.H_level.parameters()]
    gradients = [torch.autograd.grad(sum(t.pow(3).sum() for t in pair), parameters) for pair in (found, wanted)]
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, *gradients))


def test_z_H_leaves_through_an_rms_norm():
    model = hybrid()
    weight = model.controller.hrm_core.H_level.layers[-1].ln_2.weight
    for z_H in model.controller.segments(torch.randn(4, 1, 16), 3):
        torch.testing.assert_close((z_H / weight).pow(2).mean(-1), torch.ones(4, 1), atol=1e-3, rtol=0)


def test_learning_supervises_every_segment_with_the_state_detached_between():
    model = hybrid(injector="cab", segments=3)
    batch = collator()(EXAMPLES)
    found = model.learn(batch, 0.1)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    h = model.language.encode(batch.ids, batch.mask)
    total = 0
    z_H, z_L = model.controller.hrm_core.initial_state(torch.empty(3, 1, 16))
    losses = []
    for _ in range(3):
        x = model.pool(h, batch.prompt)
        z_H, z_L = reference_segment(model.controller.hrm_core, x, z_H, z_L, 3)
        logits = model.injected_logits(h, z_H)  # at every position, and the labels as a hub has them
        wanted = batch.labels[:, 1:].flatten()
        losses.append(
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
        )
        total = total + losses[-1] * 0.1 / 3
        z_H, z_L = z_H.detach(), z_L.detach()
    total.backward()
    assert found.loss == pytest.approx(total.item(), rel=1e-5)
    assert found.segment_losses == pytest.approx([0.1 * loss.item() for loss in losses], rel=1e-5)
    assert "vocabulary_bias.gate.raw" in got and "injector.make_tokens.weight" in got
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_while_the_injector_learns_alone_the_controller_has_no_gradient():
    model, batch = hybrid(injector="cab"), collator()(EXAMPLES)
    losses = model.learn(batch, 0.1).segment_losses
    alone = {name: p.grad for name, p in model.named_parameters() if not name.startswith("controller")}
    model.zero_grad()
    assert model.learn(batch, 0.1, controller=False).segment_losses == pytest.approx(losses)
    for name, p in model.named_parameters():
        if name.startswith("controller"):
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, alone[name], msg=name)


@pytest.mark.parametrize("injector", ["grb", "cab"])
def test_no_gradient_reaches_the_language_model(injector):
    model = hybrid(injector=injector)
    before = {name: p.clone() for name, p in model.language.model.named_parameters()}
    model.train()
    assert not model.language.model.training, "its dropout stays off"
    model.learn(collator()(EXAMPLES), 1.0)
    assert all(p.grad is None for p in model.language.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.language.model.named_parameters())
    assert not any("language" in name for name in model.state_dict())


class Peak:
    """Most bytes that autograd held at a time, by hooks on what it saves."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    def pack(self, tensor):
        class Held(list):
            pass

        held, size = Held([tensor]), tensor.nbytes
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.free, size)
        return held

    def free(self, size):
        self.now -= size


def test_memory_does_not_grow_with_segments():
    batch = collator()(EXAMPLES)

    def of(segments, learn):
        model = hybrid(segments=segments)
        with Peak() as peak:
            learn(model)
        return peak.most

    few, many = (of(n, lambda model: model.learn(batch, 1.0)) for n in (2, 12))
    assert few == many > 0

    def at_the_end(model):  # the same losses, but all graphs kept until one backward pass
        h = model.language.encode(batch.ids, batch.mask)
        segments = model.controller.segments(model.pool(h, batch.prompt), model.config.segments)
        sum(model.injected_logits(h, z_H).sum() for z_H in segments).backward()

    few, many = (of(n, at_the_end) for n in (2, 12))
    assert many > 4 * few, "the measure sees growth where there is some"


# -- halting -----------------------------------------------------------------------------------------------------------


def test_each_row_halts_for_itself_and_its_state_never_changes_again():
    model = hybrid(use_act=True, segments=6)
    torch.manual_seed(1)
    x = torch.randn(40, 1, 16) * 3
    q = []
    states = list(model.controller.segments(x, 6))
    q = torch.stack([model.controller.hrm_core.q_values(z_H, 0.0, None)[0] for z_H in states], 1)
    with torch.no_grad():  # around the middle of what the rows say, so that they differ
        model.controller.hrm_core.q_head.bias[1] += (q[..., 0] - q[..., 1]).quantile(0.7)
    thought = model.think(x)
    assert len(set(thought.segments.tolist())) > 2, thought.segments
    for row, n in enumerate(thought.segments.tolist()):
        torch.testing.assert_close(thought.z_H[row], states[n - 1][row])
        alone = model.think(x[row : row + 1])
        assert alone.segments.tolist() == [n]
    assert model.think(x, decide=False).segments.tolist() == [6] * 40
    assert model.think(x, 9, decide=False).segments.tolist() == [9] * 40, "longer than in training"


def test_the_head_learns_from_every_segment_of_every_row():
    model = hybrid(use_act=True)
    batch = collator()(EXAMPLES)
    exits = model.learn(batch, 1.0).exits
    losses, q = model.row_losses(batch, 3)
    torch.testing.assert_close(exits.losses[:, 0], losses)
    head = model.controller.hrm_core.q_head
    torch.testing.assert_close(nn.functional.linear(exits.means[:, 0], head.weight, head.bias), q)
    assert head.weight.grad is None, "its gradient comes by its own way"

    from hrm_model.halting import Price
    from hrm_model.training.head import HeadTraining

    training = HeadTraining(model.controller, "policy", Price(0.05), "row")
    training.add_exits(exits)
    step = training.finish(0.0)
    w = head.weight.detach().clone().requires_grad_()
    total, norm = head_loss("policy", losses, exits.means[:, 0] @ w.T + head.bias.detach(), torch.ones(3), 0.05)
    torch.testing.assert_close(head.weight.grad, torch.autograd.grad(total / norm, w)[0])
    assert step.loss == pytest.approx((total / norm).item())


# -- injectors and losses ----------------------------------------------------------------------------------------------


def test_grb_gives_every_position_the_same_and_cab_does_not():
    h, z_H = torch.randn(2, 5, 32), torch.randn(2, 1, 16)
    for injector, same in (("grb", True), ("cab", False)):
        part = hybrid(injector=injector).injector
        added = part(h, part.memory(z_H)) - h
        assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-5) == same
        assert not torch.allclose(added[0], added[1], atol=1e-2), "another z_H is another injection"


def test_cab_is_attention_over_its_memory_tokens():
    part = hybrid(injector="cab", memory_tokens=3).injector
    h, z_H = torch.randn(2, 5, 32), torch.randn(2, 1, 16)
    tokens = part.make_tokens(z_H).view(2, 3, 32)
    k, v = (tokens @ w.T for w in part.key_value.weight.chunk(2))
    q = (h * h.pow(2).mean(-1, keepdim=True).add(torch.finfo().eps).rsqrt()) @ part.query.weight.T + part.query.bias
    weights = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1)
    wanted = h + 0.5 * (weights @ v) @ part.out.weight.T  # sigmoid(0) = 0.5; one head, as 32 channels have
    torch.testing.assert_close(part(h, part.memory(z_H)), wanted, rtol=1e-4, atol=1e-4)


def test_the_vocabulary_bias_starts_at_its_gate_and_can_be_left_out():
    model = hybrid()
    assert model.vocabulary_bias.gate().item() == pytest.approx(0.1192, abs=1e-4)
    h, z_H = torch.randn(2, 5, 32), torch.randn(2, 1, 16)
    bias = torch.sigmoid(torch.tensor(-2.0)) * z_H @ model.vocabulary_bias.project.weight.T
    own = model.language.logits(model.injector(h, model.injector.memory(z_H)))
    torch.testing.assert_close(model.injected_logits(h, z_H), own + bias)
    assert not any("vocabulary" in name for name in hybrid(logit_bias_head=False).state_dict())


def test_stablemax_is_its_formula_and_keeps_a_gradient_where_softmax_has_none():
    logits, targets = torch.randn(6, 9, dtype=torch.float64) * 5, torch.arange(6)
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    wanted = -(s / s.sum(-1, keepdim=True)).log().gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_losses(logits, targets, "stablemax"), wanted)
    far = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    gradients = [
        torch.autograd.grad(token_losses(far, torch.tensor([0]), kind).sum(), far)[0]
        for kind in ("softmax", "stablemax")
    ]
    assert gradients[0].abs().max() == 0 and gradients[1].abs().max() > 1e-5


# -- answers -----------------------------------------------------------------------------------------------------------


def recomputed(model, ids: list[int], n_new: int, segments: int) -> list[int]:
    """Greedy tokens without a cache, one row, every token from a pass over all."""
    n_prompt = len(ids)
    for _ in range(n_new):
        row = torch.tensor([ids])
        prompt = torch.arange(len(ids))[None] < n_prompt
        token = model(row, torch.ones_like(row), prompt, segments)[0, -1].argmax().item()
        if token == 0:
            break
        ids = [*ids, token]
    return ids[n_prompt:]


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "GPT2"])
@pytest.mark.parametrize("injector", ["grb", "cab"])
def test_answers_over_the_cache_are_those_of_whole_passes(family, injector):
    model, make = hybrid(family, injector=injector), collator()
    prompts = [e.prompt for e in EXAMPLES]
    ids, mask = make.prompts(prompts)
    calls = []
    handle = model.language.base.register_forward_pre_hook(
        lambda module, args, options: calls.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    for segments in (3, 5):
        calls.clear()
        found = generate(model, ids, mask, 8, 0, segments=segments)
        assert calls[0] == ids.shape[1] and set(calls[1:]) == {1}, "the prompt is encoded once"
        assert found.ids == [recomputed(model, make.prompt_ids(p), 8, segments) for p in prompts]
        assert found.segments == [segments] * 3
    handle.remove()


def test_with_closed_gates_answers_are_the_language_models():
    model, make = hybrid(), collator()
    model.shut_gates()
    ids, mask = make.prompts([e.prompt for e in EXAMPLES])
    own = model.language.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    found = generate(model, ids, mask, 8, 0).ids
    for row, tokens in zip(found, own.tolist(), strict=True):
        assert row == (tokens[: tokens.index(0)] if 0 in tokens else tokens)


def test_an_answer_ends_at_the_end_of_text():
    model, make = hybrid(), collator()
    ids, mask = make.prompts([e.prompt for e in EXAMPLES])
    free = generate(model, ids, mask, 8, -1).ids
    end = free[0][2]
    found = generate(model, ids, mask, 8, end)
    for row, tokens in enumerate(free):
        stop = tokens.index(end) if end in tokens else len(tokens)
        assert found.ids[row] == tokens[:stop] and found.ended[row] == (end in tokens)


def test_drawn_answers_are_a_function_of_seed_and_row():
    model, make = hybrid(), collator()
    prompts, sampling = [e.prompt for e in EXAMPLES], Sampling(temperature=1.0)
    together = answer_texts(model, make, prompts, 8, sampling=sampling, seed=3)
    apart = answer_texts(model, make, prompts, 8, batch_size=1, sampling=sampling, seed=3)
    assert together == apart
    assert together != answer_texts(model, make, prompts, 8, sampling=sampling, seed=4)


def test_exchanged_thoughts_answer_another_prompt():
    model, make = hybrid(), collator()
    prompts = [e.prompt for e in EXAMPLES]
    own, exchanged = (answer_texts(model, make, prompts, 8, shuffle=s, sampling=GREEDY)[0] for s in (False, True))
    assert own != exchanged
    with pytest.raises(ValueError, match="at least 2 prompts"):
        answer_texts(model, make, prompts[:1], 8, shuffle=True)


def test_prompts_that_do_not_fit_or_are_empty():
    model, make = hybrid(), collator()
    ids, mask = make.prompts(["1+1=" * 15])
    with pytest.raises(ValueError, match=r"60 tokens and 8 new ones are over .* 64; .* max_new_tokens to 4"):
        generate(model, ids, mask, 8, 0)
    with pytest.raises(ValueError, match="row 0 has an empty prompt"):
        generate(model, ids, torch.zeros_like(mask), 4, 0)
    with pytest.raises(ValueError, match="64 tokens does not fit"):
        make.prompts(["1+1=" * 16])
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="is empty"):
            make.prompts([empty])
    with pytest.raises(ValueError, match="window of 64"):
        make([Example("1+1=" * 15, "12345", "t")])


# -- configurations, checkpoints, adapters -----------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_seed_and_faults_are_named_together():
    config = HybridConfig()
    assert (config.d_h, config.h_layers, config.l_layers, config.n_heads) == (512, 4, 4, 8)
    assert (config.inner_T, config.segments, config.logit_bias_init, config.vocab_ignore_index) == (3, 3, -2.0, -100)
    core = config.core_config()
    assert (core.hrm_L_cycles, core.hrm_H_cycles, core.hrm_max_steps) == (3, 1, 3)
    with pytest.raises(ValueError) as error:
        HybridConfig(d_h=10, n_heads=4, segments=0, injector="magic", loss="hinge", dropout=2)
    for part in ("d_h 10 is not divisible", "segments 0", "'magic'", "'hinge'", "dropout 2"):
        assert part in str(error.value)
    assert HybridConfig.from_dict(config.to_dict()) == config


def test_a_controller_of_another_language_model_or_width_is_refused():
    made = hybrid()
    with pytest.raises(ValueError, match=r"made for another language model:\n  digest"):
        HybridModel(language_model(seed=1), made.config)
    with pytest.raises(ValueError, match=r"family: 'llama', here 'gpt2'"):
        HybridModel(language_model("GPT2"), made.config)
    HybridModel(language_model(), made.config)  # its own


def test_the_digest_is_that_of_the_weights_in_either_precision():
    language = language_model()
    digest = language.digest()
    rounded = language.model.to(torch.bfloat16)
    assert language.digest() == digest and next(rounded.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        language.head.weight[3, 4] += 1
    assert language.digest() != digest


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_adapters_are_trained_with_the_controller_and_alone(family):
    pytest.importorskip("peft")
    batch = collator()(EXAMPLES)
    plain = hybrid(family, injector="cab")
    model = hybrid(family, injector="cab", lora_rank=2, lora_layers=1)
    names = set(model.adapters)
    assert names and all("/1/" in name for name in names), "of two layers the upper one"
    ids, mask, prompts = rows()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapters" not in name:
                p.copy_(plain.state_dict()[name])
    assert torch.equal(model(ids, mask, prompts), plain(ids, mask, prompts)), "at the start they do nothing"

    model.learn(batch, 0.1)
    grown = {name: p.grad.clone() for name, p in model.adapters.items()}
    assert any(g.abs().max() > 0 for g in grown.values())
    frozen = [p for name, p in model.language.model.named_parameters() if "lora_" not in name]
    assert all(p.grad is None for p in frozen)
    # segment by segment and one pass through the language model, against one graph of all
    model.zero_grad()
    h = model.language.encode(batch.ids, batch.mask)
    losses, x = 0, model.pool(h, batch.prompt)
    for z_H in model.controller.segments(x, 3):
        logits = model.injected_logits(h, z_H)[:, :-1].flatten(0, 1)
        losses = losses + nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum") * 0.1 / 3
    losses.backward()
    for name, p in model.adapters.items():
        torch.testing.assert_close(grown[name], p.grad, rtol=1e-4, atol=1e-6)

    alone = hybrid(family, injector="none", lora_rank=2, lora_layers=0)
    assert {name.split(".")[0] for name in alone.state_dict()} == {"adapters"}
    assert alone.learn(batch, 0.1).loss > 0 and any(p.grad.abs().max() > 0 for p in alone.parameters())


def test_more_layers_with_adapters_than_there_are():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="lora_layers 3 is over the 2 layers"):
        hybrid(lora_rank=2, lora_layers=3)
