"""train/prepare.py --mixture: budgets, split, resume, errors. Without the hub: sources are in memory or files."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from mixture_helpers import COMMIT, CORPORA, Memory, contents, documents, ids_of, jsonl, prepare, some_texts, write

from hrm_model.tokenizer import get_tokenizer
from hrm_model.training.corpora import PUBLISHED, Corpus, CorpusError, budgets, chosen
from hrm_model.training.mixture import prepare_mixture
from hrm_model.training.partial import PartialDataset, work_of
from hrm_model.training.prepare import prepare as prepare_text
from hrm_model.training.sampler import Sampler
from hrm_model.training.shards import ShardError, open_dataset
from hrm_model.training.stream_split import StreamSplit
from train.prepare import main

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = get_tokenizer()
ALL = Corpus("prose", "somebody/prose", None, "text", 10**9, revision=COMMIT)


@pytest.fixture
def sources():
    return {"prose": Memory(some_texts(120, 1)), "code": Memory(some_texts(60, 2))}


# --- budgets --------------------------------------------------------------------------------------


def test_the_published_budget_is_ten_billion_tokens_of_seven_corpora():
    assert sum(corpus.tokens for corpus in PUBLISHED) == 10_000_000_000
    assert len({corpus.name for corpus in PUBLISHED}) == 7
    asked = budgets(PUBLISHED, 1_000_000)
    assert asked["fineweb"] == asked["wikipedia"] == 300_000
    assert asked["arxiv"] == 50_000 and sum(asked.values()) == 1_000_000


def test_corpora_are_chosen_by_name_and_from_a_name_on():
    names = [corpus.name for corpus in PUBLISHED]
    assert [c.name for c in chosen(PUBLISHED, ["c4", "fineweb"])] == ["fineweb", "c4"]
    assert [c.name for c in chosen(PUBLISHED, start_from="codeparrot")] == names[4:]
    with pytest.raises(ValueError, match="--only 'wiki' is no corpus of this mixture; it has fineweb, wikipedia, "):
        chosen(PUBLISHED, ["wiki"])
    with pytest.raises(ValueError, match="names nothing from --start-from arxiv on"):
        chosen(PUBLISHED, ["c4"], "arxiv")


def test_a_corpus_ends_with_the_document_that_reaches_its_budget(tmp_path, sources):
    summary = prepare(tmp_path, sources, val_fraction=0)
    for corpus, entry in zip(CORPORA, summary["corpora"], strict=True):
        texts = documents(tmp_path / corpus.name, "train")
        assert texts == sources[corpus.name].texts[: len(texts)]
        lengths = [len(TOKENIZER.encode(text)) + 1 for text in texts]
        assert sum(lengths[:-1]) < corpus.tokens <= sum(lengths) == entry["train_tokens"]
        assert entry["documents"] == len(texts)
        assert entry["bytes_per_token"] == round(sum(len(text.encode()) for text in texts) / sum(lengths), 4)


def test_a_corpus_that_is_shorter_than_its_budget_is_taken_whole(tmp_path, sources, capsys):
    summary = prepare(tmp_path, sources, max_tokens=400_000, only=["code"])
    assert summary["corpora"][0]["documents"] == 60
    assert summary["totals"]["missing"] == ["prose"]
    assert "of 100,000 asked: that is all of it" in capsys.readouterr().err


# --- text and split -------------------------------------------------------------------------------


def test_text_is_kept_as_it_is_with_an_end_of_text_after_each_document_alone(tmp_path):
    texts = ["\n  def f():\n\treturn 1\r\n\n\n", " ", "a<|endoftext|>b", "x" * 30, "  two  spaces  "] * 20
    prepare(tmp_path, {"prose": Memory(texts)}, [ALL], val_fraction=0.2)
    train, val = documents(tmp_path / "prose", "train"), documents(tmp_path / "prose", "val")
    assert sorted(train + val) == sorted(texts) and val
    assert (ids_of(tmp_path / "prose", "train") == TOKENIZER.eot).sum() == len(train)


def test_documents_without_text_are_counted_and_leave_no_end_of_text(tmp_path):
    summary = prepare(tmp_path, {"prose": Memory(["one", "", None, "two", "", "three", None])}, [ALL], val_fraction=0)
    entry = summary["corpora"][0]
    assert documents(tmp_path / "prose", "train") == ["one", "two", "three"]
    assert (entry["documents"], entry["empty"], entry["unusable"]) == (3, 2, 2)
    with pytest.raises(CorpusError, match=r"prose: there is no document with text \(1 empty, 1 unusable\)"):
        prepare(tmp_path / "none", {"prose": Memory(["", None])}, [ALL])


def test_a_long_document_is_tokenised_as_if_in_one_piece_and_on_one_side(tmp_path):
    long = "internationalisation,\n\n\n    electroencephalography " * 50_000
    prepare(tmp_path, {"prose": Memory(["short", long, "end"])}, [ALL], val_fraction=0)
    expected = [i for text in ("short", long, "end") for i in [*TOKENIZER.encode(text), TOKENIZER.eot]]
    np.testing.assert_array_equal(ids_of(tmp_path / "prose", "train"), expected)


@pytest.mark.parametrize("fraction", [0.0005, 0.013, 0.3, 0.5, 0.9, 0.999])
def test_the_share_of_val_is_met_within_one_document_at_every_moment(fraction):
    lengths = np.random.default_rng(0).geometric(1 / 700, 20_000).tolist()
    lengths[5000] = 300_000  # one that is far too long
    split, longest = StreamSplit(fraction, seed=3), 0
    for number, length in enumerate(lengths):
        split.add(split.side(number), length)
        longest = max(longest, length)
        assert -longest < split.tokens["val"] - fraction * split.total < longest
    assert split.total == sum(lengths)
    assert not any(StreamSplit(0, seed=3).side(number) == "val" for number in range(100))


def test_what_validates_depends_on_the_seed_but_not_on_the_documents_own_length():
    def side_of_last(seed, last):
        split = StreamSplit(0.01, seed)
        sides = []
        for number in range(2000):
            sides.append(split.side(number))
            split.add(sides[-1], last if number == 1999 else 100)
        return sides

    assert side_of_last(0, 1) == side_of_last(0, 10**9) != side_of_last(1, 1)


def test_a_split_goes_on_from_its_state():
    whole, cut = StreamSplit(0.05, 0), StreamSplit(0.05, 0)
    for number in range(3000):
        cut = StreamSplit(0.05, 0, json.loads(json.dumps(cut.state())))
        side = whole.side(number)
        assert cut.side(number) == side
        for split in (whole, cut):
            split.add(side, 1 + number * 7919 % 500)


# --- datasets -------------------------------------------------------------------------------------


def test_each_corpus_is_a_dataset_that_training_mixes_by_size(tmp_path, sources):
    prepare(tmp_path, sources, shard_tokens=500, val_fraction=0.05)
    datasets = [open_dataset(path, verify=True) for path in sorted(tmp_path.glob("*/"))]
    assert [dataset.path.name for dataset in datasets] == ["code", "prose"]
    for dataset in datasets:
        shards = dataset.manifest["splits"]["train"]["shards"]
        assert [shard["tokens"] for shard in shards[:-1]] == [500] * (len(shards) - 1) and shards[-1]["tokens"] <= 500
        assert dataset.manifest["source"]["revision"] == COMMIT
    sampler = Sampler(datasets, block_size=8, seed=0)
    inputs, targets, _ = sampler.batch(0, 64)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["code", "prose", "summary.json", "summary.md"]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    texts = [text * 4000 for text in some_texts(25, 5)]
    corpus = Corpus("prose", "somebody/prose", None, "text", 1_500_000, revision=COMMIT)
    for workers in (1, 2):
        prepare(tmp_path / f"{workers}", {"prose": Memory(texts)}, [corpus], workers=workers, val_fraction=0.1)
    assert contents(tmp_path / "1" / "prose") == contents(tmp_path / "2" / "prose")


def test_the_summary_has_every_corpus_that_is_there_however_they_were_made(tmp_path, sources):
    prepare(tmp_path, sources, only=["code"])
    summary = prepare(tmp_path, sources, start_from="prose", val_fraction=0.0005)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    prose, code = summary["corpora"]
    assert code["up_to_date"] and code["seconds"] is not None
    assert (prose["share_asked"], code["share_asked"]) == (0.75, 0.25)
    assert prose["share"] + code["share"] == pytest.approx(1)
    totals = summary["totals"]
    assert totals["train_tokens"] == prose["train_tokens"] + code["train_tokens"] and not totals["missing"]
    table = (tmp_path / "summary.md").read_text()
    assert f"| prose | somebody/prose | {COMMIT} |" in table and f"{prose['documents']:,}" in table


def test_another_dataset_in_the_place_of_a_corpus_is_missing_in_the_summary(tmp_path, sources):
    (tmp_path / "some.txt").write_text("hello there\n" * 100)
    prepare_text(tmp_path / "out" / "code", [str(tmp_path / "some.txt")], workers=1)
    summary = prepare(tmp_path / "out", sources, only=["prose"])
    assert [entry["name"] for entry in summary["corpora"]] == ["prose"] and summary["totals"]["missing"] == ["code"]


def test_a_finished_corpus_is_left_alone(tmp_path, sources, capsys):
    prepare(tmp_path, sources)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    started = sources["prose"].starts.copy()
    capsys.readouterr()
    prepare(tmp_path, sources)
    assert "prose is up to date" in capsys.readouterr().err
    assert sources["prose"].starts == started
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "--seed 0, now 1;"),
        ({"val_fraction": 0.1}, r"--val-fraction 0.0005, now 0.1;"),
        ({"max_tokens": 2000}, r"tokens \(--max-tokens\) 3000, now 1500;"),
        ({"shard_tokens": 50, "seed": 2}, "--seed 0, now 2; --shard-tokens 100000000, now 50;"),
        ({"revisions": {"prose": "f" * 40}}, f"revision {COMMIT}, now {'f' * 40};"),
    ],
)
def test_other_options_are_named_both_for_finished_and_for_unfinished_work(tmp_path, sources, change, message):
    prepare(tmp_path / "done", sources, only=["prose"])
    failing = {"prose": Memory(sources["prose"].texts, [(30, ValueError("an error that lasts"))])}
    with pytest.raises(CorpusError):
        prepare(tmp_path / "begun", failing, only=["prose"])
    for out, what in (("done", "was made with "), ("begun", "was begun with ")):
        with pytest.raises(ShardError, match=what + message + ".*--overwrite"):
            prepare(tmp_path / out, sources, only=["prose"], **change)
        prepare(tmp_path / out, sources, only=["prose"], overwrite=True, **change)
    assert contents(tmp_path / "done" / "prose") == contents(tmp_path / "begun" / "prose")


def test_overwrite_keeps_what_matches_and_replaces_what_is_damaged(tmp_path, sources):
    prepare(tmp_path, sources)
    before = contents(tmp_path / "prose")
    changed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "code").iterdir()}
    shard = tmp_path / "prose" / "train-00000.bin"
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])
    prepare(tmp_path, sources, overwrite=True)
    assert contents(tmp_path / "prose") == before
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "code").iterdir()} == changed


def test_a_damaged_dataset_names_the_command_that_repairs_it(tmp_path, sources):
    prepare(tmp_path, sources)
    (tmp_path / "prose" / "train-00000.bin").write_bytes(b"\0\0")
    with pytest.raises(ShardError, match=rf"--mixture own --only prose --out {tmp_path} --overwrite"):
        open_dataset(tmp_path / "prose")


# --- resume ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from mixture_helpers import Memory, prepare, some_texts
from hrm_model.training import mixture_books
from hrm_model.training.corpora import Corpus

mixture_books.PIECE_CHARS = 30_000  # many batches, each with a save
corpora = [Corpus(n, n, None, "text", 10**9, revision="0" * 40) for n in ("one", "two")]
sources = {{c.name: Memory(some_texts(5000, seed=i)) for i, c in enumerate(corpora)}}
out, left = sys.argv[1], int(sys.argv[2])

def crash(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
        if out in str(arguments[0]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(crash)
prepare(out, sources, corpora, shard_tokens=70_001, val_fraction=0.01)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_kill_9_before_any_file_operation_changes_nothing_about_the_result(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(ROOT / "tests")))

    def life(out, operations):
        command = [sys.executable, str(script), str(out), str(operations)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode == 0

    assert life(tmp_path / "whole", 10**9)
    draw, kills = random.Random(0), 0
    while not life(tmp_path / "cut", draw.randrange(1, 80)):
        kills += 1
    assert kills > 4
    for name in ("one", "two"):
        files = contents(tmp_path / "whole" / name)
        assert len(files) > 4 and contents(tmp_path / "cut" / name) == files
    assert not list((tmp_path / "cut").glob(".*"))


def test_what_was_written_after_the_last_save_is_cut_off(tmp_path, sources):
    prepare(tmp_path / "whole", sources, only=["prose"], shard_tokens=500)
    texts = sources["prose"].texts
    with pytest.raises(CorpusError):
        prepare(tmp_path / "cut", {"prose": Memory(texts, [(30, ValueError("x"))])}, only=["prose"], shard_tokens=500)
    work = work_of(tmp_path / "cut" / "prose") / "dataset"
    newest = sorted(work.glob("train-*.bin"))[-1]
    newest.write_bytes(newest.read_bytes() + b"\1\2\3")
    (work / "train-00099.bin").write_bytes(b"a shard begun later")
    (work / "manifest.json").write_text("{}")
    prepare(tmp_path / "cut", sources, only=["prose"], shard_tokens=500)
    assert contents(tmp_path / "cut" / "prose") == contents(tmp_path / "whole" / "prose")


def _shift_cursor(work):
    state = json.loads((work / "state.json").read_text())
    state["state"]["cursor"]["after"]["next"] = 3  # one changed digit: documents would come twice
    (work / "state.json").write_text(json.dumps(state))


def _zero(file):
    data = file.read_bytes()
    file.write_bytes(data[:10] + bytes(20) + data[30:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda work: (work / "state.json").write_text("{"),
        _shift_cursor,
        lambda work: (work / "dataset" / "train-00000.bin").unlink(),
        lambda work: _zero(work / "dataset" / "train-00000.bin"),  # full
        lambda work: _zero(sorted(work.glob("dataset/train-*.bin"))[-1]),  # begun
    ],
    ids=["state cut", "cursor altered", "shard gone", "full shard zeroed", "begun shard zeroed"],
)
def test_unfinished_work_that_is_damaged_is_an_error_that_overwrite_repairs(tmp_path, sources, damage):
    options = {"only": ["prose"], "shard_tokens": 900}
    failing = {"prose": Memory(sources["prose"].texts, [(30, ValueError("x"))])}
    with pytest.raises(CorpusError):
        prepare(tmp_path, failing, **options)
    assert len(list(work_of(tmp_path / "prose").glob("dataset/train-*.bin"))) > 1
    damage(work_of(tmp_path / "prose"))
    with pytest.raises(ShardError, match=r"unfinished work for .*prose is damaged .*--overwrite"):
        prepare(tmp_path, sources, **options)
    prepare(tmp_path, sources, overwrite=True, **options)
    prepare(tmp_path / "whole", sources, **options)
    assert contents(tmp_path / "prose") == contents(tmp_path / "whole" / "prose")


def test_two_processes_do_not_prepare_the_same_corpus(tmp_path, sources):
    pytest.importorskip("fcntl")
    with (
        PartialDataset(tmp_path / "prose", 100),
        pytest.raises(ShardError, match=r"another process is preparing .*prose"),
    ):
        prepare(tmp_path, sources, only=["prose"])


def test_the_lock_of_a_process_that_has_just_finished_is_none(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock = fcntl.flock

    def late(file, operation):
        shutil.rmtree(work_of(tmp_path / "prose"))  # between opening the file and locking it
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ShardError, match="another process is preparing"), PartialDataset(tmp_path / "prose", 100):
        pass


def test_what_is_to_replace_a_finished_corpus_stays_when_the_old_command_is_given_again(tmp_path, sources):
    prepare(tmp_path, sources, only=["prose"])
    failing = {"prose": Memory(sources["prose"].texts, [(30, ValueError("x"))])}
    with pytest.raises(CorpusError):
        prepare(tmp_path, failing, only=["prose"], seed=1, overwrite=True)
    prepare(tmp_path, sources, only=["prose"])  # up to date
    sources["prose"].starts.clear()
    prepare(tmp_path, sources, only=["prose"], seed=1, overwrite=True)
    assert sources["prose"].starts == [0] and open_dataset(tmp_path / "prose").manifest["options"]["--seed"] == 1


@pytest.mark.skipif(os.name != "posix", reason="limits on file size")
def test_a_full_disk_leaves_work_that_goes_on(tmp_path):
    """A limit on file size stands for the full disk: the same path, another number."""
    assert errno.EFBIG  # what the limit gives where Python ignores the signal
    write(tmp_path / "in" / "a.jsonl", some_texts(3000, 1))
    arguments = ["--mixture", "published", "--only", "c4", "--local", f"c4={tmp_path / 'in'}", "--workers", "1"]
    arguments += ["--max-tokens", "500000", "--out"]
    code = textwrap.dedent("""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        from train.prepare import main
        sys.exit(main(sys.argv[1:]))
    """)
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "c4: file too large" in last and "bytes are free" in last and "the same command goes on" in last
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out" / "c4") == contents(tmp_path / "whole" / "c4")


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in" / "a.jsonl", some_texts(300, 1))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrm_model.training.mixture.LocalDocuments.read", interrupted)
    arguments = ["--mixture", "published", "--only", "c4", "--local", f"c4={tmp_path / 'in'}", "--workers", "1"]
    arguments += ["--max-tokens", "50000", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(arguments) == 0


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "5"], "--max-tokens goes with --mixture published"),
        (["--mixture", "published", "--source", "README.md"], "--source does not go with --mixture"),
        (["--mixture", "published", "--val-tokens", "5"], "--val-tokens does not go with --mixture"),
        (["--mixture", "published", "--text-key", "x"], "--text-key does not go with --mixture"),
        (["--mixture", "published", "--format", "chat"], "--format does not go with --mixture"),
        (["--mixture", "published", "--drop", "word"], "--drop does not go with --mixture"),
        (["--mixture", "published", "--block-size", "9"], "--block-size does not go with --mixture"),
        (["--mixture", "published", "--no-filter"], "--no-filter does not go with --mixture"),
        (["--mixture", "published", "--max-tokens", "0"], "--max-tokens 0 is below 1"),
        (["--mixture", "published", "--only", "fineweb,wiki"], "'wiki' is no corpus of this mixture; it has fineweb"),
        (["--mixture", "published", "--start-from", "x"], "--start-from 'x' is no corpus"),
        (["--mixture", "published", "--local", "fineweb"], "--local 'fineweb' is not NAME=VALUE"),
        (["--mixture", "published", "--local", "x=y"], "--local 'x' is no corpus"),
        (["--mixture", "published", "--revision", "x=y"], "--revision 'x' is no corpus"),
        (["--mixture", "published", "--only", "c4", "--local", "c4=gone"], "--local c4=gone does not exist"),
        (["--mixture", "published", "--val-fraction", "1"], r"--val-fraction 1\.0 is outside"),
        (["--mixture", "published", "--workers", "0"], "--workers 0 is below 1"),
        (["--mixture", "published", "--shard-tokens", "0"], "--shard-tokens 0 is below 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)
    assert not list(tmp_path.iterdir())


def test_the_command_prepares_local_files_and_ends_with_json(tmp_path, capsys):
    (tmp_path / "fineweb.jsonl").write_bytes(jsonl(some_texts(400, 1)))
    (tmp_path / "codeparrot.jsonl").write_bytes(jsonl(some_texts(400, 2), "content"))
    arguments = ["--mixture", "published", "--only", "codeparrot,fineweb", "--max-tokens", "20000", "--workers", "1"]
    for name in ("fineweb", "codeparrot"):
        arguments += ["--local", f"{name}={tmp_path / name}.jsonl"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--val-fraction", "0.02"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {entry["name"]: entry["tokens_asked"] for entry in summary["corpora"]} == {
        "fineweb": 6000,
        "codeparrot": 2000,
    }
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    for entry in summary["corpora"]:
        total = entry["train_tokens"] + entry["val_tokens"]
        assert entry["val_tokens"] and abs(entry["val_tokens"] - 0.02 * total) < 200  # the longest document


def test_a_mixture_of_ones_own_needs_no_catalogue(tmp_path):
    write(tmp_path / "in.jsonl", some_texts(50), "body")
    mine = [Corpus("mine", "nowhere", None, "body", 500)]
    summary = prepare_mixture(tmp_path / "out", mine, local={"mine": [tmp_path / "in.jsonl"]}, workers=1)
    assert summary["totals"]["train_tokens"] >= 450
