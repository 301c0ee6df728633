"""Continuations scored with their context shared, against each row run alone; generation, perplexity, `hrm eval`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import SHAPE, S, speaker, thinker

from hrm_kernels import Forest
from hrm_model import get_tokenizer, save_model
from hrm_model.cli import main
from hrm_model.commands.eval import biases_of
from hrm_model.evaluation.hrm_scorer import HRMScorer, _batches
from hrm_model.evaluation.perplexity import windows
from hrm_model.evaluation.requests import Request
from hrm_model.evaluation.results import evaluate
from hrm_model.evaluation.shared_context import Tree
from hrm_model.evaluation.tasks import TASKS
from hrm_model.evaluation.tasks.nq import example
from hrm_model.evaluation.tasks.task import Choices
from hrm_model.prefixes import prefixes

VARIANTS = {"published": {}, "learned positions": {"use_rotary": False}}
VARIANTS["no gqa, gelu, biases"] = {"use_gqa": False, "use_swiglu": False, "bias": True}


def requests(n: int, seed: int = 0) -> list[Request]:
    """Contexts of 1 to 20 ids, 1 to 4 choices of 1 to 13: some rows are longer than a window of 32."""
    draw = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return draw.integers(0, SHAPE["vocab_size"], draw.integers(1, most + 1)).tolist()

    return [Request(ids(24), [ids(13) for _ in range(draw.integers(1, 5))]) for _ in range(n)]


def same(found, expected, tolerance: float) -> None:
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) < tolerance
    for a, b in pairs:
        assert (a.n_tokens, a.greedy) == (b.n_tokens, b.greedy)
        assert a.steps == pytest.approx(b.steps) and a.published_steps == pytest.approx(b.published_steps)


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_batches_of_trees_give_the_numbers_of_each_row_alone(shape):
    model = thinker(1, **shape)
    asked = requests(16)
    found = HRMScorer(model, None, batch_tokens=150).score(asked)
    same(found, HRMScorer(model, None, batched=False).score(asked), 1e-9)
    steps = {score.steps for scores in found for score in scores}
    assert len(steps) > 1, "rows must stop at different steps, or this shows little"
    assert any(len({score.steps for score in scores}) > 1 for scores in found), "choices of one context too"
    assert any(len(r.context) + max(map(len, r.choices)) > SHAPE["block_size"] for r in asked), "contexts are cut"


def test_by_prefix_each_prediction_has_the_depth_of_what_precedes_it():
    model = thinker(1)
    asked = requests(4, seed=3)
    found = HRMScorer(model, None, rule="prefix", batch_tokens=150).score(asked)
    # alone: float32 log-probabilities, as prefixes() has them
    same(found, HRMScorer(model, None, rule="prefix", batched=False).score(asked), 1e-4)
    assert len({score.steps for scores in found for score in scores}) > 4


def test_by_prefix_a_choice_does_not_look_at_its_own_end():
    model = thinker(1)
    whole = HRMScorer(model, None, rule="prefix").score([Request([5, 6, 7], [[1, 2, 3, 4, 5], [1, 2, 3]])])[0]
    tail = prefixes(model, torch.tensor([5, 6, 7, 1, 2, 3, 4, 5]))
    assert whole[0].logprob == pytest.approx(-tail.nll[2:].sum().item(), abs=1e-4)
    assert whole[1].logprob == pytest.approx(-tail.nll[2:5].sum().item(), abs=1e-4)


@pytest.mark.parametrize("rule", ["row", "prefix"])
def test_a_requests_scores_do_not_depend_on_its_batch(rule):
    model = thinker(2)
    asked = requests(6, seed=1)
    scorer = HRMScorer(model, None, rule=rule)
    alone = [scorer.score([one])[0] for one in asked]
    same(scorer.score(asked), alone, 1e-9)
    same(list(reversed(scorer.score(list(reversed(asked))))), alone, 1e-9)


@pytest.mark.parametrize("option", [{"max_steps": 1}, {"max_steps": 2}, {"halt_bias": -math.inf}, {"halt_bias": 0.3}])
def test_limits_and_biases_mean_what_they_mean_for_a_row(option):
    model = thinker(1)
    asked = requests(5, seed=2)
    same(
        HRMScorer(model, None, **option).score(asked),
        HRMScorer(model, None, batched=False, **option).score(asked),
        1e-9,
    )
    if option.get("halt_bias") == -math.inf:
        assert {s.steps for scores in HRMScorer(model, None, **option).score(asked) for s in scores} == {S}


def test_small_trees_are_not_padded_to_a_large_one_by_the_thousand():
    jobs = [(number, Tree([1] * size, [[2]], "row"), [0]) for number, size in enumerate([*[9] * 300, 500, 100, 100])]
    batches = list(_batches(jobs, 1000))
    assert sorted(number for batch in batches for number, _, _ in batch) == list(range(303))
    for batch in batches:
        sizes = [len(tree.context) + 1 for _, tree, _ in batch]
        assert sum(sizes) <= 1000 and len(sizes) * max(sizes) <= 4000


def test_a_choice_too_long_for_the_window_is_named():
    with pytest.raises(ValueError, match=r"choice of 32 tokens leaves no room .* 32 at a time"):
        HRMScorer(thinker(1), None).score([Request([1, 2], [[1] * 32])])


def test_damaged_weights_are_an_error():
    model = thinker(1)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    for batched in (True, False):
        with pytest.raises(ValueError, match="not finite"):
            HRMScorer(model, None, batched=batched).score(requests(1))
    model = speaker([1, 2, 3])
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        HRMScorer(model, None).rolling([1, 2])


def test_of_equally_likely_tokens_the_first_is_the_greedy_one():
    model = speaker([3, 4])
    with torch.no_grad():
        model.lm_head.weight[7] = model.lm_head.weight[3]
    for batched in (True, False):
        found = HRMScorer(model, None, batched=batched).score([Request([1], [[3], [7]])])[0]
        assert [score.greedy for score in found] == [True, False] and found[0].logprob == found[1].logprob


@pytest.mark.parametrize("rule", ["row", "prefix"])
def test_several_biases_at_once_give_what_each_gives_alone(rule):
    model, biases = thinker(1), [2.0, -math.inf, 0.0, -0.5, 0.0]
    asked = requests(8, seed=4)
    scorer = HRMScorer(model, None, rule=rule, batch_tokens=150)
    found = scorer.score_at(biases, asked)
    for bias, of_bias in zip(biases, found, strict=True):
        same(of_bias, scorer.with_bias(bias).score(asked), 1e-9)
    means = [np.mean([score.steps for scores in of_bias for score in scores]) for of_bias in found]
    assert means[0] < means[2] < means[3] < means[1] == S


def test_a_forest_shows_each_token_its_stem_and_its_own_branch():
    forest = Forest.of([(2, [1, 2]), (1, [1])], torch.device("cpu"))
    assert forest.position.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert forest.seen[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert forest.seen[1, 0].sum(-1).tolist() == [1, 2, 1, 1, 1], "padding sees one token, so that nothing is nan"
    with pytest.raises(ValueError, match="empty part"):
        Forest.of([(1, [0])], torch.device("cpu"))


@pytest.fixture(scope="module")
def texts() -> HRMScorer:
    """A model over GPT-2's vocabulary whose depth moves."""
    return HRMScorer(thinker(3, torch.float32, vocab_size=50304, block_size=64), get_tokenizer(), "toy")


