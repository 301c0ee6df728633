"""Shards on disk, the samples drawn from them, and the n-gram losses that give a model's loss a scale."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hrm_model.keyed import keyed_integers, keyed_uniform, keyed_words
from hrm_model.ranks import Ranks
from hrm_model.training.ngram import ngram_losses
from hrm_model.training.sampler import Sampler, WindowBatches, validation_windows
from hrm_model.training.shards import DatasetWriter, ShardError, open_dataset

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {
    "tokenizer": {"name": "gpt2", "sha256": "", "vocab_size": 50257, "eot": 50256},
    "source": {"kind": "files", "paths": ["my text.txt"]},
    "fingerprint": "of nothing",
}


def write(path, train, val=(), shard_tokens=7, overwrite=False):
    with DatasetWriter(path, shard_tokens, overwrite) as writer:
        writer.append("train", np.asarray(train), documents=2)
        writer.append("val", np.asarray(val, dtype=int), documents=1)
        return writer.commit(ABOUT)


# --- shards ---------------------------------------------------------------------------------------


def test_a_split_reads_as_one_array_across_its_files(tmp_path):
    data = np.arange(50_000, 50_040)
    split = write(tmp_path / "d", data).split("train")
    assert len(list((tmp_path / "d").glob("train-*.bin"))) == 6
    assert len(split) == 40
    for start in range(41):
        for n in range(41 - start):
            part = split.read(start, n)
            assert part.dtype == np.uint16
            np.testing.assert_array_equal(part, data[start : start + n])
    for start, n in [(-1, 2), (39, 2), (41, 0), (0, -1)]:
        with pytest.raises(ValueError, match="outside 'train' of 40 tokens"):
            split.read(start, n)


def test_files_hold_little_endian_uint16_and_the_manifest_describes_them(tmp_path):
    write(tmp_path / "d", [1, 256, 50256], [5], shard_tokens=2)
    assert (tmp_path / "d/train-00000.bin").read_bytes() == b"\x01\x00\x00\x01"
    assert (tmp_path / "d/train-00001.bin").read_bytes() == b"\x50\xc4"
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert manifest["max_token_id"] == 50256
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (train["tokens"], train["documents"], val["tokens"], val["documents"]) == (3, 2, 1, 1)
    assert [(s["file"], s["tokens"]) for s in train["shards"]] == [
        ("train-00000.bin", 2),
        ("train-00001.bin", 1),
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["d"]


def test_ids_appended_in_any_portions_give_the_same_files(tmp_path):
    data = np.random.default_rng(0).integers(0, 50257, 100)
    write(tmp_path / "whole", data)
    with DatasetWriter(tmp_path / "parts", 7) as writer:
        for part in np.split(data, [1, 1, 9, 60]):
            writer.append("train", part)
        writer.append("train", np.array([], dtype=int), documents=2)
        writer.append("val", np.array([], dtype=int), documents=1)
        writer.commit(ABOUT)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_ids_that_do_not_fit_the_format_are_refused(tmp_path):
    for wrong in (65536, -1):
        with pytest.raises(ValueError, match=f"{wrong}.* do not fit into uint16"):
            write(tmp_path / "d", [0, wrong])


def test_a_writer_left_without_commit_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d") as writer:
        writer.append("train", np.arange(5))
        assert not (tmp_path / "d").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="elsewhere leftovers are cleared by age, not by process")
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = f"""
import os, numpy as np
from hrm_model.training.shards import DatasetWriter
with DatasetWriter({str(tmp_path / "d")!r}) as writer:
    writer.append("train", np.arange(5))
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    leftover = [entry.name for entry in tmp_path.iterdir()]
    assert len(leftover) == 1
    assert leftover != ["d"]
    write(tmp_path / "d", np.arange(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_overwriting_keeps_the_old_dataset_until_the_new_one_is_whole(tmp_path):
    write(tmp_path / "d", np.arange(20), [1, 2])
    with pytest.raises(ShardError, match="--overwrite"):
        write(tmp_path / "d", np.arange(30))
    with DatasetWriter(tmp_path / "d", overwrite=True) as writer:
        writer.append("train", np.arange(30))
        assert len(open_dataset(tmp_path / "d").split("train")) == 20
        writer.commit(ABOUT)
    assert len(open_dataset(tmp_path / "d", verify=True).split("train")) == 30
    assert sorted(entry.name for entry in (tmp_path / "d").iterdir()) == ["manifest.json", "train-00000.bin"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_a_directory_with_anything_else_in_it_is_never_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d", np.arange(20))  # an empty one may be
    (tmp_path / "d/thesis.tex").write_text("irreplaceable")
    with pytest.raises(ShardError, match=r"thesis\.tex.*another --out"):
        write(tmp_path / "d", np.arange(30), overwrite=True)
    assert (tmp_path / "d/thesis.tex").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"is missing.* 14 bytes"),
        (lambda file: file.write_bytes(b""), "is empty: expected 14 bytes .* found 0"),
        (lambda file: file.write_bytes(b"\0" * 13), "is odd-sized: expected 14 bytes .* found 13"),
        (lambda file: file.write_bytes(b"\0" * 12), "is truncated: expected 14 bytes .* found 12"),
        (lambda file: file.write_bytes(b"\0" * 16), "is too long: expected 14 bytes .* found 16"),
    ],
)
def test_a_damaged_shard_is_named_with_sizes_and_remedy(tmp_path, damage, message):
    write(tmp_path / "d", np.arange(40))
    damage(tmp_path / "d/train-00002.bin")
    with pytest.raises(ShardError, match=rf"train-00002\.bin {message}") as error:
        open_dataset(tmp_path / "d")
    remedy = f"run python train/prepare.py --source 'my text.txt' --out {tmp_path / 'd'} --overwrite"
    assert str(error.value).endswith(remedy)


