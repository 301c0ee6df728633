"""The reference ops against formulas written out, in float64, forward and backward; and the choice of backend."""

from __future__ import annotations

import math

import pytest
import torch

import hrm_kernels as ops
from hrm_kernels import reference


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_rms_norm_is_its_formula():
    x, w = rand(3, 5, 8), rand(8, seed=1)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 8 + 1e-5).sqrt() * w
    assert torch.allclose(ops.rms_norm(x, w, 1e-5), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(ops.rms_norm, (x, w))


def test_rms_norm_in_bfloat16_rounds_once():
    """float32 inside, float32 weight, one rounding at the end."""
    x, w = rand(4, 64).detach(), rand(64, seed=1).detach()
    out = ops.rms_norm(x.bfloat16(), w.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, reference.rms_norm(x.bfloat16().float(), w.float()).bfloat16())


def test_add_rms_norm_keeps_a_float32_residual_under_a_bfloat16_branch():
    x, branch, w = rand(2, 3, 8).detach().float(), rand(2, 3, 8, seed=1).detach().bfloat16(), torch.ones(8)
    total, normed = ops.add_rms_norm(x, branch, w)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, x + branch.float())
    assert torch.equal(normed, ops.rms_norm(total, w))


def test_swiglu_puts_the_activation_on_up():
    x, gate, up, b_gate, b_up = (
        rand(4, 6),
        rand(10, 6, seed=1),
        rand(10, 6, seed=2),
        rand(10, seed=3),
        rand(10, seed=4),
    )
    u = x @ up.T + b_up
    expected = u * torch.sigmoid(u) * (x @ gate.T + b_gate)
    assert torch.allclose(ops.swiglu(x, gate, up, b_gate, b_up), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(ops.swiglu, (x, gate, up, b_gate, b_up))


def test_rope_turns_each_adjacent_pair_by_its_angle():
    x = rand(1, 4, 2, 6)
    out = ops.rope(x, ops.rope_table(torch.tensor([0, 1, 5, 300]), 6))
    for t, position in enumerate([0, 1, 5, 300]):
        for i in range(3):
            angle = position * 1e4 ** (-2 * i / 6)
            a, b = x[0, t, :, 2 * i], x[0, t, :, 2 * i + 1]
            assert torch.allclose(out[0, t, :, 2 * i], a * math.cos(angle) - b * math.sin(angle), atol=1e-5)
            assert torch.allclose(out[0, t, :, 2 * i + 1], a * math.sin(angle) + b * math.cos(angle), atol=1e-5)


def test_rope_takes_positions_per_row_too():
    x = rand(2, 3, 2, 4).detach()
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    both = ops.rope(x, ops.rope_table(positions, 4))
    for row in range(2):
        assert torch.equal(both[row : row + 1], ops.rope(x[row : row + 1], ops.rope_table(positions[row], 4)))


def test_an_odd_head_size_cannot_be_rotated():
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        ops.rope_table(torch.arange(3), 7)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_is_causal_grouped_softmax(n_kv_head):
    batch, n_tokens, n_head, dim = 2, 7, 4, 6
    qkv = rand(batch, n_tokens, (n_head + 2 * n_kv_head) * dim)
    out = ops.attention(qkv, n_head, n_kv_head).unflatten(-1, (n_head, dim))
    heads = qkv.unflatten(-1, (-1, dim))
    for h in range(n_head):
        q, k, v = heads[:, :, h], *(heads[:, :, n_head + s + h * n_kv_head // n_head] for s in (0, n_kv_head))
        for t in range(n_tokens):
            weights = (q[:, t : t + 1] @ k[:, : t + 1].mT / dim**0.5).softmax(-1)
            assert torch.allclose(out[:, t, h], (weights @ v[:, : t + 1])[:, 0], atol=1e-10)


CACHED = {
    "a token of each of neighbouring rows": [(1, 4, 5), (2, 4, 5), (3, 4, 5)],
    "the same, rows of different lengths": [(0, 2, 3), (1, 6, 7), (2, 0, 1), (3, 4, 5)],
    "a token of rows that are no neighbours": [(0, 3, 4), (3, 5, 6)],
    "in another order": [(3, 5, 6), (2, 5, 6), (0, 1, 2)],
    "one token of one row": [(2, 6, 7)],
    "a first token": [(1, 0, 1)],
    "whole rows": [(0, 0, 7), (1, 0, 3), (3, 0, 1)],
    "the rest of rows": [(1, 3, 7), (0, 1, 3), (2, 6, 7)],
    "all together": [(3, 0, 5), (2, 2, 6), (0, 4, 5)],
}
"""(row, begin, end) of the tokens, in a cache of 4 rows x 7 positions."""


@pytest.mark.parametrize("n_kv_head, head_dim", [(1, 6), (2, 7), (4, 2)])
@pytest.mark.parametrize("spans", CACHED.values(), ids=CACHED)
def test_cached_attention_is_causal_grouped_softmax_over_what_a_row_holds(spans, n_kv_head, head_dim):
    n_head, n_rows, n_positions = 4, 4, 7
    tokens = ops.Tokens.of([ops.Span(*span) for span in spans], n_positions, torch.device("cpu"))
    places = [(row, t) for row, begin, end in spans for t in range(begin, end)]
    qkv = rand(1, len(places), (n_head + 2 * n_kv_head) * head_dim).detach()
    kv = rand(n_rows, n_positions, 2, n_kv_head, head_dim, seed=1).detach()
    before = kv.clone()
    out = ops.cached_attention(qkv, kv, tokens, n_head, n_kv_head).unflatten(-1, (n_head, head_dim))
    for i, (row, t) in enumerate(places):
        q, new = qkv[0, i].unflatten(-1, (-1, head_dim)).tensor_split([n_head])
        before[row, t] = new.unflatten(0, (2, n_kv_head))
        for h in range(n_head):
            k, v = before[row, : t + 1, :, h * n_kv_head // n_head].unbind(1)
            weights = (k @ q[h] / head_dim**0.5).softmax(0)
            assert torch.allclose(out[0, i, h], weights @ v, atol=1e-10)
    assert torch.equal(kv, before), "written at the tokens' places, and nowhere else"


@pytest.mark.parametrize("spans", CACHED.values(), ids=CACHED)
def test_tokens_say_where_they_are(spans):
    tokens = ops.Tokens.of([ops.Span(*span) for span in spans], 7, torch.device("cpu"))
    places = [(row, t) for row, begin, end in spans for t in range(begin, end)]
    assert tokens.row.tolist() == [row for row, _ in places] and tokens.position.tolist() == [t for _, t in places]
    assert tokens.place.tolist() == [7 * row + t for row, t in places]
    assert [places[i] for i in tokens.last] == [(row, end - 1) for row, _, end in spans]
    assert tokens.longest == max(end for _, _, end in spans)


def test_cached_attention_token_by_token_is_attention_of_the_whole():
    """The two ways a row can come about, in bfloat16 too, whose results round alike where the sums are as long."""
    n_tokens, heads = 6, (4, 2)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        qkv = rand(2, n_tokens, (4 + 2 * 2) * 8).detach().to(dtype)
        expected = ops.attention(qkv, *heads)
        kv, found = torch.zeros(2, n_tokens, 2, 2, 8, dtype=dtype), []
        for t in range(n_tokens):
            tokens = ops.Tokens.of([ops.Span(0, t, t + 1), ops.Span(1, t, t + 1)], n_tokens, qkv.device)
            found.append(ops.cached_attention(qkv[:, t][None], kv, tokens, *heads)[0])
        found = torch.stack(found, 1)
        assert found.dtype == dtype
        assert (found.double() - expected.double()).norm() <= limit * expected.double().norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_head=3), "n_head 3 is not divisible by n_kv_head 2"),
        (dict(n_kv_head=1), r"kv has shape \(3, 5, 2, 2, 6\); with 1 key/value heads it must be \(3, 5, 2, 1, 6\)"),
        (dict(qkv=torch.zeros(1, 3, 48)), r"qkv has shape \(1, 3, 48\); .* it must be \(1, 2, 48\)"),
        (dict(qkv=torch.zeros(2, 1, 48)), r"qkv has shape \(2, 1, 48\)"),
        (dict(kv=torch.zeros(3, 5, 2, 12)), r"kv has shape \(3, 5, 2, 12\); it must be \[R, P, 2, K, D\]"),
        (dict(kv=torch.zeros(3, 5, 3, 2, 6)), r"kv has shape \(3, 5, 3, 2, 6\)"),
        (dict(qkv=torch.zeros(1, 2, 48).bfloat16()), "qkv is torch.bfloat16 and the cache torch.float32; .* autocast"),
        (dict(kv=torch.zeros(3, 5, 2, 6, 2).mT), "kv is not dense"),
        (dict(kv=torch.zeros(3, 6, 2, 2, 6)), "tokens are of a cache of 5 positions, kv has 6"),
        (dict(spans=[(3, 0, 2)]), "lie outside a cache of 3 rows x 5 positions"),
        (dict(spans=[(0, 4, 6)]), "lie outside a cache of 3 rows x 5 positions"),
        (dict(spans=[(-1, 0, 2)]), "lie outside a cache; rows and positions begin at 0"),
        (dict(spans=[(0, -1, 1)]), "lie outside a cache; rows and positions begin at 0"),
        (dict(spans=[(0, 1, 2), (0, 2, 3)]), "row 0 comes twice"),
        (dict(spans=[(0, 1, 3), (1, 2, 2)]), "empty"),
        (dict(spans=[], qkv=torch.zeros(1, 0, 48)), "no tokens"),
    ],
)
def test_cached_attention_names_what_does_not_fit(changes, message):
    given = dict(qkv=torch.zeros(1, 2, 48), kv=torch.zeros(3, 5, 2, 2, 6), spans=[(1, 2, 4)], n_head=4, n_kv_head=2)
    given |= changes
    spans = [ops.Span(*span) for span in given.pop("spans")]
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(tokens=ops.Tokens.of(spans, 5, torch.device("cpu")), **given)


