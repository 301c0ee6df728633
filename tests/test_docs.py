"""docs/kernels.md is true: its example, block by block, becomes part of a copy of the package, runs and compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(?:python|text)\n# (\S+\.py)(?:, below: ([^\n]+))?\n(.*?)```", re.DOTALL)

COMPILE = """
import torch
from hrm_kernels import offline, tuning
with tuning.assume(90):
    found = offline.launches(torch.bfloat16, 2, 32, offline.BASE)
lines = {}
for launch in found:
    if launch.kernel.fn.__module__.endswith(".scale_add"):
        line = offline.compiled(launch, 90)
        lines[line["kernel"]] = offline.faults(line)
assert lines == {"scale_add.forward": [], "scale_add.backward": []}, lines
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package and the tests' helpers, with every block of the page where its first line says."""
    root = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "hrm_kernels", root / "hrm_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    for name in ("conftest.py", "parity.py", "interpreter.py", "golden_files.py"):
        shutil.copy(ROOT / "tests" / name, root / "tests")
    for name, line, body in BLOCK.findall(PAGE):
        path = root / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if line:
            at = re.search(rf"^ *{re.escape(line)}.*\n", text, re.MULTILINE)
            assert at, f"{name} has no line that begins with {line!r}"
            text = text[: at.end()] + body + text[at.end() :]
        else:
            text = f"{text}\n\n{body}" if text else body
        path.write_text(text, encoding="utf-8")
    return root


def run(copy: Path, *command: str, interpret: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "HRM_"))}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (copy, ROOT)))
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_example_is_complete():
    files = [name for name, _, _ in BLOCK.findall(PAGE)]
    named = {"reference", "checks", "__init__", "backend", "tuning", "offline", "kernels/__init__", "kernels/scale_add"}
    assert {f"hrm_kernels/{name}.py" for name in named} | {"tests/test_scale_add.py"} == set(files)
    assert PAGE.count("```") == 2 * len(files), "every block says where it goes"


def test_the_example_agrees_with_float64_forward_and_backward(copy):
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_scale_add.py", interpret=True)


def test_the_example_compiles_without_a_fault(copy):
    run(copy, "-c", COMPILE, interpret=False)


def test_every_kernel_file_is_explained_and_every_file_named_exists():
    for path in (ROOT / "hrm_kernels" / "kernels").glob("*.py"):
        assert path.name in PAGE or path.name == "parts.py", path.name
    named = set(re.findall(r"[\w/]+\.py\b", PAGE)) - {"tests/test_scale_add.py", "hrm_kernels/kernels/scale_add.py"}
    paths = [*(ROOT / "hrm_kernels").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    missing = [name for name in named if not any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in paths)]
    assert len(named) > 15 and not missing, missing
