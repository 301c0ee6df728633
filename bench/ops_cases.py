"""What bench/ops.py measures: inputs, work and implementations of each op, and whether their numbers are right.

With M = B T rows, N = (H + 2K) D columns of queries, keys and values, and e bytes a number, an op's work is

    op                    forward FLOPs  backward FLOPs  forward bytes / e       backward bytes / e
    rms_norm              0              0               2 MC                    3 MC
    add_rms_norm          0              0               4 MC                    4 MC
    swiglu                4 MCF          8 MCF           MC + 2 FC + MF          2 MC + 4 FC + MF
    swiglu_mul            0              0               3 MF                    5 MF
    qkv_rope              2 MCN          4 MCN           MC + CN + MN            2 MC + 2 CN + MN
    attention             2 M T H D      5 M T H D       MN + M H D              2 MN + M H D
    rope_gqa_attention    both           both            MC + CN + M H D         2 MC + 2 CN + M H D
    linear_cross_entropy  2 MCV          4 MCV           MC + CV                 MC + CV
    halting               0              0               MC                      MC

and a little for vectors and tables. FLOPs are those of the products; causal attention counts half of T^2, its backward
pass five products to the forward's two, because S is made again. Bytes are the fewest a pass can move: what it needs
is read once and what it gives is written once. So the gradients of cross-entropy, which are made where the logits are,
are only written; those of a sum of two tensors are one tensor; what could be computed again is not counted.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hrm_kernels as ops
from hrm_kernels import reference

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}
"""||found - truth|| / ||truth|| allowed of results and of gradients; the truth is the reference in float64."""


class Sizes(NamedTuple):
    """One model size and batch. Letters as in hrm_kernels/__init__.py."""

    B: int
    T: int
    C: int
    H: int
    K: int
    F: int
    V: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: dict[str, int], batch: int, tokens: int, dtype: torch.dtype) -> Sizes:
        """From a dictionary like hrm_kernels.offline.BASE."""
        names = ("width", "n_head", "n_kv_head", "hidden", "vocab")
        return cls(batch, tokens, *(shape[name] for name in names), dtype)

    @property
    def D(self) -> int:
        """Head size."""
        return self.C // self.H

    @property
    def M(self) -> int:
        """Rows."""
        return self.B * self.T

    @property
    def N(self) -> int:
        """Columns of the packed projection."""
        return (self.H + 2 * self.K) * self.D

    @property
    def e(self) -> int:
        """Bytes a number."""
        return self.dtype.itemsize


class Work(NamedTuple):
    """What must be done, however it is done."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Ceilings(NamedTuple):
    """What a machine can do at most; flops_per_s is None where it is not known."""

    bytes_per_s: float
    flops_per_s: float | None
    source: str

    def floor(self, work: Work) -> tuple[float, str]:
        """(least seconds, which of "bytes" and "FLOPs" takes them)."""
        for_bytes = work.bytes / self.bytes_per_s
        for_flops = work.flops / self.flops_per_s if self.flops_per_s else 0.0
        return max((for_bytes, "bytes"), (for_flops, "FLOPs"))


def assumed(dtype: torch.dtype) -> Ceilings:
    """An H200, as far as it is known: it is not in this machine."""
    tflops = 790e12 if dtype == torch.bfloat16 else None
    products = "790 TFLOP/s bfloat16 matmul" if tflops else "no ceiling for float32 products"
    return Ceilings(4.3e12, tflops, f"assumed, an H200: 4.3 TB/s copy, {products}")


class Implementation(NamedTuple):
    """One way to run an op."""

    call: Callable[..., Any]
    package: str = ""
    """Distribution that must be installed."""
    overwrites: bool = False
    """Its backward pass leaves gradients where its inputs were."""

    def missing(self) -> bool:
        """Whether its package is not installed."""
        return bool(self.package) and importlib.util.find_spec(self.package.replace("-", "_")) is None


class Case(NamedTuple):
    """One op."""

    inputs: Callable[[Sizes, Callable[..., Tensor]], list]
    """Of the sizes and a function that draws random tensors (see `draw`): the op's arguments."""
    work: Callable[[Sizes], tuple[Work, Work]]
    """Forward, and what the backward pass adds."""
    truth: Callable[..., Any]
    """The reference, for float64."""
    implementations: dict[str, Implementation]


