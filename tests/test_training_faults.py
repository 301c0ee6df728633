"""What goes wrong in a run loses nothing but the work since its last save, and an error names the cause."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import adamw, linux, net, run_python, train
from pretrain_helpers import (
    NO_PICTURES,
    SCRIPT,
    Forks,
    assert_same_bits,
    checkpoint_of,
    records,
    short_run,
    start_from,
    weights,
)

from hrm_model import HRMConfig, HRMForCausalLM, save_model
from hrm_model.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from hrm_model.training import command
from train.pretrain import main

pytestmark = [linux, *NO_PICTURES]
STEPS = 6


def short(dataset: Path, model: Path, out: Path) -> list[str]:
    """Six steps, saved after 2, 4 and 6, with averaged weights."""
    flags = short_run(dataset, model, out)
    return [*flags, *f"--steps {STEPS} --batch-size 2 --eval-every 6 --sample-tokens 0 --ema 0.9 --timeout 0.5".split()]


@pytest.fixture
def flags(tiny_dataset, tiny_model, tmp_path) -> list[str]:
    return short(tiny_dataset, tiny_model, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, forks, tiny_dataset, tiny_model):
    """Uninterrupted runs of one and two processes: size -> its directory."""
    made = {}

    def run(size: int) -> Path:
        if size not in made:
            made[size] = tmp_path_factory.mktemp("whole") / "run"
            codes, printed = forks.run(size, short(tiny_dataset, tiny_model, made[size]))
            assert codes == [0] * size, printed
        return made[size]

    return run


def at_update(number: int, code: str, of_rank: int = 0, after: bool = False) -> str:
    """Code to inject: does `code` in one process before or after an optimizer's update, `self` being the optimizer."""
    before, then = ("pass", code) if after else (code, "pass")
    return f"""
import os, resource, signal, torch
update, count = torch.optim.AdamW.step, [0]
def updated(self, *args, **kwargs):
    count[0] += 1
    hit = count[0] == {number} and rank == {of_rank}
    if hit: {before}
    update(self, *args, **kwargs)
    if hit: {then}
torch.optim.AdamW.step = updated
"""


def assert_resumes(forks: Forks, flags: list[str], whole: Path, size: int = 1, step: int | None = None) -> None:
    """The run goes on from `step` and ends at the uninterrupted run's bits, its averages included."""
    run = Path(flags[flags.index("--out") + 1])
    codes, printed = forks.run(size, [*flags, "--resume", "auto"])
    assert codes == [0] * size, printed
    assert step is None or f"(step {step})" in printed[0]
    assert_same_bits(weights(run, STEPS), weights(whole, STEPS))
    averages = [(checkpoint_of(r, STEPS) / "ema.safetensors").read_bytes() for r in (run, whole)]
    assert averages[0] == averages[1]
    assert [r["loss"] for r in records(run, "train")] == [r["loss"] for r in records(whole, "train")]
    assert_no_litter(run)


def assert_no_litter(run: Path) -> None:
    for entry in (run / "checkpoints").iterdir():
        verify_checkpoint(entry)


# -- kills and damage --------------------------------------------------------------------------------------------------

