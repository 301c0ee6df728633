"""Several processes that share the rows of a run train as one does: losses, depths, checkpoints, stopping."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conversation_datasets import TINY, some_rows, write_chat
from pretrain_helpers import SCRIPT, Forks, checkpoint_of, records
from safetensors import safe_open
from small_models import thinker

from hrm_model import HRMForCausalLM, load_model, save_model
from hrm_model.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint
from hrm_model.exits import exits
from hrm_model.halting import Exploration
from hrm_model.ranks import Ranks
from hrm_model.training.shards import open_dataset

SEED, STEPS, MAX_STEPS, EXPLORE = 1337, 20, 4, 0.25
COMMON = f"--recipe tiny --steps {STEPS} --accumulation 2 --lr 0.001 --min-lr 0.0001 --warmup 2 --dropout 0"
COMMON += f" --device cpu --halting policy --explore {EXPLORE} --step-price 0.02 --target-steps 2.5 --head-lr 0.00005"
COMMON += " --ema 0.9 --log-every 1 --eval-every 10 --eval-windows 5 --save-every 10 --sample-tokens 0 --timeout 0.5"
STAGES = {"pretrain": COMMON + " --batch-size 3 --depth-warmup 0", "converse": COMMON + " --tokens-per-batch 48"}
"""Three rows of text or so in a micro-batch: of four processes one has none."""


class Runs:
    """Runs of this file by what they are, each made once."""

    def __init__(self, directory: Path, forks: Forks, text: Path, talk: Path, model: Path):
        self.directory, self.forks = directory, forks
        self.data, self.model = {"pretrain": text, "converse": talk}, model
        self._made: dict[tuple, Path] = {}
        self._names = itertools.count()

    def flags(self, stage: str, out: Path, *more: str) -> list[str]:
        paths = ["--data", str(self.data[stage]), "--init-from", str(self.model), "--out", str(out)]
        return [*STAGES[stage].split(), *paths, *more]

    def __call__(self, stage: str, size: int, parallel: str = "auto", *more: str) -> Path:
        key = stage, size, parallel, *more
        if key not in self._made:
            out = self.directory / f"run-{next(self._names)}"
            codes, printed = self.forks.run(size, self.flags(stage, out, "--parallel", parallel, *more), stage)
            assert codes == [0] * size, printed
            assert all(not text for text in printed[1:]), "one process speaks for all"
            self._made[key] = out
        return self._made[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks, tiny_dataset) -> Runs:
    directory, chance = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    rows = [(chance.integers(0, 60, len(ids)), mask) for ids, mask in some_rows(70, shortest=3, longest=17)]
    write_chat(directory / "talk", rows[:60], rows[60:], about=TINY)
    return Runs(
        directory, forks, tiny_dataset, directory / "talk", save_model(undecided(tiny_dataset), directory / "model")
    )


@torch.no_grad()
def undecided(dataset: Path) -> HRMForCausalLM:
    """A model whose head stops half of the text's prefixes after the first step."""
    shape = dict(block_size=16, halting="policy", hrm_max_steps=MAX_STEPS)
    model = thinker(dtype=torch.float32, **shape)
    ids = torch.from_numpy(open_dataset(dataset).split("train").read(0, 16 * 16).reshape(16, 16).astype(np.int64))
    model.hrm_core.q_head.bias[0] -= exits(model, ids, ids).margins()[..., 0].median()
    return model


def numbers(record: dict) -> dict:
    """What of a line of metrics.jsonl must not depend on the number of processes; each pads to its own longest row."""
    kept = {k: v for k, v in record.items() if k not in ("kind", "tokens_per_s", "mfu", "padding_share")}
    nested = {
        f"{k}.{inner}": v for k, values in kept.items() if isinstance(values, dict) for inner, v in values.items()
    }
    return {k: v for k, v in kept.items() if not isinstance(v, dict) and v is not None} | nested


def assert_same_records(found: Path, expected: Path, after: int = 0) -> None:
    for kind in ("train", "eval"):
        ours, theirs = ([numbers(r) for r in records(run, kind) if r["step"] > after] for run in (found, expected))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs] != []
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5), f"{kind} at step {b['step']}"


