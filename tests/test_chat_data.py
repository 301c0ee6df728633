"""Datasets of conversations on disk: ids, what a loss looks at, and where each conversation ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conversation_datasets import ABOUT, some_rows, write_chat
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_model.training.sampler import Sampler
from hrm_model.training.shards import DatasetWriter, ShardError, open_dataset


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 40), st.data())
def test_conversations_read_back_as_written_wherever_files_are_cut(tmp_path_factory, lengths, shard_tokens, data):
    rows = []
    for size in lengths:
        mask = data.draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))
        rows.append((np.arange(size) + 7, np.array([False, *mask])))
    path = tmp_path_factory.mktemp("chat") / "d"
    write_chat(path, rows, shard_tokens=shard_tokens)
    found = open_dataset(path, verify=True).conversations("train")
    assert len(found) == len(rows) and found.lengths.tolist() == lengths
    assert found.answers.tolist() == [int(mask.sum()) for _, mask in rows]
    for i, (ids, mask) in enumerate(rows):
        got_ids, got_mask = found.row(i)
        assert (got_ids.dtype, got_mask.dtype) == (np.int64, bool)
        np.testing.assert_array_equal(got_ids, ids)
        np.testing.assert_array_equal(got_mask, mask)


def test_portions_in_which_conversations_are_written_change_nothing(tmp_path):
    rows = some_rows(20)
    write_chat(tmp_path / "whole", rows, rows[:3], shard_tokens=100)
    with DatasetWriter(tmp_path / "parts", 100, chat=True) as writer:
        for ids, mask in rows:
            writer.append_conversations("train", ids, mask, [len(ids)])
        for ids, mask in rows[:3]:
            writer.append_conversations("val", ids, mask, [len(ids)])
        writer.commit(ABOUT)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_the_files_are_described_by_the_manifest(tmp_path):
    rows = [(np.array([5, 6, 7, 50256]), np.array([False, False, True, True]))]
    write_chat(tmp_path / "d", rows, shard_tokens=3)
    names = ["manifest.json", "train-00000.bin", "train-00000.mask", "train-00001.bin", "train-00001.mask"]
    names += ["train-lengths.bin", "val-lengths.bin"]
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == names
    assert (tmp_path / "d/train-00000.mask").read_bytes() == b"\0\0\1"
    assert (tmp_path / "d/train-lengths.bin").read_bytes() == b"\4\0\0\0"
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("chat", 1)
    assert manifest["splits"]["train"]["documents"] == 1
    assert len(open_dataset(tmp_path / "d").conversations("val")) == 0


def test_conversations_are_also_text_to_pretrain_on(tmp_path):
    rows = some_rows(30)
    dataset = write_chat(tmp_path / "d", rows)
    split = dataset.split("train")
    np.testing.assert_array_equal(split.read(0, len(split)), np.concatenate([ids for ids, _ in rows]))
    assert Sampler([dataset], 16, seed=0).sample(3).shape == (17,)


def test_text_has_no_conversations_and_says_how_to_make_some(tmp_path):
    with DatasetWriter(tmp_path / "d") as writer:
        writer.append("train", np.arange(9), documents=1)
        dataset = writer.commit(ABOUT)
    assert dataset.format == "text" and "format" not in dataset.manifest
    with pytest.raises(ShardError, match=r"d is a dataset of text, .* train/prepare\.py --format chat"):
        dataset.conversations("train")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.mask", lambda data: data[:-1], "truncated: expected 100 bytes .* found 99"),
        ("train-00001.mask", lambda data: None, "missing: expected 100 bytes"),
        (
            "train-lengths.bin",
            lambda data: data + b"\0\0\0\0",
            "too long: expected 80 bytes .20 conversations., found 84",
        ),
        ("train-lengths.bin", lambda data: data[:-3], "odd-sized: expected 80 bytes"),
        ("val-lengths.bin", lambda data: b"", "empty: expected 8 bytes"),
    ],
)
def test_a_mask_or_lengths_of_another_size_are_noticed_on_opening(tmp_path, name, damage, message):
    write_chat(tmp_path / "d", some_rows(20), some_rows(2), shard_tokens=100)
    file = tmp_path / "d" / name
    data = damage(file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(ShardError, match=f"{name} is {message}") as error:
        open_dataset(tmp_path / "d")
    remedy = f"run python train/prepare.py --format chat --source talk.jsonl --out {tmp_path / 'd'} --overwrite"
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize("name", ["train-00000.mask", "train-lengths.bin", "val-00000.mask"])
def test_a_flipped_bit_is_noticed_when_verifying(tmp_path, name):
    write_chat(tmp_path / "d", some_rows(20), some_rows(2), shard_tokens=100)
    file = tmp_path / "d" / name
    data = bytearray(file.read_bytes())
    data[4] ^= 1
    file.write_bytes(data)
    dataset = open_dataset(tmp_path / "d")
    with pytest.raises(ShardError, match=f"{name} was altered: expected sha256"):
        open_dataset(tmp_path / "d", verify=True)
    if "lengths" in name:  # without verifying, lengths still have to add up
        with pytest.raises(ShardError, match=r"lengths\.bin have .* ids, the split .* --format chat .*--overwrite"):
            dataset.conversations("train")


def test_a_manifest_that_lacks_what_conversations_need_is_damaged(tmp_path):
    write_chat(tmp_path / "d", some_rows(3))
    file = tmp_path / "d/manifest.json"
    file.write_text(file.read_text().replace("mask_sha256", "mask"))
    with pytest.raises(ShardError, match="damaged"):
        open_dataset(tmp_path / "d")


def test_a_conversation_outside_the_split_is_an_error(tmp_path):
    found = write_chat(tmp_path / "d", some_rows(3)).conversations("train")
    for i in (-1, 3):
        with pytest.raises(IndexError, match=rf"conversation {i} is outside 0\.\.2"):
            found.row(i)


def test_a_writer_left_without_commit_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d", chat=True) as writer:
        ids, mask = some_rows(1)[0]
        writer.append_conversations("train", ids, mask, [len(ids)])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
