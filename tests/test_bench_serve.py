"""bench/serve.py: no time is shown unless every answer is that of generating alone."""

from __future__ import annotations

import json

import pytest
import torch
from serving import text_model

import bench.serve
from bench.serve import Answer, differing, main, requests
from hrm_model import save_model

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "thinker"
    save_model(text_model(), path)
    return str(path)


def run(checkpoint, capsys, *flags):
    sizes = ["--requests", "6", "--tokens", "4", "--clients", "1", "6", "--places", "3"]
    status = main(["--checkpoint", checkpoint, *sizes, *flags])
    output = capsys.readouterr().out
    return status, output, json.loads(output.splitlines()[-1])


def test_answers_are_compared_and_times_shown(checkpoint, capsys):
    status, output, record = run(checkpoint, capsys, "--no-save")
    assert status == 0 and record["equal"] and record["environment"]["torch"] == torch.__version__
    assert [cell["who"] for cell in record["cells"]] == ["one by one", "1 client", "6 clients"]
    for cell in record["cells"]:
        assert cell["tokens"] == 24 and cell["tokens_per_s"] == pytest.approx(24 / cell["seconds"])
        assert 0 < cell["median_s"] <= cell["p95_s"] <= cell["seconds"]
    assert "all 6 answers are those of generating alone" in output and "appended" not in output


def test_a_wrong_answer_shows_no_time(checkpoint, capsys, monkeypatch):
    ask = bench.serve.ask

    def wrong(address, one):
        answer = ask(address, one)
        return answer._replace(steps=[*answer.steps[:-1], 99]) if one.seed == 4 else answer

    monkeypatch.setattr(bench.serve, "ask", wrong)
    status, output, record = run(checkpoint, capsys)
    assert status == 1 and not record["equal"] and record["cells"] == [] and "tokens/s" not in output
    assert record["wrong"] == [f"{n} clients, request 4: another answer than alone" for n in (1, 6)]


def test_refusals_are_wrong_and_requests_do_not_depend_on_how_many_there_are():
    one = Answer([1], [1], 0.1)
    assert differing([one, one], [one._replace(seconds=9), "429: full"]) == ["request 1: 429: full"]
    assert requests(20, 128, 8)[:5] == requests(5, 128, 8)
    assert all(4 <= len(asked.ids) <= 64 for asked in requests(100, 128, 8))
    assert {asked.temperature for asked in requests(3, 128, 8)} == {0.0, 0.8, 1.0}
