"""The halting head: pool, score, decide, and keep the books of a batch whose rows stop at different steps.

    q = mean over real tokens of z_H w^T + b = [halt, continue];   a row halts where q_halt + halt_bias > q_continue

The mean and the head are linear, so each program reduces some positions of one row to two numbers, and the program that
finishes last adds those up and does the rest for all rows: one kernel, and no sum depends on which program ran when.
With the books it also counts steps, marks rows and rewrites the list of rows that go on, all on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transfer import to_device
from ..tuning import tile
from .launch import cdiv, dense, kernel_op, launch, needs_grad, power_of_2

MOST_ROWS = 4096
"""Rows that the last program holds at once."""

WIDEST = 16384
"""Channels that a program holds of a position."""


class Books(NamedTuple):
    """State of a batch on its way through the steps, on the device. B rows; the first n_active entries of `active`
    are the rows that go on, in ascending order."""

    active: Tensor
    """[B] int32."""
    n_active: Tensor
    """[1] int32."""
    executed: Tensor
    """[B] int32, steps run."""
    halted: Tensor
    """[B] int8, 1 where the row stopped by its own decision."""
    limit: Tensor
    """[B] int32, steps after which a row ends whatever it decides."""
    may_halt: Tensor
    """[B] int32, 1 where the head's decision counts (0: the row runs to its limit)."""
    q: Tensor
    """[B, 2] float32, [halt, continue] after the row's last step."""
    partial: Tensor
    """[B, parts, 2] float32, scratch."""
    ticket: Tensor
    """[1] int32, 0 between launches."""

    @staticmethod
    def sizes(z_H: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Field -> (shape, type) for a batch z_H [B, T, C]. `open` fills them in."""
        n, n_parts = z_H.shape[0], cdiv(z_H.shape[1], _positions(z_H))
        sizes = {name: ((n,), torch.int32) for name in ("active", "executed", "limit", "may_halt")}
        sizes |= {"n_active": ((1,), torch.int32), "ticket": ((1,), torch.int32), "halted": ((n,), torch.int8)}
        return sizes | {"q": ((n, 2), torch.float32), "partial": ((n, n_parts, 2), torch.float32)}

    def open(self, limit: list[int], may_halt: list[bool]) -> None:
        """Begin with rows that have run no step; those with limit 0 are done before they start. No synchronisation."""
        n = len(limit)
        rows = [row for row in range(n) if limit[row] > 0]
        told = [*limit, *map(int, may_halt), *rows, *[0] * (n - len(rows)), len(rows)]
        told = torch.tensor(told, dtype=torch.int32, device="cpu")
        fields = self.limit, self.may_halt, self.active, self.n_active
        for field, part in zip(fields, to_device(told, self.limit.device).split([n, n, n, 1]), strict=True):
            field.copy_(part)
        for field in (self.executed, self.halted, self.q, self.ticket):
            field.zero_()


def _positions(z_H: Tensor) -> int:
    """Positions of a row that one program sums."""
    n_rows, _, n_channels = z_H.shape
    return max(1, min(tile("halting", z_H.dtype, n_rows, z_H.device).M, 8192 // power_of_2(n_channels)))


@triton.jit
def _decide(
    z_ptr, w_ptr, b_ptr, lengths_ptr, partial_ptr, ticket_ptr, q_ptr, halt_ptr,
    active_ptr, n_active_ptr, executed_ptr, limit_ptr, may_halt_ptr,
    B, T, z_row_stride, z_token_stride, halt_bias,
    C: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BOOKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    n_parts = tl.cdiv(T, BLOCK_T)
    slot, part = tl.program_id(0) // n_parts, tl.program_id(0) % n_parts
    n_slots = B
    row = slot
    if HAS_BOOKS:
        n_slots = tl.load(n_active_ptr)
        row = tl.load(active_ptr + slot)
    if slot < n_slots:
        length = T
        if HAS_LENGTHS:
            length = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), T)
        position = part * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        channel = tl.arange(0, BLOCK_C)[None, :]
        mask = (position < length) & (channel < C)
        z_ptrs = z_ptr + row.to(tl.int64) * z_row_stride + position * z_token_stride + channel
        z = tl.sum(tl.load(z_ptrs, mask, other=0.0).to(tl.float32), 0)
        c = tl.arange(0, BLOCK_C)
        for_halt = tl.sum(z * tl.load(w_ptr + c, c < C, other=0.0).to(tl.float32), 0)
        for_more = tl.sum(z * tl.load(w_ptr + C + c, c < C, other=0.0).to(tl.float32), 0)
        place = partial_ptr + (row * n_parts + part) * 2
        tl.store(place, for_halt)
        tl.store(place + 1, for_more)
        tl.debug_barrier()  # every warp's stores before the one that takes the ticket publishes them
        ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
        if ticket == n_slots * n_parts - 1:
            slots = tl.arange(0, BLOCK_B)
            live = slots < n_slots
            rows = slots
            if HAS_BOOKS:
                rows = tl.load(active_ptr + slots, live, other=0)
            tokens = tl.zeros((BLOCK_B,), tl.float32) + T
            if HAS_LENGTHS:
                tokens = tl.load(lengths_ptr + rows, live, other=1).to(tl.float32)
            q_halt = tl.zeros((BLOCK_B,), tl.float32)
            q_more = tl.zeros((BLOCK_B,), tl.float32)
            for p in range(0, BLOCK_PARTS):
                known = live & (p + 0 * slots < n_parts)
                place_of = partial_ptr + (rows * n_parts + p) * 2
                q_halt += tl.load(place_of, known, other=0.0, cache_modifier=".cg")
                q_more += tl.load(place_of + 1, known, other=0.0, cache_modifier=".cg")
            q_halt = q_halt / tokens + tl.load(b_ptr).to(tl.float32)
            q_more = q_more / tokens + tl.load(b_ptr + 1).to(tl.float32)
            halt = (q_halt + halt_bias) > q_more
            tl.store(q_ptr + 2 * rows, q_halt, live)
            tl.store(q_ptr + 2 * rows + 1, q_more, live)
            if HAS_BOOKS:
                halt = halt & (tl.load(may_halt_ptr + rows, live, other=0) != 0)
                executed = tl.load(executed_ptr + rows, live, other=0) + 1
                goes_on = live & (halt == 0) & (executed < tl.load(limit_ptr + rows, live, other=0))
                order = tl.cumsum(goes_on.to(tl.int32), 0)
                tl.debug_barrier()  # the old list has been read by every warp before the new one is written over it
                tl.store(executed_ptr + rows, executed, live)
                tl.store(active_ptr + order - 1, rows, goes_on)
                tl.store(n_active_ptr, tl.sum(goes_on.to(tl.int32), 0))
            tl.store(halt_ptr + rows, halt.to(tl.int8), live)
            tl.store(ticket_ptr, 0)  # for the next launch


@kernel_op(
    "halting_decide(Tensor z_H, Tensor w, Tensor b, Tensor? lengths, Tensor(a!) q, Tensor(b!) halt,"
    " float halt_bias) -> ()"
)
def _launch(z_H, w, b, lengths, q, halt, halt_bias):
    shape, dtype = Books.sizes(z_H)["partial"]
    partial = torch.empty(shape, dtype=dtype, device=z_H.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=z_H.device)
    _start(z_H, w, b, lengths, partial, ticket, q, halt, (None,) * 5, halt_bias)


def _start(z_H, w, b, lengths, partial, ticket, q, halt, books, halt_bias):
    """books: active, n_active, executed, limit, may_halt, or five times None."""
    n_rows, n_tokens, n_channels = z_H.shape
    n_parts = partial.shape[1]
    launch(
        _decide, (n_rows * n_parts,),
        z_H, w, b, lengths, partial, ticket, q, halt, *books,
        n_rows, n_tokens, z_H.stride(0), z_H.stride(1), halt_bias,
        C=n_channels, HAS_LENGTHS=lengths is not None, HAS_BOOKS=books[0] is not None,
        BLOCK_T=_positions(z_H), BLOCK_C=power_of_2(n_channels), BLOCK_B=power_of_2(n_rows),
        BLOCK_PARTS=power_of_2(n_parts), **tile("halting", z_H.dtype, n_rows, z_H.device).options,
    )  # fmt: skip


def keep_books(z_H: Tensor, w: Tensor, b: Tensor, halt_bias: float, lengths: Tensor | None, books: Books) -> None:
    """After a step: score the active rows of z_H [B, T, C], count the step, and rewrite the list of rows that go on.

    Rows that are not active are neither read nor written. No synchronisation, nothing allocated. Arguments are dense.
    """
    kept = books.active, books.n_active, books.executed, books.limit, books.may_halt
    _start(z_H, w, b, lengths, books.partial, books.ticket, books.q, books.halted, kept, halt_bias)


def _score(z_H, w, b, lengths, halt_bias):
    """(q [B, 2], decision [B])."""
    q = torch.empty((z_H.shape[0], 2), dtype=torch.float32, device=z_H.device)
    halt = torch.empty(z_H.shape[0], dtype=torch.int8, device=z_H.device)
    _launch(z_H, w, b, lengths, q, halt, halt_bias)
    return q, halt.bool()


class _Halting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_H, w, b, lengths, halt_bias):
        q, halt = _score(z_H, w, b, lengths, halt_bias)
        ctx.save_for_backward(z_H, w, lengths)
        ctx.b_dtype = b.dtype
        ctx.mark_non_differentiable(halt)
        return q, halt

    @staticmethod
    def backward(ctx, dq, _):
        z_H, w, lengths = ctx.saved_tensors
        n_tokens = z_H.shape[1]
        # the weight of a position in its row's mean: 1 / length, 0 for padding
        share = dq.new_full((z_H.shape[0], n_tokens), 1 / n_tokens)
        if lengths is not None:
            real = torch.arange(n_tokens, device=z_H.device) < lengths[:, None]
            share = real / lengths[:, None].to(dq.dtype)
        dz = torch.einsum("bt,bo,oc->btc", share, dq, w.to(dq.dtype)).to(z_H.dtype)
        dw = torch.einsum("bo,bt,btc->oc", dq, share, z_H.to(dq.dtype)).to(w.dtype)
        return dz, dw, dq.sum(0).to(ctx.b_dtype), None, None


def halting(
    z_H: Tensor, w: Tensor, b: Tensor, halt_bias: float = 0.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z_H = z_H if z_H.stride(2) == 1 else z_H.contiguous()
    w, b, lengths = dense(w, b, lengths)
    score = _Halting.apply if needs_grad(z_H, w, b) else _score
    return score(z_H, w, b, lengths, halt_bias)
