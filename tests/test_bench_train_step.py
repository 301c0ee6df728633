"""The benchmark of a training iteration: it trains as training does, checks before it times, and its figures add up."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import DEVICE, model_tiles

import bench.common
import hrm_kernels as ops
from bench import shares, train_step_cases
from bench.train_step import main
from bench.train_step_cases import Implementation, MicroBatch, check, differences, make_batches, numbers
from hrm_model import HRMConfig, HRMForCausalLM
from hrm_model.atomic import read_json
from hrm_model.training.loop import Training
from hrm_model.training.recipes import TrainConfig

FLAGS = ["--device", "cpu", "--batch-size", "2", "--accumulation", "3", "--repeats", "2", "--config"]


def run(*flags: object) -> tuple[int, str, dict]:
    """(exit status, what was printed, the last line's content)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(list(map(str, flags)))
    return status, printed.getvalue(), json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def tiny_model(small_model) -> Path:
    """A config.json of the same model with few words."""
    path = small_model.with_name("few_words.json")
    path.write_text(json.dumps(read_json(small_model) | {"vocab_size": 512}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> tuple[str, dict, Path]:
    """(what was printed, summary, directory of what was written) of a run with everything but torch.compile."""
    out = tmp_path_factory.mktemp("bench")
    names = ["published", "eager", "fused"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.common, "RESULTS", out)
        plot = out / "plot.png"
        status, printed, summary = run(*FLAGS, tiny_model, "--implementations", *names, "--save", "--plot", plot)
    assert status == 0, printed
    return printed, summary, out


@pytest.fixture(scope="module")
def training(small_dataset, small_model, tmp_path_factory) -> Training:
    """A real run, not begun, of 3 x 2 rows a step at random depths, its head without an objective."""
    options = dict(data=[str(small_dataset)], out=str(tmp_path_factory.mktemp("run") / "run"), device="cpu")
    options |= dict(batch_size=2, accumulation=3, steps=10, warmup=4, grad_clip=0.5, dropout=0.1)
    options |= dict(halting="none", depth="random")  # what the benchmark's iteration is
    return Training(TrainConfig.of_recipe("tiny", **options), read_json(small_model))


def depths_of(training: Training, first: int) -> list[int]:
    """Of two samples of a run."""
    batch = training.data.training.batch(np.array([first, first + 1]))
    return training.train_step.depths(batch, 0)[0]


def test_batches_have_the_depths_of_a_training_run_and_are_the_same_for_all(training):
    steps = make_batches(training.run, 16, training.config, torch.device("cpu"))
    assert len(steps) == 3, "the fewest iterations that see 16 rows"
    drawn = [batch.depths for batches in steps for batch in batches]
    assert drawn == [depths_of(training, 2 * i) for i in range(9)]
    again = make_batches(training.run, 16, training.config, torch.device("cpu"))
    assert torch.equal(steps[1][1].ids_BT, again[1][1].ids_BT)
    assert torch.equal(steps[0][0].ids_BT[:, 1:], steps[0][0].targets_BT[:, :-1])


def test_an_iteration_is_one_of_the_training_loop_to_the_bit(training):
    ours = Implementation("eager", training.model, training.run, torch.float32)
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    for step in range(2):
        drawn = [training.data.training.batch(samples) for samples in training.data.training.plan(step)]
        batches = [
            MicroBatch(
                torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), training.train_step.depths(batch, 0)[0]
            )
            for batch in drawn
        ]
        training.train_step(step)
        training.train_step.seed_dropout(step)
        ours.iteration(step, batches)
    found = dict(ours.model.named_parameters())
    for name, p in training.model.named_parameters():
        assert torch.equal(p, found[name]), name
        assert torch.equal(p, before[name]) == ("q_head" in name), f"{name}: all are trained but the head"


def test_figures_follow_from_times_and_from_the_steps_that_ran(finished):
    _, summary, _ = finished
    timed = summary["implementations"]
    assert list(timed) == ["published", "eager"] and summary["timed"]
    assert (summary["run"]["halting"], summary["run"]["depth"]) == ("none", "random"), "as the baseline can"
    n_rows, n_tokens = 6, 6 * 16
    for name, steps in (("published", summary["mean_slowest_depth"]), ("eager", summary["mean_depth"])):
        record = timed[name]
        assert 0 < record["ms_least"] <= record["ms"] <= record["ms_most"]
        assert record["tokens_per_s"] == pytest.approx(n_tokens / record["ms"] * 1e3)
        assert record["row_steps"] == pytest.approx(n_rows * steps)
        assert record["row_steps_per_s"] == pytest.approx(n_rows * steps / record["ms"] * 1e3)
        rate = record["flops"] / record["ms"] * 1e3
        assert record["share_of_matmul_ceiling"] == pytest.approx(rate / summary["matmul_ceiling_flops_per_s"])
        assert record["speedup_vs_published"] == pytest.approx(timed["published"]["ms"] / record["ms"])
        assert record["peak_bytes"] is None, "a CPU's memory is not measured"
    assert timed["published"]["flops"] > timed["eager"]["flops"]


def test_shares_of_the_time_add_up(finished):
    _, summary, _ = finished
    for record in summary["implementations"].values():
        found = record["profile"]
        assert sum(found["shares"].values()) == pytest.approx(1) and found["seconds"] > 0
        assert found["shares"]["matrix products"] > 0.02 and found["shares"]["other"] < 0.05
        assert sum(found["other"].values()) <= found["shares"]["other"] + 1e-9


def test_what_is_not_measured_is_said(finished):
    printed, summary, _ = finished
    assert "fused: not measured: needs a CUDA device" in printed and "fused" in summary["skipped"]
    (eager,) = (line for line in printed.splitlines() if line.startswith("eager") and "x" in line.split()[-1])
    assert "not measured" in eager and eager.endswith(
        f"{summary['implementations']['eager']['speedup_vs_published']:.2f}x"
    )


def test_the_result_is_saved_and_drawn(finished):
    _, summary, out = finished
    assert json.loads((out / "train_step.jsonl").read_text()) == summary
    assert summary["environment"]["torch"] == torch.__version__ and summary["model"]["n_embd"] == 8
    pytest.importorskip("matplotlib")
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_baseline_there_is_no_ratio(tiny_model):
    status, printed, summary = run(*FLAGS, tiny_model, "--implementations", "eager", "--depth", "full")
    assert status == 0 and summary["mean_depth"] == 3
    assert summary["implementations"]["eager"]["speedup_vs_published"] is None
    assert printed.count("not measured") == 3, "peak memory, how busy the device is, the ratio"


def scale_an_output(model: HRMForCausalLM) -> None:
    model.ln_f.weight.data *= 1.01


def scale_a_small_gradient(model: HRMForCausalLM) -> None:
    model.hrm_core.H_level.layers[0].attn.v_proj.weight.register_hook(lambda gradient: 1.01 * gradient)


def lose_a_number(model: HRMForCausalLM) -> None:
    model.ln_f.weight.data[0] = math.nan


@pytest.mark.parametrize("fault", [scale_an_output, scale_a_small_gradient, lose_a_number])
def test_wrong_numbers_are_seen_and_nothing_is_timed(tiny_model, monkeypatch, fault):
    monkeypatch.setattr(train_step_cases, "compile_blocks", fault)
    names = ["published", "eager", "compile"]
    status, printed, summary = run(*FLAGS, tiny_model, "--implementations", *names)
    assert status == 1 and not summary["timed"] and summary["implementations"] == {}
    assert "error: compile differs from eager: nothing was timed" in printed and "tokens/s" not in printed
    assert summary["checks"]["published"]["right"] and not summary["checks"]["compile"]["right"]
    (line,) = (line for line in printed.splitlines() if "WRONG" in line)
    assert line.startswith("compile")


def test_what_fails_leaves_the_others_their_times(tiny_model, monkeypatch):
    def fail(model):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(train_step_cases, "compile_blocks", fail)
    status, printed, summary = run(*FLAGS, tiny_model, "--implementations", "eager", "compile")
    assert status == 1 and list(summary["implementations"]) == ["eager"]
    assert summary["failed"] == {"compile": "FAILED: RuntimeError: no compiler"}
    assert "compile: not measured: FAILED: RuntimeError: no compiler" in printed


@pytest.mark.slow
def test_compiled_blocks_pass_the_check_and_are_timed(tiny_model):
    status, printed, summary = run(*FLAGS, tiny_model, "--implementations", "compile", "--dtype", "bfloat16")
    assert status == 0, printed
    assert summary["implementations"]["compile"]["ms"] > 0 and summary["checks"]["compile"]["right"]


def test_differences_are_relative_and_nan_is_kept():
    big, small = torch.tensor([3.0, 4.0]), torch.tensor([3e-3, 4e-3])
    expected = [2.0, 4.0], [big, small]
    assert differences(([2.0, 4.4], [big, small]), expected) == pytest.approx([0.1, 0, 0])
    assert differences(([2.0, 4.0], [big, 1.5 * small]), expected)[2] == pytest.approx(0.5)
    assert differences(([2.0, 4.0], [2 * big, small]), expected)[1:] == pytest.approx([1, 1], rel=1e-5)
    noise = torch.tensor([1e-6, 0.0])  # of a gradient that is zero but for rounding
    assert differences(([2.0], [big, noise]), ([2.0], [big, 0 * noise]))[2] == pytest.approx(1e-6 / 5e-4)
    for wrong in (([math.nan, 4.0], [big, small]), ([2.0, 4.0], [big, small * math.nan])):
        assert any(map(math.isnan, differences(wrong, expected)))


def test_kernels_pass_the_check_and_their_time_goes_by_their_op(tiny_model):
    """On a CPU in Triton's interpreter, which main would not time."""
    shape = read_json(tiny_model) | {"n_embd": 32}
    training = TrainConfig.of_recipe("tiny")
    torch.manual_seed(0)
    start = HRMForCausalLM(HRMConfig.from_dict(shape)).to(DEVICE)
    batches = make_batches(training, 16, start.config, DEVICE)[0]
    eager, fused = (Implementation(name, start, training, torch.float32) for name in ("eager", "fused"))
    fused.backend = "triton"
    with model_tiles(), ops.use_backend("auto", hrm_loop="host"):
        assert check(eager, fused, batches)["right"]
        with shares._named_kernels(), torch.profiler.profile() as profiler:
            numbers(fused, batches)
    names = {event.key for event in profiler.key_averages()}
    for kernel in ("attention._forward", "swiglu._forward", "linear_cross_entropy._loss_and_gradient"):
        assert kernel in names


def test_every_kernel_file_has_a_row():
    files = {path.stem for path in (Path(ops.__file__).parent / "kernels").glob("*.py")}
    for file in files - {"__init__", "launch", "parts"}:
        assert shares.label_of(f"{file}._forward _forward") != "other", file


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("aten::mm sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention pytorch_flash::flash_fwd_kernel", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "norms"),
        ("triton_poi_fused_mul_silu_1 triton_poi_fused_mul_silu_1", "SwiGLU gate"),
        ("CompiledFunctionBackward triton_poi_fused_add_7", "elementwise arithmetic"),
        ("aten::_fused_adamw_ void at::native::multi_tensor_apply_kernel", "optimizer and clipping"),
        ("aten::copy_ Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("aten::mul void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "elementwise arithmetic"),
        ("hrm_step._add_norm _add_norm", "norms"),
        ("something nobody knows", "other"),
    ],
)
def test_names_of_a_gpus_profile_are_told_apart(name, label):
    assert shares.label_of(name) == label


