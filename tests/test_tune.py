"""hrm_kernels.tune: what it writes into the tables, what it refuses, what it drops before timing. Times need a GPU."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hrm_kernels as ops
from hrm_kernels import tune, tuning
from hrm_kernels.tuning import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")
PRESENT = tune.TABLES.read_text(encoding="utf-8")
LINES = """
op                   type    rows   KB    M    N    K warps stages  why
rms_norm             any      any    0    4    0    0     4      1  a warp a row
qkv                  half      64   99   16   64   64     4      4  decoding
qkv                  half     any   99  128  128   64     8      3
qkv                  float32  any   99   64   64   32     4      2
attention_dq         half     any   99   64   64    0     4      3  some reason
attention_dq         float32  any   99   32   32    0     8      2
"""
ATTENTION = """
type      tokens  implementation  why
any       any     triton          not timed yet
"""
TEXT = PRESENT.replace(tuning.TABLE, LINES).replace(tuning.ATTENTION, ATTENTION)
"""tuning.py with tables that tuning does not change under these tests."""
NEW = Tile(32, 32, 0, 4, 5)
LONG = tune.Setting(torch.bfloat16, 64, 512, 86)
"""A type, a length and a GPU of 99 KB for which attention_dq has a line of its own."""


def loaded(text: str, folder: Path):
    """tuning.py's text as a module."""
    path = folder / "rewritten.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rewritten", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changes(text: str) -> list[str]:
    lines = difflib.ndiff(TEXT.splitlines(), text.splitlines())
    return [line for line in lines if line[0] in "+-"]


def answers(text: str, folder: Path) -> dict[tuple, Tile]:
    """What tuning.py with this text says of every op it has, both types, few and many rows, several GPUs."""
    module = loaded(text, folder)
    found = {}
    for op in {line.op for line in module._LINES}:
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (1, 64, 65, 512, 32768):
                for arch in (80, 86, 90, 100):
                    with module.assume(arch):
                        found[op, dtype, rows, arch] = module.tile(op, dtype, rows, META)
    return found


def test_a_line_is_written_as_the_table_writes_it():
    lines = tuning.TABLE.strip().splitlines()[1:]
    for line in lines:
        op, type_name, rows, kb, m, n, k, warps, stages, *why = line.split(maxsplit=9)
        tile = Tile(int(m), int(n), int(k), int(warps), int(stages))
        assert tune.rendered(op, type_name, rows, kb, tile, why[0] if why else "") == line
    assert len(lines) > 10


def test_a_winner_takes_the_place_of_the_line_for_its_type_and_memory(tmp_path):
    text = tune.with_tile(TEXT, "attention_dq", LONG, NEW, "A10: 0.100 ms, 1.50x")
    removed, added = changes(text)
    assert removed.split()[1:4] == added.split()[1:4] == ["attention_dq", "half", "any"]
    assert added.endswith("   32   32    0     4      5  A10: 0.100 ms, 1.50x")
    before, after = answers(TEXT, tmp_path), answers(text, tmp_path)
    assert after["attention_dq", torch.bfloat16, 512, 86] == NEW != before["attention_dq", torch.bfloat16, 512, 86]
    others = {key for key in before if key[:2] != ("attention_dq", torch.bfloat16)}
    assert {key: before[key] for key in others} == {key: after[key] for key in others}


@pytest.mark.parametrize("op", ["rms_norm", "attention_dq"])
def test_a_line_that_also_serves_other_types_or_less_memory_stays_below_the_winner(op, tmp_path):
    setting = LONG._replace(arch=90)
    text = tune.with_tile(TEXT, op, setting, NEW, "H100: 0.100 ms, 1.50x")
    (added,) = changes(text)
    assert added.split()[:5] == ["+", op, "half", "any", "227"]
    before, after = answers(TEXT, tmp_path), answers(text, tmp_path)
    changed = {key for key in before if before[key] != after[key]}
    assert changed and {(name, dtype) for name, dtype, _, _ in changed} == {(op, torch.bfloat16)}
    assert {arch for *_, arch in changed} == {90, 100}, "the GPUs of 227 KB"
    assert len(changes(tune.with_tile(text, op, setting, Tile(16, 16, 0, 4, 1), ""))) == 1, "its own line next time"


def test_lines_for_few_rows_and_for_many_are_apart(tmp_path):
    text = tune.with_tile(TEXT, "qkv", tune.Setting(torch.bfloat16, 16, 1, 90), NEW, "")
    before, after = answers(TEXT, tmp_path), answers(text, tmp_path)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("qkv", torch.bfloat16, rows, arch) for rows in (1, 64) for arch in (90, 100)}
    text = tune.with_tile(TEXT, "attention_dq", tune.Setting(torch.float32, 16, 1, 86), NEW, "")
    after = answers(text, tmp_path)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("attention_dq", torch.float32, rows, arch) for rows in (1, 64) for arch in (80, 86, 90, 100)}
    assert len(changes(text)) == 1, "a line for any number of rows stays when few were timed"