def test_generation_in_batches_is_that_of_each_prompt_alone(texts):
    alone = HRMScorer(texts.model, texts.tokenizer, batched=False)
    prompts = [texts.encode(text) for text in ("Question: who?\nAnswer:", "A", "One two three four five six")]
    found, expected = texts.generate(prompts, 12, ["\n"]), alone.generate(prompts, 12, ["\n"])
    for a, b in zip(found, expected, strict=True):
        assert (a.tokens, a.steps, a.published_steps) == (b.tokens, b.steps, b.published_steps)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert len({step for row in found for step in row.steps}) > 1
    assert any(a != b for row in found for a, b in zip(row.steps, row.published_steps, strict=True))


def test_an_answer_ends_before_a_newline():
    newline = get_tokenizer().encode("\n")[0]
    says = [*get_tokenizer().encode(" Paris"), newline, *get_tokenizer().encode(" more")]
    scorer = HRMScorer(speaker(says), get_tokenizer())
    found = scorer.generate([[1]], 3, ["\n"])[0]
    assert found.text == " Paris" and len(found.logprobs) == len(found.steps) == 2


@pytest.mark.parametrize("end", ["\n\n", " \n", "\n\n\n", ".\n", "\r\n"])
def test_an_answer_ends_at_the_first_newline_of_its_text_whatever_token_that_is_in(end):
    says = [*get_tokenizer().encode(" Paris"), *get_tokenizer().encode(end), *get_tokenizer().encode("Question: more")]
    rows = [example({"question": "Where?", "answer": ["Paris"]})]
    results = []
    for batched in (True, False):
        scorer = HRMScorer(speaker(says), get_tokenizer(), batched=batched)
        scorer.encode = lambda text, is_context=False: [1]  # its logits are a function of the position alone
        (said,) = scorer.generate([[1]], len(says), ["\n"])
        assert said.text.strip().rstrip(".") == "Paris" and len(said.logprobs) == len(said.tokens) + 1
        results.append((said.text, said.tokens, said.steps, evaluate(scorer, TASKS["nq"], rows).to_dict()["correct"]))
    assert results[0] == results[1] and results[0][-1] == 1


