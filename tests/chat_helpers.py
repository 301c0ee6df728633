"""A small model that has learned an answer by heart, and a person who talks to it at a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import torch

from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer, save_model
from hrm_model.template import encode

ROOT = Path(__file__).parents[1]
SHAPE = dict(vocab_size=50304, n_embd=32, block_size=128, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1)
SHAPE |= dict(
    hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=3, halt_bias=0.0, embed_scale=5.0
)
ANSWER = "Hello to you."
"""What the model says to everything, at every depth."""


def learn(path: Path) -> Path:
    """Save a model that always says ANSWER to `path`. On one thread: what it learns does not depend on the cores, and
    two threads on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return save_model(_taught(), path)
    finally:
        torch.set_num_threads(threads)


def _taught() -> HRMForCausalLM:
    tokenizer = get_tokenizer()
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    rows = []
    hi = turn("Hi", ANSWER)
    for turns in (hi, hi + turn("How are you?", ANSWER), hi + hi):
        ids, is_answer = encode(turns, tokenizer)
        targets = [i if answer else -1 for i, answer in zip(ids[1:], is_answer[1:], strict=True)]
        rows.append((torch.tensor([ids[:-1]]), torch.tensor([targets])))
    n_steps, lr = 180, 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / n_steps)
        ids, targets = rows[step % len(rows)]
        model(ids, targets, force_steps=1 + step % 3).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Person:
    """Runs `hrm chat` with a pseudo-terminal as its terminal, types, and reads what it shows."""

    def __init__(self, *arguments: str, **environment: str):
        import fcntl
        import pty
        import termios

        self._terminal, child = pty.openpty()

        def own_terminal():
            os.setsid()
            fcntl.ioctl(child, termios.TIOCSCTTY, 0)  # so that Ctrl-C, typed, becomes a signal

        inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TRITON_INTERPRET")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hrm_model", "chat", *arguments],
            cwd=ROOT,
            env=inherited | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment,
            stdin=child,
            stdout=child,
            stderr=child,
            preexec_fn=own_terminal,
        )
        os.close(child)
        self._shown, self._read = "", 0

    def type(self, text: str | bytes) -> None:
        """Press these keys."""
        os.write(self._terminal, text if isinstance(text, bytes) else text.encode())

    def see(self, text: str, timeout: float = 60.0) -> str:
        """Wait until `text` appears after what was seen before; everything up to it, colours included."""
        end = time.monotonic() + timeout
        while text not in self._shown[self._read :]:
            assert self._receive(end - time.monotonic()), f"no {text!r} in {self._shown[self._read :]!r}"
        begin, self._read = self._read, self._shown.index(text, self._read) + len(text)
        return self._shown[begin : self._read]

    def ask(self, line: str, prompt: str = "Human: ") -> str:
        """Type a line and wait for the next prompt; what was shown in between, without colours."""
        self.type(line + "\n")
        self.see("\n")
        return plain(self.see(prompt))

    def interrupt(self, leaves: bool = False, prompt: str = "Human: ") -> str:
        """Press Ctrl-C at the prompt and wait for the next one, or for the program's end; what was shown in between.

        Pressed again if nothing happens: Python's readline looks for signals only while it waits for a key, and the
        first may have come a moment before that."""
        for _ in range(20):
            self.type("\x03")
            if leaves:
                if not self._receive_all(3.0):
                    self.process.wait(10)
                    return ""
                continue
            with contextlib.suppress(AssertionError):
                return plain(self.see(prompt, 3.0))
        raise AssertionError(f"Ctrl-C does nothing after {self._shown!r}")

    def leave(self, keys: str) -> None:
        """Type something that ends the program, and wait for that."""
        self.type(keys)
        assert not self._receive_all(60.0)
        self.process.wait(10)

    def close(self) -> None:
        """End the program if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._terminal)

    def _receive(self, timeout: float) -> bool | None:
        """Whether something came within `timeout` seconds; None when the program has closed its side."""
        if timeout <= 0 or not select.select([self._terminal], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # EIO: the other side is closed
            return None
        self._shown += data.decode("utf-8", "replace")
        return True if data else None

    def _receive_all(self, timeout: float) -> bool:
        """Read until the program closes its side (False) or nothing comes for `timeout` seconds (True)."""
        while (came := self._receive(timeout)) is not None:
            if not came:
                return True
        return False


def plain(text: str) -> str:
    """Without escape sequences and carriage returns."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).replace("\r", "")
