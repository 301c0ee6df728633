"""The benchmarks' rows in the hub's layout and in their authors', preprocessing as published, rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_model.evaluation.data import examples, places_of
from hrm_model.evaluation.tasks import TASKS, gsm8k, nq
from hrm_model.evaluation.tasks.hellaswag import clean
from hrm_model.evaluation.tasks.task import Choices, Question

ARC = Choices("Question: Which is a gas?\nAnswer:", ["iron", "air"], 1)
MMLU = Choices(
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is 1 + 1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:",
    ("A", "B", "C", "D"),
    2,
)
PIQA = {"goal": " open a jar ", "sol1": "twist the lid", "sol2": "look at it "}
SAMPLES = {
    "hellaswag": (
        {
            "ctx": "[header] Dance [title] Begin.  A man",
            "endings": ["jumps [step] up.", "sits.", "a", "b"],
            "label": "1",
        },
        Choices("Dance. Begin. A man", ["jumps up.", "sits.", "a", "b"], 1),
    ),
    "piqa": (PIQA | {"label": 1}, Choices("open a jar", ["twist the lid", "look at it"], 1)),
    "winogrande": (
        {"sentence": "Ann told Bob that _ was late.", "option1": "Ann ", "option2": "Bob", "answer": "2"},
        Choices("Ann told Bob that", ["Ann was late.", "Bob was late."], 1),
    ),
    "nq": ({"question": "who?", "answer": ["A man", " "]}, Question("Question: who?\nAnswer:", ["A man"])),
    "arc_easy": (
        {"question": "Which is a gas?", "choices": {"text": ["iron", "air"], "label": ["A", "B"]}, "answerKey": "B"},
        ARC,
    ),
    "arc_challenge": (
        {
            "question": {
                "stem": "Which is a gas?",
                "choices": [{"text": "iron", "label": "1"}, {"text": "air", "label": "2"}],
            },
            "answerKey": "2",
        },
        ARC,
    ),
    "mmlu": (
        {"question": "What is 1 + 1?", "choices": ["0", "1", "2", "3"], "answer": 2, "subject": "abstract_algebra"},
        MMLU,
    ),
    "gsm8k": (
        {"question": "Add 999 and 1.", "answer": "999 + 1 = <<999+1=1000>>1000\n#### 1,000"},
        Question("Question: Add 999 and 1.\nAnswer:", ["1000"]),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_row_makes_the_published_example(name, tmp_path):
    row, expected = SAMPLES[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    found, left_out = examples(TASKS[name], places_of([str(tmp_path)], [name])[name])
    assert (found, left_out) == ([expected], 0)


@pytest.mark.parametrize("name", SAMPLES)
def test_parquet_holds_the_same(name, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row, expected = SAMPLES[name]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    place = places_of([f"{name}={tmp_path / 'rows.parquet'}"], [name])[name]
    assert examples(TASKS[name], place)[0] == [expected]


def test_piqas_labels_lie_beside_its_rows(tmp_path):
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(PIQA) + "\n" for _ in range(2)))
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    found, _ = examples(TASKS["piqa"], places_of([str(tmp_path)], ["piqa"])["piqa"])
    assert [example.label for example in found] == [0, 1]
    (tmp_path / "valid-labels.lst").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"valid-labels\.lst is no text in UTF-8"):
        examples(TASKS["piqa"], tmp_path / "valid.jsonl")
    for labels, message in (("0\n", "has 1 labels, .* more rows"), ("0\n1\n0\n", "has 3 labels, .* 2 rows")):
        (tmp_path / "valid-labels.lst").write_text(labels)
        with pytest.raises(ValueError, match=message):
            examples(TASKS["piqa"], tmp_path / "valid.jsonl")


def test_mmlus_folder_of_csv_files_is_read_subject_by_subject(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "abstract_algebra_test.csv").write_text("What is 1 + 1?,0,1,2,3,C\n")
    (tmp_path / "test" / "anatomy_test.csv").write_text('"Which, if any?",a,b,c,d,A\n')
    found, _ = examples(TASKS["mmlu"], places_of([str(tmp_path)], ["mmlu"])["mmlu"])
    assert found[0] == MMLU and len(found) == 2 and "about anatomy.\n\nWhich, if any?\nA. a\n" in found[1].context
    (tmp_path / "test" / "anatomy_test.csv").write_text("only,five,cells,are,here\n")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv, row 1 is malformed: it has 5 cells"):
        examples(TASKS["mmlu"], tmp_path / "test")
    for damaged in (b"\xff,a,b,c,d,A\n", b'q,"' + b"x" * 200_000):
        (tmp_path / "test" / "anatomy_test.csv").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"anatomy_test\.csv, row 1 is unreadable: .*fetch the file again"):
            examples(TASKS["mmlu"], tmp_path / "test")


def test_arcs_label_is_a_name_and_no_place():
    row = {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": 2}
    assert TASKS["arc_easy"].example(row).label == 1


def test_rows_without_an_example_are_left_out_and_counted(tmp_path):
    rows = [PIQA | {"label": 0}, PIQA | {"label": 0, "sol2": " "}]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, left_out = examples(TASKS["piqa"], tmp_path / "piqa.jsonl")
    assert (len(found), left_out) == (1, 1)
    assert TASKS["nq"].example({"question": "who?", "answer": []}) is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hellaswag", {"label": ""}, "the label is '', none of 0, 1, 2, 3"),
        ("hellaswag", {"label": "4"}, "none of 0, 1, 2, 3"),
        ("hellaswag", {"endings": "one"}, "'endings' is a str, not a list"),
        ("hellaswag", {"ctx": 3}, "'ctx' is a int, not a text"),
        ("piqa", {"label": -1}, "the label is -1"),
        ("piqa", {"goal": None}, "'goal' is a NoneType"),
        ("winogrande", {"sentence": "no gap"}, "has no gap"),
        ("winogrande", {"answer": ""}, "none of 1, 2"),
        ("nq", {"question": None}, "'question' is a NoneType"),
        ("arc_easy", {"answerKey": "E"}, "the label is 'E', none of A, B"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A"]}}, "at least two"),
        ("arc_easy", {"choices": {"text": "iron", "label": "ABCD"}}, "'text' is a str, not a list"),
        ("arc_easy", {"choices": {"text": [1, 2], "label": ["A", "B"]}}, "'text' has 1 in it, which is no text"),
        ("arc_easy", {"answerKey": 1}, "the label is '1', none of A, B"),
        ("nq", {"answer": [None]}, "'answer' has None in it"),
        ("mmlu", {"choices": ["a", "b"]}, "a list of four texts"),
        ("mmlu", {"choices": ["a", "b", None, "d"]}, "'choices' has None in it"),
        ("mmlu", {"answer": 4}, "the label is 4"),
        ("gsm8k", {"answer": "42"}, "has no ####"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(name, change, message, tmp_path):
    row, _ = SAMPLES[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    with pytest.raises(ValueError, match=rf"{name}: .*{name}\.jsonl:2 is malformed: .*{message}.*mend it"):
        examples(TASKS[name], path)
    assert len(examples(TASKS[name], path, limit=1)[0]) == 1


def test_missing_keys_damaged_lines_and_empty_files_are_named(tmp_path):
    path = tmp_path / "piqa.jsonl"
    for content, message in (
        ('{"goal": "a"}\n', r"piqa\.jsonl:1 is malformed: it has no 'sol1'"),
        ("[1]\n", "it is a list, not an object"),
        ("{]\n", r"piqa\.jsonl:1 is unreadable.*fetch the file again"),
        ("", "has no example"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            examples(TASKS["piqa"], path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match="of no known kind"):
        examples(TASKS["piqa"], tmp_path / "x.txt")


def test_without_a_network_the_error_says_which_file_and_how_to_get_it(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name, task in TASKS.items():
        if task.hub:
            with pytest.raises(ValueError, match=rf"{name}: cannot read .*no route.*--data {name}=FILE: .*GitHub|ARC"):
                examples(task, None)


def test_the_hub_is_asked_for_what_the_published_evaluation_read(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(repository, config=None, *, split, data_files=None):
        asked[data_files or repository] = (config, split)
        return [SAMPLES[name][0]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in SAMPLES:
        assert examples(TASKS[name], None)[0] == [SAMPLES[name][1]]
    assert asked["Rowan/hellaswag"] == (None, "validation") and asked["allenai/winogrande"][1] == "validation"
    assert asked["allenai/ai2_arc"] == ("ARC-Challenge", "test") and asked["cais/mmlu"] == ("all", "test")
    assert any(key.startswith("hf://datasets/ybisk/piqa@refs%2Fconvert%2Fparquet/") for key in asked)


def test_preprocessing():
    assert clean(" a [title] b  [step]c [x] ") == "a. b c"
    assert nq.normalised("The  Beatles!") == "beatles" and nq.normalised("an ant") == "n ant", "as published"
    assert nq.is_right("the man", ["A man"]) and not nq.is_right("", [""]) and not nq.is_right("men", ["man"])
    assert gsm8k.number_in("so 3 + 4 = 7\n#### 1,234.50 and 9") == gsm8k.number_in("it is $1234.5.")
    assert gsm8k.number_in("7 apples\nQuestion: what is 9?") == 7 and gsm8k.number_in("none") is None
    assert gsm8k.is_right("#### -3", ["-3"]) and not gsm8k.is_right("#### 3", ["-3"])


def test_the_cards_prompts_have_no_right_answer():
    found, _ = examples(TASKS["card"], None)
    assert [type(example) for example in found] == [Question] * 4 and found[0].prompt == "The capital of France is"


def test_a_folder_may_have_a_task_under_its_authors_name(tmp_path):
    for name, file in (("hellaswag", "hellaswag_val.jsonl"), ("nq", "NQ-open.dev.jsonl"), ("gsm8k", "test.jsonl")):
        (tmp_path / file).write_text(json.dumps(SAMPLES[name][0]) + "\n")
    found = places_of([str(tmp_path)], ["hellaswag", "nq", "gsm8k", "card"])
    assert {name: Path(path).name for name, path in found.items()} == {
        "hellaswag": "hellaswag_val.jsonl",
        "nq": "NQ-open.dev.jsonl",
        "gsm8k": "test.jsonl",
    }