def test_altered_bytes_are_found_when_verifying(tmp_path):
    write(tmp_path / "d", np.arange(40))
    file = tmp_path / "d/train-00001.bin"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    open_dataset(tmp_path / "d")
    with pytest.raises(ShardError, match=r"train-00001\.bin was altered: expected sha256"):
        open_dataset(tmp_path / "d", verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "no manifest of a dataset"),
        (lambda text: "[]", "no manifest of a dataset"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 2'),
            "version 2, this code reads 1",
        ),
        (lambda text: text.replace("train-00000.bin", "../../train-00000.bin"), "damaged"),
        (lambda text: text.replace('"tokens": 7', '"tokens": 8', 1), "damaged"),
        (lambda text: text.replace('"tokens": 7', '"tokens": "7"', 1), "damaged"),
    ],
)
def test_a_damaged_manifest_is_an_error_with_a_remedy(tmp_path, change, message):
    write(tmp_path / "d", np.arange(40))
    file = tmp_path / "d/manifest.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ShardError, match=rf"manifest\.json .*{message}.*prepare\.py .*--overwrite"):
        open_dataset(tmp_path / "d")


def test_what_is_no_dataset_is_an_error_that_says_how_to_make_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShardError, match=r"no dataset at .* run python train/prepare\.py"):
            open_dataset(path)


def test_a_vocabulary_smaller_than_the_datasets_ids_is_named_with_both(tmp_path):
    dataset = write(tmp_path / "d", [3, 900, 1])
    dataset.check_vocab(901)
    with pytest.raises(ShardError, match="ids up to 900, vocab_size 900 allows up to 899"):
        dataset.check_vocab(900)
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        dataset.split("test")


# --- sampler --------------------------------------------------------------------------------------


def philox(key, counter):
    """Philox-4x64-10 by its definition, for four words of one counter."""
    mask = 2**64 - 1
    words, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        p0, p1 = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(p1 >> 64) ^ words[1] ^ k0, p1 & mask, (p0 >> 64) ^ words[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "dataset", np.arange(1000), np.arange(2000, 2100), shard_tokens=64)


