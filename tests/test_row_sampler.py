"""Which conversations a step sees: exact shares, each once an epoch, similar lengths, whatever the process count."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from conversation_datasets import ABOUT, EOT, some_rows, write_chat
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_model.training.rows import RowSampler, _exact_counts, validation_rows
from hrm_model.training.shards import DatasetWriter, ShardError, open_dataset


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("rows") / "large", some_rows(700), some_rows(40, seed=1), 10_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Its ids are from 1,000 on, to tell its rows from those of `large`."""
    rows = [(np.where(ids == EOT, ids, ids + 1000), mask) for ids, mask in some_rows(45, seed=2)]
    return write_chat(tmp_path_factory.mktemp("rows") / "small", rows, rows[:5], 10_000)


def batches(sampler, steps):
    return [samples for step in range(steps) for samples in sampler.plan(step)]


def names(sampler, samples):
    """The first id of each row, which says which conversation it is."""
    return sampler.batch(samples).inputs[:, 0].tolist()


def test_a_row_is_a_conversation_padded_on_the_right_and_scored_on_answers(large):
    sampler = RowSampler([large], 64, seed=0, tokens_per_batch=256)
    conversations = large.conversations("train")
    for samples in batches(sampler, 5):
        batch = sampler.batch(samples)
        assert batch.inputs.dtype == batch.targets.dtype == batch.samples.dtype == np.int64
        np.testing.assert_array_equal(batch.samples, samples)
        lengths = np.full(len(samples), batch.inputs.shape[1]) if batch.lengths is None else batch.lengths
        assert lengths.max() == batch.inputs.shape[1]
        for inputs, targets, n in zip(batch.inputs, batch.targets, lengths, strict=True):
            ids, is_answer = conversations.row(int(inputs[0]))
            np.testing.assert_array_equal(inputs[:n], ids[:-1])
            np.testing.assert_array_equal(targets[:n], np.where(is_answer[1:], ids[1:], -1))
            assert (inputs[n:] == EOT).all() and (targets[n:] == -1).all()
            assert (targets[:n] == EOT).sum() == 1, "the end of the conversation is learned"


def test_the_loss_looks_at_every_id_where_asked_to(large):
    sampler = RowSampler([large], 64, seed=0, tokens_per_batch=256, train_on_prompt=True)
    samples = sampler.plan(0)[0]
    batch = sampler.batch(samples)
    lengths = [large.conversations("train").lengths[i] - 1 for i in batch.inputs[:, 0]]
    assert [(targets >= 0).sum() for targets in batch.targets] == lengths
    assert sampler.count_targets(samples) == sum(lengths)


def test_targets_are_counted_without_reading_rows(large, small):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256, accumulation=3)
    for samples in batches(sampler, 40):
        assert sampler.count_targets(samples) == (sampler.batch(samples).targets >= 0).sum()


def test_every_conversation_comes_once_an_epoch_and_in_another_order_the_next(large):
    sampler = RowSampler([large], 64, seed=0, tokens_per_batch=512)
    rows = [names(sampler, np.arange(700 * epoch, 700 * epoch + 700)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(700)) for epoch in rows)
    assert rows[0] != rows[1] != rows[2]
    other = RowSampler([large], 64, seed=1, tokens_per_batch=512)
    assert names(other, np.arange(700)) != rows[0]


def test_steps_take_each_sample_once_pool_after_pool(large, small):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256)
    seen, pool = [], sampler.pool_rows
    for samples in batches(sampler, 300):
        seen += samples.tolist()
    whole = len(seen) // pool * pool
    for start in range(0, whole, pool):
        assert sorted(seen[start : start + pool]) == list(range(start, start + pool))
    assert whole > 3 * pool


@pytest.mark.parametrize(
    ("weights", "shares"), [(None, (700 / 745, 45 / 745)), ([0.4, 0.6], (0.4, 0.6)), ([0, 2], (0, 1))]
)
def test_shares_are_exact_in_every_pool(large, small, weights, shares):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256, weights=weights)
    assert sampler.shares == pytest.approx(shares)
    pool = sampler.pool_rows
    for p in range(1, 6):
        here = [name < 1000 for name in names(sampler, np.arange(pool * p))]
        assert abs(sum(here) - shares[0] * pool * p) < 1
    if weights == [0.4, 0.6]:
        assert sum(name < 1000 for name in names(sampler, np.arange(5 * pool))) == 2 * pool


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any), st.integers(1, 50))
def test_shares_never_drift_from_what_was_asked(weights, pool):
    given_rows = [0] * len(weights)
    for number in range(1, 30):
        counts = _exact_counts(weights, given_rows, pool)
        assert sum(counts) == pool and min(counts) >= 0
        given_rows = [before + n for before, n in zip(given_rows, counts, strict=True)]
        for rows, weight in zip(given_rows, weights, strict=True):
            assert abs(rows - number * pool * weight / sum(weights)) < 2
            assert weight or not rows


