"""What preparing a corpus costs: tokens/s of a core next to tiktoken alone, and memory, which must not grow with size.

    python bench/prepare.py            # about a minute
    python bench/prepare.py --save     # and append the record to bench/results/prepare.jsonl

The text is what Python brings along: prose, code, C docstrings. "prepare" is all of train/prepare.py --mixture in one
process: lines of JSON read, tokenised, split, hashed, written, flushed to disk, saved. "tiktoken" encodes the same
texts, which are in memory, with the pattern of the GPT-2 release, on one thread. Ids are compared before anything is
timed. Peak memory is that of a process which prepares a corpus, for two sizes of corpus. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

from bench.common import environment, interleaved, positive, print_table, save
from hrm_model.tokenizer import END_OF_TEXT, RANKS_FILE, get_tokenizer, read_ranks
from hrm_model.training.corpora import Corpus
from hrm_model.training.mixture import prepare_mixture
from hrm_model.training.shards import open_dataset
from hrm_model.training.sources import Report, StdlibSource

CORPUS = Corpus("bench", "none", None, "text", 10**12)
MOST_GROWTH = 24_000_000
"""Bytes that the peak may differ by between the two sizes: what an allocator keeps, not what a corpus needs."""
CHILD = """
import resource, sys
from hrm_model.training.corpora import Corpus
from hrm_model.training.mixture import prepare_mixture

def peak():
    try:  # ru_maxrss also counts what the process was before exec(): this one is of its own memory
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
corpus = Corpus("bench", "none", None, "text", 10**12)
prepare_mixture(sys.argv[2], [corpus], local={"bench": [sys.argv[1]]}, workers=1)
print(before, peak())
"""


def texts_of(n_bytes: int) -> Iterator[str]:
    """Documents of about `n_bytes` of UTF-8 in all; the same again where there are not enough."""
    documents = [piece.text for piece in StdlibSource(Report()).pieces(Report())]
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]  # prose and code mixed
    size = 0
    while True:
        for document in documents:
            yield document
            size += len(document.encode("utf-8", "replace"))
            if size >= n_bytes:
                return


def write(path: Path, n_bytes: int) -> Path:
    """A corpus of about `n_bytes` as lines of JSON."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts_of(n_bytes):
            file.write(json.dumps({"text": text}) + "\n")
    return path


def prepare(source: Path, out: Path, **options: Any) -> None:
    """The whole path, in this process, quietly."""
    shutil.rmtree(out, ignore_errors=True)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        prepare_mixture(out, [CORPUS], local={"bench": [source]}, workers=1, **options)


def plain_tiktoken() -> tiktoken.Encoding:
    """GPT-2's encoding as tiktoken has it, from the ranks at hand."""
    ranks, special = read_ranks(RANKS_FILE), {END_OF_TEXT: get_tokenizer().eot}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def speed(megabytes: float, repeats: int, folder: Path) -> dict[str, Any]:
    """Tokens/s of each way, the median of `repeats` rounds. Raises SystemExit when their ids differ."""
    texts = list(texts_of(int(megabytes * 1e6)))
    source, encoding = write(folder / "speed.jsonl", int(megabytes * 1e6)), plain_tiktoken()
    prepare(source, folder / "out", val_fraction=0)
    split = open_dataset(folder / "out" / "bench").split("train")
    expected = [i for text in texts for i in [*encoding.encode_ordinary(text), encoding.eot_token]]
    if not np.array_equal(split.read(0, len(split)), expected):
        raise SystemExit("error: the ids differ from those of tiktoken; nothing was timed")
    work = {
        "prepare": lambda: prepare(source, folder / "out"),
        "tiktoken encode_ordinary": lambda: [encoding.encode_ordinary(text) for text in texts],
        "tiktoken encode_ordinary_batch": lambda: encoding.encode_ordinary_batch(texts, num_threads=1),
    }
    times = interleaved(work, repeats, torch.device("cpu"))
    rows = [
        {
            "name": name,
            "tokens_per_s": len(expected) / statistics.median(seconds),
            "mb_per_s": sum(len(text.encode()) for text in texts) / 1e6 / statistics.median(seconds),
            "spread": max(seconds) / min(seconds) - 1,
        }
        for name, seconds in times.items()
    ]
    return {"tokens": len(expected), "documents": len(texts), "rows": rows}


def memory(megabytes: list[float], folder: Path) -> list[dict[str, Any]]:
    """Peak bytes of a process that prepares a corpus of each size, and what it had before it began."""
    found = []
    for size in megabytes:
        source = write(folder / "memory.jsonl", int(size * 1e6))
        shutil.rmtree(folder / "out", ignore_errors=True)
        command = [sys.executable, "-c", CHILD, str(source), str(folder / "out")]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        before, peak = map(int, done.stdout.splitlines()[-1].split())
        found.append({"corpus_mb": size, "before_bytes": before, "peak_bytes": peak})
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--megabytes", type=float, default=3.0, metavar="N", help="of text to time; default: 3")
    add("--memory", type=float, nargs=2, default=[5.0, 30.0], metavar="N", help="sizes of corpora; default: 5 30")
    add("--repeats", type=positive, default=3, metavar="N", help="rounds; the median counts; default: 3")
    add("--save", action="store_true", help="append the record to bench/results/prepare.jsonl")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        timed = speed(options.megabytes, options.repeats, Path(name))
        print(f"{timed['documents']:,} documents, {timed['tokens']:,} tokens, one core, median of {options.repeats}")
        columns = {
            "": lambda r: r["name"],
            "tokens/s": lambda r: f"{r['tokens_per_s']:,.0f}",
            "MB/s": lambda r: f"{r['mb_per_s']:.2f}",
            "spread": lambda r: f"{r['spread']:.0%}",
        }
        print_table(columns, timed["rows"])
        sizes = memory(options.memory, Path(name))
    for found in sizes:
        print(
            f"a corpus of {found['corpus_mb']:g} MB: {found['peak_bytes'] / 1e6:,.0f} MB at the peak, "
            f"{found['before_bytes'] / 1e6:,.0f} MB before it began"
        )
    growth = sizes[1]["peak_bytes"] - sizes[0]["peak_bytes"]
    bounded = growth <= MOST_GROWTH
    print(f"{'bounded' if bounded else 'LIMIT NOT KEPT'}: {growth / 1e6:+,.0f} MB, at most {MOST_GROWTH / 1e6:g}")
    ours, plain = (timed["rows"][i]["tokens_per_s"] for i in (0, 1))
    record = {
        "environment": environment(torch.device("cpu")) | {"tiktoken": tiktoken.__version__},
        "repeats": options.repeats,
        **timed,
        "share_of_tiktoken": ours / plain,
        "memory": sizes,
        "bounded": bounded,
    }
    if options.save:
        print(f"appended to {save('prepare.jsonl', record)}")
    print(json.dumps(record))
    return int(not bounded)


if __name__ == "__main__":
    sys.exit(main())
