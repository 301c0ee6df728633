"""Full disks and kills leave whole checkpoints, the earlier ones untouched, and no litter."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest
from checkpoint_helpers import linux, net, run_python, small_model, steps
from safetensors.torch import load_file

from hrm_model.checkpoint import CheckpointError, load_model, save_checkpoint, save_model, verify_checkpoint


def test_a_path_through_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*(Not a directory|exists)"):
        save_model(small_model(), tmp_path / "file" / "model")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file", 1, net(), None, {})
    with pytest.raises(CheckpointError, match="is a file and a save is a directory"):
        save_model(small_model(), tmp_path / "file", overwrite=True)


@linux
def test_a_disk_that_fills_leaves_earlier_checkpoints_and_no_litter(tmp_path):
    child = run_python(
        """
        import resource, signal, sys
        from torch import nn
        from hrm_model.checkpoint import CheckpointError, save_checkpoint, save_model
        run = sys.argv[1]
        save_checkpoint(run, 1, nn.Linear(4, 4), None, {})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (30_000, 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save_checkpoint(run, 2, nn.Linear(100, 100), None, {})
            except CheckpointError as error:
                print(error)
        """,
        tmp_path,
    )
    out, _ = child.communicate(timeout=60)
    messages = out.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert re.search(
            r"cannot write .*step-00000002: file too large; it needs \d\d,\d{3} bytes, [\d,]+ bytes are free there; "
            r"raise the file size limit .*Earlier checkpoints are untouched",
            message,
        )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    verify_checkpoint(tmp_path / "checkpoints" / "step-00000001")


CRASHER = """
import os, sys
import torch
from torch import nn
from hrm_model.checkpoint import save_checkpoint, save_model
torch.set_num_threads(1)

def net(value):
    return nn.Linear(3, 3).requires_grad_(False).apply(lambda m: m.weight.fill_(value))

left = None
def crash(event, arguments):
    global left
    changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+"))
    if left is not None and changes:
        left -= 1
        if left < 0:
            os._exit(9)  # as kill -9: no handler, no clean-up

sys.addaudithook(crash)
for line in sys.stdin:
    what, count, value, path = line.split(maxsplit=3)
    child = os.fork()
    if child == 0:
        left = int(count)
        if what == "model":
            save_model(net(float(value)), path.strip(), overwrite=True)
        else:
            save_checkpoint(path.strip(), int(float(value)), net(float(value)), None, {}, keep_last=2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def crash_at(child: subprocess.Popen, what: str, count: int, value: int, path: Path) -> bool:
    """Have the child save, dying before its file operation number `count`; False if the save needed fewer."""
    child.stdin.write(f"{what} {count} {value} {path}\n")
    child.stdin.flush()
    code = int(child.stdout.readline())
    assert code in (0, 9)
    return code == 9


def value_at(path: Path) -> float:
    verify_checkpoint(path)
    return load_file(path / "model.safetensors")["weight"][0, 0].item()


@linux
def test_a_kill_before_any_file_operation_leaves_a_whole_version(tmp_path):
    target, run = tmp_path / "model", tmp_path / "run"
    with run_python(CRASHER) as child:
        assert not crash_at(child, "model", 10**6, 0, target)
        # Overwriting: the old or the new content, at its name or at the one that load_model's error gives.
        count = current = between = 0
        while crash_at(child, "model", count, current + 1, target):
            if target.exists():
                current = int(value_at(target))
            else:
                with pytest.raises(CheckpointError, match="a save over it was interrupted: rename") as caught:
                    load_model(target)
                former = Path(re.search(r"rename (\S+) to model", str(caught.value))[1])
                assert value_at(former) == current
                between += 1
            count += 1
        assert count > 8
        assert between >= 1
        assert value_at(target) == current + 1
        assert {p.name for p in tmp_path.iterdir()} == {"model"}

        # Checkpoints: every visible one is whole, the newest two survive the deletion of others, litter goes.
        for step in (1, 2, 3):
            assert not crash_at(child, "step", 10**6, step, run)
        count, step = 0, 4
        while crash_at(child, "step", count, step, run):
            whole = sorted((run / "checkpoints").glob("step-*"))
            assert [value_at(path) for path in whole] == [int(path.name[5:]) for path in whole]
            assert len(whole) >= 2
            step = int(whole[-1].name[5:]) + 1
            count += 1
        assert count > 10
        assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
            f"step-{step - 1:08d}",
            f"step-{step:08d}",
        ]
        child.stdin.close()


@linux
def test_kill_9_at_random_moments_leaves_only_whole_checkpoints(tmp_path):
    code = """
    import os, sys
    import torch
    from torch import nn
    from hrm_model.checkpoint import save_checkpoint
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # its first use imports a lot
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            model = nn.Linear(300, 300)
            for step in range(int(line), int(line) + 1000):
                print(os.getpid(), flush=True)
                save_checkpoint(sys.argv[1], step, model, torch.optim.AdamW(model.parameters()), {}, keep_last=2)
        os.waitpid(child, 0)
        print("dead", flush=True)
    """
    generator = random.Random(0)
    newest = 0
    with run_python(code, tmp_path) as child:
        for _ in range(25):
            child.stdin.write(f"{newest + 1}\n")
            child.stdin.flush()
            for _ in range(generator.randint(1, 3)):
                saver = int(child.stdout.readline())
            for _ in range(generator.randint(0, 150_000)):  # up to some milliseconds into a save
                pass
            os.kill(saver, signal.SIGKILL)
            while child.stdout.readline() != "dead\n":
                pass
            whole = sorted((tmp_path / "checkpoints").glob("step-*"))
            for path in whole:
                verify_checkpoint(path)
            newest = int(whole[-1].name[5:]) if whole else 0
        child.stdin.close()
    assert newest > 10
    save_checkpoint(tmp_path, newest + 1, net(), None, {}, keep_last=1)
    assert steps(tmp_path) == [newest + 1]


@linux
def test_the_unfinished_save_of_a_live_process_is_left_alone(tmp_path):
    code = """
    import sys
    from hrm_model.atomic import atomic_directory
    with atomic_directory(sys.argv[1]) as directory:
        (directory / "config.json").write_text("{}")
        print("writing", flush=True)
        sys.stdin.readline()
    """
    with run_python(code, tmp_path / "checkpoints" / "step-00000009") as child:
        assert child.stdout.readline() == "writing\n"
        save_checkpoint(tmp_path, 1, net(), None, {})
        child.communicate("go on\n", timeout=60)
    assert child.returncode == 0
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "step-00000009"}