def test_scores_are_means_over_tokens_and_their_error_is_that_of_a_share():
    """The model says " b b b": a long choice of likely tokens wins over a short one by its mean."""
    b, filler = get_tokenizer().encode(" b")[0], get_tokenizer().encode("x")[0]
    scorer = HRMScorer(speaker([filler, b, b, b, b]), get_tokenizer())
    rows = [Choices("x x", ["b b", "q"], 0), Choices("x x", ["b b", "q"], 1), Choices("x x", ["q", "b b"], 1)]
    result = evaluate(scorer, TASKS["piqa"], rows).to_dict()
    assert (result["correct"], result["examples"]) == (2, 3)
    assert result["stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert sum(result["steps"]["histogram"]) == 6


def test_of_equal_choices_the_first_is_the_answer(texts):
    """Twice computed, they round apart."""
    second, fourth = (
        evaluate(
            texts, TASKS["arc_easy"], [Choices(f"Q {i}", ["a b c", " x y", f"z {i}", "x y"], label) for i in range(6)]
        )
        for label in (1, 3)
    )
    assert second.losses.tolist() == fourth.losses.tolist() and not fourth.right.any()
    assert len(second.steps.executed) == 24, "each choice is a row all the same"


def test_an_example_that_does_not_fit_is_named(texts):
    rows = [Choices("short", ["a", "b"], 0), Choices("a long one", ["b", "word " * 70], 0)]
    with pytest.raises(ValueError, match=r"toy, piqa: example 2, 'a long one': a choice of 7\d tokens .* 64 at a time"):
        evaluate(texts, TASKS["piqa"], rows)


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 1, 3, 4])
def test_windows_score_every_token_once(stride):
    ids = list(range(11))
    seen = []
    for read, n_new in windows(ids, 4, stride):
        assert 2 <= len(read) <= 5 and n_new <= len(read) - 1
        seen += read[-n_new:]
    assert seen == ids[1:]


