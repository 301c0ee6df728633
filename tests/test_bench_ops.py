"""The benchmark of the ops: it checks before it times, counts work right, and says so where it cannot time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hrm_kernels as ops
from bench.ops import main
from bench.ops_cases import CASES, Implementation, Sizes, block, draw, forward, largest_error, tensors
from hrm_kernels import reference
from hrm_kernels.offline import BASE

ROOT = Path(__file__).parents[1]
SMALL = {"width": 32, "n_head": 4, "n_kv_head": 2, "hidden": 64, "vocab": 97}
TINY = ["--batch", "1", "--tokens", "4", "--repeats", "1", "--dtype", "float32"]
ON_CPU = [*TINY, "--device", "cpu", "--time-anyway", "--implementations", "eager", "triton"]


def run_in_process(*flags: str, out: Path, op: str = "rms_norm") -> tuple[int, dict[tuple[str, str], dict]]:
    """(exit status, (direction, implementation) -> its line in `out`) of a tiny run."""
    status = main([*ON_CPU, "--ops", op, "--out", str(out), *flags], SMALL)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return status, {(line["direction"], line["implementation"]): line for line in lines}


def test_every_op_of_the_seam_is_measured():
    """But attention over a cache, which has no backward pass: bench/generate.py times decoding as a whole."""
    assert set(CASES) == {*ops.OPS, "rope_gqa_attention"} - {"cached_attention"}


def test_every_kernel_passes_the_check_and_is_timed(tmp_path):
    """In Triton's interpreter, whose mode is chosen when a process imports Triton."""
    code = f"import sys; from bench.ops import main; sys.exit(main(sys.argv[1:], {SMALL}))"
    command = [sys.executable, "-c", code, *ON_CPU, "--out", str(tmp_path / "ops.jsonl")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * len(CASES)
    for line in lines:
        assert line["state"] == "right" and 0 < line["us_p20"] <= line["us"] <= line["us_p80"], line
        assert len(line["errors"]) == (1 if line["direction"] == "forward" else 2)
        assert line["environment"]["torch"] == torch.__version__ and line["ceilings"]["bytes_per_s"] > 0
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["timed"] and summary["rows"] == len(lines) and not summary["wrong_or_failed"]
    assert "they mean nothing" in done.stdout


def test_a_wrong_result_gets_no_time_and_exit_status_1(tmp_path, capsys, monkeypatch):
    wrong = Implementation(lambda x, w: reference.rms_norm(x, w) * 1.001)
    monkeypatch.setitem(CASES["rms_norm"].implementations, "triton", wrong)
    status, lines = run_in_process(out=tmp_path / "ops.jsonl")
    output = capsys.readouterr().out
    assert status == 1
    for direction in ("forward", "forward+backward"):
        assert lines[direction, "triton"]["state"] == "WRONG" and "us" not in lines[direction, "triton"]
        assert lines[direction, "triton"]["errors"][0] == pytest.approx(1e-3, rel=1e-2)
        assert lines[direction, "eager"]["us"] > 0
    rows = [line for line in output.splitlines() if "triton " in line]
    assert len(rows) == 2 and all("WRONG: relative error of results 1.0e-03 (limit 1e-05)" in row for row in rows)
    assert len(json.loads(output.splitlines()[-1])["wrong_or_failed"]) == 2


def test_a_wrong_gradient_costs_the_time_of_the_backward_pass_alone(tmp_path, monkeypatch):
    def without_gradient_of_up(gate, up):
        return reference.swiglu_mul(gate, up.detach()) + 0 * up

    case = CASES["swiglu_mul"].implementations
    monkeypatch.setitem(case, "triton", Implementation(without_gradient_of_up))
    status, lines = run_in_process(out=tmp_path / "ops.jsonl", op="swiglu_mul")
    assert status == 1
    assert lines["forward", "triton"]["us"] > 0
    assert lines["forward+backward", "triton"]["state"] == "WRONG" and "us" not in lines["forward+backward", "triton"]


def test_what_fails_what_cannot_run_and_what_is_not_installed_leave_the_others_their_times(tmp_path, monkeypatch):
    def fail(x, w):
        raise RuntimeError("out of luck\nand more")

    def refuse(x, w):
        raise ops.BackendError("not for this tensor")

    for call, package, state, expected in (
        (fail, "", "FAILED: RuntimeError: out of luck", 1),
        (refuse, "", "cannot run: not for this tensor", 0),
        (refuse, "no-such-package", "not installed (pip install no-such-package)", 0),
    ):
        monkeypatch.setitem(CASES["rms_norm"].implementations, "triton", Implementation(call, package))
        status, lines = run_in_process(out=tmp_path / f"{len(state)}.jsonl")
        assert (status, lines["forward", "triton"]["state"]) == (expected, state)
        assert lines["forward", "eager"]["us"] > 0


def test_an_implementation_that_overwrites_its_inputs_changes_no_other(tmp_path, monkeypatch):
    """In the check; the copies that are timed are restored on a GPU, where such an implementation runs."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.kept = gate.detach(), up.detach()
            return reference.swiglu_mul(gate, up)

        @staticmethod
        def backward(ctx, d):
            gate, up = ctx.kept
            s = torch.sigmoid(up)
            gradients = d * up * s, d * gate * s * (1 + up * (1 - s))
            return gate.copy_(gradients[0]), up.copy_(gradients[1])

    case = CASES["swiglu_mul"].implementations
    monkeypatch.setitem(case, "triton", case["eager"])
    monkeypatch.setitem(case, "eager", Implementation(Overwriting.apply, overwrites=True))
    status, lines = run_in_process(out=tmp_path / "ops.jsonl", op="swiglu_mul")
    assert status == 0 and all(line["state"] == "right" for line in lines.values())


def test_errors_are_relative_and_nan_is_never_right():
    truth = torch.tensor([3.0, 4.0]), torch.tensor([1e-9, 0.0])
    assert largest_error((torch.tensor([3.0, 4.5]), truth[1]), truth) == pytest.approx(0.1)
    noise = torch.tensor([1e-6, 0.0])  # against a gradient that is zero but for rounding
    assert largest_error((truth[0], noise), truth) == pytest.approx(2e-7, rel=1e-2)
    assert largest_error((torch.tensor([3.0, math.nan]), truth[1]), truth) == math.inf
    assert largest_error((torch.tensor([3.0]), truth[1]), truth) == math.inf


@pytest.mark.parametrize(
    ("name", "gflop", "megabytes"),
    [
        ("QKV projection", 26.3, 89),
        ("attention, causal", 15.0, 88),
        ("output projection", 13.2, 59),
        ("gate + up", 105.2, 267.5),
        ("down", 52.6, 148),
    ],
)
def test_work_of_one_block_at_64_x_512(name, gflop, megabytes):
    """Counted by hand: 32,768 rows, width 448, 16 heads of 56, hidden 1792, two bytes a number."""
    work = block(Sizes.of(BASE, 64, 512, torch.bfloat16))[name]
    assert work.flops / 1e9 == pytest.approx(gflop, rel=5e-3)
    assert work.bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_work_of_ops_is_that_of_their_tensors():
    """Forward, what is counted is what the inputs and results hold."""
    sizes = Sizes.of(SMALL, 2, 16, torch.float32)
    for op, case in CASES.items():
        args = case.inputs(sizes, draw(sizes, torch.device("cpu")))
        results = forward(case.truth, args)
        moved = sum(t.nbytes for t in (*tensors(args), *results))
        assert case.work(sizes)[0].bytes == pytest.approx(moved, abs=16), op


def test_without_a_gpu_nothing_is_timed_and_that_is_said(capsys):
    assert main(["--device", "cpu", "--batch", "64", "--tokens", "512", "--arch"]) == 0
    output = capsys.readouterr().out
    assert "Nothing was timed, because there is no GPU here" in output
    assert "assumed, an H200: 4.3 TB/s copy, 790 TFLOP/s bfloat16 matmul" in output
    assert "vs eager" not in output
    swiglu = next(line.split() for line in output.splitlines() if line.startswith("swiglu "))
    assert swiglu[1:] == ["64", "x", "512", "forward", "105.2", "150", "133.2", "FLOPs"]
    assert json.loads(output.splitlines()[-1])["timed"] is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ops", "softmax"], "argument --ops: invalid choice: 'softmax'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--batch", "0"], "'0' is not a whole number of at least 1"),
        (["--device", "cuda:99"], "--device 'cuda:99' is not to be had here"),
        (["--device", "cpu", "--plot", "x.png"], "without a GPU nothing is timed; leave it out"),
        (["--device", "cpu", "--out", "no/such/x.jsonl"], "make it first"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_choices_in_the_reference_are_timed_and_left_as_they_were(capsys):
    before = reference.CROSS_ENTROPY_CHUNK
    assert main(["--reference", "--repeats", "1"]) == 0
    assert before == reference.CROSS_ENTROPY_CHUNK
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(ms > 0 for ms in (*summary["rope_ms"].values(), *summary["cross_entropy_ms"].values()))
    assert list(summary["cross_entropy_ms"]) == ["64", "256", "512"]


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run_in_process("--plot", str(tmp_path / "ops.png"), out=tmp_path / "ops.jsonl")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_is_ours_and_torch_s_is_right_and_timed(tmp_path):
    out = tmp_path / "ops.jsonl"
    names = ["rms_norm", "swiglu_mul", "attention", "linear_cross_entropy"]
    main(["--batch", "2", "--tokens", "16", "--repeats", "3", "--ops", *names, "--out", str(out)], SMALL)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        if line["implementation"] in ("eager", "compile", "triton"):
            assert line["us"] > 0 and line["peak_bytes"] > 0 and line["speedup_vs_compile"] > 0, line