def test_random_words_are_philox_of_seed_stream_and_sample():
    for seed, sample, stream in [(0, 0, 0), (7, 12345, 3), (2**63 + 5, 2**40, 9), (-1, 1, 1)]:
        words = keyed_words(seed, sample, 3, stream)
        for i in range(3):
            assert words[i].tolist() == philox((seed % 2**64, stream), sample + i + 1)


def test_a_sample_is_a_function_of_seed_and_number_alone(dataset):
    sampler = Sampler([dataset], 16, seed=3)
    first = [sampler.sample(i) for i in range(20)]
    again = [Sampler([dataset], 16, seed=3).sample(i) for i in reversed(range(20))][::-1]
    np.testing.assert_array_equal(first, again)
    other = [Sampler([dataset], 16, seed=4).sample(i) for i in range(20)]
    assert not np.array_equal(first, other)
    assert first[0].dtype == np.int64
    assert all(np.array_equal(window, np.arange(window[0], window[0] + 17)) for window in first)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(dataset, size):
    sampler = Sampler([dataset], 8, seed=0)
    data = WindowBatches(sampler, batch_size=4, accumulation=2)
    shares = [Ranks(rank, size).share(samples) for samples in data.plan(3) for rank in range(size)]
    parts = [data.batch(share) for share in shares if len(share)]
    inputs, targets, numbers = (np.concatenate([p[i] for p in parts]) for i in (0, 1, 3))
    order = np.argsort(numbers)
    np.testing.assert_array_equal(numbers[order], np.arange(24, 32))
    np.testing.assert_array_equal(inputs[order], [sampler.sample(i)[:-1] for i in range(24, 32)])
    np.testing.assert_array_equal(targets[order], [sampler.sample(i)[1:] for i in range(24, 32)])
    assert sum(data.count_targets(share) for share in shares) == targets.size == 64


def test_samples_that_cannot_be_are_an_error(dataset):
    sampler = Sampler([dataset], 8, seed=0)
    with pytest.raises(ValueError, match="0 samples were asked for"):
        sampler.batch(0, 0)
    with pytest.raises(ValueError, match="sample number -1 is negative"):
        sampler.sample(-1)


def test_every_place_is_equally_likely_the_first_and_the_last_included(tmp_path):
    sampler = Sampler([write(tmp_path / "d", np.arange(14))], 10, seed=1)
    places = Counter(int(sampler.sample(i)[0]) for i in range(4000))
    assert sorted(places) == [0, 1, 2, 3]
    assert all(abs(n - 1000) < 120 for n in places.values())  # 4 standard deviations of 27


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, 0.25), ([1, 1], 0.5), ([0.9, 0.1], 0.9), ([0, 2], 0.0), ([1e-300, 0.0], 1.0)],
)
def test_datasets_are_drawn_by_weight_or_by_tokens(tmp_path, weights, expected):
    small, large = write(tmp_path / "s", np.full(100, 1)), write(tmp_path / "l", np.full(300, 2))
    sampler = Sampler([small, large], 4, seed=0, weights=weights)
    share = np.mean([sampler.sample(i)[0] == 1 for i in range(2000)])
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / 2000)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights .* for 2 datasets"),
        ([1.0, -0.5], r"weight -0\.5"),
        ([1.0, math.nan], "weight nan"),
        ([math.inf, 1.0], "weight inf"),
        ([0, 0], "all weights are 0"),
    ],
)
def test_weights_that_are_none_are_named(dataset, weights, message):
    with pytest.raises(ValueError, match=message):
        Sampler([dataset, dataset], 8, seed=0, weights=weights)


