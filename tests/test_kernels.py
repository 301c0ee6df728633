"""How kernels are chosen, registered, compiled and refused. Their numbers are in test_parity.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import COMPILING, DEVICE, model_tiles, random, small_tiles
from test_parity import OP_NAMES, calls_of_every_op
from torch.utils._python_dispatch import TorchDispatchMode

import hrm_kernels as ops
from hrm_kernels import tuning
from hrm_kernels.backend import LIBRARIES
from hrm_model import HRMConfig, HRMForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def floats(inputs: dict[str, torch.Tensor], grad: bool = True) -> dict[str, torch.Tensor]:
    return {name: t.float().requires_grad_(grad) for name, t in inputs.items()}


def first(result):
    return result[0] if isinstance(result, tuple) else result


# -- torch.compile, opcheck, CUDA graphs -------------------------------------------------------------------------------


@OP_NAMES
def test_under_torch_compile_there_is_no_graph_break_and_the_same_comes_out(op):
    call, inputs = calls_of_every_op()[op]
    torch.compiler.reset()
    compiled = torch.compile(lambda **t: first(call(**t)), fullgraph=True, backend="aot_eager")
    with small_tiles(), ops.use_backend("triton"):
        plain, traced = floats(inputs), floats(inputs)
        expected, found = first(call(**plain)), compiled(**traced)
        assert torch.equal(found, expected)
        expected.sum().backward()
        found.sum().backward()
    for name in inputs:
        assert plain[name].grad is None or torch.equal(plain[name].grad, traced[name].grad), name


@pytest.mark.slow
def test_a_compiled_model_step_uses_the_kernels():
    """Inductor, dynamic batch size, as `--fused --compile` has it: blocks compiled, numbers as without."""
    from hrm_model.training.device import compile_blocks

    shape = dict(vocab_size=97, n_embd=16, block_size=8, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=0)
    shape |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=2, dropout=0.0)
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**shape)).to(DEVICE)
    ids = torch.arange(24, device=DEVICE).view(3, 8)
    gradients = {}
    for compiled in (False, True):
        if compiled:
            compile_blocks(model)
        with model_tiles(), ops.use_backend("triton"):
            model(ids, ids, force_steps=[1, 2, 2]).loss.backward()
        gradients[compiled] = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
    for name, g in gradients[False].items():
        assert torch.allclose(gradients[True][name], g, rtol=1e-4, atol=1e-7), name


class Noted(TorchDispatchMode):
    """Writes down the arguments of every op of this package that torch's dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hrm_kernels":
            self.calls[function] = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        return function(*args, **(kwargs or {}))


@OP_NAMES
def test_registered_ops_pass_opcheck(op, monkeypatch):
    """Schema (what is written is declared), fake implementation and tracing, on the arguments the ops really get."""
    call, inputs = calls_of_every_op()[op]
    with small_tiles(), ops.use_backend("triton"):
        with monkeypatch.context() as patch, Noted() as noted:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that calls go through the dispatcher
            first(call(**floats(inputs))).sum().backward()
        assert noted.calls
        for function, args in noted.calls.items():
            torch.library.opcheck(function, args)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@OP_NAMES
def test_every_op_can_be_captured_in_a_cuda_graph(op):
    call, inputs = calls_of_every_op()[op]
    given = floats(inputs, grad=False)
    with ops.use_backend("triton"), torch.no_grad():
        expected = first(call(**given)).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = first(call(**given))
        found.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_a_weight_is_cast_once_a_forward_pass_and_not_kept_beyond():
    from hrm_kernels.autocast import cast, shared_casts

    w = random(4, 4, seed=1).float().requires_grad_()
    with shared_casts():
        copy = cast(w, torch.bfloat16)
        assert cast(w, torch.bfloat16) is copy
        with torch.no_grad():
            assert not cast(w, torch.bfloat16).requires_grad, "a copy with history is not for a pass without"
        assert cast(w, torch.float32) is w
    with torch.no_grad():
        w += 1
    with shared_casts():
        assert torch.equal(cast(w, torch.bfloat16), w.bfloat16())
    assert cast(w, torch.bfloat16) is not cast(w, torch.bfloat16)


# -- which implementation runs -----------------------------------------------------------------------------------------