def test_kernels_count_once_and_those_without_an_op_by_their_own_name():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, device, us=0.0, kernels=(), annotation=False):
        took = SimpleNamespace(elapsed_us=lambda: us)
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
        return SimpleNamespace(
            name=name, device_type=device, time_range=took, kernels=launched, is_user_annotation=annotation
        )

    events = [event("aten::mm", cpu, 9, [("gemm", 4.0)]), event("gemm", cuda, 4.0), event("gemm", cuda, 2.0)]
    events.append(event("a range", cuda, 50.0, annotation=True))
    assert shares._kernel_seconds(events) == pytest.approx({"aten::mm gemm": 4e-6, "gemm": 2e-6})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "huge"], "argument --recipe: invalid choice: 'huge'"),
        (["--implementations", "magic"], "argument --implementations: invalid choice: 'magic'"),
        (["--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["--depth", "fixed:0"], "'fixed:0' is none of random, full, fixed:N"),
        (["--depth", "head"], "'head' is none of random, full, fixed:N"),
        (["--depth", "fixed:5"], "--depth fixed:5 is over hrm_max_steps 4 of the model; give less"),
        (["--tokens", "129"], "--tokens 129 is over block_size 128 of the model; give fewer"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "cuda:99"], "--device 'cuda:99' is not to be had here"),
        (["--config", "no/such.json"], "no/such.json"),
        (["--plot", "no/such/x.png"], "make it first"),
        (["--implementations", "fused"], "--implementations fused: needs a CUDA device"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, message, capsys):
    device = [] if "--device" in flags else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main([*device, "--recipe", "tiny", *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
