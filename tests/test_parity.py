"""The front door. The reference model against numbers that the published code produced; every Triton kernel against the
reference in float64; whole models with kernels against models without; and a training run with and without.

On a GPU the kernels run as they are, on a CPU through Triton's interpreter. Tolerances are in parity.py.
"""

from __future__ import annotations

import pytest
import torch
from golden_files import NAMES, Golden, assert_gradients_match, load, relative_error
from parity import DEVICE, TOLERANCE, compare, model_tiles, ones_of_stride_0, random, random_gradient, run, small_tiles

import hrm_kernels as ops
from bench.published import PublishedHRM
from hrm_model import HRMConfig, HRMForCausalLM


@pytest.fixture(params=NAMES)
def golden(request) -> Golden:
    return load(request.param)


@torch.no_grad()
def test_logits_q_and_step_counts_are_the_published_ones(golden):
    out = golden.model()(golden.numbers["input_ids"])
    assert out.steps_taken.tolist() == golden.numbers["steps_taken"].tolist()
    assert relative_error(out.logits, golden.numbers["logits"]) <= 1e-5
    assert relative_error(out.q_logits, golden.numbers["q_logits"]) <= 1e-5


def test_training_loss_and_gradients_are_the_published_ones(golden):
    model, numbers = golden.training_model(), golden.numbers
    out = model(numbers["input_ids"], numbers["train.targets"], gradient="published", return_logits=True)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(numbers["train.loss"].item(), rel=1e-4)
    assert relative_error(out.logits, numbers["train.logits"]) <= 1e-5
    assert out.steps_taken.tolist() == numbers["train.steps_taken"].tolist()
    assert assert_gradients_match(model, numbers) >= 30


