"""The README is true: its files exist, its flags exist, its commands run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from parity import COMPILING

from bench.generate import main as generate_main
from bench.halting_tasks import main as halting_tasks_main
from bench.halting_text import main as halting_text_main
from bench.hrm_step import main as hrm_step_main
from bench.ops import main as ops_main
from bench.quantized import main as quantized_main
from bench.soak import main as soak_main
from hrm_kernels.offline import main as offline_main
from hrm_model.cli import COMMANDS
from hrm_model.cli import main as hrm_main
from hrm_model.training.flags import field_docs
from hrm_model.training.recipes import TrainConfig
from train.continual import main as continual_main
from train.halting import main as halting_main
from train.identity import main as identity_main
from train.prepare import main as prepare_main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


GUIDES = ("chat", "finetune", "depth", "deploy")
"""Pages of docs/ whose commands run as they stand, where command one has been."""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_every_file_it_names_exists():
    names = set(re.findall(r"\b[\w/-]+\.(?:py|md|png)\b", README))
    names -= {"dashboard.png"}  # made by a run
    known = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if ".venv" not in path.parts}
    missing = [name for name in names if not any(k == name or k.endswith("/" + name) for k in known)]
    assert len(names) > 30 and not missing, missing


def test_no_figure_is_missing():
    assert not re.search(r"@[A-Z]+@|TBD|XXX", README)
    assert list((ROOT / "bench" / "results").glob("*.jsonl"))


def test_every_module_of_the_packages_is_in_its_map():
    listed = README[README.index("## Map") :]
    modules = [p for package in ("hrm_kernels", "hrm_model") for p in (ROOT / package).rglob("*.py")]
    missing = [p.name for p in modules if p.name not in listed and p.name != "version.py"]
    assert not missing, missing


def test_every_flag_it_names_exists(capsys):
    with pytest.raises(SystemExit):
        prepare_main(["--help"])
    fits = continual_main, identity_main, halting_main, halting_tasks_main, halting_text_main, quantized_main, soak_main
    for command in (generate_main, hrm_step_main, ops_main, offline_main, *fits):
        with pytest.raises(SystemExit):
            command(["--help"])
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            hrm_main([name, "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    known |= {"--dist"}  # pytest-xdist's
    known |= {"--" + name.replace("_", "-") for name in field_docs(TrainConfig)} | {"--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert len(named) > 8 and named <= known, named - known


def commands() -> list[str]:
    """The two commands without their installation, then those of the section Use, in the README's order."""
    one, two, use = blocks("bash")
    last = [c.strip().split("&&")[-1].strip().replace(".venv/bin/python", "python") for c in (one, two)]
    assert last == ["python train/pretrain.py", "python -m pytest -n auto --dist worksteal"]
    lines = [line for line in use.strip().splitlines() if not line.startswith("#")]
    return [last[0], *lines]


@pytest.mark.slow
def test_every_command_runs_as_it_stands(tmp_path):
    """In a clean copy, one after the other, then the Python example, and the guides a block of commands at a time.
    Command two is how this test is run itself."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        target = tmp_path / "copy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    for name, arguments in (("python", ""), ("hrm", "-m hrm_model ")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = COMPILING | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    outputs = {}
    guides = [block for name in GUIDES for block in blocks("bash", (ROOT / "docs" / f"{name}.md").read_text("utf-8"))]
    for command in [*commands(), f"python -c {shlex.quote(blocks('python')[0])}", *guides]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path / "copy",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        outputs[command] = done.stdout
    gain = re.search(r"([\d.]+) nats under the unigram", outputs["python train/pretrain.py"])
    assert gain and float(gain[1]) >= 0.2, "command one must end at least 0.2 nats under the unigram loss"
