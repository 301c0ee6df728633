"""train/prepare.py: from text files, JSON lines and the standard library to a dataset, as a user runs it."""

import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from hrm_model.tokenizer import get_tokenizer
from hrm_model.training.prepare import choose_validation, ensure_default_dataset, prepare
from hrm_model.training.shards import ShardError, open_dataset
from hrm_model.training.sources import FileSource, Report, StdlibSource

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "prepare.py"
TOKENIZER = get_tokenizer()


def run(*arguments):
    """Call the script's main() in this process; returns its exit code."""
    spec = importlib.util.spec_from_file_location("train_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def documents(path, split):
    """The texts of a split, cut at its end-of-text ids."""
    part = open_dataset(path, verify=True).split(split)
    ids = part.read(0, len(part))
    if not len(ids):
        return []
    assert ids[-1] == TOKENIZER.eot
    pieces = np.split(ids, np.flatnonzero(ids == TOKENIZER.eot) + 1)[:-1]
    return [TOKENIZER.decode(piece[:-1]) for piece in pieces]


def write_files(folder, texts):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return folder


def some_texts(n):
    draw = np.random.default_rng(0)
    words = ["alpha", " beta", "\n", "\n\n    ", "42", " é", "漢字", "😀", "\t", "don't"]
    return [f"document {i}: " + "".join(draw.choice(words, draw.integers(1, 200))) for i in range(n)]


# --- documents ------------------------------------------------------------------------------------


def test_every_document_is_on_one_side_whole_and_unchanged(tmp_path):
    texts = some_texts(60)
    texts[3] = "\r\n  white space kept \t\r\n\n\n"
    texts[4] = " "
    texts[5] = "a<|endoftext|>b is no end of text"
    source = write_files(tmp_path / "in", texts)
    assert run("--source", source, "--out", tmp_path / "d", "--val-fraction", 0.2, "--shard-tokens", 100) == 0
    train, val = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert train == [text for text in texts if text in set(train)]  # in order
    assert val == [text for text in texts if text in set(val)]
    assert sorted(train + val) == sorted(texts)
    splits = open_dataset(tmp_path / "d").manifest["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (len(train), len(val))
    assert len(val) > 5


def test_the_validation_split_has_the_size_asked_for(tmp_path):
    # 2 tokens each: a letter and the end
    source = write_files(tmp_path / "in", ["abcdefghij"[i % 10] for i in range(100)])
    for asked, expected in [(2, 2), (20, 20), (33, 32), (198, 198), (199, 198)]:
        summary = prepare(tmp_path / f"{asked}", [source], val_tokens=asked, workers=1)
        assert summary["val_tokens"] == expected
        assert summary["train_tokens"] == 200 - expected
    assert prepare(tmp_path / "half", [source], val_fraction=0.5)["val_tokens"] == 100
    assert prepare(tmp_path / "default", [source])["val_tokens"] == 10
    assert prepare(tmp_path / "none", [source], val_fraction=0)["val_tokens"] == 0


def test_documents_are_chosen_to_come_closest_to_the_target_and_by_the_seed():
    lengths = np.random.default_rng(0).integers(5, 5000, 500)
    for target in (10, 1000, 50_000, int(lengths.sum()) // 2):
        chosen = choose_validation(lengths, target, seed=0)
        got = int(lengths[chosen].sum())
        assert abs(got - target) <= (2 if target > 10 else 8)  # 18 is the shortest
        assert 0 < chosen.sum() < 500
        np.testing.assert_array_equal(chosen, choose_validation(lengths, target, seed=0))
    seeds = [choose_validation(lengths, 50_000, seed) for seed in (0, 1)]
    assert not np.array_equal(*seeds)
    assert not choose_validation(lengths, 0, seed=0).any()
    assert (~choose_validation(lengths, int(lengths.sum()) - 1, seed=0)).any()
    assert choose_validation(np.array([10, 1000]), 990, seed=0).tolist() == [False, True]
    assert choose_validation(np.array([10, 1000]), 1009, seed=0).tolist() == [False, True]
    assert choose_validation(np.array([1000, 900]), 1, seed=0).tolist() == [False, True]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    texts = [text * 400 for text in some_texts(12)]  # several batches
    source = write_files(tmp_path / "in", texts)
    for workers in (1, 2):
        assert run("--source", source, "--out", tmp_path / f"{workers}", "--workers", workers) == 0
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()
    assert sorted(documents(tmp_path / "2", "train") + documents(tmp_path / "2", "val")) == sorted(texts)


def test_a_long_document_is_tokenised_as_if_in_one_piece(tmp_path):
    text = "internationalisation,\n\n\n    electroencephalography " * 80_000 + " " * 1_500_000 + "end"
    assert len(text) > 5_000_000
    source = write_files(tmp_path / "in", [text, "short"])
    prepare(tmp_path / "d", [source], val_tokens=2, workers=1)
    split = open_dataset(tmp_path / "d").split("train")
    np.testing.assert_array_equal(split.read(0, len(split)), [*TOKENIZER.encode(text), TOKENIZER.eot])


def test_one_document_is_cut_where_a_line_ends(tmp_path, capsys):
    lines = "".join(f"line {i}\n" for i in range(200))
    source = write_files(tmp_path / "in", [lines])
    summary = prepare(tmp_path / "d", [source], val_fraction=0.1, workers=1)
    (train,), (val,) = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert train + val == lines
    assert train.endswith("\n")
    assert abs(summary["val_share"] - 0.1) < 0.005
    out = capsys.readouterr().out
    assert re.search(r"one document only: cut at the end of a line, the last \d+ tokens", out)


def test_one_document_without_lines_is_cut_between_characters(tmp_path):
    source = write_files(tmp_path / "in", ["漢字" * 50])
    prepare(tmp_path / "d", [source], val_fraction=0.3, workers=1)
    (train,), (val,) = documents(tmp_path / "d", "train"), documents(tmp_path / "d", "val")
    assert train + val == "漢字" * 50
    with pytest.raises(ValueError, match="one document of one token"):
        prepare(tmp_path / "e", [write_files(tmp_path / "one", ["a"])], val_tokens=1, workers=1)


def test_empty_documents_are_skipped_and_counted(tmp_path):
    source = write_files(tmp_path / "in", ["one", "", "two", "", "three"])
    summary = prepare(tmp_path / "d", [source], workers=1)
    assert (summary["documents"], summary["empty"], summary["problems"]) == (3, 2, 0)
    with pytest.raises(ValueError, match=r"no document in .*2 empty"):
        prepare(tmp_path / "e", [write_files(tmp_path / "void", ["", ""])], workers=1)
    assert not (tmp_path / "e").exists()


# --- files ----------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_and_only_for_known_files(tmp_path):
    folder = tmp_path / "in"
    (folder / "b" / ".hidden").mkdir(parents=True)
    for name in ("b/2.md", "b.txt", "a.TXT", "b/1.py", "c.bin", ".d.txt", "b/.hidden/e.txt", "b/note"):
        (folder / name).write_text(name)
    (folder / "lines.jsonl").write_text('{"text": "line"}\n')
    (tmp_path / "note").write_text("named, so of any suffix")
    prepare(tmp_path / "d", [folder, tmp_path / "note", folder / "a.TXT"], val_tokens=0, workers=1)
    expected = ["a.TXT", "b.txt", "b/1.py", "b/2.md", "line", "named, so of any suffix"]
    assert documents(tmp_path / "d", "train") == expected


def test_broken_lines_are_reported_with_their_number_and_do_not_stop_the_rest(tmp_path, capsys):
    lines = [
        '{"text": "first"}', "{broken", '{"body": "x"}', '{"text": 5}', '["text"]', "", "\ud800",
        "[" * 100_000, '{"text": ""}', '{"text": "l\\ud800ne\\r\\n"}',
    ]  # fmt: skip
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    assert run("--source", file, "--out", tmp_path / "d", "--val-tokens", 0, "--workers", 1) == 0
    assert documents(tmp_path / "d", "train") == ["first", "l\ufffdne\r\n"]
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert (summary["documents"], summary["problems"], summary["empty"]) == (2, 6, 1)
    for number, what in [(2, "property name"), (3, r"no key 'text', only \['body'\]"), (4, "is a int"),
                         (5, "JSON list"), (7, "utf-8"), (8, "")]:  # fmt: skip
        assert re.search(rf"skipped {re.escape(str(file))}:{number}: .*{what}", err)
    assert err.count("skipped") == 6


def test_gzipped_lines_and_another_key(tmp_path, capsys):
    data = gzip.compress(b"".join(b'{"body": "document %d"}\n' % i for i in range(2000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    summary = prepare(tmp_path / "d", [tmp_path / "a.jsonl.gz"], text_key="body", workers=1)
    assert summary["documents"] == 2000
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    summary = prepare(tmp_path / "e", [tmp_path / "cut.jsonl.gz"], text_key="body", workers=1)
    assert 0 < summary["documents"] < 2000
    assert summary["problems"] == 1
    assert f"cut.jsonl.gz:{summary['documents'] + 1}: and what follows" in capsys.readouterr().err
    (tmp_path / "cut.jsonl.gz").write_bytes(b"")
    sources = [tmp_path / "a.jsonl.gz", tmp_path / "cut.jsonl.gz"]
    assert prepare(tmp_path / "f", sources, text_key="body", workers=1)["problems"] == 1


def test_a_file_that_is_not_utf8_is_reported_with_its_line(tmp_path, capsys):
    source = write_files(tmp_path / "in", ["good", "\ufeffwith a byte order mark"])
    (source / "latin.txt").write_bytes("one\ntwo\ncaf\xe9\n".encode("latin-1"))
    (source / "cut.txt").write_bytes("\n漢".encode()[:-1])
    summary = prepare(tmp_path / "d", [source], val_tokens=0, workers=1)
    assert documents(tmp_path / "d", "train") == ["good", "with a byte order mark"]
    assert summary["problems"] == 2
    err = capsys.readouterr().err
    assert re.search(r"latin\.txt:3: not UTF-8", err)
    assert re.search(r"cut\.txt:2: not UTF-8", err)


def test_many_problems_are_counted_but_not_all_printed(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 1000)
    summary = prepare(tmp_path / "d", [tmp_path / "a.jsonl"], val_tokens=0, workers=1)
    assert summary["problems"] == 1000
    err = capsys.readouterr().err
    assert err.count("skipped") == 20
    assert "further problems are only counted" in err


# --- runs -----------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_whatever_the_files_times_are(tmp_path, capsys):
    source = write_files(tmp_path / "in", some_texts(10))
    arguments = ("--source", source, "--out", tmp_path / "d")
    assert run(*arguments) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "d").iterdir()}
    os.utime(source / "0003.txt", (1, 1))
    capsys.readouterr()
    assert run(*arguments, "--workers", 1) == 0
    out = capsys.readouterr().out
    assert "is up to date" in out
    assert json.loads(out.splitlines()[-1])["up_to_date"] is True
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "d").iterdir()}


@pytest.mark.parametrize("change", ["content", "option"])
def test_other_inputs_do_not_replace_a_dataset_unless_told_to(tmp_path, capsys, change):
    source = write_files(tmp_path / "in", some_texts(10))
    arguments = ["--source", source, "--out", tmp_path / "d", "--workers", 1]
    assert run(*arguments) == 0
    before = (tmp_path / "d/manifest.json").read_text()
    if change == "content":
        (source / "0003.txt").write_text("something else")
    else:
        arguments += ["--seed", 1]
    assert run(*arguments) == 1
    assert re.search("error: .*/d was made from other inputs .* --overwrite", capsys.readouterr().err)
    assert (tmp_path / "d/manifest.json").read_text() == before
    assert run(*arguments, "--overwrite") == 0
    assert (tmp_path / "d/manifest.json").read_text() != before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["d", "in"]


def test_a_damaged_dataset_is_an_error_that_its_remedy_repairs(tmp_path, capsys):
    source = write_files(tmp_path / "in", some_texts(10))
    arguments = ("--source", source, "--out", tmp_path / "d", "--workers", 1)
    assert run(*arguments) == 0
    (tmp_path / "d/train-00000.bin").write_bytes(b"\0\0")
    assert run(*arguments) == 1
    remedy = re.search(r"python train/prepare\.py (.*)$", capsys.readouterr().err.strip())[1]
    assert run(*remedy.split()) == 0
    open_dataset(tmp_path / "d", verify=True)


def test_what_stands_in_the_way_is_named_and_left_alone(tmp_path, capsys):
    source = write_files(tmp_path / "in", some_texts(3))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for out, message in [
        ("file", "file is a file and a dataset is a directory"),
        ("folder", r"folder is in the way: it holds mine\.txt"),
        ("file/below", "cannot prepare .*below"),
    ]:
        assert run("--source", source, "--out", tmp_path / out, "--overwrite") == 1
        assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "gone.txt"], r"source gone\.txt does not exist"),
        (["--source", "no_text"], r"folder no_text has no file of a known kind .*\.txt"),
        (["--source", "in", "stdlib"], "stdlib cannot be mixed"),
        (["--source", "in", "--val-tokens", "99999999"], "leaves nothing to train on: the source has"),
        (["--source", "in", "--val-tokens", "-1"], "--val-tokens -1 is negative"),
        (["--source", "in", "--val-fraction", "1"], r"--val-fraction 1\.0 is outside 0 <= f < 1"),
        (["--source", "in", "--val-fraction", "nan"], "--val-fraction nan is outside"),
        (["--source", "in", "--val-fraction", "0.1", "--val-tokens", "5"], "give one"),
        (["--source", "in", "--workers", "0"], "--workers 0 is below 1"),
        (["--source", "in", "--shard-tokens", "0"], "--shard-tokens 0 is below 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "in", some_texts(3))
    (tmp_path / "no_text").mkdir()
    assert run(*arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*{message}", last)
    assert not list(tmp_path.glob("data/*"))


def test_without_out_the_dataset_is_named_after_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "novels", some_texts(3))
    assert run("--source", "novels", "--workers", 1) == 0
    assert open_dataset("data/novels").manifest["source"]["paths"] == ["novels"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_it_says_so_in_one_line_and_leaves_nothing(tmp_path, workers):
    command = [sys.executable, SCRIPT, "--out", tmp_path / "d", "--workers", str(workers)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        shown = ""
        while "tokenising" not in shown:
            shown += process.stderr.read(1)
            assert process.poll() is None, shown
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.count("\n") == 1  # "preparing", and no summary
    assert re.fullmatch(r"interrupted; .*/d is as it was", re.split(r"[\r\n]", err.strip())[-1])
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# --- the standard library -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """(dataset directory, what the command printed)"""
    out = tmp_path_factory.mktemp("data") / "stdlib"
    command = [sys.executable, SCRIPT, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_standard_library_becomes_a_dataset_without_arguments(stdlib):
    out, printed = stdlib
    dataset = open_dataset(out, verify=True)
    summary = json.loads(printed.splitlines()[-1])
    train, val = len(dataset.split("train")), len(dataset.split("val"))
    assert (train, val) == (summary["train_tokens"], summary["val_tokens"])
    assert train + val > 4_000_000
    assert abs(val / (train + val) - 0.05) < 0.0005
    assert summary["problems"] == 0
    assert dataset.manifest["source"]["python"] == f"CPython {sys.version.split()[0]}"
    dataset.check_vocab(50257)


def test_the_standard_library_is_its_topics_sources_and_c_docstrings_whole(stdlib):
    texts = StdlibSource(Report())._texts
    found = documents(stdlib[0], "train") + documents(stdlib[0], "val")
    assert sorted(found) == sorted(text for text in texts if text)
    library = Path(sysconfig.get_path("stdlib"))
    sources = [(library / name).read_bytes().decode() for name in ("textwrap.py", "json/decoder.py")]
    assert set(sources) <= set(texts)
    assert any(text.startswith('The "assert" statement') for text in texts)
    assert any("math.cos(x, /)\n\nReturn the cosine of x" in text for text in texts)
    assert (library / "pydoc_data/topics.py").read_bytes().decode() not in texts


def test_the_standard_library_gives_the_same_documents_in_another_process(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import asyncio, ctypes, sqlite3, unittest.mock
from hrm_model.training.sources import Report, StdlibSource
print(StdlibSource(Report()).fingerprint)
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == StdlibSource(Report()).fingerprint


def test_the_default_dataset_is_made_once(tmp_path, stdlib, capsys):
    dataset = ensure_default_dataset(tmp_path / "stdlib")
    assert dataset.manifest == open_dataset(stdlib[0]).manifest
    capsys.readouterr()
    assert ensure_default_dataset(tmp_path / "stdlib").manifest == dataset.manifest
    assert capsys.readouterr().out == ""
    (tmp_path / "stdlib/val-00000.bin").unlink()
    with pytest.raises(ShardError, match=r"--source stdlib .*--overwrite"):
        ensure_default_dataset(tmp_path / "stdlib")


def test_a_file_source_fingerprint_is_of_contents_not_places(tmp_path):
    a, b = write_files(tmp_path / "a", ["x", "y"]), write_files(tmp_path / "b", ["x", "y"])
    c = write_files(tmp_path / "c", ["y", "x"])
    prints = [FileSource([folder], "text", Report()).fingerprint for folder in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]
