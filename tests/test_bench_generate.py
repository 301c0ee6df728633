"""The benchmark of generation: it checks before it times, counts block applications, and draws depths by a seed."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

import bench.generate
import bench.generate_cases
from bench.generate import counts, main, targets, whole_text
from bench.generate_cases import Schedule, applications, judge, jumps, mean_depth, plans, sample, within
from bench.published import PublishedHRM
from hrm_model import HRMConfig, HRMForCausalLM, save_model
from hrm_model.cache import HRMCache
from hrm_model.incremental import extend

SHAPE = dict(vocab_size=50, n_embd=8, block_size=16, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=2)
SHAPE |= dict(hrm_H_layers=1, hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=2, hrm_max_steps=4)
CONFIG = HRMConfig(**SHAPE)
VARYING = "1-3,1|4"
HEAD = "cached tok/s  ratio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(HRMForCausalLM(CONFIG), tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def run(checkpoint, capsys, tmp_path, monkeypatch):
    """Runs the benchmark: (exit status, what is printed, its last line)."""
    monkeypatch.setattr("bench.common.RESULTS", tmp_path)

    def call(*flags: str) -> tuple[int, str, dict]:
        sizes = ["--contexts", "16", "--batches", "2", "--depths", "1", "4", "--varying", "2|4"]
        common = ["--checkpoint", checkpoint, "--seconds", "0.01", "--device", "cpu"]
        status = main([*common, *sizes, *flags])
        output = capsys.readouterr().out
        return status, output, json.loads(output.splitlines()[-1])

    return call


def simulated(depths: list[list[int]], config: HRMConfig, n_prompt: int = 0) -> list[float]:
    """Applications of each token, summed over rows: after it, every position of the row has run every step up to its
    depth, and has been seen at that depth by the output blocks. The prompt has run all steps, at all depths."""
    found = []
    ran = [[n_prompt] * (config.hrm_max_steps + 1) for _ in depths[0]]
    seen = [[n_prompt] * (config.hrm_max_steps + 1) for _ in depths[0]]
    for t, of_rows in enumerate(depths):
        length, total = n_prompt + t + 1, 0
        for row, depth in enumerate(of_rows):
            total += config.n_input_layers
            for step in range(1, depth + 1):
                total += config.blocks_per_step * (length - ran[row][step])
                ran[row][step] = length
            total += config.n_output_layers * (length - seen[row][depth])
            seen[row][depth] = length
        found.append(total)
    return found


def test_a_run_checks_then_times_and_counts_what_was_executed(run, tmp_path):
    status, output, summary = run("--batches", "1", "3", "--varying", VARYING, "--tokens", "4")
    assert status == 0 and summary["timed"] and not summary["wrong"] and not summary["failed"]
    assert output.index("% of the limit") < output.index("steady state") < output.index("whole texts")
    (line,) = (tmp_path / "generate.jsonl").read_text().splitlines()
    assert json.loads(line) == summary and summary["environment"]["torch"] == torch.__version__
    modes = [("1", "fixed"), ("4", "fixed"), *((name, by) for name in ("1-3", "1|4") for by in ("token", "turn"))]
    cells = {(cell["batch"], cell["depth"], cell["depth_update"]): cell for cell in summary["cells"]}
    assert list(cells) == [(batch, *mode) for batch in (1, 3) for mode in modes]
    for (batch, name, mode), cell in cells.items():
        assert cell["context"] == 16 and cell["tokens_counted"] == 4 >= cell["tokens_recomputed"] >= 1
        assert cell["cached_ms"] > 0 and cell["cached_tokens_per_s"] == pytest.approx(batch / cell["cached_ms"] * 1e3)
        assert cell["speedup"] == pytest.approx(cell["recompute_ms"] / cell["cached_ms"])
        assert cell["speedup"] == pytest.approx(cell["cached_tokens_per_s"] / cell["recompute_tokens_per_s"])
        assert (cell["published_ms"] is None) == (mode != "fixed") and cell["compile_ms"] is None
        assert cell["applications"] == pytest.approx(sum(cell["applications_of"].values()))
        assert cell["applications_of_deepest"] == applications(CONFIG, Schedule.parse(name).choices[-1])
        once_each = cell["applications_of_mean_depth"]
        assert once_each == pytest.approx(applications(CONFIG, cell["mean_depth"]))
        assert (cell["applications"] > once_each * 1.001) == (mode == "token"), "else nothing is run again"
    schedules = [Schedule.parse(text) for text in VARYING.split(",")]
    todo = [plan for batch in (1, 3) for plan in plans([1, 4], schedules, batch, 16, 4)]
    for plan, cell in zip(todo, summary["cells"], strict=True):
        expected = simulated(plan.depths, CONFIG, plan.start)[plan.n_warm :]
        assert cell["applications"] == pytest.approx(sum(expected) / (cell["batch"] * len(expected)))
        assert cell["mean_depth"] == pytest.approx(mean_depth(plan.depths, plan.counted))
        assert cell["tokens_before"] == plan.n_warm
    for once in summary["once"]:
        assert once["prefill"]["tokens"] == 16 and once["prefill"]["depth"] == 1 and once["prefill"]["cached_ms"] > 0
        assert [(use["from"], use["to"]) for use in once["first_uses"]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
        prompt = once["prompt"]
        assert once["first_uses"][0]["applications"] == prompt * applications(CONFIG, 1)
        backfill = prompt * (CONFIG.blocks_per_step + CONFIG.n_output_layers)
        assert once["first_uses"][1]["applications"] == backfill + applications(CONFIG, 2)
    assert summary["targets_missed"] == [] and "targets: not measured" in output


@pytest.mark.parametrize("update", ["token", "turn"])
@pytest.mark.parametrize("name", ["1-4", "1|4", "3"])
def test_applications_of_a_whole_text_are_those_of_a_simulation_and_of_a_real_model(name, update):
    schedule = Schedule.parse(name)._replace(update=update)
    found = whole_text(CONFIG, schedule, 16, 3)
    depths = schedule.depths(3, 16)
    assert found["applications"] == pytest.approx(sum(simulated(depths, CONFIG)) / 48)
    assert found["mean_depth"] == pytest.approx(mean_depth(depths, range(16)))
    model = HRMForCausalLM(CONFIG).eval()
    cache = HRMCache(model, 3)
    for of_rows in depths:
        extend(model, cache, {row: [1] for row in range(3)}, force_steps=of_rows)
    of = {"input": cache.work.input / 48, "core": cache.work.core / 48, "output": cache.work.output / 48}
    assert found["of"] == {kind: pytest.approx(n) for kind, n in of.items()}


def test_whole_texts_are_counted_at_every_depth_and_for_each_schedule():
    rows = counts(CONFIG, [Schedule.parse("2|3")], 12)
    names = [(row["depth"], row["depth_update"]) for row in rows]
    varying = [(name, update) for name in ("1-4", "1|4", "2|3") for update in ("token", "turn")]
    assert names == [*((str(depth), "fixed") for depth in (1, 2, 3, 4)), *varying]
    for row in rows[:4]:
        assert row["applications"] == row["applications_of_mean_depth"] == row["applications_of_deepest"]


def wrong_logits(*args, **options):
    out = extend(*args, **options)
    out.logits[-1, 3] += 1e-3
    return out


def wrong_steps(*args, **options):
    out = extend(*args, **options)
    return dataclasses.replace(out, executed_steps=[n + 1 for n in out.executed_steps])


@pytest.mark.parametrize("wrong", [wrong_logits, wrong_steps])
def test_a_wrong_cache_shows_no_time(run, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(bench.generate_cases, "extend", wrong)
    status, output, summary = run("--tokens", "2")
    assert status == 1 and not summary["timed"] and summary["wrong"] == ["context 16, batch 2, cached"]
    assert "cached     WRONG: " in output and "context 16, batch 2, cached: wrong" in output
    assert HEAD not in output and summary["cells"] == summary["once"] == []
    assert not list(tmp_path.iterdir()), "nothing is recorded"


def test_what_is_wrong_only_while_it_is_timed_shows_no_time_either(run, monkeypatch):
    timed = bench.generate_cases.timed

    def later(call, device):
        result, seconds = timed(call, device)
        if hasattr(result, "halted"):
            result.logits.neg_()
        return result, seconds

    monkeypatch.setattr(bench.generate_cases, "timed", later)
    status, output, summary = run("--tokens", "2")
    assert status == 1 and not summary["timed"] and HEAD not in output


def test_an_implementation_that_fails_is_named_and_the_others_are_timed(run, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of luck\nand a second line")

    monkeypatch.setattr(PublishedHRM, "reason", fail)
    status, output, summary = run("--tokens", "2", "--varying", "2")
    assert status == 1 and summary["failed"] == {"published": "RuntimeError: out of luck"}
    assert summary["timed"] and HEAD in output and "published tok/s" not in output


def test_a_size_without_memory_is_left_out_with_its_reason(run, monkeypatch):
    monkeypatch.setattr("hrm_model.cache.free_bytes", lambda device: 400_000)
    status, output, summary = run("--batches", "1", "32", "--tokens", "2", "--varying", "2")
    assert status == 0 and {cell["batch"] for cell in summary["cells"]} == {1}
    assert "MB are free" in summary["skipped"]["context 16, batch 32"] and "not measured: context 16" in output


def test_bfloat16_is_held_to_the_recomputed_ones_own_error(run):
    status, _, summary = run("--dtype", "bfloat16", "--tokens", "2", "--no-save")
    assert status == 0 and summary["timed"] and summary["dtype"] == "bfloat16"
    truth = torch.linspace(-1, 1, 50)
    near, far = truth + 1e-2, truth + 2.1e-2
    assert judge(near, near, truth, 1e-5).of_limit == pytest.approx(0.5)
    assert judge(far, near, truth, 1e-5).of_limit > 1


def test_not_finite_logits_are_wrong_and_large_ones_may_be_off_by_more():
    assert judge(torch.tensor([math.nan, 1.0]), torch.ones(2), None, 1e-5).of_limit == math.inf
    assert judge(torch.tensor([9e-6]), torch.tensor([0.0]), None, 1e-5).of_limit == pytest.approx(0.9)
    assert judge(torch.tensor([100.0005]), torch.tensor([100.0]), None, 1e-5).of_limit < 1


def test_a_schedule_is_a_function_of_the_seed_the_row_and_the_token():
    schedule = Schedule.parse("1-7")
    few, many = schedule.depths(2, 10, seed=3), schedule.depths(5, 40, seed=3)
    assert few == [row[:2] for row in many[:10]], "whatever else is drawn"
    assert few == schedule.depths(2, 10, seed=3) != schedule.depths(2, 10, seed=4)
    assert {depth for row in many for depth in row} == set(range(1, 8))
    by_turn = schedule._replace(update="turn").depths(5, 40, seed=3)
    assert by_turn == [many[0]] * 40, "the first draw of each row is kept"
    drawn = [depth for (depth,) in Schedule.parse("1|16").depths(1, 2000)]
    assert set(drawn) == {1, 16} and 900 < drawn.count(1) < 1100


def test_schedules_are_read_and_named():
    for name in ("4", "1-7", "1|16", "2|3|9", "1-16"):
        assert Schedule.parse(name).name == name
    assert Schedule.parse("16|1").choices == (1, 16) and Schedule.parse("3-4").name == "3|4"
    assert Schedule.parse("4").mode == "fixed" and Schedule.parse("1-4").mode == "token"
    assert within(Schedule.parse("1|16"), CONFIG).choices == (1, 4)
    for text in ("", "0-3", "7-1", "deep", "1|", "0"):
        with pytest.raises(ValueError, match="no schedule of depths"):
            Schedule.parse(text)


def test_recomputed_tokens_have_the_same_mean_depth():
    for text, rows in (("1-7", 1), ("1|16", 1), ("1-16", 8)):
        depths, among = Schedule.parse(text).depths(rows, 80), range(16, 80)
        for n in (1, 2, 7, 64, 100):
            found = sample(depths, among, n)
            assert len(set(found)) == len(found) >= min(n, 64) and set(found) <= set(among)
            assert mean_depth(depths, found) == pytest.approx(mean_depth(depths, among), rel=0.05)
    assert len(sample([[4]] * 10, range(2, 10), 1)) == 1


def test_the_deepest_rise_and_fall_and_the_last_token_are_checked():
    depths = [[1, 1], [7, 1], [6, 1], [2, 2], [2, 1], [3, 1]]
    assert jumps(depths, [0], range(2, 6)) == [3, 5], "a rise before those that count is none of them"
    assert jumps(depths, [0, 1], range(1, 6)) == [1, 3, 4, 5]
    assert jumps([[4]] * 5, [0], range(1, 5)) == [4]


def test_every_plan_ends_where_the_context_does_and_is_half_prompt():
    schedules = [Schedule.parse(text) for text in ("1-7", "1|16", "1-16")]
    for context in (8, 64, 512):
        for plan in plans([1, 4, 16], schedules, 2, context, 64):
            assert plan.start + len(plan.depths) == context and plan.start >= context // 2 and plan.counted
        assert len({plan.start for plan in plans([1], schedules, 2, context, 64) if plan.schedule.mode == "token"}) == 1


def test_targets_are_the_base_models_at_its_longest_context():
    varying = [Schedule.parse("1-7")]
    sizes = [(context, batch) for context in (64, 512) for batch in (1, 8, 3)]
    cells = [
        {"context": context, "batch": batch, "depth": depth, "depth_update": update, "speedup": 20.0}
        for context, batch in sizes
        for depth, update in (("4", "fixed"), ("1-7", "token"), ("1-7", "turn"))
    ]
    once = [{"context": context, "batch": batch, "prefill": {"speedup": 1.5}} for context, batch in sizes]
    found = SimpleNamespace(
        config=HRMConfig.preset("base"), options=SimpleNamespace(varying=varying), cells=cells, once=once
    )
    assert targets(found)[:2] == [("batch 1, 1-7 by token", 20.0, 15.0), ("batch 8, 1-7 by token", 20.0, 40.0)]
    assert [what for what, *_ in targets(found)[2:]] == ["batch 1, prefill", "batch 8, prefill", "batch 3, prefill"]
    found.config = CONFIG
    assert targets(found) == []


def test_strict_makes_a_missed_target_an_error(run, monkeypatch):
    monkeypatch.setattr(bench.generate, "targets", lambda found: [("batch 2", 3.0, 2.5), ("batch 4", 2.0, 2.5)])
    few = ["--tokens", "2", "--varying", "2", "--depths", "2", "--no-save"]
    status, output, summary = run(*few)
    assert status == 0 and summary["targets_missed"] == ["batch 4: 2.00x, at least 2.5x"]
    assert "batch 2: 3.00x, at least 2.5x: met" in output and "2.00x, at least 2.5x: MISSED" in output
    assert run(*few, "--strict")[0] == 1


def test_a_plot_is_drawn_and_nothing_saved_where_that_is_said(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "generate.png"
    status, output, _ = run("--contexts", "8", "16", "--tokens", "2", "--no-save", "--plot", str(path))
    assert status == 0 and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path] and "appended" not in output


def test_defaults_are_no_more_than_the_model_can_do(checkpoint):
    options, _ = bench.generate.arguments(["--checkpoint", checkpoint, "--device", "cpu"])
    assert options.contexts == [16] and options.depths == [1, 4] and options.batches == [1, 8]
    assert [schedule.choices for schedule in options.varying] == [(1, 2, 3, 4)]
    options, _ = bench.generate.arguments(["--checkpoint", checkpoint, "--device", "cpu", "--quick", "--tokens", "3"])
    assert options.tokens == 3 and options.batches == [1, 4] and options.seconds == 0.3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--contexts", "17"], "--contexts 17 is over block_size 16 of the model"),
        (["--contexts", "4"], "--contexts 4: at least 8 tokens"),
        (["--batches", "0"], "'0' is not a whole number of at least 1"),
        (["--depths", "5"], "depth 5 is over hrm_max_steps 4 of the model"),
        (["--varying", "1-9"], "depth 9 is over hrm_max_steps 4 of the model"),
        (["--varying", "deep"], "'deep' is no schedule of depths"),
        (["--seconds", "-1"], "'-1' is no number of seconds"),
        (["--fused"], "--fused: needs a CUDA device"),
        (["--checkpoint", "no/such/folder"], "no/such/folder"),
        (["--device", "tpu"], "--device 'tpu' is not to be had here"),
        (["--plot", "no/such/folder/a.png"], "there is no directory"),
    ],
)
def test_a_bad_option_is_one_clear_error(flags, words, checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", checkpoint, "--device", "cpu", *flags])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert words in captured.err.splitlines()[-1] and captured.err.count("error:") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [["--dtype", "float32"], ["--dtype", "bfloat16"], ["--fused"]])
def test_a_device_shows_its_kernels_and_the_time_of_a_step(capsys, flags):
    sizes = ["--model", "tiny", "--contexts", "32", "--batches", "1", "--tokens", "4", "--seconds", "0.1"]
    assert main([*sizes, "--no-save", *flags]) == 0
    (once,) = json.loads(capsys.readouterr().out.splitlines()[-1])["once"]
    assert once["device"]["step_ms"] > 0 and once["device"]["cached_kernels"] > 0