def test_single_ops_can_have_an_implementation_of_their_own():
    qkv = random(1, 5, 32, seed=1).float()
    with ops.use_backend("triton", attention="sdpa"):
        assert ops.describe(DEVICE)["attention"] == "sdpa" and ops.describe(DEVICE)["swiglu"] == "triton"
        assert ops.backend.chosen("attention", qkv, 2, 1, None, 0.0) == ("sdpa", LIBRARIES["attention"]["sdpa"])
        with ops.use_backend("reference"):
            assert set(ops.describe(DEVICE).values()) == {"reference"}, "the reference takes no exception over"
        with ops.use_backend("auto"):
            assert ops.describe(DEVICE)["attention"] == "sdpa", "an op not named keeps the one it has"
    assert ops.describe(torch.device("cpu"))["attention"] == "reference"


def test_attention_of_a_library_is_used_behind_the_fused_projection():
    call, inputs = calls_of_every_op()["rope_gqa_attention"]
    with small_tiles(), ops.use_backend("triton"):
        expected = call(**floats(inputs, grad=False))
        with ops.use_backend("triton", attention="sdpa"):
            found = call(**floats(inputs, grad=False))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and not torch.equal(found, expected)


@pytest.mark.parametrize(
    "mode, overrides, message",
    [
        ("fast", {}, "backend is 'fast'; it must be one of auto, reference, triton"),
        ("auto", {"attnetion": "sdpa"}, "names the op 'attnetion'; there are rms_norm"),
        ("auto", {"swiglu": "flash"}, "wants swiglu='flash'; it must be one of auto, reference, triton"),
    ],
)
def test_a_choice_that_does_not_exist_is_named(mode, overrides, message):
    before = ops.current_backend(), ops.describe(DEVICE)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.use_backend(mode, **overrides)
    assert (ops.current_backend(), ops.describe(DEVICE)) == before


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=COMPILING | environment, capture_output=True, text=True, cwd=ROOT
    )


def test_the_environment_chooses_too():
    code = "import torch, hrm_kernels as k; print(k.current_backend(), k.describe(torch.device('cpu'))['attention'])"
    assert run_python(code, HRM_KERNELS="auto,attention=sdpa").stdout.split() == ["auto", "sdpa"]
    wrong = run_python(code, HRM_KERNELS="auto,attention=fast")
    assert wrong.returncode and "HRM_KERNELS wants attention='fast'" in wrong.stderr


def test_auto_works_without_triton_and_triton_by_name_says_what_is_missing():
    """As on macOS and Windows: the package is hidden from import."""
    code = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else found(name, *a)\n"
        "import torch, hrm_kernels as k\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "k.rms_norm(x, torch.ones(4)).sum().backward()\n"
        "k.use_backend('triton')\n"
        "try: k.rms_norm(x, torch.ones(4))\n"
        "except k.BackendError as error: print(error)\n"
    )
    done = run_python(code)
    assert "rms_norm: the package triton is not installed (pip install 'triton>=3.6')" in done.stdout, done.stderr


def test_triton_by_name_on_a_cpu_says_why_not():
    code = "import torch, hrm_kernels as k; k.use_backend('triton'); k.rms_norm(torch.ones(2, 4), torch.ones(4))"
    done = run_python(code)
    expected = "rms_norm: the tensors are on cpu, Triton kernels need a CUDA device, or a CPU with TRITON_INTERPRET=1"
    assert expected in done.stderr and "use 'auto' or 'reference'" in done.stderr


def test_products_of_float32_are_as_exact_as_torch_was_told():
    code = "import torch; from hrm_kernels.kernels.launch import precision as p; b = torch.backends\n"
    code += "print(p(torch.float32)); b.cuda.matmul.fp32_precision = 'tf32'; print(p(torch.float32))\n"
    code += "b.cuda.matmul.fp32_precision = 'ieee'; print(p(torch.float32), p(torch.bfloat16))"
    assert run_python(code).stdout.split() == ["tf32x3", "tf32", "tf32x3", "tf32"]


