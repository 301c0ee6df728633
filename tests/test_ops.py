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
