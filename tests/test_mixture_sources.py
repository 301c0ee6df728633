"""Where the text of a corpus comes from: files in the hub's layouts, the hub's own library, and errors on the way."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
from mixture_helpers import COMMIT, Memory, contents, impatient, jsonl, prepare, some_texts, write

from hrm_model.training.corpora import Corpus, CorpusError
from hrm_model.training.documents import LocalDocuments
from hrm_model.training.hub import HubDocuments, resolve_revision
from hrm_model.training.mixture import prepare_mixture
from hrm_model.training.retry import Backoff, is_transient
from hrm_model.training.shards import ShardError

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Corpus("prose", "somebody/prose", None, "text", 10**9, revision=COMMIT)
LAYOUTS = [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet"]


def needs(layout):
    if layout.endswith(".zst"):
        pytest.importorskip("zstandard")
    if layout.endswith(".parquet"):
        pytest.importorskip("pyarrow")


class StatusError(Exception):
    """As HTTP libraries raise it: with a response that has a status."""

    def __init__(self, status):
        super().__init__(f"{status} from the server")
        self.response = type("Response", (), {"status_code": status})()


# --- local files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_documents_from_any_document_on(tmp_path, layout):
    needs(layout)
    texts = some_texts(50)
    for number, start in enumerate((0, 20, 35)):
        write(tmp_path / f"part-{number}{layout}", texts[start : start + (20, 15, 15)[number]])
    documents = LocalDocuments(CORPUS, [tmp_path])
    assert list(documents.read({})) == list(enumerate(texts))
    for stop in (1, 7, 19, 20, 21, 34, 35, 49, 50):
        reading = documents.read({})
        for _ in range(stop):
            next(reading)
        cursor = json.loads(json.dumps(documents.position()))
        assert list(LocalDocuments(CORPUS, [tmp_path]).read(cursor)) == list(enumerate(texts))[stop:]


def test_files_are_read_in_order_and_only_those_with_text(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl", "a.jsonl", ".hidden.jsonl", ".cache/c.jsonl", "b/dataset_infos.json"):
        write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("of no interest")
    assert [text for _, text in LocalDocuments(CORPUS, [tmp_path]).read({})] == ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]
    with pytest.raises(CorpusError, match=r"--local prose=.*README\.md is of no known kind; known are \.parquet"):
        LocalDocuments(CORPUS, [tmp_path / "README.md"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="has no file of a known kind"):
        LocalDocuments(CORPUS, [tmp_path / "empty"])


def test_rows_without_text_keep_their_number(tmp_path):
    lines = [{"text": "a"}, {"text": None}, {"text": 5}, {"text": ""}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(LocalDocuments(CORPUS, [tmp_path]).read({})) == [
        (0, "a"), (1, None), (2, None), (3, ""), (4, "b"), (5, None)
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_without_the_key_is_an_error_that_says_what_it_has(tmp_path, layout):
    needs(layout)
    write(tmp_path / f"a{layout}", ["x"], key="body")
    with pytest.raises(CorpusError, match=r"prose \(somebody/prose\): .* has no 'text', only id, body; pin .*--local"):
        list(LocalDocuments(CORPUS, [tmp_path]).read({}))


@pytest.mark.parametrize("layout", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_was_cut_is_an_error_that_names_it(tmp_path, layout):
    needs(layout)
    path = write(tmp_path / f"a{layout}", some_texts(500))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(CorpusError, match=rf"prose: .*a{layout}.* is damaged .*fetch the file again"):
        list(LocalDocuments(CORPUS, [tmp_path]).read({}))


def test_a_parquet_file_whose_text_is_not_utf8_is_damaged(tmp_path):
    needs(".parquet")
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet is damaged \('utf-8' codec can't decode"):
        list(LocalDocuments(CORPUS, [tmp_path]).read({}))


@pytest.mark.parametrize("layout", [".jsonl.gz", ".json.zst"])
def test_a_packed_file_without_a_byte_is_damaged(tmp_path, layout):
    needs(layout)
    write(tmp_path / f"a{layout}", [])
    assert list(LocalDocuments(CORPUS, [tmp_path]).read({})) == []  # no text takes some bytes
    (tmp_path / f"a{layout}").write_bytes(b"")
    with pytest.raises(CorpusError, match=rf"a{layout}:1 is damaged \(it is empty\)"):
        list(LocalDocuments(CORPUS, [tmp_path]).read({}))


def test_memory_does_not_follow_how_well_a_file_was_packed(tmp_path):
    needs(".zst")
    write(tmp_path / "a.jsonl.zst", ["x" * 1_000_000] * 200)
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 30_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in LocalDocuments(CORPUS, [tmp_path]).read({})) == 200
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_rows_of_a_parquet_file_are_read_by_their_size(tmp_path):
    needs(".parquet")
    import pyarrow
    import pyarrow.parquet

    # Random, as otherwise the column's size in the file says nothing about the texts'.
    texts = [np.random.default_rng(i).bytes(1_000_000).hex() for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", write_batch_size=1)
    before = pyarrow.total_allocated_bytes()
    seen = [
        (text == texts[number], pyarrow.total_allocated_bytes() - before)
        for number, text in LocalDocuments(CORPUS, [tmp_path]).read({})
    ]
    assert len(seen) == 40 and all(same for same, _ in seen)
    assert max(n_bytes for _, n_bytes in seen) < 50_000_000  # all of them take 80


@pytest.mark.parametrize("line", [b"{broken", b'["a list"]', b"\xff\xfe{}", b"[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["good"]) + line + b"\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2 is damaged"):
        list(LocalDocuments(CORPUS, [tmp_path]).read({}))


def test_a_mirror_is_known_by_its_files_not_by_its_place(tmp_path):
    prints = []
    for place, texts in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["x", "z"])):
        write(tmp_path / place / "1.jsonl", texts)
        prints.append(LocalDocuments(CORPUS, [tmp_path / place]).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("layout", [".parquet", ".json.gz", ".jsonl.zst"])
def test_a_dataset_is_the_same_from_every_layout(tmp_path, layout):
    needs(layout)
    texts = some_texts(300)
    write(tmp_path / "plain" / "a.jsonl", texts)
    write(tmp_path / "packed" / f"a{layout}", texts)
    for name in ("plain", "packed"):
        local = {"prose": [tmp_path / name]}
        prepare_mixture(tmp_path / "out" / name, [CORPUS], local=local, workers=1, val_fraction=0.05)
    files = [contents(tmp_path / "out" / name / "prose") for name in ("plain", "packed")]
    for found in files:
        del found["manifest.json"]
    assert files[0] == files[1]


# --- failures that pass, and those that last ------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("reset"), TimeoutError(), OSError(errno.EIO, "input/output error"), EOFError("cut"),
        IncompleteRead(b""), StatusError(429), StatusError(500), StatusError(503), StatusError(408),
    ],
)  # fmt: skip
def test_failures_that_pass_are_retried_from_the_document_they_struck(tmp_path, error):
    texts, slept = some_texts(200), []
    prepare(tmp_path / "whole", {"prose": Memory(texts)}, [CORPUS], val_fraction=0.1)
    source = Memory(texts, [(0, error), (70, error), (70, error), (150, error)])
    summary = prepare(tmp_path / "cut", {"prose": source}, [CORPUS], val_fraction=0.1, backoff=impatient(slept))
    assert contents(tmp_path / "cut" / "prose") == contents(tmp_path / "whole" / "prose")
    assert slept == [0.75, 0.75, 1.5, 0.75]
    assert summary["corpora"][0]["retries"] == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StatusError(401), r"401 from the server; log in .*\(hf auth login\).*--local prose=PATH"),
        (StatusError(404), r"404 from the server; check the repository and its revision \(--revision prose=.*--local"),
        (FileNotFoundError("gone"), "gone; check the repository"),
        (PermissionError("closed"), "closed; pin another revision"),
        (OSError(errno.ENOSPC, "no space left"), "no space left"),
        (KeyError("odd"), "KeyError: 'odd'; pin another revision"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "--revision prose=refs/convert/parquet",
        ),
    ],
)
def test_failures_that_last_end_at_once_with_corpus_repository_and_remedy(tmp_path, error, message):
    slept = []
    with pytest.raises(CorpusError, match=r"^prose \(somebody/prose\) at document 7: .*" + message):
        prepare(tmp_path, {"prose": Memory(some_texts(20), [(7, error)])}, [CORPUS], backoff=impatient(slept))
    assert not slept


def test_it_is_given_up_after_a_number_of_attempts_and_goes_on_later(tmp_path):
    texts, slept = some_texts(200), []
    source = Memory(texts, [(90, ConnectionError("down"))] * 12)
    with pytest.raises(CorpusError, match="at document 90: gave up after 12 attempts: ConnectionError: down; the same"):
        prepare(tmp_path / "cut", {"prose": source}, [CORPUS], val_fraction=0.1, backoff=impatient(slept))
    assert slept == [0.75 * min(120, 2**n) for n in range(11)]
    (state,) = tmp_path.glob("cut/.prose.partial/state.json")
    assert json.loads(state.read_text())["state"]["retries"] == 11
    again = Memory(texts)
    prepare(tmp_path / "cut", {"prose": again}, [CORPUS], val_fraction=0.1)
    prepare(tmp_path / "whole", {"prose": Memory(texts)}, [CORPUS], val_fraction=0.1)
    assert contents(tmp_path / "cut" / "prose") == contents(tmp_path / "whole" / "prose")


def test_with_workers_too_nothing_that_was_read_before_a_failure_is_lost(tmp_path):
    texts = [text * 3000 for text in some_texts(25, 5)]
    with pytest.raises(CorpusError, match="at document 20"):
        prepare(tmp_path, {"prose": Memory(texts, [(20, KeyError("x"))])}, [CORPUS], workers=2)
    (state,) = tmp_path.glob(".prose.partial/state.json")
    state = json.loads(state.read_text())["state"]
    assert (state["cursor"]["next"], state["documents"]) == (20, 20)


def test_delays_double_up_to_a_limit_and_half_of_each_is_drawn():
    assert [Backoff(draw=lambda: 0.0).delay(n) for n in (1, 2, 3, 20)] == [0.5, 1, 2, 60]
    assert Backoff(draw=lambda: 0.5).delay(1) == 0.75


def test_the_first_error_in_the_chain_that_says_something_decides():
    def chained(outer, inner):
        outer.__cause__ = inner
        return outer

    assert is_transient(chained(RuntimeError("wrapped"), StatusError(502)))
    assert not is_transient(chained(RuntimeError("wrapped"), StatusError(403)))
    assert is_transient(chained(ConnectionError("x"), FileNotFoundError("no cached copy either")))
    assert not is_transient(ValueError("x"))


# --- the hub's library ----------------------------------------------------------------------------


def repository(folder, layout):
    """A folder as a repository of the hub has it, with two configurations and their splits."""
    texts = some_texts(60)
    for number in range(3):
        part = texts[20 * number : 20 * number + 20]
        write(folder / "python" / f"train-{number:05d}-of-00003{layout}", part, "content")
    write(folder / "python" / f"validation-00000-of-00001{layout}", ["not this"], "content")
    write(folder / "other" / f"train-00000-of-00001{layout}", ["nor this"], "content")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("python", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return Corpus("code", str(folder), "python", "content", 10**9, revision=COMMIT), texts


@pytest.mark.parametrize("layout", [".parquet", ".json.gz", ".jsonl.zst"])
def test_the_hubs_library_gives_the_documents_of_one_configuration_from_any_on(tmp_path, layout):
    pytest.importorskip("datasets")
    needs(layout)
    corpus, texts = repository(tmp_path / "repository", layout)
    documents = HubDocuments(corpus, COMMIT)
    assert list(documents.read({})) == list(enumerate(texts))
    for stop in (0, 1, 7, 19, 20, 21, 40, 59, 60):
        reading = documents.read({})
        for _ in range(stop):
            next(reading)
        cursor = json.loads(json.dumps(documents.position()))
        for changes in ({}, {"datasets": "another version"}):
            found = list(HubDocuments(corpus, COMMIT).read(cursor | changes if stop else {}))
            assert found == list(enumerate(texts))[stop:]


def test_a_corpus_through_the_hubs_library_is_that_of_its_files(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    corpus, _ = repository(tmp_path / "repository", ".parquet")
    prepare_mixture(tmp_path / "hub", [corpus], workers=1, val_fraction=0.05)
    local = {"code": sorted((tmp_path / "repository" / "python").glob("train-*"))}
    prepare_mixture(tmp_path / "local", [corpus], local=local, workers=1, val_fraction=0.05)
    hub, files = (contents(tmp_path / name / "code") for name in ("hub", "local"))
    assert json.loads(hub.pop("manifest.json"))["source"]["revision"] == COMMIT
    del files["manifest.json"]
    assert hub == files


def test_a_missing_column_of_a_repository_is_named(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    corpus, _ = repository(tmp_path / "repository", ".parquet")
    corpus = Corpus("code", corpus.repository, "python", "text", 100, revision=COMMIT)
    with pytest.raises(CorpusError, match=r"revision 0123.* has no 'text', only id, content; pin a revision"):
        prepare_mixture(tmp_path / "out", [corpus], workers=1)


def test_a_commit_needs_no_looking_up():
    assert resolve_revision(CORPUS, COMMIT) == COMMIT


def test_a_revision_that_was_begun_with_is_kept(tmp_path):
    """Without --revision nobody asks the hub again: the branch of the catalogue may have moved on."""
    branch = Corpus("prose", "somebody/prose", None, "text", 500, revision="main")
    texts = some_texts(100)
    with pytest.raises(CorpusError):
        prepare(tmp_path, {"prose": Memory(texts, [(5, KeyError("x"))])}, [branch], revisions={"prose": COMMIT})
    prepare(tmp_path, {"prose": Memory(texts)}, [branch])
    prepare(tmp_path, {"prose": Memory(texts)}, [branch])
    manifest = json.loads((tmp_path / "prose" / "manifest.json").read_text())
    assert manifest["source"]["revision"] == COMMIT


def test_another_repository_is_not_read_at_the_commit_of_the_one_before(tmp_path):
    first = Corpus("prose", "somebody/prose", None, "text", 500, revision=COMMIT)
    second = Corpus("prose", "somebody/else", None, "text", 500, revision="f" * 40)
    prepare(tmp_path, {"prose": Memory(some_texts(100))}, [first])
    summary = prepare(tmp_path, {"prose": Memory(some_texts(100))}, [second], overwrite=True)
    assert [entry["revision"] for entry in summary["corpora"]] == ["f" * 40]


def test_without_the_library_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['datasets'] = None; from train.prepare import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--mixture", "published", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: reading fineweb from the hub needs the package datasets: ")
    assert "pip install 'hrm-kernels[data]'" in done.stderr and not (tmp_path / "out").exists()


def test_neither_network_nor_library_is_needed_for_what_is_finished(tmp_path, monkeypatch, capsys):
    corpus = Corpus("prose", "somebody/prose", None, "text", 500, revision="main")
    prepare(tmp_path, {"prose": Memory(some_texts(100))}, [corpus], revisions={"prose": COMMIT})
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    prepare_mixture(tmp_path, [corpus])
    assert "prose is up to date" in capsys.readouterr().err
    with pytest.raises(CorpusError, match="needs the package datasets: pip install"):
        prepare_mixture(tmp_path, [corpus], seed=1, overwrite=True)


def test_files_in_place_of_the_hub_are_other_inputs(tmp_path):
    corpus = Corpus("prose", "somebody/prose", None, "text", 500, revision="main")
    write(tmp_path / "in.jsonl", some_texts(100))
    prepare_mixture(tmp_path / "out", [corpus], local={"prose": [tmp_path / "in.jsonl"]}, workers=1)
    with pytest.raises(ShardError, match=r"made with source local files \w+, now somebody/prose; give the same"):
        prepare(tmp_path / "out", {"prose": Memory([])}, [corpus])