def test_a_split_shorter_than_a_window_is_an_error_unless_it_has_no_share(tmp_path, dataset):
    short = write(tmp_path / "short", np.arange(16))
    assert len(Sampler([short], 15, seed=0).sample(0)) == 16
    with pytest.raises(ValueError, match=r"short has 16 tokens, .* block_size 16 needs 17"):
        Sampler([short], 16, seed=0)
    with pytest.raises(ValueError, match=r"'val' of .*short has 0 tokens"):
        Sampler([short], 16, seed=0, split="val")
    Sampler([short, dataset], 16, seed=0, weights=[0, 1]).sample(0)
    with pytest.raises(ValueError, match="no dataset"):
        Sampler([], 16, seed=0)


def test_ids_beyond_the_vocabulary_are_refused_with_id_limit_and_file(tmp_path):
    dataset = write(tmp_path / "d", np.arange(20), np.arange(20))
    with pytest.raises(ValueError, match="ids up to 19, vocab_size 19"):
        Sampler([dataset], 4, seed=0, vocab_size=19)
    file = tmp_path / "d/train-00001.bin"
    file.write_bytes(b"\xff\xff" * 7)  # of the right size, so opening does not see it
    sampler = Sampler([open_dataset(tmp_path / "d")], 18, seed=0, vocab_size=50304)
    with pytest.raises(ValueError, match=r"id 65535 in .*train-00001\.bin is not below vocab_size 50304"):
        sampler.batch(0, 1)
    with pytest.raises(ValueError, match=r"id 19 in .*val-00002\.bin is not below vocab_size 19"):
        validation_windows([dataset], 19, 1, vocab_size=19)


def test_keyed_integers_cover_both_ends_evenly_and_do_not_depend_on_their_batch():
    draws = keyed_integers(5, np.arange(8000), 3, 6, stream=11)
    assert draws.dtype == np.int64
    assert sorted(Counter(draws.tolist())) == [3, 4, 5, 6]
    assert all(abs(n - 2000) < 160 for n in Counter(draws.tolist()).values())
    some = [77, 3, 3, 7999, 0]
    np.testing.assert_array_equal(keyed_integers(5, some, 3, 6, stream=11), draws[some])
    assert not np.array_equal(keyed_integers(5, np.arange(8000), 3, 6, stream=12), draws)
    np.testing.assert_array_equal(keyed_integers(5, [1, 2], 4, 4, stream=0), [4, 4])
    assert keyed_integers(5, [], 1, 8, stream=0).shape == (0,)
    with pytest.raises(ValueError, match="low 5 is above high 4"):
        keyed_integers(5, [0], 5, 4, stream=0)


def test_keyed_uniform_is_uniform_and_keyed():
    draws = [keyed_uniform(0, i, stream=4) for i in range(2000)]
    assert all(0 <= u < 1 for u in draws)
    assert abs(np.mean(draws) - 0.5) < 4 / math.sqrt(12 * 2000)
    assert keyed_uniform(0, 17, stream=4) == draws[17] == (philox((0, 4), 18)[0] >> 11) / 2**53
    assert keyed_uniform(1, 17, stream=4) != draws[17] != keyed_uniform(0, 17, stream=5)


def test_validation_windows_are_evenly_spaced_and_predict_no_token_twice(tmp_path):
    one = write(tmp_path / "1", [0], np.arange(100))
    two = write(tmp_path / "2", [0], np.arange(1000, 1051))
    inputs, targets = validation_windows([one, two], 10, 14)  # 9 places in one, 5 in two
    assert inputs.shape == targets.shape == (14, 10)
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs[:, 0], [*range(0, 90, 10), *range(1000, 1050, 10)])
    np.testing.assert_array_equal(targets, inputs + 1)
    assert len(np.unique(targets)) == targets.size
    few, _ = validation_windows([one, two], 10, 7)
    np.testing.assert_array_equal(few[:, 0], [0, 20, 40, 60, 80, 1010, 1030])


