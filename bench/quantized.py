"""What a product with a quantised weight takes on this CPU: in float32, here, by torchao, by torch's own kernels.

python bench/quantized.py                        # the base model's widths, 1, 8 and 64 rows
python bench/quantized.py --sizes 448x448 --rows 1

    plain        x W^T in float32
    ours, once   x and W^T made plain beforehand: decoding over a cache, and every use but the first in a forward pass
    ours, each   W made plain at each use
    torchao      F.linear on its tensor
    int8 kernel, int4 kernel   torch's _weight_int8pack_mm and _weight_int4pack_mm_for_cpu, written for AVX-512

Microseconds, medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from hrm_kernels.quantized import product, rounded
from hrm_model.quantization import Quantization, quantize_linear, torchao


def microseconds(call, rounds: int) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) * 1e6


def case(n: int, k: int, rows: int, how: Quantization, rounds: int) -> dict[str, float | None]:
    """Times of [rows, k] by [n, k]."""
    torch.manual_seed(0)
    x, layer = torch.randn(rows, k), torch.nn.Linear(k, n, bias=False)
    plain = layer.weight.detach().clone()
    quantize_linear(layer, how.to, how.dynamic, how.group_size)
    w = layer.weight
    wide = w.dequantize()
    found = {
        "plain": microseconds(lambda: F.linear(x, plain), rounds),
        "ours, once": microseconds(lambda: F.linear(rounded(x, w), wide), rounds),
        "ours, each": microseconds(lambda: product(rounded(x, w), w), rounds),
        "torchao": microseconds(lambda: F.linear(x, w), rounds),
        "int8 kernel": None,
        "int4 kernel": None,
    }
    if how.to == "int8" and not how.dynamic:
        scale = w.scale.flatten()
        found["int8 kernel"] = microseconds(lambda: torch._weight_int8pack_mm(x, w.qdata, scale), rounds)
    if how.to == "int4" and not how.dynamic:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((w.qdata + 8).int(), 1)
        zeros = -w.zero_point.float() * w.scale
        scales = torch.stack((w.scale, zeros), -1).transpose(0, 1).contiguous()
        size = how.group_size
        found["int4 kernel"] = microseconds(
            lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, size, scales), rounds
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["448x448", "1792x448", "448x1792"], help="N x K of weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="rows of x")
    parser.add_argument("--rounds", type=int, default=9, help="times each is measured")
    args = parser.parse_args(argv)
    torchao()
    kinds = [("int8", False), ("int8", True), ("int4", False), ("int4", True), ("fp8", False)]
    lines = []
    with torch.no_grad():
        for size in args.sizes:
            n, k = map(int, size.split("x"))
            for rows in args.rows:
                for to, dynamic in kinds:
                    found = case(n, k, rows, Quantization(to, dynamic), args.rounds)
                    lines.append({"size": size, "rows": rows, "to": to, "dynamic": dynamic, **found})
                    shown = "  ".join(f"{name} {value:,.0f}" for name, value in found.items() if value is not None)
                    print(f"{size:>9} rows {rows:>3} {to + (' dynamic' if dynamic else ''):<13} {shown}", flush=True)
    print(
        json.dumps(
            {
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "us": lines,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
