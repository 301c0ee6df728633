"""The benchmark of the loop: it checks before it times, counts steps right, fits right and says what it leaves out."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
from parity import model_tiles

import bench.hrm_step
from bench.common import print_table, waits_between_launches
from bench.hrm_step import FITS, fit, fits, main, not_kept
from bench.hrm_step_cases import DEEP_SHARE, DRIVERS, Bench, Loop, Start, Work, cases, judge, kernels_of_a_step
from bench.published import PublishedHRM
from hrm_kernels.backend import INTERPRETED
from hrm_model import HRMConfig

TINY = ["--preset", "tiny", "--batch-sizes", "3", "--tokens", "5", "--repeats", "1", "--device", "cpu"]
FEW = ["--depths", "all-1", "uniform"]


def run(capsys, *flags: str) -> tuple[int, str, dict]:
    """(exit status, what is printed, its last line) of a tiny run."""
    status = main([*TINY, *flags])
    output = capsys.readouterr().out
    return status, output, json.loads(output.splitlines()[-1])


def test_a_run_checks_then_times_and_counts_the_steps_that_ran(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.common.RESULTS", tmp_path)
    status, output, summary = run(capsys, "--save")
    assert status == 0 and summary["timed"] and not summary["wrong"] and not summary["failed"]
    assert output.index("0.0% of the limit") < output.index("us/row-step") < output.index("a of full depth")
    (line,) = (tmp_path / "hrm_step.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["environment"]["torch"] == torch.__version__ and record["fits"] == summary["fits"]
    rows = {(row["depths"], row["implementation"]): row for row in record["rows"]}
    assert summary["rows"] == len(rows) == 2 * len(cases(3, 4))
    for case in cases(3, 4):
        published, ours = rows[case.name, "published"], rows[case.name, "reference"]
        assert ours["row_steps"] == sum(case.depths) and ours["mean_depth"] == pytest.approx(sum(case.depths) / 3)
        assert published["row_steps"] == 3 * max(case.depths)
        assert published["speedup_vs_published"] == 1
        assert ours["speedup_vs_published"] == pytest.approx(published["ms"] / ours["ms"])
        assert ours["us_per_row_step"] == pytest.approx(ours["ms"] * 1e3 / sum(case.depths))
        assert ours["share_of_matmul_ceiling"] == pytest.approx(ours["tflops"] / ours["matmul_ceiling_tflops"])
        assert 0 < ours["ms_least"] <= ours["ms"] <= ours["ms_most"]
        assert ours["kernels"] is ours["host_waits"] is ours["peak_bytes"] is None


def test_what_cannot_run_on_a_cpu_is_left_out_with_its_reason(capsys):
    status, output, summary = run(capsys, *FEW)
    assert status == 0 and set(summary["skipped"]) == {"compile", *DRIVERS}
    missing = output[output.index("\nnot measured") :]
    assert "kernels, waits, peak memory: no CUDA device" in missing
    assert all(f"{name}: {reason}" in missing for name, reason in summary["skipped"].items())
    assert "CUDA device" in summary["skipped"]["fused-graph"]
    assert f"starts {summary['kernels_of_a_fused_step']} kernels" in missing

    status, _, summary = run(capsys, *FEW, "--implementations", "fused-while", "reference")
    assert status == 0 and set(summary["skipped"]) == {"fused-while"} and summary["timed"]


def test_a_wrong_implementation_means_that_nothing_is_timed(capsys, monkeypatch):
    right = PublishedHRM.reason

    def wrong(self, *args):
        z_H, *others = right(self, *args)
        z_H[1] *= 1.001  # of three rows
        return z_H, *others

    monkeypatch.setattr(PublishedHRM, "reason", wrong)
    status, output, summary = run(capsys, *FEW)
    assert status == 1 and summary["wrong"] == ["3 x 5 published"]
    assert "3 x 5 published: WRONG: a row off by 1.0e-03" in output and "nothing was timed" in output
    assert not summary["timed"] and summary["rows"] == 0 and "us/row-step" not in output


def test_a_row_that_runs_a_step_too_many_is_wrong(capsys, monkeypatch):
    right = PublishedHRM.reason
    monkeypatch.setattr(PublishedHRM, "reason", lambda self, *args: (*right(self, *args)[:3], torch.tensor([4, 4, 5])))
    status, _, summary = run(capsys, "--depths", "all-S")
    assert status == 1 and summary["wrong"] == ["3 x 5 published"] and not summary["timed"]


def test_an_implementation_that_fails_is_named_and_the_others_are_timed(capsys, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of luck\nand a second line")

    monkeypatch.setattr(PublishedHRM, "reason", fail)
    status, output, summary = run(capsys, *FEW)
    assert status == 1 and summary["failed"] == {"3 x 5 published": "RuntimeError: out of luck"}
    assert summary["timed"] and summary["rows"] == 2 and "all-1        reference" in output


def test_not_finite_numbers_are_wrong():
    errors = torch.tensor([1e-7, math.nan])
    assert judge(errors, None)[1] > 1 and judge(errors, torch.tensor([1e-2, 1e-2]))[1] > 1
    assert judge(torch.tensor([1e-5, 2e-5]), None) == (pytest.approx(2e-5), pytest.approx(0.2))


def test_bfloat16_is_held_to_the_references_own_error():
    own = torch.full((8,), 1e-2)
    assert judge(own, own)[1] == pytest.approx(1 / 1.2)
    assert judge(1.3 * own, own)[1] > 1, "all rows somewhat worse"
    one_row = own.clone()
    one_row[3] *= 1.9
    assert judge(one_row, own)[1] < 1 < judge(torch.where(one_row > 1e-2, 2.1e-2, 0.5e-2), own)[1]


def test_bfloat16_passes_its_check(capsys):
    status, output, summary = run(capsys, *FEW, "--dtype", "bfloat16")
    assert status == 0 and summary["timed"] and "in float32\n" in output


@pytest.mark.parametrize(("n_rows", "max_steps"), [(8, 8), (8, 16), (64, 16), (256, 16), (2, 4)])
def test_depths_have_the_stated_means(n_rows, max_steps):
    found = {case.name: case for case in cases(n_rows, max_steps)}
    means = {name: statistics.mean(case.depths) for name, case in found.items()}
    share = round(DEEP_SHARE * n_rows) / n_rows
    expected = {"all-1": 1, "one-deep": 1 + (max_steps - 1) / n_rows, "all-S": max_steps, "all-S-given": max_steps}
    expected |= {"bimodal": 1 + share * (max_steps - 1), "half-deep": (1 + max_steps) / 2}
    expected |= {"uniform": (1 + max_steps) / 2, "mostly-deep": 1 + (n_rows - n_rows // 4) / n_rows * (max_steps - 1)}
    assert means == {name: pytest.approx(expected[name]) for name in means}
    for name, case in found.items():
        assert len(case.depths) == n_rows and min(case.depths) >= 1 and case.given == (name == "all-S-given")
        assert max(case.depths) == (1 if name == "all-1" else max_steps), "else a decision would be foreseen"
    distinct = {tuple(sorted(case.depths)) for name, case in found.items() if name != "all-S-given"}
    assert len(distinct) == len(found) - 1, "no case twice"
    assert cases(n_rows, max_steps) == list(found.values()), "the same in every run"


def test_a_uniform_depth_has_every_step_equally_often_where_rows_suffice():
    (uniform,) = cases(64, 16, ["uniform"])
    assert np.bincount(uniform.depths).tolist() == [0, *[4] * 16]
    assert list(uniform.depths) != sorted(uniform.depths), "deep rows are not neighbours"


def test_a_single_row_is_shallow_or_deep():
    assert [case.name for case in cases(1, 16)] == ["all-1", "all-S", "all-S-given"]


def test_the_share_of_deep_rows_agrees_with_what_is_published():
    """HellaSwag: 3.033 +- 6.263 of numbers that are 0 or 16."""
    mean, spread = 16 * DEEP_SHARE, 16 * math.sqrt(DEEP_SHARE * (1 - DEEP_SHARE))
    assert [mean, spread] == [pytest.approx(3.033, abs=0.02), pytest.approx(6.263, abs=0.02)]


def test_a_fit_finds_a_line_and_weighs_relative_residuals():
    assert fit([8, 16, 64], [0.5 + 0.1 * n for n in (8, 16, 64)]) == pytest.approx((0.5, 0.1, 0), abs=1e-12)
    row_steps = [8, 15, 22, 36, 36, 50, 64]  # what 8 rows run of at most 8 steps
    noise = 0.03 * np.random.default_rng(0).standard_normal((400, len(row_steps)))
    runs = [list(0.1 * np.array(row_steps) * (1 + one)) for one in noise]
    relative = np.std([fit(row_steps, seconds)[0] for seconds in runs])
    plain = np.std([np.polynomial.polynomial.polyfit(row_steps, seconds, 1)[0] for seconds in runs])
    assert 2 * relative < plain and relative < 0.01 * 6.4, "of the time at full depth"


def line(n: int, ms: float, name: str = "reference", **changes) -> dict:
    row = {"batch": 8, "tokens": 64, "implementation": name, "depths": "any", "given": False, "row_steps": n, "ms": ms}
    return row | {"host_waits": 0} | changes


def test_limits_are_judged_by_size_and_implementation(capsys):
    rows = [line(n, 10 + n) for n in (8, 36, 64)] + [line(n, 10 + n, "published") for n in (8, 64)]
    rows += [line(n, 1.0 * n, "fused-while") for n in (8, 64)]
    rows += [line(64, 99.0, given=True), line(64, 99.0, "fused-while", given=True)]
    found = {one["implementation"]: one for one in fits(rows, 8)}
    assert [one["points"] for one in found.values()] == [3, 2, 2], "what is given is not fitted"
    assert found["reference"]["a_ms"] == pytest.approx(10)
    assert found["reference"]["a_of_full_depth"] == pytest.approx(10 / 74)
    (words,) = not_kept(rows, list(found.values()))
    assert words == "8 x 64 reference: a is 13.5% of the time at full depth, limit 5%"
    late = [line(8, 8.0, "fused-graph", host_waits=3), line(8, 8.0, "fused-host", host_waits=3)]
    (words,) = not_kept([*late, line(8, 8.0, "fused-while", host_waits=None)][:2], [])
    assert words == "8 x 64 fused-graph, any: waits of the host 3, limit 0"
    assert "not measured" in not_kept([line(8, 8.0, "fused-while", host_waits=None)], [])[0]
    print_table(FITS, found.values())
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and {len(head)} == set(map(len, lines)) and "13.5%" in lines[0]


def test_strict_makes_a_broken_limit_an_error(capsys, monkeypatch):
    for limit, status in ((math.inf, 0), (-math.inf, 1)):
        monkeypatch.setattr(bench.hrm_step, "A_LIMIT", limit)
        assert run(capsys, *FEW, "--strict")[0] == status
    status, output, summary = run(capsys, *FEW)
    assert status == 0 and "LIMIT NOT KEPT: 3 x 5 reference" in output and len(summary["limits_not_kept"]) == 1


def test_a_size_without_memory_is_left_out_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr("bench.hrm_step_cases.free_bytes", lambda device: 10**6)
    status, output, summary = run(capsys, *FEW, "--batch-sizes", "1", "64")
    assert status == 0 and "1 x 5" not in summary["skipped"] and summary["rows"] == 2
    assert "0.0 GB are free" in summary["skipped"]["64 x 5"] and "64 x 5: may need" in output


def test_waits_count_between_the_first_launch_and_the_last():
    calls = ["cudaStreamSynchronize", "cudaMemcpy", "cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    calls += ["cudaEventQuery", "cudaEventSynchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoDAsync_v2", "aten::copy_"]
    assert waits_between_launches([*calls, "cudaGraphLaunch", "cudaDeviceSynchronize"]) == 3
    assert waits_between_launches([*calls, "cuLaunchKernelEx", "cudaDeviceSynchronize"]) == 3
    assert waits_between_launches(["cudaGraphLaunch", "cudaDeviceSynchronize"]) == 0
    assert waits_between_launches(["cudaDeviceSynchronize"]) == 0


def test_a_step_of_the_base_model_is_seven_kernels_a_block_and_two():
    config = HRMConfig.preset("base")
    assert kernels_of_a_step(config, torch.bfloat16, 64, 512) == 7 * config.blocks_per_step + 2


def test_all_halt_is_a_decision_and_all_deep_is_none():
    config = HRMConfig.preset("tiny", vocab_size=97)
    found = Bench(config, torch.float32, torch.device("cpu"), ["published", "reference"], ["all-1", "all-S"])
    start = Start.of(found.model, 3, 5)
    for loop in found.loops:
        loop.prepare(5)
        for case in found.cases((3, 5)):
            _, executed = loop.run(start.xs[0], start, loop.work(case))
            assert tuple(executed.tolist()) == case.depths
    assert len(start.xs) == 3, "nine rows are checked"
    assert all(torch.equal(a, b) for a, b in zip(start.xs, Start.of(found.model, 3, 5).xs, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the CPU only in Triton's interpreter")
def test_the_loop_on_kernels_passes_the_check():
    config = HRMConfig.preset("tiny", n_embd=64, vocab_size=97)
    with model_tiles():
        depths = ["all-1", "uniform", "all-S-given"]
        found = Bench(config, torch.float32, torch.device("cpu"), ["reference", "fused-host"], depths)
        found.check((8, 2))
    assert [loop.name for loop in found.loops] == ["reference", "fused-host"]
    assert not found.wrong and not found.failed and not found.skipped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_driver_on_the_device_waits_for_the_host(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.common.RESULTS", tmp_path)
    assert main(["--preset", "tiny", "--batch-sizes", "8", "--tokens", "16", "--repeats", "1", "--save"]) == 0
    rows = json.loads((tmp_path / "hrm_step.jsonl").read_text())["rows"]
    waits = {(row["implementation"], row["depths"]): row["host_waits"] for row in rows}
    assert all(n == 0 for (name, _), n in waits.items() if name in ("fused-graph", "fused-while"))
    assert waits["published", "all-S"] > 0 and waits["reference", "all-S"] > 0, "the count sees waits"
    assert all(row["kernels"] > 0 and row["peak_bytes"] > 0 for row in rows if row["implementation"] != "fused-while")


def test_a_plot_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loop.png"
    status, _, _ = run(capsys, *FEW, "--tokens", "2", "5", "--plot", str(path))
    assert status == 0 and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "129"], "--tokens 129 is over the 128 of --preset tiny"),
        (["--batch-sizes", "0"], "'0' is not a whole number of at least 1"),
        (["--depths", "deep"], "invalid choice: 'deep'"),
        (["--implementations", "fused"], "invalid choice: 'fused'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--device", "tpu"], "--device 'tpu' is not to be had here"),
        (["--plot", "no/such/folder/a.png"], "there is no directory"),
    ],
)
def test_a_bad_option_is_one_clear_error(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, *flags])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert words in captured.err.splitlines()[-1] and captured.err.count("error:") == 1


def test_works_of_the_published_loop_are_as_deep_as_the_slowest_row():
    model = Bench(HRMConfig.preset("tiny", vocab_size=97), torch.float32, torch.device("cpu"), None, []).model
    (case,) = cases(8, 4, ["one-deep"])
    assert Loop("published", model).work(case) == Work("published", (4,) * 8, False)
    assert Loop("reference", model).work(case) == Work("reference", case.depths, False)
