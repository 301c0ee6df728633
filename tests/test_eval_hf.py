"""Models of Hugging Face through the same protocol: contexts shared or not, batches or not, the numbers are theirs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from hrm_model import save_model  # noqa: E402
from hrm_model.cli import main  # noqa: E402
from hrm_model.evaluation.hf_scorer import HFScorer  # noqa: E402
from hrm_model.evaluation.requests import Request  # noqa: E402

KINDS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=48),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
        max_position_embeddings=48, word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    ),
    "pythia": lambda: transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random models with a tokenizer of 258 bytes and marks, as folders."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(alphabet, 3)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    root = tmp_path_factory.mktemp("hf")
    for kind, config in KINDS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
        model.save_pretrained(root / kind)
        end = "</s>" if kind == "opt" else "<|endoftext|>"
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)
        fast.save_pretrained(root / kind)
    return root


def requests() -> list[Request]:
    draw = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return draw.integers(3, 258, draw.integers(1, most + 1)).tolist()

    return [Request(ids(40), [ids(12) for _ in range(draw.integers(1, 5))]) for _ in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_shared_contexts_give_the_numbers_of_each_row_alone(folders, kind):
    scorer = HFScorer(str(folders / kind), batch_tokens=400)
    found = scorer.score(requests())
    assert scorer._shares, "the model keeps keys and values and takes positions"
    for request, scores in zip(requests(), found, strict=True):
        for choice, score in zip(request.choices, scores, strict=True):
            context = request.context[max(0, len(request.context) + len(choice) - 48) :]
            with torch.no_grad():
                logits = scorer.model(torch.tensor([[*context, *choice]])).logits[0, len(context) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum().item()
            assert score.logprob == pytest.approx(expected, abs=2e-4)
            assert score.greedy == (logits.argmax(-1).tolist() == choice)


def test_a_model_that_cannot_share_is_read_row_by_row(folders):
    scorer = HFScorer(str(folders / "gpt2"))
    expected = scorer.score(requests())
    other = HFScorer(str(folders / "gpt2"))
    other._shares = False
    for a, b in zip(other.score(requests()), expected, strict=True):
        assert [x.logprob for x in a] == pytest.approx([y.logprob for y in b], abs=2e-4)


def test_the_check_of_sharing_reads_what_was_kept(folders, monkeypatch):
    """Choices of one token are predicted by the context alone; whether its keys can be used shows with longer ones."""
    scorer = HFScorer(str(folders / "gpt2"))
    cache = type(scorer.model(torch.tensor([[5]]), use_cache=True).past_key_values)
    monkeypatch.setattr(cache, "batch_select_indices", lambda self, indices: self.crop(0))
    asked = [Request([5, 6, 7], [[8], [9]]), Request([5, 6, 7], [[8, 9], [9, 8, 7]])]
    found = scorer.score(asked)
    assert not scorer._shares
    alone = HFScorer(str(folders / "gpt2"), batched=False).score(asked)
    for a, b in zip(found, alone, strict=True):
        assert [x.logprob for x in a] == pytest.approx([y.logprob for y in b], abs=2e-4)


def test_damaged_weights_are_an_error(folders):
    scorer = HFScorer(str(folders / "pythia"))
    with torch.no_grad():
        scorer.model.get_output_embeddings().weight[0] = float("nan")
    for ask in (
        lambda: scorer.score(requests()[:1]),
        lambda: scorer.rolling([5, 6]),
        lambda: scorer.generate([[5]], 2, ["\n"]),
    ):
        with pytest.raises(ValueError, match="not finite"):
            ask()


def test_what_a_folder_sets_for_generation_does_not_change_the_likeliest_token(folders):
    plain, other = HFScorer(str(folders / "gpt2")), HFScorer(str(folders / "gpt2"))
    other.model.generation_config.repetition_penalty = 9.0
    other.model.generation_config.no_repeat_ngram_size = 1
    found, expected = (scorer.generate([scorer.encode("aaaa")], 8, []) for scorer in (other, plain))
    assert list(found[0].tokens) == list(expected[0].tokens)


def test_a_newline_is_its_own_token_whatever_stands_before_it(folders):
    """As of Llama, whose tokenizer puts a mark of a space before a text."""
    scorer = HFScorer(str(folders / "gpt2"))
    mark, newline = scorer.encode(" ")[0], scorer.encode("\n")[0]
    scorer.encode = lambda text: [mark, newline]
    assert scorer._tokens_of("\n") == [newline]


def test_a_text_ends_at_a_newline_inside_a_token(folders):
    scorer = HFScorer(str(folders / "gpt2"))
    paris, lines, more = (scorer.encode(text) for text in (" Paris", ".\n\n", "Question"))
    scorer.model.generate = lambda input_ids, **_: SimpleNamespace(
        sequences=torch.cat((input_ids, torch.tensor([paris + lines + more])), 1),
        logits=[torch.zeros(1, len(scorer.tokenizer))] * len(paris + lines + more),
    )
    (said,) = scorer.generate([[5]], 9, ["\n"])
    assert said.text == " Paris." and list(said.tokens) == (paris + lines)[: len(said.tokens)]
    assert len(said.logprobs) == len(said.tokens) + 1 <= len(paris + lines)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_batches_is_that_of_each_prompt_alone(folders, kind):
    batched = HFScorer(str(folders / kind))
    alone = HFScorer(str(folders / kind), batched=False)
    prompts = [batched.encode(text) for text in ("Hello", "Question: who was it?\nAnswer:", "a b")]
    found, expected = (scorer.generate(prompts, 6, ["\n"]) for scorer in (batched, alone))
    for a, b in zip(found, expected, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-4)


def test_perplexity_is_the_models_own_loss(folders):
    scorer = HFScorer(str(folders / "pythia"))
    ids = scorer.encode("A short text.")
    with torch.no_grad():
        row = torch.tensor([[0, *ids]])
        expected = scorer.model(row, labels=row).loss.item()
    assert scorer.rolling(ids).losses.mean() == pytest.approx(expected, abs=1e-5)


def test_compare_puts_them_beside_ours(folders, tmp_path, capsys):
    from small_models import thinker

    save_model(thinker(3, torch.float32, vocab_size=50304, block_size=64), tmp_path / "toy")
    rows = [{"goal": f"open {i}", "sol1": "twist", "sol2": "look", "label": i % 2} for i in range(3)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(tmp_path / "toy"), "--tasks", "piqa,card", "--data", str(tmp_path)]
    assert main([*command, "--compare", ",".join(str(folders / kind) for kind in KINDS)]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert [(r["model"], r["task"]) for r in found] == [(m, t) for m in ("toy", *KINDS) for t in ("piqa", "card")]
    assert all((result["steps"] is None) == (result["model"] != "toy") for result in found)
