"""Tile sizes: one table, read from top to bottom, the first line that fits is used.

TABLE, columns: `type`: half is bfloat16 and float16. `rows`: for at most so many rows (tokens). `KB`: for GPUs that
give a program at least so much shared memory (99 on sm_86, sm_89, sm_120; 163 on sm_80; 227 on sm_90, sm_100). M, N, K:
the tile.
ATTENTION: which implementation `auto` takes for rows of at most so many tokens: triton, sdpa or flash.
`python -m hrm_kernels.tune` times candidates on the GPU at hand and writes its choice here; nothing is tuned while a
model runs. What spills is said by `python -m hrm_kernels.offline`. No line has been timed on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

TABLE = """
op                   type    rows   KB    M    N    K warps stages  why
rms_norm             any      any    0    2    0    0     1      1  a warp a row: 16-byte loads, sums by shuffles alone
rms_norm_backward    any      any    0    4    0    0     4      1  two warps a row: of one alone too few would run
swiglu               half      64   99   16   64   64     4      4  decoding: few rows, weights stream once
swiglu               half     any  227  128  128   64     8      3  two 128 x 128 accumulators; 4 warps would spill
swiglu               half     any   99  128   64   64     8      3  mma.sync: 128 x 128 would spill
swiglu               float32  any   99   64   32   32     4      2  three tf32 products; 64 x 64 would spill on sm_80
swiglu_mul           any      any    0    0 1024    0     4      1  1024 elements a program
qkv                  half      64   99   16   64   64     4      4  decoding
qkv                  half     any   99  128  128   64     8      3  896 = 7 x 128 columns; 4 warps would spill
qkv                  float32  any  227   64   64   32     4      2
qkv                  float32  any   99   64   32   32     4      2  64 x 64 would spill on sm_80
linear               half      64   99   16   32   64     4      4  decoding: 448 columns in 14 programs
linear               half     any   99  128   64   64     4      4  448 = 7 x 64 columns
linear               float32  any   99   64   32   32     4      2  three tf32 products
rotate               any      any    0    0 1024    0     4      1  1024 elements a program
attention            half      64   99   16   32    0     4      2  short rows
attention            half     any   99  128   64    0     8      3  4 warps would spill on sm_80
attention            float32  any  227   64   32    0     8      2
attention            float32  any   99   32   32    0     4      2  64 x 32 would spill on sm_80
cached_attention     half     any   99    0   64    0     4      3  a token's heads and 64 keys at a time
cached_attention     float32  any  227    0   32    0     4      2
cached_attention     float32  any   99    0   16    0     4      2  32 would spill on sm_80
attention_dq         half     any   99   64   64    0     4      3
attention_dq         float32  any   99   32   32    0     8      2  4 warps would spill
attention_dkv        half     any   99   32   64    0     4      3  64 x 64 would spill with dropout
attention_dkv        float32  any   99   32   32    0     8      2  4 warps would spill
attention_wide       half     any   99   64   32    0     4      2  heads of 66 to 128
attention_wide       float32  any   99   32   16    0     4      1
attention_dq_wide    half     any   99   32   32    0     4      2
attention_dq_wide    float32  any   99   16   16    0     4      1
attention_dkv_wide   half     any   99   32   32    0     4      2
attention_dkv_wide   float32  any   99   16   16    0     4      1
cross_entropy        any      any    0    0 4096    0     8      1  4096 columns of a row at a time
halting              any      any    0   16    0    0     8      1  16 positions x 512 channels at a time
"""

ATTENTION = """
type      tokens  implementation  why
any       any     triton          not timed yet
"""


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class _Line(NamedTuple):
    op: str
    type: str
    rows: float
    shared_kb: int
    tile: Tile

    def fits(self, op: str, type_name: str, rows: int, shared_kb: int) -> bool:
        return self.op == op and self.type in ("any", type_name) and rows <= self.rows and self.shared_kb <= shared_kb


SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""Compute capability -> shared memory of one program in KB (CUDA C++ programming guide, table of technical data)."""

_assumed: int | None = None
_override: dict[str, Tile] = {}


def _parse(table: str) -> list[_Line]:
    lines = []
    for line in table.strip().splitlines()[1:]:
        op, type_name, rows, kb, *numbers = line.split(maxsplit=9)[:9]
        lines.append(
            _Line(op, type_name, float("inf") if rows == "any" else int(rows), int(kb), Tile(*map(int, numbers)))
        )
    return lines


_LINES = _parse(TABLE)
_ATTENTION = [line.split(maxsplit=3)[:3] for line in ATTENTION.strip().splitlines()[1:]]


def _type_name(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def fastest_attention(dtype: torch.dtype, n_tokens: int) -> str:
    """Which implementation of attention `auto` takes on a GPU for rows of n_tokens."""
    for type_name, tokens, name in _ATTENTION:
        if type_name in ("any", _type_name(dtype)) and (tokens == "any" or n_tokens <= int(tokens)):
            return name
    raise LookupError(f"no line for attention of {n_tokens} tokens in {dtype}")


def tile(op: str, dtype: torch.dtype, rows: int, device: torch.device) -> Tile:
    """The tile of kernel `op` for `rows` rows of `dtype` on `device`."""
    if op in _override:
        return _override[op]
    return _lookup(op, _type_name(dtype), rows, shared_kb(device))


@functools.lru_cache(maxsize=1024)
def _lookup(op: str, type_name: str, rows: int, shared_kb: int) -> Tile:
    for line in _LINES:
        if line.fits(op, type_name, rows, shared_kb):
            return line.tile
    raise LookupError(f"no tile for {op}, {type_name}, {rows} rows on a GPU with {shared_kb} KB of shared memory")


def overrides() -> frozenset:
    """Tiles in force instead of the table's."""
    return frozenset(_override.items())


def shared_kb(device: torch.device) -> int:
    """Shared memory of one program in KB on `device` (or on the GPU that `assume` names)."""
    if _assumed is not None:
        return SHARED_KB[_assumed]
    return _shared_kb(device.index) if device.type == "cuda" else 227


@functools.lru_cache(maxsize=64)
def _shared_kb(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return SHARED_KB.get(major * 10 + minor, 99)


class use_tiles:
    """`with use_tiles(swiglu=Tile(16, 16, 16, 4, 1)):` other tiles than the table's. For tests and tuning."""

    def __init__(self, **tiles: Tile):
        self.tiles = tiles

    def __enter__(self) -> None:
        global _override
        self.before, _override = _override, {**_override, **self.tiles}

    def __exit__(self, *exc) -> None:
        global _override
        _override = self.before


class assume:
    """`with assume(90):` tiles as for that compute capability, whatever is in the machine."""

    def __init__(self, capability: int):
        self.capability = capability

    def __enter__(self) -> None:
        global _assumed
        _assumed = self.capability

    def __exit__(self, *exc) -> None:
        global _assumed
        _assumed = None
