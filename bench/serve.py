"""How many tokens a second does a server give to many clients, against generating their texts one by one?

    python bench/serve.py                          # recipe small, random weights; 1, 8 and 50 clients
    python bench/serve.py --checkpoint runs/tiny --clients 1 50

The same requests are answered twice: one by one by hrm_model.generate, without a server, and by a server in a process
of its own, over HTTP, for so many clients at once, each with its next request as soon as it has an answer. Prompts are
pieces of this repository's README of 4 to 64 tokens; of three requests one is greedy and two draw with a seed. The
answers' tokens and steps must be the same: else no time is shown. Refusals (429) count as wrong: there is room for all.

One JSON line is appended to bench/results/serve.jsonl, and the last line is JSON. Exit status: 0; 1 where an answer
differs or fails; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import environment, positive, print_table, save
from hrm_model import HRMConfig, HRMForCausalLM, load_model, save_model
from hrm_model.checkpoint import CheckpointError
from hrm_model.config import PRESETS
from hrm_model.generate import stream
from hrm_model.sampling import Sampling
from hrm_model.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[1]


class Asked(NamedTuple):
    """A request."""

    ids: list[int]
    max_tokens: int
    temperature: float
    seed: int


class Answer(NamedTuple):
    """What came of it."""

    tokens: list[int]
    steps: list[int]
    seconds: float


def requests(n: int, window: int, max_tokens: int) -> list[Asked]:
    """The first n requests, whatever n is."""
    text = get_tokenizer().encode((ROOT / "README.md").read_text(encoding="utf-8"))
    made = []
    for i in range(n):
        size = min(4 + 7 * i % 61, window - max_tokens)
        begin = 97 * i % (len(text) - size)
        made.append(Asked(text[begin : begin + size], max_tokens, (0.0, 0.8, 1.0)[i % 3], i))
    return made


def one_by_one(model: HRMForCausalLM, asked: list[Asked]) -> tuple[list[Answer], float]:
    """(answers, seconds in all)."""
    answers, begin = [], time.perf_counter()
    for one in asked:
        begun = time.perf_counter()
        sampling = Sampling(temperature=one.temperature)
        events = list(stream(model, [one.ids], one.max_tokens, sampling=sampling, seed=one.seed))
        answers.append(Answer([e.token for e in events], [e.steps for e in events], time.perf_counter() - begun))
    return answers, time.perf_counter() - begin


@contextmanager
def server(checkpoint: str, places: int, queue: int, device: str):
    """The address of `hrm serve` in a process of its own."""
    command = [sys.executable, "-m", "hrm_model", "serve", checkpoint, "--port", "0", "--device", device]
    command += ["--places", str(places), "--queue", str(queue), "--timeout", "3600"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("the server did not start; its error is above")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, one: Asked) -> Answer | str:
    """The answer, or what was said instead."""
    body = {"prompt": one.ids, "max_tokens": one.max_tokens, "temperature": one.temperature, "seed": one.seed}
    connection, begun = http.client.HTTPConnection(urlsplit(address).netloc, timeout=3600), time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    if response.status != 200:
        return f"{response.status}: {said['error']['message']}"
    hrm = said["choices"][0]["hrm"]
    return Answer(hrm["tokens"], hrm["steps"], time.perf_counter() - begun)


def by_clients(address: str, asked: list[Asked], clients: int) -> tuple[list[Answer | str], float]:
    """(answers, seconds in all) of so many clients."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: ask(address, one), asked))
    return answers, time.perf_counter() - begin


def differing(expected: list[Answer], found: list[Answer | str]) -> list[str]:
    """What is wrong, a line for each request."""
    wrong = []
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        if isinstance(other, str):
            wrong.append(f"request {i}: {other}")
        elif (one.tokens, one.steps) != (other.tokens, other.steps):
            wrong.append(f"request {i}: another answer than alone")
    return wrong


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=sorted(PRESETS), default="small", help="random weights (default: small)")
    which.add_argument("--checkpoint", metavar="CKPT", help="a saved model instead")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 50], metavar="N")
    parser.add_argument("--requests", type=positive, default=50, metavar="N", help="in all (default: 50)")
    parser.add_argument("--tokens", type=positive, default=32, metavar="N", help="new ones of each (default: 32)")
    parser.add_argument("--places", type=positive, default=16, metavar="N", help="of the server (default: 16)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true", help="append nothing to bench/results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Ask, compare, print."""
    options = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            torch.manual_seed(0)
            checkpoint = str(Path(folder) / options.model)
            save_model(HRMForCausalLM(HRMConfig.preset(options.model)), checkpoint)
        try:
            model, config = load_model(checkpoint, options.device)
        except (CheckpointError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if options.tokens >= config.block_size:
            print(f"error: --tokens {options.tokens} must be below the window of {config.block_size}", file=sys.stderr)
            return 2
        return _measure(options, model, checkpoint)


def _measure(options: argparse.Namespace, model: HRMForCausalLM, checkpoint: str) -> int:
    asked = requests(options.requests, model.config.block_size, options.tokens)
    one_by_one(model, asked[:1])  # pays for memory and caches
    expected, seconds = one_by_one(model, asked)
    cells, wrong = [_cell("one by one", expected, seconds)], []
    with server(checkpoint, options.places, options.requests, options.device) as address:
        by_clients(address, asked[:1], 1)
        for clients in options.clients:
            found, seconds = by_clients(address, asked, clients)
            different = differing(expected, found)
            wrong += [f"{clients} clients, {line}" for line in different]
            if not different:
                cells.append(_cell(f"{clients} client{'s' * (clients > 1)}", found, seconds))
    for cell in cells:
        cell["speedup"] = cell["tokens_per_s"] / cells[0]["tokens_per_s"]
    record = {
        "bench": "serve", "model": Path(options.checkpoint or options.model).name,
        "parameters": model.num_parameters(), "requests": options.requests, "tokens": options.tokens,
        "places": options.places, "equal": not wrong, "wrong": wrong, "cells": [] if wrong else cells,
        "environment": environment(model.device),
    }  # fmt: skip
    for line in wrong:
        print(f"WRONG: {line}")
    if not wrong:
        print_table(
            {
                "": lambda cell: cell["who"],
                "tokens/s": lambda cell: f"{cell['tokens_per_s']:.1f}",
                "of one by one": lambda cell: f"{cell['speedup']:.2f}x",
                "median s": lambda cell: f"{cell['median_s']:.2f}",
                "95 % s": lambda cell: f"{cell['p95_s']:.2f}",
            },
            cells,
        )
        print(f"all {options.requests} answers are those of generating alone, token by token and step by step")
        if not options.no_save:
            print(f"appended to {save('serve.jsonl', record).relative_to(ROOT)}")
    print(json.dumps(record))
    return int(bool(wrong))


def _cell(who: str, answers: list[Answer], seconds: float) -> dict[str, Any]:
    times = [answer.seconds for answer in answers]
    tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "who": who, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "mean_steps": sum(sum(answer.steps) for answer in answers) / tokens,
        "median_s": quantile(times, 0.5), "p95_s": quantile(times, 0.95),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