def test_replayed_gradient_is_the_published_one_where_every_row_runs_all_steps(golden):
    model, numbers = golden.training_model(), golden.numbers
    out = model(numbers["input_ids"], numbers["train.targets"])
    out.loss.backward()
    penalty = 0.01 * golden.config.hrm_max_steps
    assert out.loss.item() == pytest.approx(numbers["train.loss"].item() - penalty, rel=1e-4)
    assert assert_gradients_match(model, numbers) >= 30


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_row_result_does_not_depend_on_its_batch(golden, seed):
    """Each row alone against the row in a shuffled batch, padded to another length, beside rows of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    model, ids = golden.model(), golden.numbers["input_ids"]
    n_rows, n_tokens = ids.shape
    lengths = torch.randint(1, n_tokens + 1, (n_rows,), generator=generator)
    order = torch.randperm(n_rows, generator=generator)
    padded = torch.randint(0, golden.config.vocab_size, (n_rows, n_tokens + 5), generator=generator)
    for slot, row in enumerate(order):
        padded[slot, : lengths[row]] = ids[row, : lengths[row]]
    together = model(padded, lengths=lengths[order])
    for slot, row in enumerate(order):
        n = int(lengths[row])
        alone = model(ids[row : row + 1, :n])
        assert together.executed_steps[slot] == alone.executed_steps[0]
        assert relative_error(together.logits[slot, :n], alone.logits[0]) <= 1e-5
        assert relative_error(together.q_logits[slot], alone.q_logits[0]) <= 1e-5


@torch.no_grad()
def test_baseline_alone_gives_the_published_numbers(golden):
    model = PublishedHRM(golden.model())
    for row in range(len(golden.numbers["input_ids"])):
        out = model(golden.numbers["input_ids"][row : row + 1])
        assert out.steps_taken.item() == golden.numbers["steps_taken"][row]
        assert relative_error(out.logits[0], golden.numbers["logits"][row]) <= 1e-5
        assert relative_error(out.q_logits[0], golden.numbers["q_logits"][row]) <= 1e-5


def test_baseline_trains_with_the_published_gradients(golden):
    model, numbers = golden.training_model(), golden.numbers
    out = PublishedHRM(model)(numbers["input_ids"], numbers["train.targets"])
    out.loss.backward()
    assert out.loss.item() == pytest.approx(numbers["train.loss"].item(), rel=1e-4)
    assert assert_gradients_match(model, numbers) >= 30


@torch.no_grad()
def test_baseline_shows_the_fault_that_is_repaired_here():
    """In the published code rows that have halted go on being updated until the slowest has; here they are frozen."""
    golden = load("tiny_gqa")
    expected, ids = golden.numbers["logits"], golden.numbers["input_ids"]
    published = PublishedHRM(golden.model())(ids)
    assert (published.logits - expected).abs().max() > 0.1
    assert (golden.model()(ids).logits - expected).abs().max() < 1e-4


# -- kernels, op by op: on a GPU as they are, on a CPU through Triton's interpreter ------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
pytestmark = pytest.mark.usefixtures("nan_filled")


@DTYPES
@pytest.mark.parametrize("shape", [(3, 129, 448), (63, 123), (1, 1, 448), (5, 2000), (0, 448), (700, 8)])
def test_rms_norm(shape, dtype):
    inputs = {"x": random(*shape, seed=1), "w": random(shape[-1], seed=2)}
    compare(ops.rms_norm, inputs, dtype, float32=("w",))


@DTYPES
@pytest.mark.parametrize("keep_sum", [True, False])
@pytest.mark.parametrize("shape", [(2, 63, 448), (129, 123), (1, 448), (0, 123)])
def test_add_rms_norm(shape, keep_sum, dtype):
    inputs = {"x": random(*shape, seed=1), "branch": random(*shape, seed=2), "w": random(shape[-1], seed=3)}
    compare(lambda x, branch, w: ops.add_rms_norm(x, branch, w, 1e-5, keep_sum), inputs, dtype, float32=("w",))


def test_add_rms_norm_of_a_float32_residual_and_a_bfloat16_branch():
    x, branch, w = (random(*s, seed=i) for i, s in enumerate([(5, 448), (5, 448), (448,)]))
    inputs = {"x": x, "branch": branch, "w": w}
    compare(ops.add_rms_norm, inputs, torch.bfloat16, float32=("x", "w"))
    total, norm = ops.add_rms_norm(x.float(), branch.bfloat16(), w.float())
    assert total.dtype == norm.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_rms_norm_of_large_and_tiny_numbers(scale):
    compare(ops.rms_norm, {"x": random(9, 448, seed=1, scale=scale), "w": random(448, seed=2)}, torch.float32)


def test_rms_norm_does_not_depend_on_the_sign_or_the_row_beside():
    x, w = random(8, 448, seed=1).float(), random(448, seed=2).float()
    with ops.use_backend("triton"):
        together = ops.rms_norm(x, w)
        assert torch.equal(ops.rms_norm(-x, w), -together)
        assert all(torch.equal(ops.rms_norm(x[i : i + 1], w)[0], together[i]) for i in range(8))


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, k, f", [(1, 448, 96), (63, 123, 70), (129, 48, 33), (0, 32, 16)])
def test_swiglu(m, k, f, bias, dtype):
    inputs = {"x": random(m, k, seed=1), "w_gate": random(f, k, seed=2, scale=k**-0.5)}
    inputs["w_up"] = random(f, k, seed=3, scale=k**-0.5)
    if bias:
        inputs |= {"b_gate": random(f, seed=4), "b_up": random(f, seed=5)}
    with small_tiles():
        compare(ops.swiglu, inputs, dtype)


def test_swiglu_with_the_tiles_in_use():
    inputs = {"x": random(3, 65, 100, seed=1), "w_gate": random(130, 100, seed=2), "w_up": random(130, 100, seed=3)}
    compare(ops.swiglu, inputs, torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 123), (1, 1792), (0, 8), (2049,)])
def test_swiglu_mul(shape, dtype):
    compare(ops.swiglu_mul, {"gate": random(*shape, seed=1), "up": random(*shape, seed=2, scale=3)}, dtype)


def projection(width: int, n_head: int, n_kv_head: int, d: int, bias: bool) -> dict[str, torch.Tensor]:
    sizes = {"q": n_head * d, "k": n_kv_head * d, "v": n_kv_head * d}
    inputs = {f"w_{n}": random(size, width, seed=i, scale=width**-0.5) for i, (n, size) in enumerate(sizes.items())}
    if bias:
        inputs |= {f"b_{n}": random(size, seed=9 + i) for i, (n, size) in enumerate(sizes.items())}
    return inputs


def rotary_of(positions: torch.Tensor, d: int, like: torch.Tensor) -> torch.Tensor:
    table = ops.rope_table(positions.to(DEVICE), d)
    return table.double() if like.dtype == torch.float64 else table


@DTYPES
@pytest.mark.parametrize(
    "rows, tokens, width, heads, d, bias",
    [
        (2, 63, 123, (4, 2), 14, True),
        (1, 1, 448, (2, 1), 56, False),
        (3, 17, 64, (2, 2), 64, False),
        (0, 4, 32, (2, 1), 8, False),
    ],
)
def test_qkv_rope(rows, tokens, width, heads, d, bias, dtype):
    def call(x, w_q, w_k, w_v, b_q=None, b_k=None, b_v=None):
        biases = None if b_q is None else (b_q, b_k, b_v)
        return ops.qkv_rope(x, w_q, w_k, w_v, biases, rotary_of(torch.arange(tokens), d, x))

    with small_tiles():
        compare(call, {"x": random(rows, tokens, width, seed=1), **projection(width, *heads, d, bias)}, dtype)


def test_qkv_rope_takes_positions_per_row_and_none():
    inputs = {"x": random(3, 5, 32, seed=1), **projection(32, 2, 1, 8, False)}
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [2, 2, 2, 2, 900]])
    with small_tiles():
        compare(lambda **t: ops.qkv_rope(**t, rotary=rotary_of(positions, 8, t["x"])), inputs, torch.float32)
        compare(lambda **t: ops.qkv_rope(**t, rotary=None), inputs, torch.float32)


@DTYPES
@pytest.mark.parametrize(
    "rows, tokens, n_head, n_kv_head, d",
    [
        (2, 1, 4, 2, 56),
        (2, 63, 4, 2, 56),
        (1, 129, 2, 1, 64),
        (1, 37, 3, 3, 8),
        (2, 40, 6, 1, 128),
        (1, 33, 2, 1, 2),
        (0, 5, 2, 1, 8),
    ],
)
def test_attention(rows, tokens, n_head, n_kv_head, d, dtype):
    inputs = {"qkv": random(rows, tokens, (n_head + 2 * n_kv_head) * d, seed=tokens)}
    with small_tiles():
        compare(lambda qkv: ops.attention(qkv, n_head, n_kv_head), inputs, dtype)


def test_attention_with_the_tiles_in_use_at_512_tokens():
    compare(lambda qkv: ops.attention(qkv, 2, 1), {"qkv": random(1, 512, 4 * 56, seed=1)}, torch.float32)


def test_attention_of_a_query_whose_scores_are_all_minus_infinity_is_nan_and_not_a_look_ahead():
    """As the softmax of the definition is. float16 projections overflow to infinity."""
    qkv = random(1, 20, 4 * 8, seed=1).half()
    qkv[0, 0, :8], qkv[0, 0, 16:24] = float("inf"), -1.0  # query 0 of head 0 sees key 0 alone, at -inf
    with small_tiles(), ops.use_backend("triton"):
        out = ops.attention(qkv, 2, 1)
    assert out[0, 0, :8].isnan().all() and out[0, 1:].isfinite().all() and out[0, 0, 8:].isfinite().all()


def test_attention_with_scores_so_large_that_one_key_takes_all():
    with small_tiles():
        compare(lambda qkv: ops.attention(qkv, 2, 1), {"qkv": random(1, 40, 32, seed=1, scale=30)}, torch.float32)


@DTYPES
def test_attention_of_padded_rows_is_that_of_the_rows_alone(dtype):
    """Real positions as without padding, whatever the padding holds; their gradients too; padding gets a zero."""
    lengths, n_tokens, sizes = [1, 33, 64, 70], 70, (4, 2)
    qkv = random(4, n_tokens, 8 * 14, seed=1).to(dtype)
    gradient = random(4, n_tokens, 4 * 14, seed=2).to(dtype)
    padded = qkv.clone()
    for row, n in enumerate(lengths):
        padded[row, n:] = 1e4
    padded.requires_grad_()
    with small_tiles(), ops.use_backend("triton"):
        together = ops.attention(padded, *sizes, lengths=torch.tensor(lengths, device=DEVICE))
        together.backward(gradient)
        for row, n in enumerate(lengths):
            alone = qkv[row : row + 1, :n].clone().requires_grad_()
            out = ops.attention(alone, *sizes)
            out.backward(gradient[row : row + 1, :n])
            assert relative_error(together[row, :n], out[0]) <= TOLERANCE[dtype][0]
            assert relative_error(padded.grad[row, :n], alone.grad[0]) <= TOLERANCE[dtype][1]
            assert together[row, n:].eq(0).all() and padded.grad[row, n:].eq(0).all()


def rope_gqa_attention_of(tokens: int, d: int, lengths: list[int] | None = None):
    """(call, inputs) with two query heads on one key head and biases; padding is masked out of the result."""
    real = torch.arange(tokens, device=DEVICE) < torch.tensor(lengths or [tokens] * 2, device=DEVICE)[:, None]

    def call(x, w_q, w_k, w_v, b_q=None, b_k=None, b_v=None):
        biases = None if b_q is None else (b_q, b_k, b_v)
        rotary = rotary_of(torch.arange(tokens), d, x)
        n = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        return ops.rope_gqa_attention(x, w_q, w_k, w_v, biases, rotary, 2, 1, n) * real[..., None]

    return call


@DTYPES
@pytest.mark.parametrize("lengths", [None, [20, 37]])
@pytest.mark.parametrize("bias", [False, True])
def test_rope_gqa_attention(lengths, bias, dtype):
    """One op with one backward pass: what qkv_rope and attention are one after the other."""
    call = rope_gqa_attention_of(37, 56, lengths)
    # Sums over all positions whose terms cancel: in bfloat16 they are mostly noise, and judged in the next test.
    noisy = ("d b_q", "d b_k") if dtype == torch.bfloat16 else ()
    with small_tiles():
        compare(call, {"x": random(2, 37, 48, seed=1), **projection(48, 2, 1, 56, bias)}, dtype, but_not=noisy)


def test_bfloat16_errors_of_attention_are_on_average_no_larger_than_the_reference_has():
    """Over six draws, for every gradient; those of the biases are sums that nearly cancel."""
    call, total = rope_gqa_attention_of(37, 56), {"reference": {}, "triton": {}}
    for seed in range(6):
        inputs = {"x": random(2, 37, 48, seed=seed), **projection(48, 2, 1, 56, True)}
        inputs = {name: t.bfloat16() for name, t in inputs.items()}
        with small_tiles():
            truth = run("reference", call, {name: t.double() for name, t in inputs.items()}, random_gradient)
            for mode, errors in total.items():
                for name, t in run(mode, call, inputs, random_gradient).items():
                    errors[name] = errors.get(name, 0.0) + relative_error(t, truth[name])
    for name, error in total["triton"].items():
        assert error <= 1.2 * total["reference"][name], name


@pytest.mark.parametrize("fused", [True, False])
def test_attention_dropout_keeps_what_it_says_and_has_the_gradient_of_what_it_kept(fused):
    """With values that are unit vectors the output is the matrix of weights, so the mask can be read off it."""
    n_tokens, d, p = 32, 32, 0.3
    qkv = random(3, n_tokens, 3 * d, seed=1).float()
    qkv[..., 2 * d :] = torch.eye(n_tokens, device=DEVICE)
    with small_tiles(), ops.use_backend("triton", attention="triton" if fused else "sdpa"):
        torch.manual_seed(3)
        found = qkv.clone().requires_grad_()
        weights = ops.attention(found, 1, 1, None, p)
        torch.manual_seed(3)
        assert torch.equal(ops.attention(qkv, 1, 1, None, p), weights), "the same draw from the same generator"
        assert not torch.equal(ops.attention(qkv, 1, 1, None, p), weights), "another draw from the next"
    below = torch.ones(n_tokens, n_tokens, device=DEVICE).tril().bool()
    kept = (weights != 0) & below
    share = kept.sum().item() / (3 * below.sum().item())
    assert abs(share - (1 - p)) < 0.05, "1584 weights: three standard deviations are 0.035"
    expected = qkv.double().requires_grad_()
    q, k, v = expected.split(d, dim=-1)
    scores = (q @ k.mT / d**0.5).masked_fill(~below, float("-inf"))
    truth = (scores.softmax(-1) * kept / (1 - p)) @ v
    assert relative_error(weights, truth) <= 1e-5
    gradient = random(*truth.shape, seed=5)
    weights.backward(gradient.float())
    truth.backward(gradient)
    assert relative_error(found.grad, expected.grad) <= 1e-5


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_linear_cross_entropy(reduction, z_loss, dtype):
    targets = torch.randint(0, 211, (37,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[[0, 5, 36]] = -1

    def call(x, w):
        return ops.linear_cross_entropy(x, w, targets, -1, reduction, z_loss)

    with small_tiles():
        compare(call, {"x": random(37, 24, seed=1), "w": random(211, 24, seed=2, scale=0.3)}, dtype)


@pytest.mark.parametrize("case", ["all ignored", "one row", "no rows", "large logits", "many chunks"])
def test_linear_cross_entropy_at_the_edges(case, monkeypatch):
    from hrm_kernels.kernels import linear_cross_entropy as kernel

    rows = {"one row": 1, "no rows": 0}.get(case, 10)
    targets = torch.full((rows,), -100) if case == "all ignored" else torch.arange(rows)
    if case == "many chunks":
        monkeypatch.setattr(kernel, "CHUNK_BYTES", 3 * 300 * 4)  # three rows at a time
    inputs = {"x": random(rows, 16, seed=1, scale=50 if case == "large logits" else 1), "w": random(300, 16, seed=2)}
    with small_tiles():
        compare(lambda x, w: ops.linear_cross_entropy(x, w, targets.to(DEVICE), -100), inputs, torch.float32)


def test_linear_cross_entropy_of_a_target_that_is_no_column_is_nan_and_so_is_its_gradient():
    targets = torch.tensor([5, 300, 2], device=DEVICE)
    with small_tiles(), ops.use_backend("triton"):
        x, w = random(3, 16, seed=1).float().requires_grad_(), random(300, 16, seed=2).float()
        losses = ops.linear_cross_entropy(x, w, targets, reduction="none")
        losses.sum().backward()
        assert losses.isnan().tolist() == x.grad.isnan().any(-1).tolist() == [False, True, False]
        x.grad = None
        ops.linear_cross_entropy(x, w, targets).backward()
        assert x.grad.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("rows", [1, 32768 if DEVICE.type == "cuda" else 4096])
def test_linear_cross_entropy_in_float16_neither_underflows_nor_overflows(rows, mode):
    """Gradients of a mean over many rows are below what float16 can hold, so a loss scale of 65,536 must reach them in
    time; and the scale itself is above what float16 can hold."""
    targets = torch.randint(0, 64, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = {"x": random(rows, 16, seed=1, scale=0.3).half(), "w": random(64, 16, seed=2, scale=0.3).half()}

    def gradients(mode, dtype):
        given = {k: t.to(dtype).detach().clone().requires_grad_() for k, t in inputs.items()}
        with model_tiles(), ops.use_backend(mode):
            (ops.linear_cross_entropy(**given, targets=targets) * 65536.0).backward()
        return [t.grad for t in given.values()]

    for found, truth in zip(gradients(mode, torch.float16), gradients("reference", torch.float64), strict=True):
        assert relative_error(found, truth) <= TOLERANCE[torch.float16][1]


@DTYPES
@pytest.mark.parametrize("lengths", [None, [1, 63, 17]])
@pytest.mark.parametrize("tokens, width", [(63, 448), (1, 123)])
def test_halting(tokens, width, lengths, dtype):
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE).clamp(max=tokens)

    def call(z_H, w, b):
        return ops.halting(z_H, w, b, 0.35, lengths)

    inputs = {"z_H": random(3, tokens, width, seed=1), "w": random(2, width, seed=2), "b": random(2, seed=3)}
    compare(call, inputs, dtype, float32=("w", "b"))


@torch.no_grad()
def test_halting_keeps_the_books_of_rows_that_stop_at_different_steps():
    """Against a loop over rows in plain Python: counts, marks, scores, and the list of rows that go on."""
    from hrm_kernels.kernels.halting import Books, keep_books

    n_rows, n_tokens, width, bias = 37, 5, 16, 0.1
    generator = torch.Generator().manual_seed(0)
    limit = torch.randint(0, 7, (n_rows,), generator=generator)
    may_halt = torch.rand(n_rows, generator=generator) < 0.7
    lengths = torch.randint(1, n_tokens + 1, (n_rows,), generator=generator)
    w, b = random(2, width, seed=1).float(), random(2, seed=2).float()
    sizes = Books.sizes(random(n_rows, n_tokens, width, seed=0).float())
    books = Books(**{name: torch.empty(shape, dtype=dtype, device=DEVICE) for name, (shape, dtype) in sizes.items()})
    books.open(limit.tolist(), may_halt.tolist())
    active = [row for row in range(n_rows) if limit[row] > 0]
    executed, halted, q = [0] * n_rows, [False] * n_rows, dict.fromkeys(range(n_rows), torch.zeros(2, device=DEVICE))
    sizes = []
    for step in range(8):
        z_H = random(n_rows, n_tokens, width, seed=100 + step).float()
        keep_books(z_H, w, b, bias, lengths.to(DEVICE), books)
        with ops.use_backend("reference"):
            scores, decisions = ops.halting(z_H, w, b, bias, lengths.to(DEVICE))
        for row in active:
            executed[row] += 1
            q[row] = scores[row]
            halted[row] = bool(decisions[row]) and bool(may_halt[row])
        active = [row for row in active if not halted[row] and executed[row] < limit[row]]
        sizes.append(len(active))
        assert books.n_active.item() == len(active) and books.active[: len(active)].tolist() == active
    assert sizes[0] > sizes[2] > 0 == sizes[-1], "rows must have stopped at different steps"
    assert books.executed.tolist() == executed and books.halted.bool().tolist() == halted
    assert relative_error(books.q, torch.stack([q[row] for row in range(n_rows)])) <= 1e-5


# -- how inputs may come -----------------------------------------------------------------------------------------------


def calls_of_every_op() -> dict[str, tuple]:
    """Op name -> (call, inputs) at sizes that no tile divides."""
    tokens, d, targets = 5, 8, torch.tensor([3, -1, 50, 7, 8, 9, 10, 11, 12, 13], device=DEVICE)
    x = random(2, tokens, 24, seed=1)
    qkv = projection(24, 2, 1, d, False)

    def rope(**t):
        return ops.qkv_rope(**t, rotary=rotary_of(torch.arange(tokens), d, t["x"]))

    def rope_attention(**t):
        return ops.rope_gqa_attention(
            **t, biases=None, rotary=rotary_of(torch.arange(tokens), d, t["x"]), n_head=2, n_kv_head=1
        )

    return {
        "rms_norm": (ops.rms_norm, {"x": x, "w": random(24, seed=2)}),
        "add_rms_norm": (ops.add_rms_norm, {"x": x, "branch": random(2, tokens, 24, seed=3), "w": random(24, seed=2)}),
        "swiglu": (ops.swiglu, {"x": x, "w_gate": random(40, 24, seed=4), "w_up": random(40, 24, seed=5)}),
        "swiglu_mul": (ops.swiglu_mul, {"gate": x, "up": random(2, tokens, 24, seed=6)}),
        "qkv_rope": (rope, {"x": x, **qkv}),
        "attention": (lambda qkv: ops.attention(qkv, 2, 1), {"qkv": random(2, tokens, 32, seed=7)}),
        "rope_gqa_attention": (rope_attention, {"x": x, **qkv}),
        "linear_cross_entropy": (
            lambda x, w: ops.linear_cross_entropy(x, w, targets),
            {"x": random(10, 24, seed=8), "w": random(60, 24, seed=9)},
        ),
        "halting": (ops.halting, {"z_H": x, "w": random(2, 24, seed=10), "b": random(2, seed=11)}),
    }


OP_NAMES = pytest.mark.parametrize("op", list(calls_of_every_op()))


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, every axis in the middle of a larger one, the last two exchanged in memory."""
    if t.dim() < 2:
        return torch.stack((t, t), dim=-1)[..., 0]
    big = t.new_zeros([n + 2 for n in t.shape]).mT.contiguous().mT
    view = big[tuple(slice(1, -1) for _ in t.shape)]
    return view.copy_(t)


