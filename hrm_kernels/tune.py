"""Time tiles on the GPU at hand and write the fastest into tuning.py's tables. Nothing is tuned while a model runs.

    python -m hrm_kernels.tune --write                                        # every op, both types, 64 x 512 tokens
    python -m hrm_kernels.tune --ops swiglu qkv --rows 64 --tokens 1 --write       # the lines for few rows: decoding
    python -m hrm_kernels.tune --offline --arch 90         # without a GPU: what the compiler makes of each candidate

A candidate that spills registers, needs more shared memory than there is or multiplies matrices without matrix
instructions is not timed, nor is one whose numbers are not the reference's in float64. Times are of the op, its library
products included; in between the L2 cache is overwritten. A line stays unless a tile is more than 2 % faster. Where a
line also serves other types or GPUs of less memory, on which the winner might spill, it stays for them and the winner
goes above it. Exit status 1 if what is in use computes wrong numbers, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hrm_kernels as ops

from . import library_attention, offline, reference, tuning
from .backend import INTERPRETED
from .tuning import SHARED_KB, Tile

GRID = """
op             kernels                type     rows  M           N                     K       warps   stages
swiglu         swiglu.forward         half     64    16,32       32,64,128             64,128  4       3,4,5
swiglu         swiglu.forward         half     any   64,128      64,128                64      4,8     2,3,4
swiglu         swiglu.forward         float32  any   32,64,128   32,64                 32      4,8     2,3
qkv            qkv_rope.project       half     64    16,32       32,64,128             64,128  4       3,4,5
qkv            qkv_rope.project       half     any   64,128,256  64,128                64      4,8     3,4
qkv            qkv_rope.project       float32  any   32,64,128   32,64                 32      4,8     2,3
linear         linear.linear          half     64    16,32       16,32,64              64,128  4       3,4,5
linear         linear.linear          half     any   64,128,256  64,128                64      4,8     3,4
linear         linear.linear          float32  any   32,64,128   32,64                 32      4,8     2,3
attention      attention.forward      half     64    16,32,64    16,32,64              0       4       2,3
attention      attention.forward      half     any   64,128      32,64,128             0       4,8     2,3
attention      attention.forward      float32  any   16,32,64    16,32,64              0       4,8     2
attention_dq   attention.queries      half     any   64,128      32,64,128             0       4,8     2,3
attention_dq   attention.queries      float32  any   16,32,64    16,32,64              0       4,8     2
attention_dkv  attention.keys         half     any   32,64,128   64,128                0       4,8     2,3
attention_dkv  attention.keys         float32  any   16,32,64    16,32,64              0       4,8     2
rms_norm       rms_norm.forward       any      any   1,2,4       0                     0       1,2,4   1
swiglu_mul     swiglu.gate            any      any   0           512,1024,2048,4096    0       4,8     1
cross_entropy  linear_cross_entropy.  any      any   0           2048,4096,8192,16384  0       4,8,16  1
"""
"""Candidates: every combination within a line, for the kernels whose names begin so. Of an op's lines the first that
fits is used, as in tuning.TABLE."""

OPS = tuple(dict.fromkeys(line.split()[0] for line in GRID.strip().splitlines()[1:]))
CHOICE = "attention_choice"
"""The name in --ops of tuning.ATTENTION: whose attention is fastest, forward and backward, at which lengths."""
CHOICE_TOKENS = (128, 512, 2048)
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}
"""||out - truth|| / ||truth|| at most: forward alone, and where a gradient is among the results."""
LEAST_GAIN = 1.02
FEW_ROWS = 64
"""What is timed with at most so many rows is written for so many, not for all."""
TABLES = Path(tuning.__file__)


class Setting(NamedTuple):
    """What is tuned for."""

    dtype: torch.dtype
    batch: int
    tokens: int
    arch: int

    def case(self, op: str) -> tuple[str, str, int, int]:
        """(op, type, rows, shared memory) as tuning.py looks them up. Attention counts the tokens of a sample, the rest
        all of them."""
        rows = self.tokens if op.startswith("attention") else self.batch * self.tokens
        return op, "float32" if self.dtype == torch.float32 else "half", rows, SHARED_KB[self.arch]


class Candidate(NamedTuple):
    """A compiled tile; of several kernels or variants that it serves, the worst."""

    tile: Tile
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    faults: tuple[str, ...] = ()


def tiles(op: str, setting: Setting) -> tuple[str, list[Tile]]:
    """(beginning of the kernels' names, the tile in use and then those of the grid)."""
    _, type_name, n_rows, _ = setting.case(op)
    for line in GRID.strip().splitlines()[1:]:
        name, kernels, of_type, rows, *choices = line.split()
        if name == op and of_type in ("any", type_name) and (rows == "any" or n_rows <= int(rows)):
            grid = itertools.product(*([int(number) for number in choice.split(",")] for choice in choices))
            present = tuning._lookup(*setting.case(op))
            return kernels, list(dict.fromkeys([present, *(Tile(*numbers) for numbers in grid)]))
    raise LookupError(f"GRID has no line for {op}, {type_name}, {n_rows} rows; add one")


def starts(op: str, kernels: str, tile: Tile, setting: Setting) -> dict[str, Any]:
    """The starts of the kernels that `tile` serves, under what distinguishes them for the compiler."""
    with tuning.assume(setting.arch), tuning.use_tiles(**{op: tile}):
        # more samples compile to the same
        found = offline.launches(setting.dtype, min(setting.batch, 64), setting.tokens, offline.BASE)
    chosen = {}
    for launch in found:
        fn = launch.kernel.fn
        name = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__.strip('_')}"
        if name.startswith(kernels):
            chosen[f"{name} {offline.specialised(launch)} {sorted(launch.options.items(), key=str)}"] = launch
    return chosen


