"""The process that Forks (pretrain_helpers.py) starts: imports torch once and forks the processes of each run.

Requests are lines of JSON: {"start": flags, "stage", "inject", "logs", "env"} is answered with process ids,
{"wait": ids, "timeout"} with their exit statuses, negative where a signal ended one.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.modules["matplotlib"] = None  # pictures would take half of a short run's time

# torch._dynamo would be imported by the first optimizer or shard of each process, which takes longest of all
for name in ("torch._dynamo", "torch.distributed.fsdp", "hrm_model.training.loop", "train.pretrain", "train.converse"):
    importlib.import_module(name)
importlib.import_module("hrm_model.tokenizer").get_tokenizer().token_bytes()


def become(flags: list[str], stage: str, inject: str, log: str, env: dict[str, str]) -> None:
    """Be one process of a run, and end."""
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, handle in ((0, null), (1, out), (2, out)):
        os.dup2(handle, number)
    os.environ.update(env)
    code = 1
    try:
        exec(inject, {"rank": int(env.get("RANK", "0"))})
        code = importlib.import_module(f"train.{stage}").main(flags)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], timeout: float) -> list[int]:
    """Exit statuses of `pids`, which are killed when the time is over."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["timeout"])
        else:
            answer = []
            for log, env in zip(request["logs"], request["env"], strict=True):
                pid = os.fork()
                if pid == 0:
                    become(request["start"], request["stage"], request["inject"], log, env)
                answer.append(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