def draw(sizes: Sizes, device: torch.device) -> Callable[..., Tensor]:
    """A function of a shape that gives normal numbers which require a gradient; the same ones in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = sizes.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype).requires_grad_()

    return random


# -- implementations ---------------------------------------------------------------------------------------------------


def _seam(op: str, mode: str, **overrides: str) -> Callable:
    # every op by name: what HRM_KERNELS may say of single ops must not decide what is measured
    chosen = dict.fromkeys(ops.OPS, mode) | overrides

    def call(*args):
        with ops.use_backend(mode, **chosen):
            return getattr(ops, op)(*args)

    return call


@functools.cache
def _compiled(definition: Callable) -> Callable:
    # static shapes: a graph for any shape, which torch would make on the second, is slower than what it stands for
    return torch.compile(definition, dynamic=False)


def _with(op: str, definition: Callable, **others: Implementation) -> dict[str, Implementation]:
    return {
        "eager": Implementation(_seam(op, "reference")),
        "compile": Implementation(lambda *args: _compiled(definition)(*args)),
        "triton": Implementation(_seam(op, "triton")),
        **others,
    }


def _rope_gqa_attention(x, w_q, w_k, w_v, biases, rotary, n_head, n_kv_head):
    return reference.attention(reference.qkv_rope(x, w_q, w_k, w_v, biases, rotary), n_head, n_kv_head)


def _all_logits(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy as most code has it, with float32 logits as a whole. torch.compile gets this one, because it would
    unroll the reference's loop: 128 chunks at 32,768 rows."""
    return F.cross_entropy(F.linear(x, w).float(), targets, ignore_index=-1)


def _liger_rms_norm(x, w):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is float32 inside and one rounding, as here; False: the gradient that came in is not overwritten
    return LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "gemma", False)


def _liger_add_rms_norm(x, branch, w):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    norm, total = LigerFusedAddRMSNormFunction.apply(x, branch, w, 1e-5, 0.0, "gemma", False)
    return total, norm