KILLER = """
import os, sys
import torch
from torch import nn
import hrm_model.sharded as sharded
from hrm_model.checkpoint import save_checkpoint
torch.set_num_threads(1)
model = nn.Linear(3, 3)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
left = None

def operation(half=lambda: None):
    global left
    if left is not None:
        left -= 1
        if left < 0:
            half()
            os._exit(9)  # as kill -9: no handler, no clean-up

def audited(event, arguments):
    changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+"))
    if changes:
        operation()

fsync, save_file = os.fsync, sharded.save_file
def synced(handle):
    operation()
    fsync(handle)
def saved(tensors, path, metadata):
    def half():
        save_file(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
    operation(half)
    save_file(tensors, path, metadata)
    operation()

sys.addaudithook(audited)
os.fsync, sharded.save_file = synced, saved
for line in sys.stdin:
    count, step = map(int, line.split())
    child = os.fork()
    if child == 0:
        average = {name: p.detach() + step for name, p in model.named_parameters()}
        left = count
        save_checkpoint(sys.argv[1], step, model, optimizer, {}, keep_last=2, average=average)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_at_every_write_fsync_and_rename_of_a_save_with_averages_leaves_whole_checkpoints(tmp_path):
    def killed_at(count: int, step: int) -> bool:
        child.stdin.write(f"{count} {step}\n")
        child.stdin.flush()
        return {9: True, 0: False}[int(child.stdout.readline())]

    with run_python(KILLER, tmp_path) as child:
        for step in (1, 2):
            assert not killed_at(10**6, step)
        count, step = 0, 3
        while killed_at(count, step):
            visible = sorted((tmp_path / "checkpoints").glob("step-*"))
            for path in visible:
                verify_checkpoint(path)
                assert (path / "ema.safetensors").exists()
            assert len(visible) >= 2, "the checkpoints before are never lost"
            step = int(visible[-1].name[5:]) + 1
            count += 1
        assert count > 30
        assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "no litter"
        child.stdin.close()


def test_every_byte_wise_damage_of_every_file_is_noticed_and_the_checkpoint_before_serves(tmp_path):
    model = net()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    average = dict(model.named_parameters())
    first, second = (save_checkpoint(tmp_path, n, model, optimizer, {}, average=average) for n in (1, 2))
    assert len(list(second.iterdir())) == 6
    for path in sorted(second.iterdir()):
        content = path.read_bytes()
        flips = [content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(0, len(content), 97)]
        cuts = [content[:i] for i in range(0, len(content), 331)]
        for damaged in (*flips, *cuts, bytes(len(content)), content + b"\0"):
            path.write_bytes(damaged)
            warned: list[str] = []
            assert latest_checkpoint(tmp_path, warned.append) == first, f"{path.name}"
            assert len(warned) == 1 and (path.name in warned[0] or path.name == "manifest.json")
            with pytest.raises(CheckpointError):
                load_checkpoint(second, net(), restore_rng=False)
        path.write_bytes(content)
    assert latest_checkpoint(tmp_path) == second


PARTS = """
import os, torch
import hrm_model.sharded as sharded
save_file, renames = sharded.save_file, [0]
rename, fsync = os.rename, os.fsync
def dies(*args, **kwargs):
    if os.path.exists({trigger!r}):
        os.kill(os.getpid(), 9)