@OP_NAMES
def test_views_that_are_not_contiguous_give_the_same(op):
    call, inputs = calls_of_every_op()[op]
    with small_tiles():
        plain = run("triton", call, {k: t.float() for k, t in inputs.items()}, random_gradient)
        viewed = run("triton", call, {k: strided(t.float()) for k, t in inputs.items()}, random_gradient)
    for name in plain:
        assert torch.allclose(viewed[name], plain[name], rtol=1e-5, atol=1e-6), name


def test_biases_and_lengths_may_be_views_too():
    call = rope_gqa_attention_of(9, 8)
    inputs = {k: t.float() for k, t in {"x": random(2, 9, 16, seed=1), **projection(16, 2, 1, 8, True)}.items()}
    lengths = torch.tensor([9, 0, 4, 0], device=DEVICE)[::2]
    qkv, w, b = random(2, 9, 32, seed=2).float(), random(2, 16, seed=4).float(), random(2, seed=5).float()
    with small_tiles():
        plain = run("triton", call, inputs, random_gradient)
        viewed = run("triton", call, {k: strided(t) for k, t in inputs.items()}, random_gradient)
        assert all(torch.allclose(viewed[k], plain[k], rtol=1e-5, atol=1e-6) for k in plain)
        with ops.use_backend("triton"):
            assert torch.equal(ops.attention(qkv, 2, 1, lengths), ops.attention(qkv, 2, 1, lengths.clone()))
            expected, _ = ops.halting(inputs["x"], w, b, 0.0, lengths.clone())
            assert torch.equal(ops.halting(inputs["x"], w, strided(b), 0.0, lengths)[0], expected)


