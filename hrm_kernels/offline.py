"""Compile every kernel for GPUs that are not there, and say what the compiler made of it.

    python -m hrm_kernels.offline                        # sm_80, sm_90 and sm_100, the base model's sizes
    python -m hrm_kernels.offline --arch 90 --rows 1 --tokens 1 --json

The ops run forward and backward on tensors without memory while their kernel starts are written down; each distinct one
is then compiled as it would be on that GPU, tile sizes and argument alignment included. Needs Triton, no GPU. Exit
status 1 if a kernel spills registers, needs more shared memory than there is, or multiplies matrices without matrix
instructions; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hrm_kernels as ops

from . import autocast
from .backend import INTERPRETED
from .loop import BlockWeights, LoopWeights
from .past import NewestTokens, Span, StepPast, Tokens
from .tuning import SHARED_KB, assume

BASE = {"width": 448, "n_head": 8, "n_kv_head": 4, "hidden": 1792, "vocab": 50304}
"""The base model: 82.77 M parameters."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
_TYPES |= {torch.int32: "i32", torch.int8: "i8"}


def launches(dtype: torch.dtype, rows: int, tokens: int, shape: dict[str, int]) -> list:
    """What every op starts for `rows` x `tokens` at the model size `shape`, forward alone and with gradients; for a
    half type also under autocast to it, where x is float32 and weights are not."""
    from .kernels.hrm_step import Sizes, Space, step
    from .kernels.launch import record

    def tensor(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device="meta", requires_grad=of.is_floating_point)

    c, f, v = shape["width"], shape["hidden"], shape["vocab"]
    h, k = shape["n_head"], shape["n_kv_head"]
    d = c // h
    x, branch, norm = tensor(rows, tokens, c), tensor(rows, tokens, c), tensor(c, of=torch.float32)
    lengths = tensor(rows, of=torch.int64)
    rotary = torch.empty((tokens, d // 2, 2), device="meta")
    projections = tensor(h * d, c), tensor(k * d, c), tensor(k * d, c)
    biases = tensor(h * d), tensor(k * d), tensor(k * d)
    hidden = tensor(rows, tokens, f), tensor(rows, tokens, f)
    flat, table, targets = tensor(rows * tokens, c), tensor(v, c), tensor(rows * tokens, of=torch.int64)
    head = tensor(2, c, of=torch.float32), tensor(2, of=torch.float32)
    calls = [
        lambda: ops.rms_norm(x, norm),
        lambda: ops.add_rms_norm(x, branch, norm),
        lambda: ops.add_rms_norm(x, branch, norm, keep_sum=False)[1],
        lambda: ops.swiglu(x, tensor(f, c), tensor(f, c)),
        lambda: ops.swiglu(x, tensor(f, c), tensor(f, c), tensor(f), tensor(f)),
        lambda: ops.swiglu_mul(*hidden),
        lambda: ops.qkv_rope(x, *projections, rotary=rotary),
        lambda: ops.rope_gqa_attention(x, *projections, None, rotary, h, k),
        lambda: ops.rope_gqa_attention(x, *projections, None, rotary, h, k, lengths),
        lambda: ops.rope_gqa_attention(x, *projections, biases, rotary, h, k, lengths, 0.1),
        lambda: ops.attention(tensor(rows, tokens, (h + 2 * k) * d), h, k),
        lambda: ops.linear_cross_entropy(flat, table, targets),
        lambda: ops.halting(x, *head)[0],
    ]
    wide = tensor(rows, tokens, c, of=torch.float32)
    under_autocast = [
        lambda: ops.add_rms_norm(wide, branch, norm),
        lambda: ops.swiglu(wide, tensor(f, c), tensor(f, c)),
        lambda: ops.rope_gqa_attention(wide, *projections, None, rotary, h, k),
    ]

    def forward_and_backward(call) -> None:
        with torch.no_grad():
            call()
        result = call()
        result = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(result, [torch.empty_like(r) for r in result])

    with record() as found, ops.use_backend("triton", **dict.fromkeys(ops.OPS, "triton")):
        for call in calls:
            forward_and_backward(call)
        if dtype != torch.float32:
            with autocast.assume(dtype):
                for call in under_autocast:
                    forward_and_backward(call)
        half = projections[0], *projections[1:], tensor(c, c)
        mlp = tensor(f, c), tensor(f, c), tensor(c, f)
        plain = BlockWeights(norm, *half, norm, *mlp)
        biased = BlockWeights(norm, *half, norm, *mlp, *biases, tensor(c), tensor(f), tensor(f), tensor(c))
        gelu = plain._replace(gate=None)
        for start, block, real, dropout_p in (
            (x, plain, None, 0.0),
            (x, biased, lengths, 0.1),
            (x, gelu, None, 0.0),
            *([] if dtype == torch.float32 else [(wide, plain, None, 0.0)]),  # autocast
        ):
            keep_before = dropout_p > 0  # as in training
            needs = Space.sizes(start, dtype, block, rotary, real, keep_before)
            space = Space.of({name: tensor(*size, of=of) for name, (size, of) in needs.items()}, start)
            # two cycles each: everything that can follow the end of a level
            step(space, LoopWeights((block,), (block,), *head), Sizes(h, k, 2, 2, 1e-5, 0.35, dropout_p))
        with torch.no_grad():
            decode(x, dtype, plain, head, h, k, d)
    return found


def decode(
    x: Tensor, dtype: torch.dtype, block: BlockWeights, head: tuple[Tensor, Tensor], h: int, k: int, d: int
) -> None:
    """Start what decoding over a cache does, for rows as many and as long as x's."""
    from .kernels.hrm_step import Sizes, Space, step

    (rows, tokens, c), device = x.shape, x.device

    def tensor(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device=device)

    kv, index = tensor(rows, tokens, 2, k, d), tensor(rows, of=torch.int64)
    newest = tensor(1, rows, (h + 2 * k) * d)
    ops.cached_attention(newest, kv, NewestTokens(index, index, tokens), h, k)
    last = Tokens.of([Span(row, tokens - 1, tokens) for row in range(rows)], tokens, device)
    ops.cached_attention(newest, kv, last, h, k)
    one = tensor(rows, 1, c)
    needs = Space.sizes(one, dtype, block, tensor(rows, 1, d // 2, 2, of=torch.float32), None, False)
    space = Space.of({name: tensor(*size, of=of) for name, (size, of) in needs.items()}, one)
    sums = tensor(2, rows, c, of=torch.float64)
    past = StepPast(tensor(2, 4, *kv.shape), tensor(2, *x.shape), tensor(*x.shape), sums, index)
    step(space, LoopWeights((block,), (block,), *head), Sizes(h, k, 1, 1, 1e-5, 0.35, 0.0), past)


def specialised(launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """(signature, constants, attributes) as Triton makes them of a call: 1 and None are constants."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    values = dict(zip(names, launch.args, strict=False))
    options = {"num_warps", "num_stages", "enable_fp_fusion"}
    values |= {name: value for name, value in launch.options.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    as_it_comes = launch.kernel.do_not_specialize
    for index, name in enumerate(names):
        value = values[name]
        given_by_name = name in launch.options
        if given_by_name or value is None or (type(value) is int and value == 1 and name not in as_it_comes):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            # memory of a tensor starts at 256 bytes; a view may start anywhere
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in as_it_comes:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compiled(launch, arch: int) -> dict[str, Any]:
    """Compile one kernel start for compute capability `arch` and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch)
    wanted = {name: launch.options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=wanted)
    usage = _resource_usage(binary.asm["cubin"])
    ptx = binary.asm["ptx"]
    wide_loads = len(re.findall(r"ld\.global[^;]*\.v4|cp\.async[^;]*, 0x10|cp\.async\.cg", ptx))
    constants = {k: v for k, v in constants.items() if k.startswith("BLOCK")}
    return {
        "kernel": f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__.strip('_')}",
        "first_argument": signature[next(iter(signature))].lstrip("*"),
        "arch": f"sm_{arch}",
        "tile": "x".join(str(v) for v in constants.values()),
        "num_warps": launch.options["num_warps"],
        "num_stages": launch.options["num_stages"],
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"],
        "shared_bytes": binary.metadata.shared,
        "shared_limit": SHARED_KB[arch] * 1024,
        "has_dot": "tt.dot" in binary.asm["ttir"],
        "matrix_instruction": _matrix_instruction(ptx),
        "wide_loads": wide_loads,
    }


def _matrix_instruction(ptx: str) -> str:
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return ""


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and stack bytes (spills) of the only function in the binary."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def report(arch: int, dtype: torch.dtype, rows: int, tokens: int, shape: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A line for each distinct kernel start."""
    seen = set()
    with assume(arch):
        found = launches(dtype, rows, tokens, shape)
    for launch in found:
        signature, constants, _ = specialised(launch)
        key = launch.kernel.fn, str(signature), str(constants)
        if key not in seen:
            seen.add(key)
            yield {"dtype": str(dtype).removeprefix("torch."), **compiled(launch, arch)}


def faults(line: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = []
    if line["spill_bytes"]:
        wrong.append(f"spills {line['spill_bytes']} bytes")
    if line["shared_bytes"] > line["shared_limit"]:
        wrong.append(f"needs {line['shared_bytes']} bytes of shared memory, there are {line['shared_limit']}")
    if line["has_dot"] and not line["matrix_instruction"]:
        wrong.append("multiplies matrices without matrix instructions")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m hrm_kernels.offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_KB))
    types = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=types)
    parser.add_argument("--rows", type=int, default=64, help="batch size (default 64)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a row (default 512)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; kernels that are interpreted are not compiled: unset it")
    if reason := ops.why_no_kernel("rms_norm", torch.device("meta")):
        parser.error(reason)
    heading = f"{'kernel':<39}{'x':<6}{'arch':<8}{'tile':<13}{'warps':>6}{'stages':>7}{'regs':>6}{'spill':>7}"
    if not options.json:
        print(f"{heading}{'shared':>9}{'wide':>6}  matrix instruction")
    bad = 0
    for arch in options.arch:
        for dtype in options.dtype:
            for line in report(arch, getattr(torch, dtype), options.rows, options.tokens, BASE):
                wrong = faults(line)
                bad += bool(wrong)
                note = f"  <- {', '.join(wrong)}" if wrong else ""
                if options.json:
                    print(json.dumps({**line, "faults": wrong}), flush=True)
                    continue
                print(
                    f"{line['kernel']:<39}{line['first_argument']:<6}{line['arch']:<8}{line['tile']:<13}{line['num_warps']:>6}"
                    f"{line['num_stages']:>7}{line['registers']:>6}{line['spill_bytes']:>7}{line['shared_bytes']:>9}"
                    f"{line['wide_loads']:>6}  {line['matrix_instruction']}{note}",
                    flush=True,
                )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