def test_importing_the_package_does_not_import_triton():
    done = run_python("import sys, hrm_kernels, hrm_model; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# -- what a kernel does not cover, and what no implementation takes ----------------------------------------------------


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda r: ops.rms_norm(r(2, 8).double(), r(8)), "x is torch.float64"),
        (lambda r: ops.rms_norm(r(2, 20000), r(20000)), "x has 20000 channels; the kernel takes up to 16384"),
        (
            lambda r: ops.attention(r(1, 4, 4 * 136), 2, 1),
            "the head size is 136; the kernel takes even",
        ),
        (lambda r: ops.attention(r(1, 4, 4 * 7), 2, 1), "the head size is 7"),
        (lambda r: ops.swiglu(r(2, 8).bfloat16(), r(4, 8), r(4, 8)), "w_gate is torch.float32 and x is torch.bfloat16"),
        (lambda r: ops.swiglu_mul(r(2, 8).bfloat16(), r(2, 8)), "gate is torch.bfloat16 and up is torch.float32"),
        (lambda r: ops.halting(r(5000, 1, 4), r(2, 4), r(2)), "z_H has 5000 rows; the kernel takes up to 4096"),
    ],
)
def test_what_a_kernel_does_not_cover_is_said_when_it_was_asked_for(call, reason):
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match=re.escape(reason)):
        call(lambda *shape: random(*shape, seed=1).float())


def wrong_inputs() -> dict[str, tuple]:
    def r(*shape):
        return random(*shape, seed=1).float()

    rotary = ops.rope_table(torch.arange(4, device=DEVICE), 8)
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    return {
        "w has shape (7,); with 8 channels in x it must be (8,)": lambda: ops.rms_norm(r(2, 8), r(7)),
        "branch has shape (8,)": lambda: ops.add_rms_norm(r(2, 8), r(8), r(8)),
        "w_up has shape (5, 8)": lambda: ops.swiglu(r(2, 8), r(4, 8), r(5, 8)),
        "w_gate has shape (4, 7) and x (2, 8)": lambda: ops.swiglu(r(2, 8), r(4, 7), r(4, 8)),
        "b_gate, b_up: give all or none": lambda: ops.swiglu(r(2, 8), r(4, 8), r(4, 8), r(4)),
        "up has shape (2, 3)": lambda: ops.swiglu_mul(r(2, 4), r(2, 3)),
        "x has shape (4, 8); it must be [B, T, C]": lambda: ops.qkv_rope(r(4, 8), r(8, 8), r(8, 8), r(8, 8)),
        "rotary has shape (4, 4, 2)": lambda: ops.qkv_rope(r(1, 5, 8), r(8, 8), r(8, 8), r(8, 8), None, rotary),
        "w_q makes 12 channels": lambda: ops.qkv_rope(r(1, 4, 8), r(12, 8), r(8, 8), r(8, 8), None, rotary),
        "qkv has 30 channels": lambda: ops.attention(r(1, 4, 30), 2, 1),
        "n_head 3 is not divisible by n_kv_head 2": lambda: ops.attention(r(1, 4, 28), 3, 2),
        "lengths has shape (2,)": lambda: ops.attention(r(1, 4, 32), 2, 1, ids[:2]),
        "lengths is torch.float32": lambda: ops.attention(r(1, 4, 32), 2, 1, r(1)),
        "dropout_p is 1.5": lambda: ops.attention(r(1, 4, 32), 2, 1, None, 1.5),
        "rotary is for heads of 8": lambda: ops.rope_gqa_attention(
            r(1, 4, 8), r(32, 8), r(16, 8), r(16, 8), None, rotary, 2, 1
        ),
        "w_q makes 16 channels for 2 heads and w_k 16 for 1": lambda: ops.rope_gqa_attention(
            r(1, 4, 8), r(16, 8), r(16, 8), r(16, 8), None, None, 2, 1
        ),
        "targets (3,)": lambda: ops.linear_cross_entropy(r(2, 8), r(9, 8), ids),
        "reduction 'max'": lambda: ops.linear_cross_entropy(r(3, 8), r(9, 8), ids, reduction="max"),
        "targets is torch.float32": lambda: ops.linear_cross_entropy(r(3, 8), r(9, 8), r(3)),
        "w has shape (3, 8)": lambda: ops.halting(r(2, 4, 8), r(3, 8), r(2)),
        "w is on meta": lambda: ops.rms_norm(r(2, 8), torch.ones(8, device="meta")),
    }


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("message", list(wrong_inputs()))
def test_wrong_input_is_one_error_that_names_the_argument(message, mode):
    with ops.use_backend(mode), pytest.raises(ValueError, match=re.escape(message)):
        wrong_inputs()[message]()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_cross_entropy_needs_less_than_an_eighth_of_eager_memory():
    """Every allocation of forward and backward at 32,768 rows of the base model in bfloat16, counted on tensors without
    memory."""
    from torch.distributed._tools.mem_tracker import MemTracker

    from hrm_kernels.kernels.launch import record

    def peak(call) -> int:
        x, w = (torch.empty(n, 448, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (32768, 50304))
        targets, tracker = torch.empty(32768, dtype=torch.int64, device="meta"), MemTracker()
        with tracker:
            call(x, w, targets).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("meta")]["Total"]

    eager = peak(lambda x, w, targets: torch.nn.functional.cross_entropy((x @ w.T).float(), targets))
    with record(), ops.use_backend("triton"):
        ours = peak(ops.linear_cross_entropy)
    print(f"peak memory: {ours / 1e9:.2f} GB, eager {eager / 1e9:.1f} GB")
    assert eager > 15e9, "eager keeps the logits several times, 3.3 GB in bfloat16 and 6.6 GB in float32"
    assert 0.4e9 < ours < eager / 8