@OP_NAMES
def test_a_gradient_of_stride_0_is_like_any_other(op):
    call, inputs = calls_of_every_op()[op]
    with small_tiles():
        compare(call, inputs, torch.float32, gradient=ones_of_stride_0)


@OP_NAMES
def test_half_precision_other_than_bfloat16(op):
    call, inputs = calls_of_every_op()[op]
    with small_tiles():
        compare(call, inputs, torch.float16)


@OP_NAMES
def test_under_autocast_results_have_the_reference_dtypes_and_numbers(op):
    """float32 inputs and weights, products in bfloat16: as the reference under the same autocast."""
    call, inputs = calls_of_every_op()[op]
    given = {k: t.float() for k, t in inputs.items()}

    def under_autocast(**tensors):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return call(**tensors)

    with small_tiles():
        found = run("triton", under_autocast, given, random_gradient)
        expected = run("reference", under_autocast, given, random_gradient)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        if found[name].dtype != torch.bool:
            # each is within the tolerance of the truth, so they are within twice of each other
            assert relative_error(found[name], expected[name]) <= 2 * TOLERANCE[torch.bfloat16][name[:2] == "d "], name


@DTYPES
@OP_NAMES
def test_a_pass_without_gradient_computes_the_same_bits_as_one_with(op, dtype):
    """The loop runs without gradient and its last step again with: both must see the same states."""
    call, inputs = calls_of_every_op()[op]
    given = {k: t.to(dtype) for k, t in inputs.items()}
    with small_tiles(), ops.use_backend("triton"):
        with torch.no_grad():
            without = call(**given)
        with_gradient = call(**{k: t.clone().requires_grad_() for k, t in given.items()})
    without, with_gradient = (r if isinstance(r, tuple) else (r,) for r in (without, with_gradient))
    assert all(torch.equal(a, b) for a, b in zip(without, with_gradient, strict=True))