def saved(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if rank == {victim} and {event!r} == "write" and "step-00000004" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
def synced(handle):
    fsync(handle)
    name = os.readlink(f"/proc/self/fd/{{handle}}")
    if rank == {victim} and {event!r} == "fsync" and "step-00000004" in name and "manifest" in name:
        os.kill(os.getpid(), 9)
def renamed(source, target, **kwargs):
    if rank == {victim} and {event!r} == "rename" and str(target).endswith("step-00000004"):
        os.kill(os.getpid(), 9)
    rename(source, target, **kwargs)
sharded.save_file, os.fsync, os.rename = saved, synced, renamed
"""


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "event"), [(0, "write"), (1, "write"), (0, "fsync"), (0, "rename")])
def test_a_process_killed_in_a_save_in_parts_leaves_the_checkpoint_before(forks, flags, tmp_path, victim, event):
    flags += ["--parallel", "fsdp"]
    codes, printed = forks.run(2, flags, inject=PARTS.format(victim=victim, event=event, trigger=""))
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, printed
    assert "lost the other processes" in printed[1 - victim]
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("step*")} == {"step-00000002"}
    codes, printed = forks.run(2, [*flags, "--resume", "auto"])
    assert codes == [0, 0] and "(step 2)" in printed[0], printed
    assert_no_litter(tmp_path / "run")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_one_process_fails_the_save_of_all(forks, flags, tmp_path):
    """The file size limit stands for a full disk, in the second process alone."""
    full = at_update(4, "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))", of_rank=1)
    codes, printed = forks.run(2, [*flags, "--parallel", "fsdp"], inject=full)
    assert codes == [1, 1], printed
    assert "error: process 1: cannot write" in printed[1] and "file too large" in printed[1]
    assert "another process could not write its part of a checkpoint" in printed[0]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert_no_litter(tmp_path / "run")


WITHOUT_PRIVILEGES = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None)
assert libc.capget(header, data) == 0
data[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE: root writes where permissions forbid it
assert libc.capset(header, data) == 0
"""


def test_a_read_only_directory_is_named(forks, flags, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    codes, printed = forks.run(1, [*flags, "--out", str(tmp_path / "locked" / "run")], inject=WITHOUT_PRIVILEGES)
    assert codes == [1] and "Permission denied" in printed[0] and str(tmp_path / "locked" / "run") in printed[0]
    assert "Traceback" not in printed[0]

    checkpoints = tmp_path / "run" / "checkpoints"
    lock = at_update(3, f"os.chmod({str(checkpoints)!r}, 0o555)")
    codes, printed = forks.run(1, flags, inject=WITHOUT_PRIVILEGES + lock)
    checkpoints.chmod(0o755)
    assert codes == [1] and "Traceback" not in printed[0]
    assert f"cannot write {checkpoints}/step-00000004" in printed[0] and "check the path and its perm" in printed[0]
    assert latest_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 2)


def test_a_log_that_a_full_disk_does_not_take_is_named_and_the_steps_are_saved(forks, flags, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    full = """
import errno, io
class Full(io.TextIOWrapper):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")
import hrm_model.training.metrics as metrics
write = metrics.MetricsLog.write
def written(self, record):
    if record["step"] == 3:
        self._file = Full(open("/dev/null", "wb"))
    write(self, record)
metrics.MetricsLog.write = written
"""
    codes, printed = forks.run(1, flags, inject=full)
    assert codes == [1] and "Traceback" not in printed[0], printed
    assert f"error: cannot write {log}: no space left on device" in printed[0]
    assert latest_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 3)


@pytest.mark.parametrize("damage", [b"", bytes(100), b"[]", b'{"resumed": 3}', b"\xff\xfe", b'{"run": {'])
def test_a_damaged_run_json_is_written_anew_and_the_run_goes_on(flags, tmp_path, whole, damage):
    run = shutil.copytree(whole(1), tmp_path / "run")
    shutil.rmtree(checkpoint_of(run, 6))
    (run / "run.json").write_bytes(damage)
    with pytest.warns(RuntimeWarning, match=r"run\.json .*it is written anew"):
        assert main([*flags, "--resume", "auto"]) == 0
    origin = json.loads((run / "run.json").read_text())
    assert origin["run"]["steps"] == STEPS and [r["step"] for r in origin["resumed"]] == [4]


def test_damaged_lines_of_the_log_are_left_out(flags, tmp_path, whole):
    run = shutil.copytree(whole(1), tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"kind"', '"kinf"')
    lines[-1] = lines[-1].replace('"eval"', '"evil"')
    (run / "metrics.jsonl").write_text("".join(lines))
    assert main([*flags, "--resume", "auto"]) == 0
    assert [r["step"] for r in records(run, "train")] == [1, 3, 4, 5, 6]
    assert [r["val_loss"] for r in records(run, "eval")] == [r["val_loss"] for r in records(whole(1), "eval")]


# -- signals -----------------------------------------------------------------------------------------------------------

AT_FSYNC = """
import os, signal
fsync, count = os.fsync, [0]
def synced(handle):
    number = handle if isinstance(handle, int) else handle.fileno()
    count[0] += "/checkpoints" in os.readlink(f"/proc/self/fd/{{number}}")
    if count[0] in {counts}:
        os.kill(os.getpid(), signal.SIGTERM)
    fsync(handle)
os.fsync = synced
"""


def test_a_signal_during_a_save_lets_it_end_and_the_run_goes_on_later(forks, flags, tmp_path, whole):
    codes, printed = forks.run(1, flags, inject=AT_FSYNC.format(counts=(2,)))
    assert codes == [75] and "stopped, saved at step 2 of 6" in printed[0]
    assert_no_litter(tmp_path / "run")
    assert_resumes(forks, flags, whole(1), step=2)


def test_two_signals_during_a_save_leave_at_once_and_the_checkpoint_before_serves(forks, flags, tmp_path, whole):
    """A save makes nine calls of fsync or so: these come in the second one."""
    codes, printed = forks.run(1, flags, inject=AT_FSYNC.format(counts=(11, 12)))
    assert codes == [128 + signal.SIGTERM], printed
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step*")] == ["step-00000002"]
    assert_resumes(forks, flags, whole(1), step=2)


# -- numbers and memory ------------------------------------------------------------------------------------------------

SPOIL = "next(p for group in self.param_groups for p in group['params']).data.view(-1)[0] = float('nan')"


@pytest.mark.parametrize("number", [3, 4])
def test_weights_that_are_not_finite_are_never_saved(forks, flags, tmp_path, number):
    """Spoiled by the update before a save, or by an earlier one."""
    codes, printed = forks.run(1, flags, inject=at_update(number, SPOIL, after=True))
    assert codes == [76], printed
    assert f"error: step {number}: the weights after it are not finite; they were not saved" in printed[0]
    assert "Last good checkpoint: " in printed[0] and "step-00000002" in printed[0]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


NAN_GRADIENT = """
import torch
backward, count = torch.Tensor.backward, [0]
def spoiled(self, *args, **kwargs):
    count[0] += 1
    backward(self * float("nan") if count[0] == 5 and rank == 1 else self, *args, **kwargs)
torch.Tensor.backward = spoiled
"""


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_gradient_of_one_process_that_is_not_finite_stops_all_before_the_update(forks, flags, tmp_path, way):
    codes, printed = forks.run(2, [*flags, "--parallel", way], inject=NAN_GRADIENT)
    assert codes == [76, 76], printed
    assert "error: step 3: the gradient norm (nan) is not finite, in samples 8..9, 10..11" in printed[0]
    assert "no parameter was changed" in printed[0] and "step-00000002" in printed[0] and not printed[1]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


HEAD_NAN = """
from hrm_model.training.head import HeadTraining
add, count = HeadTraining.add_exits, [0]
def spoiled(self, found):
    add(self, found)
    count[0] += 1
    if count[0] == 5:
        self._gradient[0][0, 0] = float("nan")
HeadTraining.add_exits = spoiled
"""


def test_a_gradient_of_the_head_that_is_not_finite_stops_before_the_update(forks, flags, tmp_path):
    """Its loss is finite."""
    codes, printed = forks.run(1, flags, inject=HEAD_NAN)
    assert codes == [76], printed
    assert "error: step 4: the halting head's loss or gradient is not finite" in printed[0]
    assert "no parameter was changed" in printed[0]
    assert latest_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 3)


def test_a_model_that_is_not_finite_is_no_start(flags, tiny_model, tmp_path, capsys):
    model = HRMForCausalLM(HRMConfig.from_dict(json.loads(tiny_model.read_text())))
    torch.nn.init.constant_(model.ln_f.weight, math.nan)
    start_from(save_model(model, tmp_path / "spoiled"), flags)
    for extra in ([], ["--dry-run"]):
        assert main([*flags, *extra]) == 1
        assert f"--init-from {tmp_path / 'spoiled'} has weights that are not finite, in ln_f" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_flags_to_change(forks, flags):
    """The address space of a process that has started may grow by 60 MB."""
    limit = """
import resource
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 60_000_000,) * 2)
"""
    codes, printed = forks.run(1, [*flags, "--batch-size", "30000"], inject=limit)
    assert codes == [1] and "Traceback" not in printed[0], printed
    last = printed[0].splitlines()[-1]
    assert last.startswith("error: out of memory (")
    assert "--resume auto and a lower --batch-size and --accumulation raised in proportion, or --recompute" in last


def test_what_the_message_of_memory_that_ran_out_says_helps(forks, flags, tmp_path, whole):
    """The run goes on from its checkpoint with the flags that the message names."""
    failing = at_update(4, "raise torch.OutOfMemoryError('CUDA out of memory')", after=True)
    assert forks.run(1, flags, inject=failing)[0] == [1]
    shutil.copytree(tmp_path / "run", tmp_path / "smaller")
    assert_resumes(forks, [*flags, "--recompute"], whole(1), step=2)

    flags[flags.index("--out") + 1] = str(tmp_path / "smaller")
    smaller = ["--batch-size", "1", "--accumulation", "4", "--resume", "auto"]
    codes, printed = forks.run(1, [*flags, *smaller])
    assert codes == [0] and "(step 2)" in printed[0] and "not the same bits" in printed[0], printed
    found, expected = (records(run, "train")[2] for run in (tmp_path / "smaller", whole(1)))
    assert found["depths"] == expected["depths"] and found["loss"] == pytest.approx(expected["loss"], abs=0.02)
    codes, printed = forks.run(1, [*flags, "--batch-size", "1", "--resume", "auto"])
    assert codes == [1] and "--accumulation was 4, is 2" in printed[0], "other rows in each step"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_every_way_to_run_out_of_memory_is_one(error, monkeypatch, capsys):
    def fails(*args):
        raise error

    monkeypatch.setattr(command, "build", fails)
    for stage, flag in (("pretrain", "--batch-size"), ("converse", "--tokens-per-batch")):
        assert command.run({}, stage) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory (") and flag in said and said.count("--recompute") == 1


def test_memory_that_ends_in_the_middle_of_an_update_saves_no_torn_weights(forks, flags, tmp_path, whole):
    failing = at_update(4, "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", after=True)
    codes, printed = forks.run(1, flags, inject=failing)
    assert codes == [1] and "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB)" in printed[0]
    assert_resumes(forks, flags, whole(1), step=2)


def test_an_error_between_updates_saves_the_steps_that_were_taken(forks, flags, tmp_path, whole):
    failing = at_update(4, "raise torch.OutOfMemoryError('CUDA out of memory')")
    failing = failing.replace("torch.optim.AdamW.step", "torch.nn.utils.clip_grads_with_norm_")
    codes, printed = forks.run(1, flags, inject=failing)
    assert codes == [1] and "out of memory" in printed[0]
    assert_resumes(forks, flags, whole(1), step=3)


# -- processes ---------------------------------------------------------------------------------------------------------

KILL, STALL = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_and_resuming_gives_the_same_bits(forks, flags, whole, way, tmp_path):
    flags += ["--parallel", way]
    codes, printed = forks.run(2, flags, inject=at_update(3, KILL, of_rank=1))
    assert codes == [1, -signal.SIGKILL], printed
    assert "error: lost the other processes" in printed[0] and "--resume auto" in printed[0]
    assert "Traceback" not in printed[0]
    if way == "ddp":
        assert_resumes(forks, flags, whole(2), size=2, step=2)


@pytest.mark.parametrize("stalled", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_stalls_ends_the_others_within_the_timeout(forks, flags, stalled):
    job = forks.start(2, [*flags, "--timeout", "0.1"], inject=at_update(3, STALL, of_rank=stalled))
    alive = job.pids[1 - stalled]
    begin = time.monotonic()
    (code,) = forks.ask(wait=[alive], timeout=60)
    printed = job.logs[1 - stalled].read_text()
    assert code == 1 and time.monotonic() - begin < 40, printed
    assert "lost the other processes" in printed and "longer than --timeout" in printed
    assert forks.ask(wait=[job.pids[stalled]], timeout=0) == [-signal.SIGKILL]


def test_samples_that_one_process_cannot_read_end_all_after_a_save(forks, flags, tmp_path, whole):
    broken = """
def failing(*args):
    raise OSError(5, "Input/output error")
"""
    broken += at_update(3, "os.pread = failing", of_rank=1)
    codes, printed = forks.run(2, flags, inject=broken)
    assert codes == [1, 1], printed
    assert "error: step 4: another process cannot read its samples" in printed[0]
    assert "error: process 1: step 4: [Errno 5] Input/output error; saved at step 3" in printed[1]
    assert latest_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", 3)
    assert_resumes(forks, flags, whole(2), size=2, step=3)


def test_a_shard_that_is_cut_short_in_use_ends_the_run_after_a_save(forks, flags, tiny_dataset, tmp_path):
    """Another program truncates what is being read: no SIGBUS, but an error that names the file."""
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    cut = f"[os.truncate(path, 0) for path in pathlib.Path({str(data)!r}).glob('train-*')]"
    codes, printed = forks.run(1, [*flags, "--data", str(data)], inject="import pathlib\n" + at_update(3, cut))
    assert codes == [1], printed
    last = printed[0].splitlines()[-1]
    assert last.startswith(f"error: step 4: shard {data}/train-0000") and "was cut short while it was in use" in last
    assert last.endswith("saved at step 3") and latest_checkpoint(tmp_path / "run") == checkpoint_of(
        tmp_path / "run", 3
    )


def torchrun(flags: list[str], log: Path, *options: str) -> subprocess.Popen:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen([*run, str(SCRIPT), *flags], env=environment, stdout=output, stderr=output)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    while not checkpoint_of(run, step).exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process_and_it_ends_at_the_same_bits(flags, tmp_path, whole):
    """The first process is killed from outside, once its checkpoint of step 2 is there."""
    with torchrun([*flags, "--resume", "auto"], tmp_path / "log", "--max-restarts", "1") as process:
        wait_for_step(tmp_path / "run", 2, process)
        os.kill(int((tmp_path / "run" / "run.lock").read_text().split()[0]), signal.SIGKILL)
        code = process.wait(timeout=200)
    printed = (tmp_path / "log").read_text()
    assert code == 0, printed
    assert "resumed from" in printed and printed.count("done: val loss") == 1
    assert_same_bits(weights(tmp_path / "run", STEPS), weights(whole(2), STEPS))


@pytest.mark.slow
def test_a_signal_to_torchrun_lets_all_its_processes_save_and_leave(flags, tmp_path):
    with torchrun([*flags, "--steps", "100000"], tmp_path / "log") as process:
        wait_for_step(tmp_path / "run", 2, process)
        process.terminate()
        process.wait(timeout=100)
    printed = (tmp_path / "log").read_text()
    assert "stopped, saved at step" in printed, printed
    step = int(printed.split("stopped, saved at step ")[1].split()[0])
    assert latest_checkpoint(tmp_path / "run") == checkpoint_of(tmp_path / "run", step)
    assert_no_litter(tmp_path / "run")


# -- clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_neither_rates_nor_weights(flags, tmp_path, monkeypatch, whole):
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600.0 * next(jumps))
    assert main(flags) == 0
    assert all(0 < r["tokens_per_s"] < 1e9 for r in records(tmp_path / "run", "train"))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    monkeypatch.undo()
    assert [r["loss"] for r in records(tmp_path / "run", "train")] == [r["loss"] for r in records(whole(1), "train")]
