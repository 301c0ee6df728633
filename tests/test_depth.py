"""hrm depth: what the page and the picture say, escaping, windows, and what happens when something is wrong."""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer, save_model
from hrm_model.commands import depth
from hrm_model.depth_cells import cells, colours, luminance, quoted
from hrm_model.depth_page import page
from hrm_model.depth_picture import MAX_ROWS, _layout, picture
from hrm_model.prefixes import Prefixes, Reading, Window, prefixes

TOKENIZER = get_tokenizer()
EVIL = """</script><script>alert("1")</script> & 'one' <img src=x onerror=alert(2)> <!-- &lt; ]]>"""


@pytest.fixture(scope="module")
def model(small_model) -> HRMForCausalLM:
    """Three steps, sixteen tokens; with this seed the prefixes of the texts below take all three depths."""
    torch.manual_seed(7)
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(small_model.read_text())))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0 if p.dim() > 1 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("saved") / "toy")


def read(model: HRMForCausalLM, text: str) -> Reading:
    ids = TOKENIZER.encode(text)
    parts = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    return Reading([Window(part, prefixes(model, torch.tensor(part))) for part in parts], 3, 0.0)


def invented(ids: list[int], max_steps: int) -> Reading:
    """A reading that no model made: depths go round 1..S."""
    n = len(ids)
    executed = torch.arange(n) % max_steps + 1
    margins = torch.linspace(-1.2345678, 1.2345678, n * max_steps).reshape(n, max_steps)
    nll = torch.linspace(0.1, 9.9, n)[1:]
    told = Prefixes(executed, executed < max_steps, margins, nll, torch.full((50257,), -math.log(50257)))
    return Reading([Window(ids, told)], max_steps, 0.0)


def html_of(reading: Reading, title: str = "title", facts: str = "facts") -> str:
    return page(reading, TOKENIZER, title=title, facts=facts)