def examine(op: str, setting: Setting) -> list[Candidate]:
    """Compile every candidate, the tile in use first. One that starts the same kernels as another is left out."""
    from triton.errors import TritonError

    kernels, of = tiles(op, setting)
    seen, found = set(), []
    for tile in tqdm(of, desc=f"compiling {op}", unit="tile", disable=not sys.stderr.isatty()):
        launches = starts(op, kernels, tile, setting)
        if frozenset(launches) in seen:
            continue
        seen.add(frozenset(launches))
        try:
            lines = [offline.compiled(launch, setting.arch) for launch in launches.values()]
        except (TritonError, RuntimeError) as error:  # some shapes are refused by a pass of the compiler or by ptxas
            reason = str(error).strip().partition("\n")[0][:60]
            found.append(Candidate(tile, faults=(f"does not compile: {reason}",)))
            continue
        line = max(lines, key=lambda line: (len(offline.faults(line)), line["spill_bytes"], line["registers"]))
        sizes = (line[name] for name in ("registers", "spill_bytes", "shared_bytes"))
        found.append(Candidate(tile, *sizes, tuple(offline.faults(line))))
    return found


class Work:
    """One op on random numbers, through the seam.

    `call` takes the module that has the op, then tensors with a batch axis, then those without; what it returns has a
    batch axis. `passes`: "forward", "both", or "backward", whose forward pass is not repeated.
    """

    def __init__(self, call: Callable, batched: list[Tensor], shared: list[Tensor], passes: str):
        self.call, self.batched, self.shared, self.with_gradient = call, batched, shared, passes != "forward"
        self.result = self.expected = self.weights = None
        if self.with_gradient:
            self.batched = [t.requires_grad_(t.is_floating_point()) for t in batched]
            result = call(ops, *batched, *shared)
            self.weights = torch.randn_like(result.detach())
            self.result = result if passes == "backward" else None

    def run(self) -> list[Tensor]:
        """What is timed."""
        return self._results(ops, self.batched, self.shared, self.weights, self.result)

    def truth(self, samples: list[int]) -> list[Tensor]:
        """The reference in float64, for these samples of the batch."""

        def wide(t: Tensor) -> Tensor:
            return t.detach().double() if t.is_floating_point() else t

        batched = [wide(t[samples]).requires_grad_(t.requires_grad) for t in self.batched]
        weights = wide(self.weights[samples]) if self.with_gradient else None
        return self._results(reference, batched, [wide(t) for t in self.shared], weights, None)

    def _results(self, module, batched, shared, weights, result) -> list[Tensor]:
        with torch.set_grad_enabled(self.with_gradient):
            out = self.call(module, *batched, *shared) if result is None else result
            if not self.with_gradient:
                return list(out) if isinstance(out, tuple) else [out]
            leaves = [t for t in batched if t.requires_grad]
            return [out.detach(), *torch.autograd.grad(out, leaves, weights, retain_graph=result is not None)]

    def error(self) -> float:
        """The worst relative error of a result. Memory is full of nan beforehand: an element not written is seen."""
        before = torch.are_deterministic_algorithms_enabled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of library products that are not deterministic
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                found = self.run()
            finally:
                torch.use_deterministic_algorithms(before)
        samples = sorted({0, found[0].shape[0] // 2, found[0].shape[0] - 1})
        if self.expected is None:
            self.expected = self.truth(samples)
        pairs = zip(found, self.expected, strict=True)
        return torch.stack([(a[samples].double() - b).norm() / b.norm() for a, b in pairs]).amax().item()  # nan stays


def work(op: str, setting: Setting, device: str = "cuda") -> Work:
    """What is run for a name of OPS or for CHOICE, at the base model's sizes."""
    c, f, v, h, k = (offline.BASE[name] for name in ("width", "hidden", "vocab", "n_head", "n_kv_head"))
    b, t, d = setting.batch, setting.tokens, c // h
    torch.manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(setting.dtype)

    def qkv(m, x, w_q, w_k, w_v, rotary):
        return m.qkv_rope(x, w_q, w_k, w_v, None, rotary)

    def attend(m, x, w_q, w_k, w_v, rotary):
        if m is ops:
            return m.rope_gqa_attention(x, w_q, w_k, w_v, None, rotary, h, k)
        return m.attention(qkv(m, x, w_q, w_k, w_v, rotary), h, k)

    def losses(m, x, targets, w):
        return m.linear_cross_entropy(x.flatten(0, 1), w, targets.flatten(), -1, "none").view(targets.shape)

    def linear(m, hidden, w):
        if m is not ops:
            return F.linear(hidden, w)
        from .kernels.launch import Rows
        from .kernels.linear import start_linear

        which = Rows(None, torch.arange(b, dtype=torch.int32, device=device), torch.tensor([b], device=device).int())
        y = hidden.new_empty(b, t, c)
        start_linear(hidden.flatten(0, 1), w, None, y.view(b * t, c), t, which)
        return y

    x, packed = random(b, t, c), random(b, t, (h + 2 * k) * d)
    gate, up, w_gate, w_up = random(b, t, f), random(b, t, f), random(f, c, scale=c**-0.5), random(f, c, scale=c**-0.5)
    projections = [random(n * d, c, scale=c**-0.5) for n in (h, k, k)]
    projections.append(ops.rope_table(torch.arange(t, device=device), d))
    targets, table = torch.randint(v, (b, t), device=device), random(v, c, scale=0.02)
    works = {
        "swiglu": (lambda m, *a: m.swiglu(*a), [x], [w_gate, w_up], "forward"),
        "qkv": (qkv, [x], projections, "forward"),
        "linear": (linear, [gate], [random(c, f, scale=f**-0.5)], "forward"),
        "attention": (lambda m, qkv: m.attention(qkv, h, k), [packed], [], "forward"),
        "attention_dq": (lambda m, qkv: m.attention(qkv, h, k), [packed], [], "backward"),
        "attention_dkv": (lambda m, qkv: m.attention(qkv, h, k), [packed], [], "backward"),
        "rms_norm": (lambda m, *a: m.add_rms_norm(*a), [x, random(b, t, c)], [random(c).float()], "forward"),
        "swiglu_mul": (lambda m, *a: m.swiglu_mul(*a), [gate, up], [], "both"),
        "cross_entropy": (losses, [x, targets], [table], "both"),
        CHOICE: (attend, [x], projections, "both"),
    }
    return Work(*works[op])


def times(runs: dict[Hashable, Callable[[], Any]], rounds: int = 100) -> dict[Hashable, float]:
    """Median milliseconds of each, taking turns, so that a clock that changes changes all alike."""
    # 1 GB of stores empties the L2 cache and lasts longer than Python needs to queue an op
    scratch = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    events = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        scratch.fill_(0)
        scratch.fill_(1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def contest(job: Work, scopes: dict[Hashable, Callable], limit: float) -> tuple[dict, dict]:
    """(milliseconds, why there are none) of `job` within each scope. Numbers are checked before anything is timed."""
    from triton.errors import TritonError

    def within(scope: Callable, function: Callable):
        with scope():
            return function()

    runs, faults = {}, {}
    for name, scope in scopes.items():
        try:
            error = within(scope, job.error)
        except TritonError as reason:  # out of shared memory or registers
            faults[name] = f"does not run: {reason}"
            continue
        if error <= limit:
            runs[name] = partial(within, scope, job.run)
        else:
            faults[name] = f"WRONG: relative error {error:.1e}, at most {limit:.0e} is allowed"
    return times(runs), faults


def table_in(text: str, name: str) -> re.Match:
    """The lines of one of tuning.py's tables."""
    return re.search(rf'(?<=^{name} = """\n)(.*?\n)(?="""$)', text, re.DOTALL | re.MULTILINE)


def rendered(op: str, type_name: str, rows: str, kb: str, tile: Tile, why: str) -> str:
    """A line of tuning.TABLE."""
    m, n, k, warps, stages = tile
    return f"{op:<21}{type_name:<8}{rows:>4}{kb:>5}{m:>5}{n:>5}{k:>5}{warps:>6}{stages:>7}  {why}".rstrip()


def with_tile(text: str, op: str, setting: Setting, winner: Tile, why: str) -> str:
    """tuning.py's text with this tile in TABLE: in place of the line in use if that is for this type, memory and number
    of rows (few or any), else above it."""
    found = table_in(text, "TABLE")
    header, *lines = found[0].splitlines()
    case = _, type_name, n_rows, kb = setting.case(op)
    index, old = next((i, line) for i, line in enumerate(tuning._parse(found[0])) if line.fits(*case))
    place = [op, type_name, str(FEW_ROWS) if n_rows <= FEW_ROWS < old.rows else lines[index].split()[2], str(kb)]
    new = rendered(*place, winner, why)
    lines[index : index + 1] = [new] if lines[index].split()[:4] == place else [new, lines[index]]
    table = "\n".join([header, *lines]) + "\n"
    assert next(line.tile for line in tuning._parse(table) if line.fits(*case)) == winner
    return text[: found.start()] + table + text[found.end() :]


def with_choice(text: str, fastest: dict[int, str], why: str) -> str:
    """tuning.py's text with the fastest attention for bfloat16 rows of at most so many tokens in ATTENTION. The last is
    for all that are longer, and neighbours that agree share a line."""
    found = table_in(text, "ATTENTION")
    header, *lines = found[0].splitlines()
    bounds = sorted(fastest)
    ends = [a for a, b in itertools.pairwise(bounds) if fastest[a] != fastest[b]]
    new = [f"{'half':<10}{end:<10}{fastest[end]:<16}{why}" for end in ends]
    new.append(f"{'half':<10}{'any':<10}{fastest[bounds[-1]]:<16}{why}")
    table = "\n".join([header, *new, *(line for line in lines if line.split()[0] != "half")]) + "\n"
    return text[: found.start()] + table + text[found.end() :]


def write(path: Path, text: str) -> None:
    """Replace the file as a whole: whoever reads it meanwhile, or after a crash, sees the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def use(text: str) -> None:
    """Write tuning.py; what this program tunes next is tuned beside the new lines."""
    write(TABLES, text)
    tuning._LINES[:] = tuning._parse(table_in(text, "TABLE")[0])
    tuning._lookup.cache_clear()


def show(op: str, type_name: str, found: list[Candidate], ms: dict[Tile, float], faults: dict[Tile, str]) -> None:
    """A line for each candidate, the fastest first; the first of `found` is in use, and ratios are to its speed."""
    present = found[0].tile
    for c in sorted(found, key=lambda c: (ms.get(c.tile, float("inf")), bool(c.faults))):
        time, ratio = "-", "-"
        if c.tile in ms:
            time, ratio = f"{ms[c.tile]:.4f}", f"{ms[present] / ms[c.tile]:.2f}" if present in ms else "-"
        notes = [*(["in use"] if c.tile == present else []), *c.faults, *([faults[c.tile]] if c.tile in faults else [])]
        size = "x".join(str(n) for n in c.tile[:3])
        line = f"{op:<15}{type_name:<9}{size:<13}{c.tile.num_warps:>5}{c.tile.num_stages:>7}{c.registers:>6}"
        print(
            f"{line}{c.spill_bytes:>7}{c.shared_bytes:>9}{time:>10}{ratio:>7}  {'; '.join(notes)}".rstrip(), flush=True
        )


def tune(op: str, setting: Setting, gpu: str, save: bool) -> bool:
    """Compile and show an op's candidates; on a GPU time them, write the winner. False if what is in use is wrong."""
    found, type_name = examine(op, setting), setting.case(op)[1]
    if not gpu:
        show(op, type_name, found, {}, {})
        return True
    present = found[0].tile
    scopes = {c.tile: partial(tuning.use_tiles, **{op: c.tile}) for c in found if not c.faults or c.tile == present}
    job = work(op, setting)
    ms, faults = contest(job, scopes, TOLERANCE[setting.dtype][job.with_gradient])
    show(op, type_name, found, ms, faults)
    if save and ms:
        best = min(ms, key=ms.get)
        gain = ms[present] / ms[best] if present in ms else float("inf")  # what is in use does not run or is wrong
        why = f"{gpu}, {setting.batch}x{setting.tokens}: {ms[best]:.3f} ms, {gain:.2f}x"
        if gain > LEAST_GAIN:
            use(with_tile(TABLES.read_text(encoding="utf-8"), op, setting, best, why))
        print(f"{op}, {type_name}: {'written' if gain > LEAST_GAIN else 'the line stays'}, {why}", flush=True)
    return "WRONG" not in faults.get(present, "")


def choose(rows: int, arch: int, gpu: str, save: bool) -> bool:
    """Time every attention at each length, from hidden states on, and write the fastest. False if Triton's is wrong."""
    names = ["triton", "sdpa", *(["flash"] if library_attention.FLASH_INSTALLED else [])]
    scopes = {name: partial(ops.use_backend, "triton", attention=name) for name in names}
    fastest, right = {}, True
    for tokens in CHOICE_TOKENS:
        setting = Setting(torch.bfloat16, max(1, rows // tokens), tokens, arch)
        ms, faults = contest(work(CHOICE, setting), scopes, TOLERANCE[setting.dtype][1])
        right = right and "triton" not in faults
        for name in names:
            result = f"{ms[name]:.4f} ms" if name in ms else faults[name]
            print(f"{CHOICE}, {setting.batch} x {tokens}: {name} {result}", flush=True)
        if ms:
            fastest[tokens] = min(ms, key=ms.get)
    if save and fastest:
        use(with_choice(TABLES.read_text(encoding="utf-8"), fastest, f"{gpu}, forward and backward"))
    return right


def main(argv: list[str] | None = None) -> int:
    """Tune."""
    parser = argparse.ArgumentParser(
        prog="python -m hrm_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*OPS, CHOICE]
    parser.add_argument("--ops", nargs="+", default=names, choices=names, metavar="OP", help=", ".join(names))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=32768, help="tokens of a batch (default 32768)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sample (default 512)")
    parser.add_argument("--write", action="store_true", help="write what is faster into hrm_kernels/tuning.py")
    parser.add_argument("--offline", action="store_true", help="compile only, as where there is no GPU")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_KB), help="compile for this, offline")
    options = parser.parse_args(argv)
    arch, gpu = options.arch, ""
    if torch.cuda.is_available() and not options.offline:
        major, minor = torch.cuda.get_device_capability()
        arch, gpu = 10 * major + minor, torch.cuda.get_device_name().removeprefix("NVIDIA ")[:24]
    if options.write and not gpu:
        print("error: --write needs times, and times need a GPU; leave --write out", file=sys.stderr)
        return 2
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; kernels that are interpreted are not compiled: unset it")
    if reason := ops.why_no_kernel("rms_norm", torch.device("meta")):
        parser.error(reason)
    if not 1 <= options.tokens <= options.rows or options.rows % options.tokens:
        parser.error(f"--rows {options.rows} is no multiple of --tokens {options.tokens}; give whole samples")
    if arch not in SHARED_KB:
        parser.error(f"compute capability {arch / 10} is not in tuning.SHARED_KB; add its shared memory there")
    print(f"{gpu or 'no GPU: compiled only, so which is fastest stays unknown'}, sm_{arch}")
    print(f"{'op':<15}{'type':<9}{'M x N x K':<13}warps stages  regs  spill   shared        ms  ratio", flush=True)
    right = True
    with ops.use_backend("triton", **dict.fromkeys(ops.OPS, "triton")):
        for op, name in itertools.product([op for op in OPS if op in options.ops], options.dtype):
            setting = Setting(getattr(torch, name), options.rows // options.tokens, options.tokens, arch)
            right = tune(op, setting, gpu, options.write) and right
        if CHOICE in options.ops and gpu:
            right = choose(options.rows, arch, gpu, options.write) and right
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
