"""lm-evaluation-harness with our model: its arithmetic over our log-likelihoods, and ours beside its own model's."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from small_models import thinker

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model  # noqa: E402

from hrm_model import get_tokenizer, save_model  # noqa: E402
from hrm_model.cli import main  # noqa: E402
from hrm_model.evaluation import harness  # noqa: E402
from hrm_model.evaluation.hrm_scorer import HRMScorer  # noqa: E402
from hrm_model.prefixes import prefixes  # noqa: E402

ROWS = [
    {"goal": f"How do I open jar {i}?", "sol1": "twist the lid.", "sol2": "look at it for long", "label": i % 2}
    for i in range(6)
]


@pytest.fixture(scope="module")
def scorer() -> HRMScorer:
    model = thinker(3, torch.float32, vocab_size=50304, block_size=64)
    return HRMScorer(model, get_tokenizer(), "toy", rule="prefix")


@pytest.fixture(scope="module")
def place(scorer, tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    save_model(scorer.model, root / "toy")
    (root / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def asked(*arguments) -> list:
    return [SimpleNamespace(args=one) for one in arguments]


def test_the_model_is_registered_and_loads_a_checkpoint(place):
    model = get_model("hrm").create_from_arg_string(f"pretrained={place / 'toy'},device=cpu,halt_bias=0.5")
    assert isinstance(model, harness.HRMForHarness) and model.scorer.halt_bias == 0.5 and model.max_length == 64
    with pytest.raises(ValueError, match="model_args rows are unknown to hrm"):
        get_model("hrm").create_from_arg_string("pretrained=x,rows=1")
    with pytest.raises(ValueError, match="dtype 'auto' is none of float32, bfloat16"):
        get_model("hrm").create_from_arg_string(f"pretrained={place / 'toy'},dtype=auto")
    save_model(thinker(1, torch.float32), place / "no text")
    with pytest.raises(ValueError, match="vocab_size 61, and text needs GPT-2's 50257"):
        get_model("hrm")(pretrained=str(place / "no text"), device="cpu")


def test_log_likelihoods_are_those_of_each_row_read_by_prefix(scorer):
    pairs = [("The cat", " sat on it"), ("The cat", " sat"), ("", "One two"), ("The cat ", "ran"), ("The cat", " sat")]
    found = harness.HRMForHarness(scorer=scorer).loglikelihood(asked(*pairs), disable_tqdm=True)
    encode = scorer.tokenizer.encode
    for (context, choice), (logprob, _) in zip(pairs, found, strict=True):
        whole = encode(context + choice)
        n = len(encode(context.rstrip())) if context else 0
        nll = prefixes(scorer.model, torch.tensor([*([] if context else [50256]), *whole])).nll
        assert logprob == pytest.approx(-nll[-(len(whole) - n) :].sum().item(), abs=1e-4)


def test_rolling_and_generation_are_the_models_own(scorer):
    model = harness.HRMForHarness(scorer=scorer)
    text = "One, two, three and so on."
    nll = prefixes(scorer.model, torch.tensor([50256, *scorer.encode(text)])).nll
    assert model.loglikelihood_rolling(asked((text,)), disable_tqdm=True) == [
        pytest.approx(-nll.sum().item(), abs=1e-3)
    ]
    said = model.generate_until(asked(("One", {"until": ["\n"], "max_gen_toks": 5})), disable_tqdm=True)
    own = scorer.generate([scorer.encode("One")], 5, [])[0]
    assert said == [own.text.split("\n")[0]]


def test_lm_evals_scores_follow_from_our_log_likelihoods(scorer, place):
    """piqa there: "Question: ..\\nAnswer:", acc by the sum of log-probabilities, acc_norm by that over characters."""
    found = {row["metric"]: row for row in harness.evaluate(scorer, ["piqa"], {"piqa": place / "piqa.jsonl"})}
    right = {"acc": 0, "acc_norm": 0}
    for row in ROWS:
        context = f"Question: {row['goal']}\nAnswer:"
        sums = []
        for solution in (row["sol1"], row["sol2"]):
            ids = scorer.encode(f"{context} {solution}")
            n = len(scorer.encode(context))
            sums.append(-prefixes(scorer.model, torch.tensor(ids)).nll[n - 1 :].sum().item())
        by_length = [total / len(text) for total, text in zip(sums, (row["sol1"], row["sol2"]), strict=True)]
        right["acc"] += sums.index(max(sums)) == row["label"]
        right["acc_norm"] += by_length.index(max(by_length)) == row["label"]
    for metric, n in right.items():
        p = n / len(ROWS)
        assert found[metric]["value"] == pytest.approx(p)
        assert found[metric]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(ROWS) - 1)))


def test_our_scoring_of_a_hugging_face_model_is_lm_evals_own(tmp_path):
    """The same GPT-2 through the harness's own class and through ours: the same log-likelihoods."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)).eval()
    tokenizer = byte_tokenizer(transformers)
    for part in (gpt2, tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    from hrm_model.evaluation.hf_scorer import HFScorer

    ours = harness.ScorerLM(HFScorer(str(tmp_path / "gpt2")), 0)
    theirs = HFLM(pretrained=gpt2, tokenizer=tokenizer, device="cpu", batch_size=1)
    pairs = [("The cat", " sat on it"), ("The cat", " sat"), ("A", " b"), ("Some other context", " x y")]
    expected = theirs.loglikelihood(asked_with_idx(pairs), disable_tqdm=True)
    found = ours.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]


def asked_with_idx(pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def byte_tokenizer(transformers):
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **ends)


def test_the_command_runs_it(place, capsys):
    command = ["eval", str(place / "toy"), "--protocol", "lm-eval", "--tasks", "piqa"]
    assert main([*command, "--data", f"piqa={place / 'piqa.jsonl'}", "--limit", "4"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {row["metric"] for row in found["results"]} == {"acc", "acc_norm"} and found["protocol"] == "lm-eval"