def test_the_fastest_attention_is_written_for_rows_of_at_most_so_many_tokens(tmp_path):
    text = tune.with_choice(TEXT, {128: "sdpa", 512: "triton", 2048: "triton"}, "H100")
    module = loaded(text, tmp_path)
    found = [module.fastest_attention(torch.bfloat16, n) for n in (1, 128, 129, 4096)]
    assert found == ["sdpa", "sdpa", "triton", "triton"]
    assert module.fastest_attention(torch.float32, 1) == "triton" and module.TABLE == LINES
    again = tune.with_choice(text, {128: "flash", 512: "flash", 2048: "flash"}, "H100")
    assert loaded(again, tmp_path).fastest_attention(torch.bfloat16, 100) == "flash"
    assert again.count("\nhalf      any       flash") == 1 and "sdpa            H100" not in again


def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    tables = Path(shutil.copy(tune.TABLES, tmp_path))
    mode = tables.stat().st_mode

    def interrupted(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune.write(tables, "half a file")
    with pytest.raises(UnicodeEncodeError):
        tune.write(tables, TEXT + "\ud800")  # fails while the text is written
    assert tables.read_text(encoding="utf-8") == PRESENT
    assert list(tables.parent.iterdir()) == [tables]
    tune.write(tables, TEXT)
    assert tables.read_text(encoding="utf-8") == TEXT and tables.stat().st_mode == mode


WITHOUT_GPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")


@pytest.mark.parametrize("flags", [["--offline"], pytest.param([], marks=WITHOUT_GPU)])
def test_writing_without_a_gpu_is_refused_in_one_line(flags, capsys):
    assert tune.main([*flags, "--write"]) == 2
    assert capsys.readouterr().err == "error: --write needs times, and times need a GPU; leave --write out\n"
    assert tune.TABLES.read_text(encoding="utf-8") == PRESENT


TWO_TILES = """
import json, torch
from hrm_kernels import tune
tune.GRID = '''
op   kernels           type  rows  M    N    K   warps  stages
qkv  qkv_rope.project  half  any   128  128  64  4,8    3
'''
found = tune.examine("qkv", tune.Setting(torch.bfloat16, 1, 512, 90))
print(json.dumps([[c.tile, c.registers, c.spill_bytes, c.faults] for c in found]))
print(tune.main(["--offline", "--arch", "90", "--ops", "qkv", "--dtype", "bfloat16", "--rows", "512"]))
"""


def test_a_tile_that_spills_is_a_candidate_no_longer():
    """128 x 128 accumulators on 4 warps: compiled for sm_90, without a GPU and without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_TILES],
        env=environment,
        cwd=Path(tune.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *shown, status = done.stdout.splitlines()
    spills = {tuple(tile): (spill, faults) for tile, _, spill, faults in json.loads(first)}
    assert spills[128, 128, 64, 8, 3] == (0, [])
    spill, faults = spills[128, 128, 64, 4, 3]
    assert spill > 0 and faults == [f"spills {spill} bytes"]
    assert status == "0" and "no GPU" in shown[0]
    assert sum(line.startswith("qkv ") for line in shown) == len(spills)
    assert [line for line in shown if line.endswith(f"spills {spill} bytes")] == [shown[-1]], "faulty ones come last"


@pytest.fixture
def small_base(monkeypatch):
    """A base model that the interpreter runs in seconds."""
    shape = {"width": 48, "n_head": 2, "n_kv_head": 1, "hidden": 40, "vocab": 130}
    monkeypatch.setattr(tune.offline, "BASE", shape)
    small = Tile(16, 16, 16, 4, 1)
    matrix = dict.fromkeys(("swiglu", "qkv", "attention", "attention_dq", "attention_dkv"), small)
    with tuning.use_tiles(**matrix), ops.use_backend("triton", **dict.fromkeys(ops.OPS, "triton")):
        yield


@pytest.mark.parametrize("op", [*tune.OPS, tune.CHOICE])
def test_what_is_timed_is_checked_against_float64(op, small_base):
    job = tune.work(op, tune.Setting(torch.float32, 3, 9, 90), DEVICE)
    assert job.error() <= tune.TOLERANCE[torch.float32][job.with_gradient]
    assert all(t.shape[0] == 3 for t in job.run())


def test_wrong_and_unwritten_numbers_are_seen(small_base):
    x, w = torch.randn(3, 5, 16, device=DEVICE), torch.randn(16, device=DEVICE)

    def wrong(module, x, w):
        return module.rms_norm(x, w) * (1.001 if module is ops else 1)

    def unwritten(module, x, w):
        return torch.empty_like(x) if module is ops else module.rms_norm(x, w)

    assert 9e-4 < tune.Work(wrong, [x], [w], "forward").error() < 2e-3
    assert not tune.Work(unwritten, [x], [w], "forward").error() <= 1