def _liger_swiglu_mul(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(up, gate)  # silu of the first argument


def _liger_linear_cross_entropy(x, w, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # ... bias, class weights, ignore_index, z_loss, label smoothing, reduction, softcap, return z_loss; dw in float32,
    # as here: summed in bfloat16 over many chunks it is less exact
    constants = None, None, -1, 0.0, 0.0, "mean", None, False, torch.float32
    return LigerFusedLinearCrossEntropyFunction.apply(x, w, targets, *constants)[0]


def _attentions(op: str) -> dict[str, Implementation]:
    """Of `attention`, sdpa is eager once more: what the two differ by is the noise of the measurement."""
    return {
        "sdpa": Implementation(_seam(op, "triton", attention="sdpa")),
        "flash": Implementation(_seam(op, "triton", attention="flash"), "flash-attn"),
    }


# -- the ops -----------------------------------------------------------------------------------------------------------


def _weights(s: Sizes, random: Callable[..., Tensor]) -> list:
    """Projections at the scale the model starts with, no biases, and the rotary table."""
    projections = [random(heads * s.D, s.C, scale=0.02) for heads in (s.H, s.K, s.K)]
    positions = torch.arange(s.T, device=projections[0].device)
    return [*projections, None, ops.rope_table(positions, s.D)]


def _cross_entropy_inputs(s: Sizes, random: Callable[..., Tensor]) -> list:
    x, w = random(s.M, s.C), random(s.V, s.C, scale=0.02)
    generator = torch.Generator(x.device).manual_seed(1)
    return [x, w, torch.randint(s.V, (s.M,), generator=generator, device=x.device)]


def projection(s: Sizes, n_in: int, n_out: int) -> Work:
    """x [M, n_in] times a weight [n_out, n_in], written out."""
    return Work(2 * s.M * n_in * n_out, (s.M * n_in + n_in * n_out + s.M * n_out) * s.e)


def _table_bytes(s: Sizes) -> int:
    return 4 * s.T * s.D


def _qkv_work(s: Sizes) -> tuple[Work, Work]:
    backward = Work(4 * s.M * s.C * s.N, (2 * s.M * s.C + 2 * s.C * s.N + s.M * s.N) * s.e)
    return projection(s, s.C, s.N) + Work(0, _table_bytes(s)), backward + Work(0, _table_bytes(s))


def _attention_work(s: Sizes) -> tuple[Work, Work]:
    pairs = s.M * s.T * s.H * s.D
    return (
        Work(2 * pairs, (s.M * s.N + s.M * s.H * s.D) * s.e),
        Work(5 * pairs, (2 * s.M * s.N + s.M * s.H * s.D) * s.e),
    )


def _rope_gqa_work(s: Sizes) -> tuple[Work, Work]:
    flops = [qkv.flops + attention.flops for qkv, attention in zip(_qkv_work(s), _attention_work(s), strict=True)]
    once = s.M * s.C + s.C * s.N
    return (
        Work(flops[0], (once + s.M * s.H * s.D) * s.e + _table_bytes(s)),
        Work(flops[1], (2 * once + s.M * s.H * s.D) * s.e + _table_bytes(s)),
    )


def block(s: Sizes) -> dict[str, Work]:
    """The products of one transformer block, forward, each result written out."""
    return {
        "QKV projection": projection(s, s.C, s.N),
        "attention, causal": _attention_work(s)[0],
        "output projection": projection(s, s.H * s.D, s.C),
        "gate + up": projection(s, s.C, 2 * s.F),
        "down": projection(s, s.F, s.C),
    }


_float32 = torch.float32  # norm weights and the halting head stay in float32 whatever the activations are

CASES: dict[str, Case] = {
    "rms_norm": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.C), random(s.C, dtype=_float32)],
        work=lambda s: (Work(0, 2 * s.M * s.C * s.e + 4 * s.C), Work(0, 3 * s.M * s.C * s.e + 8 * s.C)),
        truth=reference.rms_norm,
        implementations=_with("rms_norm", reference.rms_norm, liger=Implementation(_liger_rms_norm, "liger-kernel")),
    ),
    "add_rms_norm": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.C), random(s.B, s.T, s.C), random(s.C, dtype=_float32)],
        work=lambda s: (Work(0, 4 * s.M * s.C * s.e + 4 * s.C), Work(0, 4 * s.M * s.C * s.e + 8 * s.C)),
        truth=reference.add_rms_norm,
        implementations=_with(
            "add_rms_norm", reference.add_rms_norm, liger=Implementation(_liger_add_rms_norm, "liger-kernel")
        ),
    ),
    "swiglu": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.C), *(random(s.F, s.C, scale=0.02) for _ in range(2))],
        work=lambda s: (
            Work(4 * s.M * s.C * s.F, (s.M * s.C + 2 * s.F * s.C + s.M * s.F) * s.e),
            Work(8 * s.M * s.C * s.F, (2 * s.M * s.C + 4 * s.F * s.C + s.M * s.F) * s.e),
        ),
        truth=reference.swiglu,
        implementations=_with("swiglu", reference.swiglu),
    ),
    "swiglu_mul": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.F), random(s.B, s.T, s.F)],
        work=lambda s: (Work(0, 3 * s.M * s.F * s.e), Work(0, 5 * s.M * s.F * s.e)),
        truth=reference.swiglu_mul,
        implementations=_with(
            "swiglu_mul",
            reference.swiglu_mul,
            liger=Implementation(_liger_swiglu_mul, "liger-kernel", overwrites=True),
        ),
    ),
    "qkv_rope": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.C), *_weights(s, random)],
        work=_qkv_work,
        truth=reference.qkv_rope,
        implementations=_with("qkv_rope", reference.qkv_rope),
    ),
    "attention": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.N), s.H, s.K],
        work=_attention_work,
        truth=reference.attention,
        implementations=_with("attention", reference.attention, **_attentions("attention")),
    ),
    "rope_gqa_attention": Case(
        inputs=lambda s, random: [random(s.B, s.T, s.C), *_weights(s, random), s.H, s.K],
        work=_rope_gqa_work,
        truth=_rope_gqa_attention,
        implementations=_with("rope_gqa_attention", _rope_gqa_attention, **_attentions("rope_gqa_attention")),
    ),
    "linear_cross_entropy": Case(
        inputs=_cross_entropy_inputs,
        work=lambda s: (
            Work(2 * s.M * s.C * s.V, (s.M * s.C + s.C * s.V) * s.e + 8 * s.M),
            Work(4 * s.M * s.C * s.V, (s.M * s.C + s.C * s.V) * s.e),
        ),
        truth=reference.linear_cross_entropy,  # in chunks: 32,768 rows in float64 fit in 1 GB
        implementations=_with(
            "linear_cross_entropy",
            _all_logits,
            all_logits=Implementation(_all_logits),
            liger=Implementation(_liger_linear_cross_entropy, "liger-kernel"),
        ),
    ),
    "halting": Case(
        # weights of size 1, so that no row is near the threshold and a decision that differs is an error
        inputs=lambda s, random: [random(s.B, s.T, s.C), random(2, s.C, dtype=_float32), random(2, dtype=_float32)],
        work=lambda s: (Work(0, s.M * s.C * s.e + 8 * s.C + 9 * s.B), Work(0, s.M * s.C * s.e + 16 * s.C + 8 * s.B)),
        truth=reference.halting,
        implementations=_with("halting", reference.halting),
    ),
}