@OP_NAMES
def test_results_may_be_changed_in_place(op):
    """Nothing is handed out as a view of what autograd keeps."""
    call, inputs = calls_of_every_op()[op]
    with small_tiles(), ops.use_backend("triton"):
        result = call(**{k: t.float().requires_grad_() for k, t in inputs.items()})
        result = result[1] if op == "add_rms_norm" else result[0] if isinstance(result, tuple) else result
        result.mul_(2)


@OP_NAMES
def test_second_derivatives_are_refused_rather_than_wrong(op):
    call, inputs = calls_of_every_op()[op]
    given = {k: t.float().requires_grad_() for k, t in inputs.items()}
    with small_tiles(), ops.use_backend("triton"):
        result = call(**given)
        result = result[0] if isinstance(result, tuple) else result
        slopes = torch.autograd.grad(result.square().sum(), list(given.values()), create_graph=True, allow_unused=True)
        penalty = sum(s.square().sum() for s in slopes if s is not None)
        if op == "halting":  # its gradient is plain PyTorch, which has a second one
            penalty.backward()
        else:
            with pytest.raises(RuntimeError, match="differentiate twice"):
                penalty.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own forward mode
@OP_NAMES
def test_forward_mode_differentiation_is_refused_rather_than_ignored(op):
    from torch.autograd import forward_ad

    call, inputs = calls_of_every_op()[op]
    with small_tiles(), ops.use_backend("triton"), forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(t.float(), torch.ones_like(t).float()) for k, t in inputs.items()}
        with pytest.raises(RuntimeError, match=r"jvp|forward mode|forward AD"):
            call(**duals)