def test_qkv_rope_packs_queries_keys_values_and_rotates_the_first_two():
    x, w_q, w_k, w_v = rand(2, 3, 8), rand(8, 8, seed=1), rand(4, 8, seed=2), rand(4, 8, seed=3)
    biases = rand(8, seed=4), rand(4, seed=5), rand(4, seed=6)
    table = ops.rope_table(torch.arange(3), 4).double()
    packed = ops.qkv_rope(x, w_q, w_k, w_v, biases, table)
    q = ops.rope((x @ w_q.T + biases[0]).unflatten(-1, (2, 4)), table).flatten(-2)
    k = ops.rope((x @ w_k.T + biases[1]).unflatten(-1, (1, 4)), table).flatten(-2)
    assert torch.allclose(packed, torch.cat([q, k, x @ w_v.T + biases[2]], -1), rtol=1e-12)
    plain = ops.qkv_rope(x, w_q, w_k, w_v)
    assert torch.allclose(plain, torch.cat([x @ w.T for w in (w_q, w_k, w_v)], -1), rtol=1e-12)


def test_halting_pools_over_real_tokens_only_and_decides_strictly():
    z, w = rand(3, 5, 8).detach(), rand(2, 8, seed=1).detach()
    b = torch.zeros(2, dtype=torch.float64)
    q, halt = ops.halting(z, w, b, 0.25, torch.tensor([5, 2, 1]))
    for row, n in enumerate([5, 2, 1]):
        expected = z[row, :n].mean(0) @ w.T
        assert torch.allclose(q[row], expected, rtol=1e-12)
        assert halt[row] == (expected[0] + 0.25 > expected[1])


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n_rows", [1, 5, 600])
def test_linear_cross_entropy_is_cross_entropy_of_the_product(n_rows, reduction, z_loss):
    """600 rows are more than two chunks, the last of them ragged."""
    x, w = rand(n_rows, 6), rand(11, 6, seed=1)
    targets = torch.randint(-1, 11, (n_rows,), generator=torch.Generator().manual_seed(2))
    targets[0] = 3
    logits = x @ w.T
    keep = targets != -1
    rows = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    rows = rows + z_loss * logits.logsumexp(-1) ** 2 * keep
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / keep.sum()}[reduction]
    found = ops.linear_cross_entropy(x, w, targets, -1, reduction, z_loss)
    assert torch.allclose(found, expected, rtol=1e-10)
    weight = rand(*expected.shape, seed=3).detach()
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (x, w)),
        torch.autograd.grad((expected * weight).sum(), (x, w)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_linear_cross_entropy_of_no_real_target_is_zero_with_zero_gradient():
    x, w = rand(4, 6), rand(11, 6, seed=1)
    loss = ops.linear_cross_entropy(x, w, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not w.grad.any()


def test_linear_cross_entropy_survives_large_logits():
    x, w = torch.full((2, 4), 50.0), torch.randn(7, 4) * 50
    loss = ops.linear_cross_entropy(x, w, torch.tensor([0, 1]), reduction="none")
    expected = torch.nn.functional.cross_entropy((x.double() @ w.double().T), torch.tensor([0, 1]), reduction="none")
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_linear_cross_entropy_under_autocast_computes_the_product_in_bfloat16():
    x, w, y = rand(40, 16).detach().float(), rand(30, 16, seed=1).detach().float(), torch.arange(40) % 30
    x.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, w, y)
    loss.backward()
    assert loss.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    low = ops.linear_cross_entropy(x.detach().bfloat16(), w.detach().bfloat16(), y)
    assert torch.equal(loss.detach(), low)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)),
            r"x \(2, 3\), w \(5, 4\)",
        ),
        ((torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64)), r"targets \(3,\)"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), -1, "max"),
            "reduction 'max'",
        ),
    ],
)
def test_linear_cross_entropy_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(*arguments)