def test_perplexity_is_that_of_a_row_read_by_prefix(texts):
    ids = texts.encode("The cat sat on the mat, and the dog sat on the cat.")
    rolled = texts.rolling(ids)
    told = prefixes(texts.model, torch.tensor([50256, *ids]))
    np.testing.assert_allclose(rolled.losses, told.nll.numpy(), atol=1e-4)
    assert rolled.steps.tolist() == told.executed[:-1].tolist()
    short = HRMScorer(texts.model, texts.tokenizer)
    short.max_length = 5
    assert len(short.rolling(ids, 2).losses) == len(ids)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(texts, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    save_model(texts.model, root / "toy")
    rows = [{"goal": f"open jar {i}", "sol1": "twist it", "sol2": "look away", "label": i % 2} for i in range(5)]
    (root / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_eval_prints_a_table_and_json_and_draws_a_sweep(place, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["eval", str(place / "toy"), "--tasks", "piqa,card", "--data", str(place), "--limit", "3"]
    command += ["--halt-bias", "-2:2:2", "--chart", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")]
    assert main(command) == 0
    found = report(capsys)
    assert found == json.loads((tmp_path / "c.json").read_text())
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    of_piqa = [result for result in found["results"] if result["task"] == "piqa"]
    assert [result["halt_bias"] for result in of_piqa] == [-2.0, 0.0, 2.0]
    means = [result["steps"]["mean"] for result in of_piqa]
    assert means == sorted(means, reverse=True) and means[0] > means[-1], "a higher bias halts earlier"
    assert main(command) == 1 and "already exists" in capsys.readouterr().err


def test_protocols_differ_in_who_decides(place, capsys):
    command = ["eval", str(place / "toy"), "--tasks", "piqa", "--data", f"piqa={place / 'piqa.jsonl'}"]
    means = {}
    for protocol in ("published", "causal"):
        assert main([*command, "--protocol", protocol]) == 0
        means[protocol] = report(capsys)["results"][0]["nats_per_token"]
    assert means["published"] != pytest.approx(means["causal"], rel=1e-6)


def test_text_gives_bits_a_byte(place, capsys, tmp_path):
    (tmp_path / "t.txt").write_text("Grüße, a short text of a few words. " * 8, encoding="utf-8")
    assert main(["eval", str(place / "toy"), "--text", str(tmp_path / "t.txt"), "--stride", "16"]) == 0
    found = report(capsys)["results"][0]
    n_bytes = len((tmp_path / "t.txt").read_bytes())
    expected = found["nats_per_token"] * found["tokens"] / math.log(2) / n_bytes
    assert found["bytes"] == n_bytes and found["bits_per_byte"] == pytest.approx(expected)
    assert sum(found["steps"]["histogram"]) == found["tokens"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "piqqa"], r"no task 'piqqa'; known are .* did you mean piqa\?"),
        (["--tasks", "piqa,nq", "--data", "{place}"], r"has no nq\.jsonl .*NQ-open\.dev\.jsonl of .*--data nq=FILE"),
        (["--tasks", "piqa", "--data", "piqa=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--tasks", "piqa", "--data", "{place}/piqa.jsonl"], "of which task is not said; write TASK="),
        (["--tasks", "piqa", "--data", "boolq=x"], "no task 'boolq'"),
        (["--tasks", "card", "--halt-bias", "1:2"], "neither a number nor a range"),
        (["--tasks", "card", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "card", "--chart", "c.jpg"], r"must end in \.png"),
        (["--tasks", "card", "--chart", "{place}/c.png", "--json", "{place}/./c.png"], r"are both .*c\.png"),
        (["--tasks", "card", "--json", "{place}", "--overwrite"], "is a directory"),
        (["--tasks", "card", "--stride", "2"], "--stride is of --text"),
        (["--text", "nowhere.txt"], "cannot read --text nowhere.txt"),
        (["--text", "{place}/piqa.jsonl", "--stride", "65"], r"stride 65 must lie in 1\.\.64"),
        (["--tasks", "card", "--compare", "./nowhere/model"], "cannot load ./nowhere/model|needs transformers"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place, capsys, more, message):
    more = [part.format(place=place) for part in more]
    assert main(["eval", str(place / "toy"), *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error:")]) == 1
    assert re.search(message, error[-1]), error


def test_a_folder_that_is_no_checkpoint_is_named(place, capsys, tmp_path):
    assert main(["eval", str(tmp_path), "--tasks", "card"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_ranges_of_biases():
    assert biases_of("-2:2:0.5") == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert biases_of("1:0:-0.5") == [1.0, 0.5, 0.0] and biases_of("0.35") == [0.35] and biases_of(None) == [None]
    assert biases_of("0:0.3:0.1") == [0.0, 0.1, 0.2, 0.3]
    for bad in ("1:2:0", "2:1:1", "0:1:inf", "nan", "0:1000:1"):
        with pytest.raises(ValueError, match="--halt-bias"):
            biases_of(bad)