@OP_NAMES
def test_frozen_inputs_get_no_gradient_and_change_none_of_the_others(op):
    call, inputs = calls_of_every_op()[op]
    with small_tiles(), ops.use_backend("triton"):
        every = {k: t.float().requires_grad_() for k, t in inputs.items()}
        result = call(**every)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        for name in inputs:
            one = {k: t.float().requires_grad_(k == name) for k, t in inputs.items()}
            result = call(**one)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
            assert all(t.grad is None for k, t in one.items() if k != name)
            expected = every[name].grad
            assert one[name].grad is None or torch.equal(one[name].grad, expected), name


@OP_NAMES
def test_a_second_backward_through_the_same_graph_gives_the_same(op):
    """Nothing that is saved for the backward pass is overwritten by it."""
    call, inputs = calls_of_every_op()[op]
    given = {k: t.float().requires_grad_() for k, t in inputs.items()}
    with small_tiles(), ops.use_backend("triton"):
        result = call(**given)
        result = result[0] if isinstance(result, tuple) else result
        first = torch.autograd.grad(result.sum(), list(given.values()), retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(result.sum(), list(given.values()), allow_unused=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, again, strict=True))


# -- whole models ------------------------------------------------------------------------------------------------------

SOME = slice(None) if DEVICE.type == "cuda" else slice(0, 2)
"""Rows of the golden batches: on a CPU two, as the interpreter is slow; on a GPU all."""