# -- backend -----------------------------------------------------------------------------------------------------------


def test_use_backend_holds_for_its_block_and_a_plain_call_for_good():
    before = ops.current_backend()
    with ops.use_backend("reference"):
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == before
    ops.use_backend("reference")
    assert ops.current_backend() == "reference"
    ops.use_backend(before)


def test_every_op_of_the_seam_has_a_reference():
    from hrm_kernels.backend import OPS

    for op in OPS:
        assert callable(getattr(reference, op)) and callable(getattr(ops, op))
    assert set(ops.describe(torch.device("cpu")).values()) == {"reference"}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignored", [(), (0, 3, 4), range(6)])
def test_rows_without_a_target_change_nothing_whatever_they_hold(reduction, ignored):
    """Loss and gradients are those of the other rows alone, even where a row without a target is nan."""
    torch.manual_seed(0)
    x, w, targets = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
    keep = torch.tensor([i not in ignored for i in range(6)])
    spoiled = x.masked_fill(~keep[:, None], torch.nan).requires_grad_()
    masked = targets.masked_fill(~keep, -1)
    w1, w2, alone = w.clone().requires_grad_(), w.clone().requires_grad_(), x[keep].requires_grad_()
    loss = ops.linear_cross_entropy(spoiled, w1, masked, -1, reduction)
    logits = alone @ w2.T
    expected = torch.nn.functional.cross_entropy(logits, targets[keep], reduction=reduction if keep.any() else "sum")
    if reduction == "none":
        assert loss.shape == (6,) and not loss[~keep].any()
    torch.testing.assert_close(loss.sum(), expected.sum())
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(w1.grad, w2.grad)
    torch.testing.assert_close(spoiled.grad[keep], alone.grad)
    assert not spoiled.grad[~keep].any()
