"""What the hybrid is trained on: examples by number, held-out ones, verifiers, batches."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("transformers")
from hybrid_models import collator

from hrm_model.hybrid.tasks import Example, HeldOut, Mixture, make_task
from hrm_model.hybrid.tasks.held_out import prompt_key

GYM = ("basic_arithmetic", "chain_sum", "simple_equations", "gsm_symbolic")


def operands(example: Example) -> tuple[int, int]:
    a, b = example.prompt.removesuffix("=").split("+")
    return int(a), int(b)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_toy_sums_are_right_and_have_operands_of_that_many_digits(digits):
    task = make_task(f"toy_addition:{digits}", 5)
    seen = set()
    for number in range(300):
        example = task.example(number)
        a, b = operands(example)
        assert len(str(a)) == len(str(b)) == digits and int(example.answer) == a + b
        assert task.example(number) == example
        assert task.score(f" {a + b}\n", example) == 1 and task.score(f"{a + b}1", example) == 0
        seen.add((a, b))
    assert len(seen) > (60 if digits == 1 else 280)
    assert make_task(f"toy_addition:{digits}", 6).example(0) != task.example(0)


def test_no_test_prompt_nor_its_commutation_is_trained_on():
    split = HeldOut(make_task("toy_addition:1", 0), 30)
    held = {frozenset(operands(e)) for e in split.test}
    assert len(held) == 30, "all different, commutations counted as the same"
    trained = {frozenset(operands(split.training(i))) for i in range(2000)}
    assert not held & trained
    every = {frozenset(pair) for pair in itertools.product(range(10), repeat=2)}
    assert trained == every - held, "all others come"


def test_a_key_is_blind_to_the_order_of_numbers_and_to_nothing_else():
    assert prompt_key("12+34=") == prompt_key("34+12=") != prompt_key("12+43=")
    assert prompt_key("12+34=") != prompt_key("12*34=") and prompt_key("12+34=") != prompt_key("12+34+1=")


def test_a_mixture_is_of_equal_parts_whatever_the_batches():
    mixture = Mixture(["toy_addition:1", "toy_addition:3"], 0, 7)
    assert [len(split.test) for split in mixture.splits] == [4, 3]
    examples = mixture.training(range(400))
    share = sum(e.task == "toy_addition:1" for e in examples) / 400
    assert 0.4 < share < 0.6
    assert examples[100:103] == mixture.training([100, 101, 102])
    assert all(mixture.score(e.answer, e) == 1 and mixture.score("x", e) == 0 for e in examples[:20])


def test_a_batch_masks_prompts_and_padding_out_of_the_loss():
    examples = [Example("12+34=", "46", "t"), Example("7+8=", "15", "t"), Example("1+1=", "2", "t")]
    make = collator()
    batch = make(examples)
    assert batch.ids.shape == (3, 9) and batch.prompt_lengths.tolist() == [6, 4, 4] and batch.examples == examples
    for row, example in enumerate(examples):
        prompt, answer = make.prompt_ids(example.prompt), make.answer_ids(example.answer)
        n, m = len(prompt), len(answer)
        assert answer[-1] == make.tokenizer.eos_token_id
        assert batch.ids[row, : n + m].tolist() == prompt + answer
        assert batch.labels[row].tolist() == [-100] * n + answer + [-100] * (9 - n - m)
        assert batch.mask[row].tolist() == [1] * (n + m) + [0] * (9 - n - m)
        assert batch.prompt[row].tolist() == [True] * n + [False] * (9 - n)
        # position p predicts token p + 1
        real = batch.targets[row] >= 0
        assert batch.targets[row][real].tolist() == answer
        assert torch.equal(batch.ids[row, batch.positions[row][real] + 1], batch.targets[row][real])


def test_prompts_to_answer_are_padded_on_the_left():
    ids, mask = collator().prompts(["12+34=", "7+8="])
    assert mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]] and ids[1, 2:].tolist() == collator().prompt_ids("7+8=")


@pytest.mark.parametrize("name", GYM)
def test_tasks_of_reasoning_gym_by_name(name):
    pytest.importorskip("reasoning_gym")
    split = HeldOut(make_task(name, 3), 5)
    examples = [split.training(i) for i in (0, 1, 5000, 3)]
    assert split.training(5000) == examples[2] and len({e.prompt for e in examples}) == 4
    for e in [*examples, *split.test]:
        assert split.task.score(e.answer, e) == 1 and split.task.score("no idea", e) < 1
    assert not {prompt_key(e.prompt) for e in split.test} & {prompt_key(split.training(i).prompt) for i in range(50)}


def test_any_other_task_by_name_and_none_that_is_not_there():
    pytest.importorskip("reasoning_gym")
    example = make_task("gcd", 0).example(2)
    assert make_task("gcd", 0).score(example.answer, example) == 1
    with pytest.raises(ValueError, match=r"unknown task 'gdc'.*reasoning-gym"):
        make_task("gdc", 0)
