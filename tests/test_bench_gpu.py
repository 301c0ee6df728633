"""bench/gpu.py where there is no GPU: what it would run exists, and what goes wrong is recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_that_it_would_run_exists(tmp_path, capsys):
    assert gpu.main(["--list"]) == 0
    printed = capsys.readouterr().out
    commands = [command for commands in gpu.parts(tmp_path).values() for command in commands]
    assert len(printed.splitlines()) == len(commands) > 8
    files = [word for command in commands for word in command.words if word.startswith(("bench/", "tests/", "train/"))]
    assert files and all((ROOT / file).is_file() for file in files)
    names = gpu.SMALL.split(" or ")
    tests = (ROOT / "tests" / "test_hrm_loop.py").read_text(encoding="utf-8")
    assert all(f"def {name}" in tests for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for where there is no GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_fails_hangs_or_is_not_there_is_recorded(tmp_path):
    wanted = {
        "passed": [sys.executable, "-c", "print('words of its own')"],
        "status 3": [sys.executable, "-c", "raise SystemExit(3)"],
        "stopped after 1 s": [sys.executable, "-c", "import time; time.sleep(60)"],
        "not run: No such file or directory: no-such-program": ["no-such-program"],
    }
    with (tmp_path / "log").open("w") as log:
        for outcome, words in wanted.items():
            assert gpu.run(gpu.Command("a", words), 1 if "stopped" in outcome else 60, log)["outcome"] == outcome
    assert "words of its own" in (tmp_path / "log").read_text()
