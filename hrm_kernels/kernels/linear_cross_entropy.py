"""Linear layer and cross-entropy over a large vocabulary, a chunk of rows at a time; the logits never exist as a whole.

    l = x w^T, s = logsumexp(l), loss = s - l[target] + z s^2, p = exp(l - s)
    dl = weight (p (1 + 2 z s) - onehot(target)),   dx = dl w,   dw = dl^T x

One kernel passes twice over each row of a chunk's logits: first for maximum and sum, then to overwrite the logits with
their gradient. The three products are plain ones, so torch's library makes them; dw is accumulated in float32. A large
chunk matters: dw (90 MB at the base size) is read and written once a chunk.

For "mean" and "sum" all rows weigh the same, so the gradient is made in the forward pass while the logits are there;
for "none" weights come with the backward pass, which makes each chunk's logits again.
Source of the idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al.,
"Liger Kernel", 2024, section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import cast, compute_dtype
from ..tuning import tile
from .launch import kernel_op, launch, power_of_2

CHUNK_BYTES = 412_090_368
"""Logits alive at a time: 4096 rows of 50,304 bfloat16."""


@triton.jit
def _loss_and_gradient(
    logits_ptr, targets_ptr, row_weight_ptr, loss_ptr, row_stride, ignore_index, z_loss,
    V: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    lane = tl.arange(0, BLOCK)
    # A target that is no column is never followed: loss and gradient of its row are nan, which no training run
    # overlooks. It is read before any thread writes the gradient over it: the sums below are barriers in between.
    known = (target >= 0) & (target < V)
    safe_target = tl.where(known, target, 0)
    picked = tl.where(known, tl.load(logits + safe_target).to(tl.float32), float("nan"))
    # Every lane keeps its own running maximum and sum, so that the row is reduced once and not once a block. The first
    # maximum is finite, so that lanes beyond V (-inf) leave sums of 0 and not of nan.
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, start + lane < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
        top = new_top
    row_top = tl.max(top, 0)
    lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, lse - picked + z_loss * lse * lse))
    if WITH_GRADIENT:
        weight = tl.load(row_weight_ptr + row).to(tl.float32)
        weight = tl.where(ignored, 0.0, tl.where(known, weight, float("nan")))
        slope = weight * (1 + 2 * z_loss * lse)
        for start in range(0, V, BLOCK):
            column = start + lane
            x = tl.load(logits + column, column < V, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - lse) * slope - tl.where(column == safe_target, weight, 0.0)
            # an ignored row's gradient is zero even if its logits are infinite or nan
            d = tl.where(ignored, 0.0, d)
            tl.store(logits + column, d.to(logits_ptr.dtype.element_ty), column < V)


@kernel_op(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor targets, Tensor? row_weight, Tensor(a!) loss, Tensor(b!)? dx,"
    " Tensor(c!)? dw, int ignore_index, float z_loss) -> ()"
)
def _chunks(x, w, targets, row_weight, loss, dx, dw, ignore_index, z_loss):
    """Losses [M], and with row_weight [M] the gradients dx [M, C] and dw [V, C] float32, as far as they are wanted."""
    if dw is not None:
        dw.zero_()
    m, v = x.shape[0], w.shape[0]
    chunk = max(1, min(m, CHUNK_BYTES // (v * w.element_size())))
    buffer = torch.empty((chunk, v), dtype=x.dtype, device=x.device)
    chosen = tile("cross_entropy", x.dtype, m, x.device)
    for start in range(0, m, chunk):
        stop = min(m, start + chunk)
        logits = buffer[: stop - start]
        torch.mm(x[start:stop], w.t(), out=logits)
        launch(
            _loss_and_gradient, (stop - start,),
            logits, targets[start:stop], None if row_weight is None else row_weight[start:stop], loss[start:stop],
            v, ignore_index, z_loss,
            V=v, WITH_GRADIENT=row_weight is not None, BLOCK=min(chosen.N, power_of_2(v)), **chosen.options,
        )  # fmt: skip
        if dx is not None:
            torch.mm(logits, w, out=dx[start:stop])
        if dw is not None:
            _add_product(dw, logits.t(), x[start:stop])


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a b in float32: in one library call where there is one for narrow factors and a wide sum."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    elif into.is_cuda:
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        into += a @ b


class _TotalLoss(torch.autograd.Function):
    """Sum of the losses. A mean divides it afterwards: gradients of single rows are of order 1 and survive float16,
    those of a mean over 32,768 rows would not, and a loss scale, which arrives with g, would come too late for them."""

    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, z_loss):
        loss = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        dx, dw = _gradients_of(x, w, ctx.needs_input_grad)
        weight = None if dx is None and dw is None else torch.ones_like(loss)
        _chunks(x, w, targets, weight, loss, dx, dw, ignore_index, z_loss)
        ctx.save_for_backward(dx, dw)
        ctx.w_dtype = w.dtype
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        # in float32: as a float16 number g would overflow at a loss scale of 65,536
        dx = None if dx is None else (dx.float() * g).to(dx.dtype)
        return dx, None if dw is None else (dw * g).to(ctx.w_dtype), None, None, None


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, z_loss):
        loss = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        _chunks(x, w, targets, None, loss, None, None, ignore_index, z_loss)
        ctx.save_for_backward(x, w, targets)
        ctx.constants = ignore_index, z_loss
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, targets = ctx.saved_tensors
        loss = torch.empty_like(g, memory_format=torch.contiguous_format)
        dx, dw = _gradients_of(x, w, ctx.needs_input_grad)
        _chunks(x, w, targets, g.contiguous(), loss, dx, dw, *ctx.constants)
        return dx, None if dw is None else dw.to(w.dtype), None, None, None


def _gradients_of(x, w, wanted):
    """Room for dx and, in float32, dw: of those that are wanted."""
    dx = torch.empty_like(x) if wanted[0] else None
    return dx, torch.empty(w.shape, dtype=torch.float32, device=w.device) if wanted[1] else None


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    dtype = compute_dtype(x)
    x, w, targets = x.to(dtype).contiguous(), cast(w, dtype).contiguous(), targets.contiguous()
    if reduction == "none":
        return _RowLosses.apply(x, w, targets, ignore_index, z_loss)
    total = _TotalLoss.apply(x, w, targets, ignore_index, z_loss)
    return total / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else total