def copy_until(run: Path, step: int, target: Path) -> Path:
    """The run as it was after the checkpoint of `step`."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    return target


# -- the same run ------------------------------------------------------------------------------------------------------


slow = pytest.mark.slow
WAYS = [("pretrain", 4, "ddp"), ("pretrain", 2, "fsdp"), ("converse", 2, "ddp")]
MORE_WAYS = [("pretrain", 2, "ddp"), ("pretrain", 4, "fsdp"), ("converse", 4, "ddp"), ("converse", 2, "fsdp")]
MORE_WAYS += [("converse", 4, "fsdp")]


@pytest.mark.parametrize(("stage", "size", "way"), WAYS + [pytest.param(*way, marks=slow) for way in MORE_WAYS])
def test_processes_together_train_as_one_alone(runs, stage, size, way):
    """Losses of the model and of its head, gradients' norms, depths, prices and validation, for 20 steps. In
    conversations rows have 1 to 8 targets, so that a mean of processes' means would be another loss."""
    assert_same_records(runs(stage, size, way), runs(stage, 1))


def test_the_rows_of_these_runs_halt_at_different_steps_by_decision(runs):
    exploration = Exploration(SEED, MAX_STEPS, EXPLORE, warmup=0)
    varied = 0
    for record in records(runs("pretrain", 1), "train"):
        step = record["step"] - 1
        given = exploration.depths(range(6 * step, 6 * step + 6), step)
        decided = [n - given.count(int(depth)) for depth, n in record["depths"].items()]
        assert sum(decided) == given.count(0)
        varied += sum(n > 0 for n in decided) > 1
    assert varied >= 3


@slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", ["--gradient-window 2 --recompute", "--gradient-steps 2", "--optimizer atan2"])
def test_processes_train_as_one_with_other_gradients(runs, options, way):
    more = [*options.split(), "--steps", "6"]
    assert_same_records(runs("pretrain", 2, way, *more), runs("pretrain", 1, "auto", *more))


def test_the_published_gradient_in_shards_is_refused(runs, tmp_path):
    """A process none of whose rows runs all steps would owe the others its part of the core's gradient."""
    codes, printed = runs.forks.run(
        2, runs.flags("pretrain", tmp_path, *"--parallel fsdp --gradient published".split())
    )
    assert codes == [1, 1] and "--gradient published has no --parallel fsdp" in printed[0]


def test_every_row_belongs_to_one_process_and_order_is_kept():
    for size in (1, 2, 3, 5):
        rows = np.arange(100, 113)[::-1]
        shares = [Ranks(rank, size).share(rows) for rank in range(size)]
        together = np.empty_like(rows)
        for rank, share in enumerate(shares):
            together[rank::size] = share
        assert (together == rows).all() and sum(map(len, shares)) == len(rows)


def test_validation_weighs_rows_alike_where_one_process_has_only_full_ones(runs):
    """The loss looks at every token, and the first process has the one row that needs no padding."""
    rows = [(np.arange(i, i + size) % 60, np.arange(size) > 0) for i, size in enumerate((17, 9))]
    write_chat(runs.directory / "full", rows * 4, rows, about=TINY)
    more = [*"--train-on-prompt --steps 2 --eval-windows 2 --data".split(), str(runs.directory / "full")]
    assert_same_records(runs("converse", 2, "ddp", *more), runs("converse", 1, "auto", *more))


# -- checkpoints in parts ----------------------------------------------------------------------------------------------


def joined_by_hand(checkpoint: Path, stem: str) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(checkpoint.glob(f"{stem}-*-of-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def test_a_checkpoint_in_parts_loads_as_the_gathered_model_and_exports_to_one_file(runs, tmp_path):
    run = runs("pretrain", 2, "fsdp")
    checkpoint = checkpoint_of(run, STEPS)
    assert sorted(p.name for p in checkpoint.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ]  # fmt: skip
    verify_checkpoint(checkpoint)
    alone, _ = load_model(runs("pretrain", 1))
    for source, stem in ((run, "model"), (checkpoint, "model"), (checkpoint / "ema.safetensors", "ema")):
        model, _ = load_model(source)
        gathered = joined_by_hand(checkpoint, stem)
        assert gathered.keys() == model.state_dict().keys()
        assert all(torch.equal(gathered[name], tensor) for name, tensor in model.state_dict().items())
    model, _ = load_model(run)
    close = [
        torch.allclose(p, q, rtol=0, atol=2e-4) for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    ]
    assert all(close), "one process's weights, but for rounding that Adam enlarges"
    save_model(model, tmp_path / "whole")
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"config.json", "manifest.json", "model.safetensors"}
    again, _ = load_model(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


RESUMES = [("fsdp", 2, 1, "auto"), ("ddp", 4, 2, "fsdp")]
MORE_RESUMES = [("fsdp", 2, 4, "fsdp"), ("fsdp", 2, 2, "ddp"), ("fsdp", 4, 2, "fsdp"), ("auto", 1, 4, "fsdp")]
RESUMES += [pytest.param(*resume, marks=slow) for resume in MORE_RESUMES]


@pytest.mark.parametrize(("way", "size", "after", "then"), RESUMES)
def test_a_run_resumes_on_another_number_of_processes(runs, tmp_path, way, size, after, then):
    whole = runs("pretrain", size, way)
    run = copy_until(whole, 10, tmp_path / "run")
    flags = runs.flags("pretrain", run, "--parallel", then, "--resume", "auto")
    codes, printed = runs.forks.run(after, flags)
    assert codes == [0] * after, printed
    assert "step 10)" in printed[0]
    assert_same_records(run, whole, after=10)
    averages = [load_model(checkpoint_of(r, STEPS) / "ema.safetensors")[0].state_dict() for r in (run, whole)]
    assert all(torch.allclose(averages[0][name], averages[1][name], rtol=0, atol=2e-4) for name in averages[0])


def damages(path: Path):
    content = path.read_bytes()
    yield "missing", path.unlink
    yield "truncated", lambda: path.write_bytes(content[: len(content) // 2])
    yield "flipped", lambda: path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    yield "zeroed", lambda: path.write_bytes(bytes(len(content)))


def test_any_damage_to_any_part_is_noticed_and_the_checkpoint_before_serves(runs, tmp_path):
    run = shutil.copytree(runs("pretrain", 2, "fsdp"), tmp_path / "run")
    last = checkpoint_of(run, STEPS)
    names = sorted(p.name for p in last.iterdir())
    assert len(names) == 9, "three kinds of tensors in two parts, config, state and manifest"
    for name in names:
        content = (last / name).read_bytes()
        for what, harm in damages(last / name):
            harm()
            with pytest.raises(CheckpointError, match=r"step-00000020"):
                verify_checkpoint(last)
            warned: list[str] = []
            assert latest_checkpoint(run, warned.append) == checkpoint_of(run, 10), f"{name} {what}"
            assert len(warned) == 1 and "step-00000020" in warned[0]
            (last / name).write_bytes(content)
    assert latest_checkpoint(run) == last
    (last / "model-00002-of-00002.safetensors").unlink()
    with pytest.warns(UserWarning, match="skipped broken checkpoint step-00000020"):
        model, _ = load_model(run)
    assert torch.equal(model.wte.weight, load_model(checkpoint_of(run, 10))[0].wte.weight)


def test_parts_that_do_not_belong_together_are_refused(runs, tmp_path):
    """Without a manifest nothing but their content can tell."""
    source = checkpoint_of(runs("pretrain", 2, "fsdp"), STEPS)
    first, second = (source / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    shutil.copy(source / "config.json", tmp_path)
    for copied in (first, first), (second, second):
        for path, name in zip(copied, (first.name, second.name), strict=True):
            shutil.copy(path, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"the parts of .* hold rows up to"):
            load_model(tmp_path)
    (tmp_path / second.name).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors does not exist"):
        load_model(tmp_path)


# -- stopping together -------------------------------------------------------------------------------------------------

SIGNAL_AT_3 = """
import os, signal, torch
step = torch.optim.AdamW.step
def stepped(self, *args, count=[0], **kwargs):
    count[0] += 1
    if count[0] == 3 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = stepped
"""


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=slow)])
def test_a_signal_to_one_process_lets_all_save_the_same_step_and_leave(runs, tmp_path, way):
    run, more = tmp_path / "run", ("--parallel", way, "--steps", "6")
    codes, printed = runs.forks.run(2, runs.flags("pretrain", run, *more), inject=SIGNAL_AT_3)
    assert codes == [75, 75], printed
    assert "stopped, saved at step 3 of 6" in printed[0] and "stopping after this step" in printed[1]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    codes, printed = runs.forks.run(2, runs.flags("pretrain", run, *more, "--resume", "auto"))
    assert codes == [0, 0], printed
    assert_same_records(run, runs("pretrain", 2, way, "--steps", "6"))


@slow
def test_torchrun_starts_the_processes_of_a_run(runs, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    flags = runs.flags("pretrain", tmp_path / "run", "--parallel", "fsdp", "--steps", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *flags], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "2 processes (fsdp)" in done.stdout and done.stdout.count("done: val loss") == 1
    assert_same_records(tmp_path / "run", runs("pretrain", 1, "auto", "--steps", "2"))