# -- tiles, and what the compiler makes of them ------------------------------------------------------------------------


def test_tiles_are_found_for_every_kernel_type_size_and_gpu():
    for op in {line.op for line in tuning._LINES}:
        for capability in tuning.SHARED_KB:
            with tuning.assume(capability):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    for rows in (0, 1, 64, 65, 10**6):
                        tile = tuning.tile(op, dtype, rows, DEVICE)
                        assert tile.num_warps in (1, 2, 4, 8) and all(n == 0 or n & (n - 1) == 0 for n in tile[:3])
    assert tuning.tile("swiglu", torch.bfloat16, 1, DEVICE).M == 16, "few rows get a small tile"


@pytest.fixture(scope="module")
def offline() -> list[dict]:
    """The base model's kernels in bfloat16, compiled for sm_90 in a process of its own."""
    command = [sys.executable, "-m", "hrm_kernels.offline", "--arch", "90", "--dtype", "bfloat16", "--json"]
    done = subprocess.run(command, env=COMPILING, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_kernel_spills_at_the_base_size_on_sm_90(offline):
    assert {line["kernel"]: line["spill_bytes"] for line in offline if line["spill_bytes"]} == {}


def test_every_product_is_made_by_matrix_instructions_on_sm_90(offline):
    products = {line["kernel"] for line in offline if line["has_dot"]}
    forward = {"swiglu.forward", "qkv_rope.project", "attention.forward", "linear.linear"}
    forward |= {"cached_attention.attend"}
    assert products == forward | {"attention.queries_backward", "attention.keys_backward"}
    for line in offline:
        if line["has_dot"]:  # tiles of 16 rows are for decoding; wgmma begins at 64
            few = line["tile"].startswith("16x")
            assert line["matrix_instruction"] == ("mma.sync" if few else "wgmma.mma_async"), line


def test_every_kernel_file_is_in_the_offline_table_and_loads_in_wide_pieces(offline):
    files = {p.stem for p in (ROOT / "hrm_kernels" / "kernels").glob("*.py")} - {"__init__", "launch", "parts"}
    assert {line["kernel"].partition(".")[0] for line in offline} == files
    assert all(line["wide_loads"] for line in offline), "16-byte loads in every kernel"


def test_offline_says_what_is_wrong_with_a_kernel():
    from hrm_kernels.offline import faults

    good = {"spill_bytes": 0, "shared_bytes": 10, "shared_limit": 20, "has_dot": True, "matrix_instruction": "wgmma"}
    assert faults(good) == []
    assert faults({**good, "spill_bytes": 8}) == ["spills 8 bytes"]
    assert faults({**good, "shared_bytes": 30}) == ["needs 30 bytes of shared memory, there are 20"]
    assert faults({**good, "matrix_instruction": ""}) == ["multiplies matrices without matrix instructions"]


def test_offline_refuses_to_compile_what_is_interpreted():
    command = [sys.executable, "-m", "hrm_kernels.offline"]
    done = subprocess.run(command, env=COMPILING | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr
