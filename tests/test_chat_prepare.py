"""train/prepare.py --format chat: from the standard library, known sets and files of messages to a dataset of rows."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hrm_model import HRMConfig, get_tokenizer
from hrm_model.template import INSTRUCTION
from hrm_model.training.chat_prepare import SMALLEST_BLOCK, ensure_default_chat, prepare_chat
from hrm_model.training.chat_report import ChatReport
from hrm_model.training.chat_sources import open_sources
from hrm_model.training.chat_stdlib import documented, stdlib_conversations
from hrm_model.training.rows import RowSampler
from hrm_model.training.shards import ShardError, open_dataset
from train.prepare import main

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = get_tokenizer()
OASST = dict(lang="en", review_count=3, deleted=False, synthetic=False, tree_state="ready_for_export")
SAMPLES = {  # two rows of each known set, with its columns
    "alpaca": [
        {"instruction": "Name a fruit.", "input": "", "output": "Apple.", "text": "Below is ..."},
        {"instruction": "Translate.", "input": "chat", "output": "cat", "text": "Below is ..."},
    ],
    "alpaca-gpt4": [
        {"instruction": "Name a tree.", "input": "", "output": "Oak.", "text": "Below is ..."},
        {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is ..."},
    ],
    "dolly": [
        {"instruction": "Who?", "context": "Ann sang.", "response": "Ann.", "category": "closed_qa"},
        {"instruction": "List two.", "context": "", "response": "a, b", "category": "brainstorming"},
    ],
    "lima": [
        {"conversations": ["Why?", "Because."], "source": "stackexchange"},
        {"conversations": ["One?", "Two.", "Three?", "Four."], "source": "multi_turn"},
    ],
    "oasst1": [
        {"message_id": "m1", "parent_id": None, "text": "Hi?", "role": "prompter", "rank": None, **OASST},
        {"message_id": "m2", "parent_id": "m1", "text": "Hello!", "role": "assistant", "rank": 0, **OASST},
    ],
}


def write_lines(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def pairs(n: int):
    return [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(n)]


def texts(path, split: str = "train") -> list[str]:
    """Conversations without the instruction, and without <|endoftext|>."""
    found = open_dataset(path, verify=True).conversations(split)
    rows = [TOKENIZER.decode(found.row(i)[0][:-1]) for i in range(len(found))]
    return [row.removeprefix(INSTRUCTION).strip() for row in rows]


def answers(path) -> list[str]:
    found = open_dataset(path).conversations("train")
    return [TOKENIZER.decode(ids[mask]) for ids, mask in map(found.row, range(len(found)))]


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", ["Human: Name a fruit.\n\nAssistant: Apple.", "Human: Translate.\n\nchat\n\nAssistant: cat"]),
        ("alpaca-gpt4", ["Human: Name a tree.\n\nAssistant: Oak.", "Human: Add.\n\n1, 2\n\nAssistant: 3"]),
        ("dolly", ["Human: Who?\n\nAnn sang.\n\nAssistant: Ann.", "Human: List two.\n\nAssistant: a, b"]),
        (
            "lima",
            [
                "Human: Why?\n\nAssistant: Because.",
                "Human: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant: Four.",
            ],
        ),
        ("oasst1", ["Human: Hi?\n\nAssistant: Hello!"]),
    ],
)
def test_known_sets_are_read_from_files_with_their_columns(tmp_path, name, expected):
    file = write_lines(tmp_path / "rows.jsonl", SAMPLES[name])
    summary = prepare_chat(tmp_path / "d", [f"{name}={file}"], val_fraction=0)
    assert texts(tmp_path / "d") == expected
    assert summary["dropped"] == summary["changed"] == {}
    (part,) = open_dataset(tmp_path / "d").manifest["source"]["parts"]
    assert part["name"] == name and re.fullmatch("[0-9a-f]{64}", part["sha256"][0])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (5, "a JSON int is no object"),
        ([[1]], "a JSON list is no object"),
        ({"text": "a"}, "it lacks ['lang', 'message_id', 'parent_id', 'role']"),
        ({**SAMPLES["oasst1"][0], "message_id": None}, "message_id is a NoneType"),
        ({**SAMPLES["oasst1"][0], "parent_id": ["x"]}, "parent_id is a list"),
        ({**SAMPLES["oasst1"][0], "rank": "1"}, "rank is a str"),
    ],
)
def test_what_is_no_message_of_a_tree_is_reported(tmp_path, row, fault):
    file = write_lines(tmp_path / "rows.jsonl", [row, *SAMPLES["oasst1"]])
    prepare_chat(tmp_path / "d", [f"oasst1={file}"], val_fraction=0)
    assert texts(tmp_path / "d") == ["Human: Hi?\n\nAssistant: Hello!"]
    report = open_dataset(tmp_path / "d").manifest["report"]["dropped"]["no conversation"]
    assert report == {"count": 1, "examples": [f"{file}:1: no message of a tree: {fault}"]}


def test_mixed_is_all_of_them(tmp_path):
    for name, rows in SAMPLES.items():
        write_lines(tmp_path / f"{name}.jsonl", rows)
    summary = prepare_chat(tmp_path / "d", [f"mixed={tmp_path}"])
    assert summary["conversations"] == 9 and 0 < summary["val_tokens"] < summary["train_tokens"]
    (tmp_path / "lima.jsonl").unlink()
    with pytest.raises(ValueError, match=r"mixed=.* has no lima\.jsonl"):
        prepare_chat(tmp_path / "e", [f"mixed={tmp_path}"])


def test_files_of_every_kind_in_a_folder_are_read(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_lines(folder / "a.jsonl", pairs(2))
    (folder / "b.json").write_text(json.dumps([{"prompt": "Hi", "response": "Yo"}]))
    with gzip.open(folder / "sub" / "c.jsonl.gz", "wt") as file:
        file.write('\n{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n')
    (folder / ".hidden.jsonl").write_text("no JSON")
    (folder / "notes.txt").write_text("no conversation")
    assert prepare_chat(tmp_path / "d", [str(folder)], val_fraction=0)["conversations"] == 4
    assert texts(tmp_path / "d")[2:] == ["Human: Hi\n\nAssistant: Yo", "Human: x\n\nAssistant: y"]
    assert answers(tmp_path / "d")[2:] == [" Yo\n\n<|endoftext|>", " y\n\n<|endoftext|>"]


def test_a_packed_file_without_a_byte_is_reported(tmp_path):
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", pairs(2))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(b"")
    assert prepare_chat(tmp_path / "d", [str(tmp_path / "in")], val_fraction=0)["dropped"] == {"unreadable": 1}


def test_parquet_is_read_or_says_what_it_needs(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(ValueError, match=r'rows\.parquet needs pip install "hrm-kernels\[data\]"'):
            prepare_chat(tmp_path / "d", [str(file)])
        return
    with pytest.raises(ValueError, match=r"rows\.parquet is no Parquet file"):
        prepare_chat(tmp_path / "d", [str(file)])
    parquet.write_table(pyarrow.Table.from_pylist(SAMPLES["lima"]), file)
    prepare_chat(tmp_path / "d", [f"lima={file}"], val_fraction=0)
    assert texts(tmp_path / "d")[0] == "Human: Why?\n\nAssistant: Because."


def test_the_hub_is_read_at_a_revision_that_the_manifest_records(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return SAMPLES["lima" if args == ("json",) else "alpaca"]

    api = SimpleNamespace(dataset_info=lambda repository: SimpleNamespace(sha=f"sha of {repository}"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
    assert prepare_chat(tmp_path / "d", ["alpaca", "lima"])["conversations"] == 4
    parts = open_dataset(tmp_path / "d").manifest["source"]["parts"]
    assert [part["revision"] for part in parts] == ["sha of tatsu-lab/alpaca", "sha of GAIR/lima"]
    assert asked[0] == (("tatsu-lab/alpaca",), {"split": "train", "revision": "sha of tatsu-lab/alpaca"})
    assert asked[1][1]["data_files"] == "hf://datasets/GAIR/lima@sha of GAIR/lima/train.jsonl"


def test_without_the_hub_the_error_says_what_to_install_or_give(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert main(["--format", "chat", "--source", "dolly", "--out", str(tmp_path / "d")]) == 1
    assert re.search(r'needs pip install "hrm-kernels\[data\]"; or .* --source dolly=PATH', capsys.readouterr().err)

    def dataset_info(repository):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: SimpleNamespace(dataset_info=dataset_info))
    )
    with pytest.raises(ValueError, match=r"cannot read databricks/.* \(no route to host\); check the network"):
        prepare_chat(tmp_path / "d", ["dolly"])
    assert not (tmp_path / "d").exists()


# --- what is dropped ------------------------------------------------------------------------------


def test_what_is_dropped_is_counted_with_the_first_examples_printed_and_kept(tmp_path, capsys):
    lines = [json.dumps(pair) for pair in pairs(10)]
    lines += ["{broken", '{"text": "a"}', lines[0], '{"question": "a", "answer": " "}']
    lines += ['{"question": "Who?", "answer": "I am ChatGPT."}', '{"question": "Who?", "answer": "Alexa."}']
    lines += ['{"question": "Who?", "answer": "Alexander of Lombardy met Claude Monet."}']
    source = tmp_path / "talk.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--format", "chat", "--source", str(source), "--out", str(tmp_path / "d"), "--drop", "Alexa", "Bard"]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    reasons = dict.fromkeys(
        ["unreadable", "no conversation", "duplicate", "empty answer", "another assistant", "word 'alexa'"], 1
    )
    assert summary["dropped"] == reasons and summary["conversations"] == 11
    report = open_dataset(tmp_path / "d").manifest["report"]["dropped"]
    assert report["word 'alexa'"] == {"count": 1, "examples": [f"{source}:16: Alexa."]}
    assert report["no conversation"]["examples"][0].startswith(f"{source}:12: no known form: its keys are ['text']")
    assert main([*arguments, "--overwrite"]) == 0
    assert f"  dropped 1: duplicate, first {source}:13: What is 0 + 1?" in capsys.readouterr().out
    summary = prepare_chat(tmp_path / "all", [str(source)], filters=False)
    assert summary["conversations"] == 14 and set(summary["dropped"]) == {
        "unreadable",
        "no conversation",
        "empty answer",
    }


def test_long_conversations_are_split_and_counted(tmp_path):
    talk = {"conversations": [f"{'word ' * 20}{i}" for i in range(8)]}
    cut = {"prompt": "Hi", "response": "word " * 200}
    question = {"prompt": "word " * 200, "response": "No."}
    source = write_lines(tmp_path / "long.jsonl", [talk, cut, question, *pairs(3)])
    summary = prepare_chat(tmp_path / "d", [str(source)], block_size=90)
    assert summary["changed"] == {"split at turns": 1, "end of an answer cut off": 1}
    assert summary["dropped"] == {"question too long": 1}
    dataset = open_dataset(tmp_path / "d")
    RowSampler([dataset], 90, seed=0, tokens_per_batch=90).plan(0)
    with pytest.raises(ValueError, match="block_size 89"):
        RowSampler([dataset], 89, seed=0, tokens_per_batch=90)
    with pytest.raises(ValueError, match=r"no conversation is left of .*long\.jsonl \(6 question too long\)"):
        prepare_chat(tmp_path / "e", [str(source)], block_size=20)
    assert not (tmp_path / "e").exists()


def test_parts_of_one_conversation_are_on_one_side(tmp_path):
    talks = [{"conversations": [f"talk {i}: {'word ' * 20}" for _ in range(8)]} for i in range(20)]
    prepare_chat(tmp_path / "d", [str(write_lines(tmp_path / "t.jsonl", talks))], block_size=90, val_fraction=0.3)
    sides = [{re.search(r"talk (\d+)", text)[1] for text in texts(tmp_path / "d", split)} for split in ("train", "val")]
    assert len(sides[0] | sides[1]) == 20 and not sides[0] & sides[1] and len(sides[1]) == 6


def test_at_least_one_conversation_validates(tmp_path):
    source = str(write_lines(tmp_path / "t.jsonl", pairs(3)))
    prepare_chat(tmp_path / "d", [source], val_fraction=1e-9)
    assert len(texts(tmp_path / "d", "val")) == 1
    prepare_chat(tmp_path / "none", [source], val_fraction=0)
    assert not texts(tmp_path / "none", "val")
    source = str(write_lines(tmp_path / "more.jsonl", pairs(60)))
    seeds = [texts(prepare_chat(tmp_path / f"{seed}", [source], seed=seed)["out"], "val") for seed in range(4)]
    assert len({tuple(val) for val in seeds}) == 4 and {len(val) for val in seeds} == {3}
    one = str(write_lines(tmp_path / "one.jsonl", pairs(1)))
    with pytest.raises(ValueError, match=r"but one conversation.* --val-fraction 0"):
        prepare_chat(tmp_path / "e", [one])
    prepare_chat(tmp_path / "e", [one], val_fraction=0)


# --- up to date, errors ---------------------------------------------------------------------------


def test_the_same_inputs_and_options_are_up_to_date_and_others_need_overwrite(tmp_path, capsys):
    source = write_lines(tmp_path / "t.jsonl", pairs(5))
    arguments = ["--format", "chat", "--source", str(source), "--out", str(tmp_path / "d")]
    assert main(arguments) == 0
    before = (tmp_path / "d/manifest.json").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "is up to date" in capsys.readouterr().out
    for change in (["--block-size", "64"], ["--drop", "two"], ["--seed", "1"], ["--no-filter"]):
        assert main([*arguments, *change]) == 1
        assert "pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "d/manifest.json").read_bytes() == before
    assert main([*arguments, "--block-size", "64", "--overwrite"]) == 0
    write_lines(source, pairs(6))
    with pytest.raises(ShardError, match="other inputs"):
        prepare_chat(tmp_path / "d", [str(source)], block_size=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--source", "nowhere"],
            "source nowhere does not exist; give a file, a folder or one of stdlib, stdlib-pairs",
        ),
        (["--source", "alpaca=nowhere"], "nowhere does not exist"),
        (["--source", str(ROOT / "README.md")], r"README\.md is of no kind .* \.jsonl"),
        (["--source", str(ROOT / "train")], "train has no file that holds conversations"),
        (["--block-size", "0"], "--block-size 0 is below 1"),
        (["--val-fraction", "1"], r"--val-fraction 1\.0 is outside"),
        (["--workers", "2"], "--workers is an option of --format text"),
        (["--text-key", "x"], "--text-key is an option of --format text"),
        (["--format", "text", "--no-filter"], "--no-filter is an option of --format chat"),
        (["--format", "text", "--block-size", "9"], "--block-size is an option of --format chat"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert main(["--format", "chat", "--out", str(tmp_path / "d"), *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_json_file_that_is_no_list_is_reported(tmp_path):
    (tmp_path / "a.json").write_text('{"messages": []}')
    with pytest.raises(ValueError, match=r"no conversation is left .* \(1 unreadable\)"):
        prepare_chat(tmp_path / "d", [str(tmp_path / "a.json")])


# --- the standard library -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    return ensure_default_chat(tmp_path_factory.mktemp("data") / "stdlib-chat")


@pytest.fixture(scope="module")
def things():
    return {thing.name: thing for thing in documented()}


def test_the_standard_library_gives_some_thousand_conversations(stdlib, capsys):
    counts = stdlib.manifest["counts"]
    assert 8_000 < counts["conversations"] < 20_000
    assert sum(counts["changed"].values()) < 100 and set(counts["dropped"]) <= {"question too long"}
    assert 0.04 < counts["val_share"] < 0.06
    ensure_default_chat(stdlib.path)
    assert capsys.readouterr().out == "", "what is there is opened, not made again"
    rows = texts(stdlib.path)
    assert sum(row.count("Human:") > 1 for row in rows) > 500, "some have several turns"
    assert any("Assistant: Remove any common leading whitespace" in row for row in rows + texts(stdlib.path, "val"))
    assert not any(re.search(r"/usr|/home|0x[0-9a-f]{6}", row) for row in rows)
    sampler = RowSampler([stdlib], 512, seed=0, tokens_per_batch=4096)
    share = sampler.padding_share(sampler.rows_per_epoch * 65 // 4096)
    print(f"{len(rows):,} conversations, {sampler.answer_tokens:,} answer tokens, padding {share:.1%}")
    assert share < 0.05


def test_what_a_validation_conversation_asks_about_is_in_no_training_conversation(stdlib, things):
    subjects = [thing for thing in things.values() if thing.kind == "function" and thing.owner == "textwrap"]
    train, val = "\n".join(texts(stdlib.path)), "\n".join(texts(stdlib.path, "val"))
    for thing in subjects:
        asked = [re.search(rf"\b{re.escape(thing.name)}\b", side) is not None for side in (train, val)]
        assert sum(asked) == 1, thing.name
    assert len(subjects) > 3


def test_the_standard_library_gives_the_same_conversations_in_another_process(stdlib, tmp_path):
    code = "from hrm_model.training.chat_sources import StdlibChat; print(StdlibChat().fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"import asyncio, ctypes, sqlite3; {code}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == stdlib.manifest["source"]["parts"][0]["sha256"]


def test_signatures_and_summaries_are_those_of_the_library(things):
    assert things["json.dumps"].signature.startswith("(obj, *, skipkeys=False, ")
    assert things["math.cos"].signature == "(x, /)"
    assert things["json.encoder.JSONEncoder.encode"].signature == "(o)", "self is not passed"
    assert things["bytes.lstrip"].signature == "(bytes=None, /)"
    assert "BaseExceptionGroup.exceptions" not in things, "attributes are not asked about"
    assert things["json.dumps"].about == "Serialize obj to a JSON formatted str."
    assert things["os.getpid"].kind == "function" and things["textwrap"].kind == "module"
    assert np.mean([len(thing.about) for thing in things.values()]) < 120


def test_the_standard_librarys_parts_are_its_conversations_by_turns(tmp_path):
    """Together they are the whole, and every recipe's model can read them."""
    whole = stdlib_conversations()
    by_turns = {"stdlib-pairs": 0, "stdlib-turns": 0}
    for _, messages in whole:
        by_turns["stdlib-pairs" if len(messages) == 2 else "stdlib-turns"] += 1
    for name, count in by_turns.items():
        source = open_sources([name])[0]
        assert len(list(source.items(ChatReport()))) == count > 1000
    found = ensure_default_chat(tmp_path / "turns", "stdlib-turns")
    assert found.manifest["options"]["block_size"] == SMALLEST_BLOCK == HRMConfig.preset("tiny").block_size
    assert found.conversations("train").lengths.max() <= SMALLEST_BLOCK + 1