def without_kernels(model, *args, **options):
    with ops.use_backend("reference"):
        return model(*args, **options)


def with_kernels(model, *args, **options):
    with model_tiles(), ops.use_backend("triton"):
        return model(*args, **options)


@torch.no_grad()
def test_model_with_kernels_gives_the_published_numbers(golden):
    """float32: as the published code, and so as the reference: step counts and logits."""
    model, ids = golden.model().to(DEVICE), golden.numbers["input_ids"][SOME].to(DEVICE)
    out = with_kernels(model, ids)
    margin = ops.halt_margin(out.q_logits, golden.config.halt_bias).abs()
    assert margin.min() > 1e-4, "no golden row is so near the threshold that its steps may differ"
    assert out.steps_taken.tolist() == golden.numbers["steps_taken"][SOME].tolist()
    assert relative_error(out.logits.cpu(), golden.numbers["logits"][SOME]) <= 1e-5
    assert relative_error(out.q_logits.cpu(), golden.numbers["q_logits"][SOME]) <= 1e-5


def gradients(forward, golden: Golden, dtype: torch.dtype, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Parameter name -> gradient of a training pass with rows of one and of two steps, float64."""
    ids, targets = golden.numbers["input_ids"][SOME].to(DEVICE), golden.numbers["train.targets"][SOME].to(DEVICE)
    model = golden.training_model().to(DEVICE, dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = forward(model, ids, targets, force_steps=[1 + row % 2 for row in range(len(ids))]).loss
    with model_tiles():
        loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def test_gradients_of_a_model_with_kernels(golden):
    """float32, every parameter. 1e-8: some gradients are mathematically zero (k_proj.bias without rotation)."""
    truth = gradients(without_kernels, golden, torch.float64)
    for name, found in gradients(with_kernels, golden, torch.float32).items():
        error = (found - truth[name]).norm().item()
        assert error <= 1e-4 * truth[name].norm().item() + 1e-8, f"{name}: off by {error}"


def test_gradients_of_a_model_with_kernels_under_autocast(golden):
    """Mixed precision as in training: all gradients together no further from float64 than 1.2 times the reference."""
    truth = gradients(without_kernels, golden, torch.float64)
    size = torch.cat([g.flatten() for g in truth.values()]).norm()

    def error(forward) -> torch.Tensor:
        found = gradients(forward, golden, torch.float32, autocast=True)
        return torch.cat([(found[name] - g).flatten() for name, g in truth.items()]).norm()

    own, ours = error(without_kernels), error(with_kernels)
    assert 0 < ours <= 1.2 * own < 0.1 * size


@torch.no_grad()
def test_model_in_bfloat16_with_kernels(golden):
    """Padded rows. Those far from the threshold run as many steps with kernels as without; at equal depth the error
    against float64 is at most 1.2 times the reference's own."""
    ids = golden.numbers["input_ids"][SOME].to(DEVICE)
    lengths = ids.shape[1] - 5 * (torch.arange(len(ids), device=DEVICE) % 3)
    real = torch.arange(ids.shape[1], device=DEVICE) < lengths[:, None]
    model = golden.model().to(DEVICE, torch.bfloat16)
    reference, fused = (f(model, ids, lengths=lengths) for f in (without_kernels, with_kernels))
    near = ops.halt_margin(reference.q_logits, golden.config.halt_bias).abs() <= 5e-2
    assert not near.all(), "some rows must be far from the threshold"
    assert torch.equal(fused.executed_steps[~near], reference.executed_steps[~near])

    depth = reference.executed_steps.tolist()
    if fused.executed_steps.tolist() != depth:
        fused = with_kernels(model, ids, lengths=lengths, force_steps=depth)
    exact = golden.model().to(DEVICE, torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = without_kernels(exact, ids, lengths=lengths, force_steps=depth).logits[real]
    own, ours = relative_error(reference.logits[real], truth), relative_error(fused.logits[real], truth)
    assert 0 < ours <= 1.2 * own, f"{ours:.2e} with kernels, {own:.2e} without"


def test_training_with_kernels_follows_the_same_curve():
    """Ten AdamW steps of a small model through the interpreter, a hundred on a GPU: losses within 1e-3 all along."""
    n_steps = 10 if DEVICE.type == "cpu" else 100
    shape = dict(vocab_size=97, n_embd=32, block_size=24, n_head=4, n_kv_head=2, n_input_layers=1, n_output_layers=1)
    shape |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=2, dropout=0.0)

    def curve(forward) -> list[float]:
        torch.manual_seed(0)
        model = HRMForCausalLM(HRMConfig(**shape)).to(DEVICE).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for step in range(n_steps):
            # sequences with a rule, so that there is something to learn: each token is the one before plus a constant
            start = torch.randint(0, 97, (2, 1), generator=generator)
            ids = ((start + 5 * torch.arange(25)) % 97).to(DEVICE)
            depth = [1 + (step + row) % 2 for row in range(2)]
            loss = forward(model, ids[:, :-1], ids[:, 1:], force_steps=depth).loss
            optimizer.zero_grad()
            with model_tiles():
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    without, fused = curve(without_kernels), curve(with_kernels)
    assert without[-1] < without[0] - 0.3, "the model must have learned something"
    assert without != fused, "bitwise equal curves would mean that the kernels did not run"
    assert max(abs(a - b) for a, b in zip(without, fused, strict=True)) <= 1e-3