class Document(HTMLParser):
    """The page's elements, the text of #text, and its cells as (classes, title, text)."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text, self.cells, self.title = "", [], ""
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "input", "link"):
            name = (
                f"#{attributes['id']}"
                if "id" in attributes
                else ("cell" if "c" in attributes.get("class", "").split() else tag)
            )
            self._open.append(name)
            if name == "cell" and "#text" in self._open:
                self.cells.append([attributes["class"].split(), attributes["title"], ""])

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if "script" in self._open or "#data" in self._open:
            self.scripts[-1] += data
        elif "title" in self._open:
            self.title += data
        elif "#text" in self._open:
            if "cell" in self._open:
                self.cells[-1][2] += data
            self.text += data

    def data(self) -> dict:
        return json.loads(self.scripts[0])


def hrm_depth(*argv) -> int:
    parser = argparse.ArgumentParser()
    depth.add_arguments(parser)
    return depth.run(parser.parse_args([str(a) for a in argv]))


def test_the_text_is_there_to_the_last_character(model):
    text = 'def f(x):\n\treturn "é 日 😀"  # naïve\n\n'
    document = Document(html_of(read(model, text)))
    assert re.sub(r"window \d of \d: tokens \d+ to \d+, read afresh", "", document.text) == text + "next"


def test_a_token_has_the_colour_of_the_steps_that_predicted_it(model):
    reading = read(model, "one two three four five six seven eight")
    found = reading.windows[0].prefixes
    assert set(found.executed.tolist()) == {1, 2, 3}
    document = Document(html_of(reading))
    first, *others = document.cells
    assert "given" in first[0] and first[1] == '"one": given'
    for (kinds, title, text), steps, nats in zip(others, found.executed.tolist(), found.nll.tolist(), strict=False):
        assert f"d{steps}" in kinds
        assert title == f'"{text}": {steps} step{"s" * (steps > 1)}, {nats:.2f} nats'
    *_, after = others
    assert after[2] == "next" and f"d{found.executed[-1]}" in after[0]


def test_the_data_are_the_numbers(model):
    reading = read(model, "one two three")
    found, document = reading.windows[0].prefixes, Document(html_of(reading))
    given, two, three, after = document.data()["cells"]
    assert given == [{"id": 505, "text": '"one"'}]
    for t, (token,) in enumerate((two, three)):
        assert token["depth"] == found.executed[t] and token["halted"] == found.halted[t]
        assert token["nats"] == pytest.approx(float(found.nll[t]), rel=1e-3)
        assert token["margins"] == pytest.approx(found.margins[t].tolist(), rel=1e-3)
    best = found.next_log_probs.topk(3)
    assert [token_id for _, token_id, _ in after[0]["next"]] == best.indices.tolist()
    assert [p for _, _, p in after[0]["next"]] == pytest.approx(best.values.exp().tolist(), rel=1e-3)


def test_nothing_in_a_text_or_a_name_becomes_markup(model):
    document = Document(html_of(read(model, EVIL), title=EVIL, facts=EVIL))
    tags = [tag for tag, _ in document.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert document.title == EVIL
    assert "".join(text for _, _, text in document.cells) == EVIL + "next"
    assert "<" not in document.scripts[0] and "alert" not in document.scripts[1]
    shown = "".join(json.loads(token["text"]) for cell in document.data()["cells"][:-1] for token in cell)
    assert shown == EVIL


def test_only_its_own_script_may_run_and_nothing_is_fetched(model):
    document = Document(html_of(read(model, "some text")))
    policy = next(a["content"] for tag, a in document.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(document.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not [tag for tag, a in document.elements if tag == "link" or "src" in a or "href" in a]


def test_a_character_of_several_tokens_is_one_cell_with_all_their_depths():
    ids = TOKENIZER.encode("a😀b")
    reading = invented(ids, 4)
    a, smile, b = cells(reading.windows[0], TOKENIZER)
    assert (a.text, smile.text, b.text) == ("a", "😀", "b")
    assert [t.depth for t in smile.tokens] == [1, 2] and smile.depth == 2 and b.depth == 3
    assert [t.text for t in smile.tokens] == ["bytes f0 9f 98", "bytes 80"]
    document = Document(html_of(reading))
    assert document.cells[1][1] == "2 tokens, one character or more: 1, 2 steps"
    assert len(document.data()["cells"][1]) == 2


def test_a_character_that_a_window_cuts_is_shown_as_bytes():
    first, second = TOKENIZER.encode("😀")
    reading = Reading([*invented([first], 2).windows, *invented([second], 2).windows], 2, 0.0)
    assert [c.text for w in reading.windows for c in cells(w, TOKENIZER)] == ["\\xf0\\x9f\\x98", "\\x80"]
    assert picture(reading, TOKENIZER, title="", facts="").startswith(b"\x89PNG")


def test_what_cannot_be_seen_has_a_name():
    assert quoted(b"\n\x00") == '"\\n\\u0000"'
    assert quoted("\u202e\u200b\x7f".encode()) == '"<U+202E><U+200B><U+007F>"'
    document = Document(html_of(invented(TOKENIZER.encode("a\u202eb\r\x1b\u2028"), 2)))
    assert "".join(c[2] for c in document.cells) == "a<U+202E>b<U+000D><U+001B><U+2028>next"


@pytest.mark.parametrize("max_steps", [1, 2, 4, 16, 64])
def test_colours_are_in_order_and_their_text_can_be_read(max_steps):
    for dark in (False, True):
        scale = [[luminance(bytes.fromhex(c[1:])) for c in pair] for pair in colours(max_steps, dark)]
        grounds = [ground for ground, _ in scale]
        assert grounds == sorted(grounds, reverse=not dark) and len(set(grounds)) == max_steps
        for pair in scale:
            low, high = sorted(pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_full_page_is_far_below_a_megabyte():
    words = TOKENIZER.encode("The quick brown fox jumps over the lazy dog and runs away. " * 50)[:512]
    assert len(words) == 512 and len(html_of(invented(words, 16)).encode()) < 400_000


def test_histogram_and_correlation_are_said(model):
    varied = html_of(invented(TOKENIZER.encode("one two three four five six"), 3))
    assert "2 (33.3%)" in varied and "rank correlation" in varied
    constant = html_of(Reading([Window(w.ids, w.prefixes) for w in invented([1, 2, 3], 1).windows], 1, 0.0))
    assert "<dd>constant</dd>" in constant and "3 (100.0%)" in constant


def test_an_infinite_bias_has_no_margins_to_draw(model):
    ids = TOKENIZER.encode("one two")
    found = prefixes(model, torch.tensor(ids), halt_bias=-math.inf)
    reading = Reading([Window(ids, found)], 3, -math.inf)
    document = Document(html_of(reading))
    assert document.data()["bias"] == "-inf" and document.data()["cells"][1][0]["margins"] == ["-inf"] * 3
    assert picture(reading, TOKENIZER, title="", facts="").startswith(b"\x89PNG")


def test_page_and_picture_are_written_and_the_last_line_is_json(checkpoint, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert hrm_depth(checkpoint, "--text", "one two three four <|endoftext|>", "--out", out) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.png"]
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    ids = TOKENIZER.encode("one two three four <|endoftext|>")
    assert told["tokens"] == told["predictions"] == sum(told["histogram"].values()) == len(ids) > 6
    assert told["page"] == str(out) and told["picture"] == str(tmp_path / "page.png")
    assert told["mean_steps"] == pytest.approx(sum(int(n) * c for n, c in told["histogram"].items()) / len(ids))
    assert f"wrote {out}" in lines and lines[-3].startswith(f"mean steps {told['mean_steps']:.3f} of 3")
    assert f"{max(told['histogram'].values())} (" in lines[-2]
    source = out.read_text(encoding="utf-8")
    assert re.search(r"toy · 0\.\d\d M parameters · at most 3 steps · halt bias 0 · halting head not trained", source)
    width, height = struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])
    assert width > 800 and height > 400


def test_a_long_text_is_read_in_windows_each_afresh(checkpoint, model, tmp_path, capsys):
    text = "one two three four five six seven eight nine ten " * 4
    (tmp_path / "long.txt").write_text(text)
    assert hrm_depth(checkpoint, "--file", tmp_path / "long.txt", "--out", tmp_path / "o.html", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "41 tokens are over block_size 16: 3 windows, each read afresh"
    assert json.loads(lines[-1])["predictions"] == 41 - 2
    document = Document((tmp_path / "o.html").read_text(encoding="utf-8"))
    assert "window 2 of 3: tokens 17 to 32, read afresh" in document.text
    assert [i for i, (kinds, _, _) in enumerate(document.cells) if "given" in kinds] == [0, 16, 32]
    alone = prefixes(model, torch.tensor(TOKENIZER.encode(text)[16:32]))
    depths = [cell[0]["depth"] for cell in document.data()["cells"][17:32]]
    assert depths == alone.executed[:-1].tolist()


def test_a_picture_of_a_very_long_text_is_cut_and_says_so():
    reading = invented(TOKENIZER.encode("line\n" * (MAX_ROWS + 50)), 2)
    width, height = struct.unpack(">II", picture(reading, TOKENIZER, title="$x$", facts="$")[16:24])
    assert height < 5000 and width > 800
    pieces, _, n_rows, left_out = _layout(reading, TOKENIZER)
    assert n_rows == MAX_ROWS and len(pieces) + left_out == reading.n_tokens() and left_out > 50


def test_options_reach_the_model(checkpoint, tmp_path, capsys):
    options = ("--no-png", "--max-steps", 5, "--halt-bias=-inf", "--out", tmp_path / "o.html")
    assert hrm_depth(checkpoint, "--text", "one two", *options) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["histogram"]["5"] == 2 and told["halt_bias"] == "-inf" and told["picture"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["o.html"]


def test_standard_input_is_a_file_called_minus(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode())))
    assert hrm_depth(checkpoint, "--file", "-", "--no-png", "--out", tmp_path / "o.html") == 0
    source = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "standard input" in source and "&lt;U+000D&gt;" in source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "--text is empty; give at least one character"),
        (["--file", "empty.txt"], "--file empty.txt is empty"),
        (["--file", "latin1.txt"], r"latin1.txt is not UTF-8: byte 0xe9 at offset 3 .*iconv"),
        (["--file", "none.txt"], "cannot read --file none.txt: No such file or directory; give a UTF-8 file"),
        (["--file", "."], r"cannot read --file \.: Is a directory"),
        (["--text", "a", "--out", "there.html"], "there.html already exists; .* pass --overwrite"),
        (["--text", "a", "--out", "picture.html"], "picture.png already exists"),
        (["--text", "a", "--out", "link.html"], "link.html already exists"),
        (["--text", "a", "--out", "no/such.html"], r"--out no/such.html: no is no directory; make it first"),
        (["--text", "a", "--out", "page.txt"], "--out page.txt must end in .html"),
        (["--text", "a", "--out", "folder.html", "--overwrite"], "folder.html is a directory"),
        (["--text", "a", "--max-steps", "0"], "--max-steps 0 must be at least 1"),
        (["--text", "a", "--halt-bias", "nan"], "--halt-bias nan is no number"),
        (["--text", "a", "--device", "abacus"], "--device 'abacus' is not to be had here"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    checkpoint, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "picture.png").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as error:
        hrm_depth(checkpoint, *arguments)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.html").read_text() == (tmp_path / "picture.png").read_text() == "mine"


def test_a_model_that_reads_no_text_is_named(tmp_path):
    shape = dict(vocab_size=64, n_embd=8, block_size=16, n_head=2, n_kv_head=1, n_input_layers=0, n_output_layers=0)
    shape |= dict(hrm_H_layers=1, hrm_L_layers=1)
    save_model(HRMForCausalLM(HRMConfig(**shape)), tmp_path / "digits")
    with pytest.raises(ValueError, match="vocab_size 64, and text needs GPT-2's 50257"):
        hrm_depth(tmp_path / "digits", "--text", "a", "--out", tmp_path / "o.html")


def test_overwriting_replaces_both_and_a_failure_leaves_what_was_there(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.html"
    for path in (out, tmp_path / "o.png"):
        path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=r"cannot write .*o.html: No space left on device; check the disk"):
            hrm_depth(checkpoint, "--text", "a b", "--out", out, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.html", "o.png"]
    assert out.read_text() == "old"
    assert hrm_depth(checkpoint, "--text", "a b", "--out", out, "--overwrite") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.html", "o.png"]
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so_before_it_reads_and_writes_the_page_alone(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'hrm-kernels\[plot\]', or pass --no-png"):
        hrm_depth(checkpoint, "--file", tmp_path / "none.txt", "--out", tmp_path / "o.html")
    assert not list(tmp_path.iterdir())
    assert hrm_depth(checkpoint, "--text", "a b", "--out", tmp_path / "o.html", "--no-png") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["o.html"]


def test_what_came_into_being_while_it_read_is_not_replaced(checkpoint, tmp_path, monkeypatch):
    def meanwhile(*_, **__):
        (tmp_path / "o.png").write_text("theirs")
        return b"a picture"

    monkeypatch.setattr("hrm_model.depth_picture.picture", meanwhile)
    with pytest.raises(
        ValueError, match=r"o\.png has come into being meanwhile; .* \(the page is written: .*o\.html\)"
    ):
        hrm_depth(checkpoint, "--text", "a b", "--out", tmp_path / "o.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.html", "o.png"]
    assert (tmp_path / "o.png").read_text() == "theirs"


def test_a_correlation_that_there_is_none_of_is_null(checkpoint, tmp_path, capsys):
    options = ("--no-png", "--max-steps", 1, "--out", tmp_path / "o.html")
    assert hrm_depth(checkpoint, "--text", "one two three", *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rank_correlation"] is None


def test_a_run_is_called_by_its_name_and_not_by_where_it_lies():
    assert depth._checkpoint_name("/home/someone/runs/tiny/") == "tiny"
    assert depth._checkpoint_name("/home/someone/runs/tiny/checkpoints/step-00000600") == (
        "tiny/checkpoints/step-00000600"
    )
