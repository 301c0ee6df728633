"""bench/prepare.py runs, compares ids, and its committed records hold; docs/data.md is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import prepare
from hrm_model.training.corpora import PUBLISHED
from hrm_model.training.mixture import VAL_FRACTION
from hrm_model.training.retry import Backoff
from train.prepare import main as prepare_main
from train.pretrain import parse as pretrain_parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_it_times_what_gives_the_same_ids_and_ends_with_json(capsys):
    assert prepare.main(["--megabytes", "0.1", "--memory", "0.1", "0.2", "--repeats", "1"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"].split()[0] for row in record["rows"]] == ["prepare", "tiktoken", "tiktoken"]
    assert all(row["tokens_per_s"] > 0 for row in record["rows"]) and record["bounded"]
    assert all(found["peak_bytes"] >= found["before_bytes"] > 0 for found in record["memory"])


def test_nothing_is_timed_when_ids_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "r50k_pat_str", r"\S+|\s+")
    with pytest.raises(SystemExit, match="ids differ from those of tiktoken; nothing was timed"):
        prepare.speed(0.1, 1, tmp_path)


def test_committed_records_have_hardware_versions_and_bounded_memory():
    for line in (ROOT / "bench" / "results" / "prepare.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert {"device", "python", "tiktoken", "commit"} <= set(record["environment"])
        assert record["bounded"] and not record["environment"]["commit"].endswith("-dirty")


def test_the_pages_table_is_the_catalogue():
    rows = re.findall(r"^\| (\w+) \| (\S+/\S+) \| (\S*) ?\| (\w+) \| ([\d.]+) B \|$", PAGE, re.MULTILINE)
    assert [(n, r, c or None, k, int(float(b) * 1e9)) for n, r, c, k, b in rows] == [
        (c.name, c.repository, c.config, c.text_key, c.tokens) for c in PUBLISHED
    ]
    assert f"{VAL_FRACTION:.2%}".replace("%", " %") in PAGE
    wait = Backoff()
    assert f"up to {wait.attempts} attempts, at most {wait.first_s:g} to {wait.longest_s:g} seconds" in PAGE


def test_the_pages_files_and_flags_exist(capsys):
    for name in re.findall(r"`(\w+\.py)`", PAGE):
        assert (ROOT / "hrm_model" / "training" / name).exists(), name
    for command in (prepare_main, pretrain_parse):
        with pytest.raises(SystemExit):
            command(["--help"])
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