def test_validation_windows_are_fewer_with_a_warning_and_none_is_an_error(dataset):
    with pytest.warns(UserWarning, match="all 9 windows of 10, not 20"):
        inputs, _ = validation_windows([dataset], 10, 20)
    assert len(inputs) == 9
    with pytest.raises(ValueError, match=r"1 validation windows of 100 .* have 100 tokens, enough for 0"):
        validation_windows([dataset], 100, 1)
    with pytest.raises(ValueError, match="0 validation windows"):
        validation_windows([dataset], 10, 0)


# --- n-grams --------------------------------------------------------------------------------------


def brute_force(train, inputs, targets, V, D=0.75):
    single, pairs = Counter(train), Counter(pairwise(train))
    unigram, bigram = [], []
    for v, w in zip(inputs, targets, strict=True):
        p = (single[w] + 1) / (len(train) + V)
        after = {b: n for (a, b), n in pairs.items() if a == v}
        total = sum(after.values())
        q = max(after.get(w, 0) - D, 0) / total + D * len(after) / total * p if total else p
        unigram.append(-math.log(p))
        bigram.append(-math.log(q))
    return {"unigram": np.mean(unigram), "bigram": np.mean(bigram)}


def test_ngram_losses_equal_a_brute_force_count(tmp_path):
    draw = np.random.default_rng(0)
    train = draw.zipf(1.5, 3000) % 40
    val = draw.zipf(1.3, (5, 33)) % 50  # ids that training never showed too
    inputs, targets = val[:, :-1], val[:, 1:]
    expected = brute_force(train.tolist(), inputs.ravel().tolist(), targets.ravel().tolist(), V=50)
    for source in (train, write(tmp_path / "d", train).split("train")):
        losses = ngram_losses(source, targets, inputs, vocab_size=50)
        assert losses == pytest.approx(expected, rel=1e-12)
    assert losses["bigram"] != pytest.approx(losses["unigram"], rel=1e-3)


def test_ngram_probabilities_sum_to_one():
    train, V = np.array([0, 1, 2, 0, 1, 0, 3, 3, 4]), 6
    for context in range(V):
        for model in ("unigram", "bigram"):
            losses = [ngram_losses(train, np.array([[w]]), np.array([[context]]), V) for w in range(V)]
            assert sum(math.exp(-loss[model]) for loss in losses) == pytest.approx(1)


def test_several_sources_are_counted_together_but_not_across_their_seam():
    a, b = np.array([0, 1] * 50), np.array([2, 3] * 50)
    ask = {"val_targets": np.array([[1, 3]]), "val_inputs": np.array([[0, 2]]), "vocab_size": 4}
    together = ngram_losses([a, b], **ask)
    assert together["bigram"] < 0.05 < together["unigram"]
    seam = {"val_targets": np.array([[2]]), "val_inputs": np.array([[1]]), "vocab_size": 4}
    assert ngram_losses([a, b], **seam)["bigram"] > ngram_losses(np.concatenate([a, b]), **seam)["bigram"]


def test_a_long_source_is_sampled_evenly():
    n = np.arange(100_000)
    train = n % 10 + 10 * (n >= 50_000)  # another language in the second half
    targets, inputs = np.array([[3, 13]]), np.array([[2, 12]])
    whole = ngram_losses(train, targets, inputs, 20)
    sampled = ngram_losses(train, targets, inputs, 20, max_train_tokens=10_000)
    assert sampled != whole
    assert sampled["unigram"] == pytest.approx(whole["unigram"], rel=0.01)


def test_ngram_losses_name_what_they_cannot_use():
    good = np.array([[1, 2]])
    with pytest.raises(ValueError, match=r"training id 9 is outside 0\.\.4"):
        ngram_losses(np.array([1, 9]), good, good, 5)
    with pytest.raises(ValueError, match=r"target id -1 is outside 0\.\.4"):
        ngram_losses(np.array([1, 2]), np.array([[1, -1]]), good, 5)
    with pytest.raises(ValueError, match="one shape"):
        ngram_losses(np.array([1, 2]), good, good[:, :1], 5)
    with pytest.raises(ValueError, match="1 training tokens"):
        ngram_losses(np.array([1]), good, good, 5)
