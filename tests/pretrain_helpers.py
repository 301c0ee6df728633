"""Runs of train/pretrain.py for tests: their flags, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hrm_model import HRMConfig, HRMForCausalLM, save_model
from hrm_model.checkpoint import verify_checkpoint

SCRIPT = Path(__file__).parents[1] / "train" / "pretrain.py"
NO_PICTURES = [pytest.mark.usefixtures("no_pictures"), pytest.mark.filterwarnings("ignore:no dashboard.png")]
"""Marks of a file whose runs draw none: a picture takes longer than the run. test_first_run.py has it."""


def short_run(dataset: Path, model: Path, out: Path) -> list[str]:
    """A run of 8 steps with dropout and accumulation. Depths are random for 3 steps; then the head decides for the half
    of the rows that do not explore. The price of a step is steered."""
    run = f"--recipe tiny --config {model} --data {dataset} --out {out} --steps 8"
    run += " --batch-size 4 --accumulation 2 --lr 0.01 --min-lr 0.001 --warmup 2 --dropout 0.1 --device cpu"
    run += " --halting policy --explore 0.5 --step-price 0.02 --target-steps 1.5"
    return (run + " --log-every 1 --eval-every 4 --eval-windows 4 --save-every 2 --sample-tokens 4").split()


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = checkpoint_of(run, step)
    verify_checkpoint(checkpoint)
    model, optimizer = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    # clones: what load_file returns is mapped from the file, and some tests damage that
    return {k: v.clone() for k, v in [*model.items(), *((f"optimizer/{k}", v) for k, v in optimizer.items())]}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"not bitwise equal: {different[:5]}"


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def signal_during(training, step: int, number: int):
    """The same training, whose process gets signal `number` in step `step`, when its rows have been read."""
    depths, sent = training.train_step.depths, []

    def signalled(batch, index):
        if index == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return depths(batch, index)

    training.train_step.depths = signalled
    return training


def decided(shape: Path, q: tuple[float, float], path: Path, **changes) -> Path:
    """A model whose head says q whatever it sees."""
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(shape.read_text()) | changes))
    with torch.no_grad():
        model.hrm_core.q_head.weight.zero_()
        model.hrm_core.q_head.bias.copy_(torch.tensor(q))
    return save_model(model, path)


def start_from(model: Path, flags: list[str]) -> None:
    """In `flags`, put a model in the place of the configuration."""
    at = flags.index("--config")
    flags[at : at + 2] = ["--init-from", str(model)]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Forks:
    """Runs of one or several processes, each forked from one that has imported torch: an import takes seconds.

    A process has the environment that torchrun would give it, and writes what it prints to a file. forks.py is the
    other side of this.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._jobs = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exc) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()

    def start(self, size: int, arguments: list[str], stage: str = "pretrain", inject: str = "") -> Job:
        """Start `size` processes of a stage's script. inject: code that runs in each before, `rank` being its own."""
        self._jobs += 1
        logs = [str(self.directory / f"job-{self._jobs}-{rank}.log") for rank in range(size)]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        if size == 1:
            environments = [{}]
        pids = self.ask(start=list(map(str, arguments)), stage=stage, inject=inject, logs=logs, env=environments)
        return Job(self, pids, list(map(Path, logs)))

    def run(self, size: int, arguments: list[str], stage: str = "pretrain", inject: str = "", timeout: float = 120):
        """(exit statuses, what each process printed); -9 where the timeout ended one."""
        return self.start(size, arguments, stage, inject).wait(timeout)

    def ask(self, **request) -> list[int]:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass
class Job:
    """Processes that were started together."""

    forks: Forks
    pids: list[int]
    logs: list[Path]

    def wait(self, timeout: float = 120) -> tuple[list[int], list[str]]:
        codes = self.forks.ask(wait=self.pids, timeout=timeout)
        return codes, [log.read_text(encoding="utf-8", errors="replace") for log in self.logs]