NAMES = tuple(dict.fromkeys(name for case in CASES.values() for name in case.implementations))
"""Every implementation's name."""


# -- numbers -----------------------------------------------------------------------------------------------------------


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def tensors(args: list) -> list[Tensor]:
    """Those among an op's arguments."""
    return [a for a in args if isinstance(a, Tensor)]


def changed(change: Callable[[Tensor], Tensor], args: list) -> list:
    """`args` with every tensor changed; what required a gradient still does."""
    return [change(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]


def forward(call: Callable, args: list) -> tuple[Tensor, ...]:
    """The op's results, as where no gradient is wanted."""
    with torch.no_grad():
        return _tuple(call(*(a.detach() if isinstance(a, Tensor) else a for a in args)))


def both(call: Callable, args: list, d_results: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(results, gradients of every input that requires one)."""
    results = _tuple(call(*args))
    with_gradient = [r for r in results if r.is_floating_point()]
    return results, torch.autograd.grad(with_gradient, [a for a in tensors(args) if a.requires_grad], d_results)


def largest_error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Largest ||found - truth|| / ||truth||. A truth that is zero but for rounding, as the gradients of queries and
    keys are where there is one token, is measured by the largest of the tensors instead."""
    if [f.shape for f in found] != [t.shape for t in truth]:
        return math.inf
    norms = [t.double().norm().item() for t in truth]
    sizes = [norm if norm > 1e-6 * max(norms) else max(norms) for norm in norms]
    errors = [(f.double() - t.double()).norm().item() / s for f, t, s in zip(found, truth, sizes, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def check(implementation: Implementation, args: list, d_results: list[Tensor], truth: tuple) -> tuple[float, float]:
    """(error of the results, error of the gradients) against `truth`, as `both` gives it."""
    results, gradients = truth
    dtype = tensors(args)[0].dtype
    inputs = changed(torch.clone, args)
    _poison(results, dtype)
    error = largest_error(forward(implementation.call, inputs), results)
    inputs, d = changed(torch.clone, args), [d.clone() for d in d_results]
    _poison((*results, *gradients), dtype)
    found = both(implementation.call, inputs, d)
    return max(error, largest_error(found[0], results)), largest_error(found[1], gradients)


def _poison(alike: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Free memory full of nan. The next tensors of these sizes are mostly made of it, and an element that nothing
    writes is seen."""
    poison = [torch.full_like(t, math.nan, dtype=dtype) for t in alike]
    del poison


def verify(
    implementations: dict[str, Implementation], args: list, d_results: list[Tensor], truth: tuple
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """(name -> errors, name -> why there are none)."""
    errors, without = {}, {}
    for name, implementation in implementations.items():
        if implementation.missing():
            without[name] = f"not installed (pip install {implementation.package})"
            continue
        try:
            errors[name] = check(implementation, args, d_results, truth)
        except (ops.BackendError, torch.OutOfMemoryError) as error:
            without[name] = f"cannot run: {first_line(error)}"
        except Exception as error:  # a package's own fault: the other rows are still worth having
            without[name] = f"FAILED: {type(error).__name__}: {first_line(error)}"
    return errors, without


def first_line(error: Exception) -> str:
    """Of its message."""
    return next(iter(str(error).strip().splitlines()), "")