def test_small_datasets_go_through_their_epochs_on_their_own(large, small):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256, weights=[0.5, 0.5])
    stream = [name for name in names(sampler, np.arange(sampler.pool_rows * 4)) if name >= 1000]
    epochs = iter(stream)
    orders = [list(islice(epochs, 45)) for _ in range(len(stream) // 45)]
    assert len(orders) > 8 and all(sorted(order) == list(range(1000, 1045)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_batch_never_holds_more_than_its_tokens_padding_included(large, small):
    for tokens in (64, 100, 1000):
        sampler = RowSampler([large, small], 64, seed=3, tokens_per_batch=tokens)
        sizes = [sampler.batch(samples).inputs.size for samples in batches(sampler, 100)]
        assert max(sizes) <= tokens
        assert np.mean(sizes) > 0.85 * tokens or tokens < 1000


def test_a_pool_holds_no_conversation_twice_where_its_dataset_is_large_enough(tmp_path, large):
    other = write_chat(tmp_path / "other", [(ids + 1000 * (ids < 1000), mask) for ids, mask in some_rows(400, seed=4)])
    sampler = RowSampler([large, other], 64, seed=0, tokens_per_batch=4096, weights=[0.1, 0.9])
    assert sampler.pool_rows == 400 / 0.9 // 1 == 444
    for start in range(0, 3 * 444, 444):
        found = names(sampler, np.arange(start, start + 444))
        assert len(found) - len(set(found)) <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=3).filter(
        lambda p: any(w for _, w in p)
    ),
    st.integers(60, 700),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_any_mixture_is_planned_whole(tmp_path_factory, parts, tokens, accumulation, seed):
    root = tmp_path_factory.mktemp("mixture")
    datasets = [write_chat(root / f"{i}", some_rows(n, 2, 61, seed=i)) for i, (n, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    sampler = RowSampler(datasets, 60, seed, tokens, accumulation, weights)
    found = [samples for step in range(30) for samples in sampler.plan(step)]
    assert len(found) == 30 * accumulation and all(sampler.batch(samples).inputs.size <= tokens for samples in found)
    seen = np.concatenate(found)
    whole = seen[: len(seen) // sampler.pool_rows * sampler.pool_rows].reshape(-1, sampler.pool_rows)
    np.testing.assert_array_equal(np.sort(whole), np.arange(whole.size).reshape(whole.shape))
    rows = np.array([len(d.conversations("train")) for d in datasets]) * sampler.epochs(30)
    assert round(rows.sum()) == len(seen) and not rows[np.array(weights) == 0].any()


def test_rows_of_similar_lengths_come_together(large):
    sampler = RowSampler([large], 64, seed=0, tokens_per_batch=512)
    lengths = large.conversations("train").lengths - 1
    real = padded = 0
    for start in range(0, 690, 14):  # the same rows, unsorted, in batches of about as many
        rows = lengths[names(sampler, np.arange(start, start + 14))]
        real, padded = real + rows.sum(), padded + 14 * rows.max()
    share = sampler.padding_share(200)
    print(f"padding: {share:.1%} sorted within pools, {1 - real / padded:.1%} in random order")
    assert share < 0.06 and 1 - real / padded > 0.35


def test_long_and_short_batches_come_in_random_order(large):
    sampler = RowSampler([large], 64, seed=0, tokens_per_batch=512)
    widths = [sampler.batch(samples).inputs.shape[1] for samples in batches(sampler, 160)]
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.25
    assert len(set(widths[:10])) > 5


@pytest.mark.parametrize("step", [0, 7, 203, 20_000])
def test_a_plan_resumed_at_a_step_is_the_plan_of_that_step(large, small, step):
    options = dict(seed=5, tokens_per_batch=256, accumulation=2, weights=[0.4, 0.6])
    through = RowSampler([large, small], 64, **options)
    for earlier in range(0, step, 1000 if step > 1000 else 1):
        through.plan(earlier)
    through.batch(np.arange(3))  # looking back changes nothing
    resumed = RowSampler([large, small], 64, **options)
    for one, other in zip(through.plan(step), resumed.plan(step), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(through.batch(one).inputs, resumed.batch(one).inputs)
    assert through.epochs(step) == resumed.epochs(step)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_rows_do_not_depend_on_how_many_processes_share_them(large, small, world_size):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256)
    for samples in batches(sampler, 20):
        whole = sampler.batch(samples)
        parts = [sampler.batch(samples[rank::world_size]) for rank in range(world_size)]
        assert sum(len(part.samples) for part in parts) == len(samples)
        for rank, part in enumerate(parts):
            width = part.inputs.shape[1]
            np.testing.assert_array_equal(part.inputs, whole.inputs[rank::world_size, :width])
            np.testing.assert_array_equal(part.targets, whole.targets[rank::world_size, :width])
            assert (whole.targets[rank::world_size, width:] == -1).all()


def test_no_rows_make_a_batch_of_none(large):
    batch = RowSampler([large], 64, seed=0, tokens_per_batch=256).batch(np.array([], dtype=np.int64))
    assert batch.inputs.shape == batch.targets.shape == (0, 1)


def test_epochs_count_how_often_each_dataset_was_seen(large, small):
    sampler = RowSampler([large, small], 64, seed=0, tokens_per_batch=256, accumulation=2, weights=[0.5, 0.5])
    assert sampler.epochs(0) == [0, 0]
    seen = [name for samples in batches(sampler, 50) for name in names(sampler, samples)]
    small_rows = sum(name >= 1000 for name in seen)
    assert sampler.epochs(50) == pytest.approx([(len(seen) - small_rows) / 700, small_rows / 45])
    assert sampler.rows_per_epoch == sampler.conversations == 745
    assert sampler.answer_tokens == sum(int(d.conversations("train").answers.sum()) for d in (large, small))


def test_what_does_not_fit_is_an_error_with_a_remedy(tmp_path, large):
    longest = large.conversations("train").lengths.max()
    assert longest == 60
    RowSampler([large], 59, seed=0, tokens_per_batch=59).plan(0)
    with pytest.raises(ValueError, match=r"large has 60 ids, block_size 58 takes up to 59; .*--block-size 58.* 59"):
        RowSampler([large], 58, seed=0, tokens_per_batch=256)
    with pytest.raises(ValueError, match=r"tokens_per_batch 63 is below block_size 64.* at least 64"):
        RowSampler([large], 64, seed=0, tokens_per_batch=63)
    with pytest.raises(ValueError, match="ids up to 50256, vocab_size 50256"):
        RowSampler([large], 64, seed=0, tokens_per_batch=64, vocab_size=50256)
    empty = write_chat(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="empty has no conversations to train on"):
        RowSampler([large, empty], 64, seed=0, tokens_per_batch=64, weights=[1, 1])
    RowSampler([large, empty], 64, seed=0, tokens_per_batch=64).plan(0)
    with pytest.raises(ValueError, match="no dataset"):
        RowSampler([], 64, seed=0, tokens_per_batch=64)
    for weights in ([1, 1], [-1], [0], [float("nan")]):
        with pytest.raises(ValueError, match="weight"):
            RowSampler([large], 64, seed=0, tokens_per_batch=64, weights=weights)
    for call in (lambda s: s.plan(-1), lambda s: s.batch([-1]), lambda s: s.count_targets([-1])):
        with pytest.raises(ValueError, match="-1 is negative"):
            call(RowSampler([large], 64, seed=0, tokens_per_batch=64))


def test_text_cannot_be_taken_for_conversations(tmp_path, large):
    with DatasetWriter(tmp_path / "text") as writer:
        writer.append("train", np.arange(99))
        text = writer.commit(ABOUT)
    with pytest.raises(ShardError, match="dataset of text"):
        RowSampler([text], 64, seed=0, tokens_per_batch=64)


def test_ids_beyond_the_vocabulary_are_refused_when_read(tmp_path):
    write_chat(tmp_path / "d", some_rows(5), some_rows(5))
    for split in ("train", "val"):
        file = tmp_path / f"d/{split}-00000.bin"
        file.write_bytes(b"\xff" * file.stat().st_size)
    sampler = RowSampler([open_dataset(tmp_path / "d")], 64, seed=0, tokens_per_batch=64, vocab_size=50304)
    with pytest.raises(ValueError, match=r"conversation \d of .*d has token id 65535, .* vocab_size 50304"):
        sampler.batch(sampler.plan(0)[0])
    with pytest.raises(ValueError, match="token id 65535"):
        validation_rows([open_dataset(tmp_path / "d")], 64, 2)


def test_validation_rows_are_evenly_spaced_and_always_the_same(large, small):
    rows = validation_rows([large, small], 64, 15)
    assert rows.inputs[:, 0].tolist() == [*range(0, 40, 3), 1002]
    again = validation_rows([large, small], 64, 15)
    for one, other in zip(rows, again, strict=True):
        np.testing.assert_array_equal(one, other)
    whole = validation_rows([large, small], 64, 15, train_on_prompt=True)
    assert (whole.targets >= 0).sum() == rows.lengths.sum() > (rows.targets >= 0).sum()
    with pytest.warns(UserWarning, match="all 45 conversations, not 46"):
        assert len(validation_rows([large, small], 64, 46).inputs) == 45


def test_a_split_without_conversations_cannot_validate(tmp_path):
    dataset = write_chat(tmp_path / "d", some_rows(3))
    with pytest.raises(ValueError, match=r"4 validation conversations .* have 0"):
        validation_rows([dataset], 64, 4)
