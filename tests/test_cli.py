"""The command line: what it finds, what it prints, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from chat_helpers import ROOT, SHAPE

from hrm_kernels.version import __version__
from hrm_model import HRMConfig, HRMForCausalLM, get_tokenizer, save_model
from hrm_model.checkpoint import save_checkpoint
from hrm_model.cli import COMMANDS, help_of, main, with_dashes
from hrm_model.generate import Event

TOKENIZER = get_tokenizer()
WINDOW = SHAPE["block_size"]


@pytest.fixture(scope="module")
def made() -> HRMForCausalLM:
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE))
    with torch.no_grad():  # so that depth depends on the text
        model.hrm_core.q_head.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory) -> str:
    return str(save_model(made, tmp_path_factory.mktemp("saved") / "model"))


@pytest.fixture
def hrm(capsys):
    """Runs a command line in this process: (status, what it printed, what it said on standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            status = main(list(argv))
        except SystemExit as leaving:  # argparse's way
            status = leaving.code
        return status, *capsys.readouterr()

    return run


def start(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hrm_model", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# The command hrm


def test_help_lists_every_command_and_needs_no_torch():
    code = "import sys; from hrm_model.cli import main; main([]); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"    {name}" in done.stdout and help_of(name)[:20] in done.stdout
    assert "python train/pretrain.py" in done.stdout


def test_version(hrm):
    assert hrm("--version") == (0, f"hrm {__version__}\n", "")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ask"])  # whose run is another script's
def test_without_a_checkpoint_it_says_how_to_get_one(hrm, name, tmp_path):
    more = {"depth": ["--text", "x"], "convert": [str(tmp_path / "out")], "quantize": ["--to", "int8"]}
    more |= {"eval": ["--text", "x"], "analyze": ["--text", "x"]}
    for argv, code in (([name], 2), ([name, str(tmp_path / "none"), *more.get(name, [])], 1)):
        status, out, err = hrm(*argv)
        assert status == code and not out and err.count("\n") == 1
        assert err.startswith("error: ") and "`python train/pretrain.py`" in err and "`hrm chat runs/tiny`" in err


def test_a_wrong_command_line_is_one_line_with_the_nearest_right_word(hrm, saved):
    for argv, message in (
        (["generat"], "unknown command 'generat'; did you mean generate? see hrm --help"),
        (["info", saved, "--jsn"], "unknown argument '--jsn'; did you mean --json? see hrm info --help"),
        (["generate", saved, "--seed", "x"], "argument --seed: invalid int value: 'x'; see hrm generate --help"),
        (["chat", saved, "--no-history", "--max_history", "1"], "not allowed with argument"),
    ):
        status, out, err = hrm(*argv)
        assert status == 2 and not out and err.count("\n") == 1 and message in err


def test_a_negative_number_or_range_is_no_flag():
    given = ["--halt-bias", "-2:2:0.5", "--halt_bias", "-inf", "-x", "-1", "--", "--y", "-.5"]
    assert with_dashes(given) == ["--halt-bias=-2:2:0.5", "--halt-bias=-inf", "-x", "-1", "--", "--y", "-.5"]


def test_flags_may_be_written_as_the_published_scripts_do(hrm, saved):
    assert with_dashes(["--max_tokens=a_b", "x_y", "--", "--a_b"]) == ["--max-tokens=a_b", "x_y", "--", "--a_b"]
    published = (
        "--max_tokens 3 --min_tokens 3 --top_k 5 --top_p 0.9 --repetition_penalty 1.2 --temperature 0.5 --seed 1"
    )
    published += " --human_prefix Human: --assistant_prefix Assistant: --instruction x --no_history --debug"
    published += " --force_hrm_steps 2 --show_hrm_steps --halt_bias 0 --prompt Hi"
    status, out, err = hrm("chat", saved, *published.split())
    assert status == 0 and out.startswith("{2}") and "[prompt: " in err


def test_a_damaged_checkpoint_ends_in_one_line(hrm, made, tmp_path):
    path = save_model(made, tmp_path / "model")
    (path / "model.safetensors").write_bytes(b"x")
    status, out, err = hrm("info", str(path))
    assert status == 1 and not out and err.startswith("error: ") and "truncated" in err and err.count("\n") == 1


def test_a_model_that_knows_no_text_is_refused(hrm, tmp_path):
    other = save_model(HRMForCausalLM(HRMConfig(**SHAPE | {"vocab_size": 61})), tmp_path / "model")
    for argv in (["generate", str(other), "-p", "x"], ["chat", str(other), "--prompt", "x"]):
        status, _, err = hrm(*argv)
        assert status == 1 and "has vocab_size 61, and text needs GPT-2's 50257" in err


def test_a_kernel_that_is_required_and_missing_is_an_error(hrm, saved, monkeypatch):
    monkeypatch.setattr("hrm_kernels.backend.INTERPRETED", False)
    if torch.cuda.is_available():
        pytest.skip("kernels can run here")
    status, _, err = hrm("generate", saved, "-p", "x", "--fused=require")
    assert status == 1 and err.startswith("error: --fused=require: no kernel can run for")


def test_a_reader_that_goes_away_ends_it_quietly(saved):
    process = start("generate", saved, "-p", "a", "--max-new-tokens", "100000")
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""


def test_ctrl_c_stops_it_with_one_line(saved):
    process = start("generate", saved, "-p", "a", "--max-new-tokens", "100000")
    process.stdout.read(1)  # it is at work
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read().startswith("stopped; ")
    process = start("chat", saved, stdin=subprocess.PIPE)
    process.stdin.write("\n/stats\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read().splitlines()[-1] == "stopped"


# hrm generate


def completions(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_one_prompt_prints_its_continuation_and_counts(hrm, saved):
    status, out, err = hrm("generate", saved, "-p", "def main(", "--max-new-tokens", "5", "--force-steps", "2")
    assert status == 0 and out.endswith("\n")
    assert err.startswith("5 tokens, ") and err.endswith("mean 2.00 steps (2:5)\n")


def test_json_tells_every_token_and_the_text_is_theirs(hrm, saved):
    argv = ["generate", saved, "-p", "a", "--num-samples", "3", "--max-new-tokens", "6", "--top-k", "3"]
    status, out, _ = hrm(*argv, "--json")
    found = completions(out)
    assert status == 0 and [f["sample"] for f in found] == [0, 1, 2] and len({f["text"] for f in found}) > 1
    for f in found:
        assert f["prompt"] == "a" and f["finish"] == "length"
        assert f["text"] == TOKENIZER.decode(f["tokens"])
        assert len(f["logprobs"]) == len(f["steps"]) == len(f["tokens"]) == 6 and max(f["logprobs"]) < 0
    shown = hrm(*argv)[1]
    for number, f in enumerate(found, 1):
        header, text = f"--- {number} of 3: 'a', sample {number}\n", f["text"]
        assert header + text + "\n" * (not text.endswith("\n")) in shown


def test_a_completion_depends_on_neither_cache_nor_batch(hrm, saved):
    argv = ["generate", saved, "-p", "one", "-p", "two and three", "--max-new-tokens", "8", "--top-k", "5", "--json"]
    texts = [
        [(f["prompt"], f["tokens"], f["steps"]) for f in completions(hrm(*argv, *more)[1])]
        for more in ([], ["--no-cache"], ["--batch-size", "1"])
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_finished_completions_are_printed_whatever_ends_it(hrm, saved, monkeypatch, error):
    def events(*_, **__):
        for row, text, finish in ((0, "zero", None), (2, "two", "length"), (1, "one", None), (3, "three\n", "stop")):
            yield Event(row, 7, text, -1.0, 1, finish, False)
        raise error

    monkeypatch.setattr("hrm_model.generate.stream", events)
    argv = ["generate", saved, "-p", "a", "--num-samples", "4"]
    status, out, err = hrm(*argv)
    assert out == (
        "--- 1 of 4: 'a', sample 1\nzero\n--- 3 of 4: 'a', sample 3\ntwo\n--- 4 of 4: 'a', sample 4\nthree\n"
    )
    interrupted = isinstance(error, KeyboardInterrupt)
    assert status == (130 if interrupted else 1)
    assert err.startswith("stopped; 4 tokens" if interrupted else "error: broken")
    assert [(f["sample"], f["text"]) for f in completions(hrm(*argv, "--json")[1])] == [(2, "two"), (3, "three\n")]


def test_a_file_has_a_prompt_a_line_or_is_one(hrm, saved, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028still two\n\n".encode())
    argv = ["generate", saved, "--max-new-tokens", "1", "--json", "--file"]
    assert [f["prompt"] for f in completions(hrm(*argv, str(path))[1])] == ["one", "two\u2028still two"]
    assert [f["prompt"] for f in completions(hrm(*argv, str(path), "--whole", "-p", "first")[1])] == [
        "first",
        "one\r\ntwo\u2028still two\n\n",
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    assert [f["prompt"] for f in completions(hrm(*argv, "-")[1])] == ["from a pipe"]


def test_end_of_text_in_a_prompt_is_text(hrm, saved):
    (found,) = completions(hrm("generate", saved, "-p", "a<|endoftext|>b", "--max-new-tokens", "1", "--json")[1])
    assert found["prompt"] == "a<|endoftext|>b"


def test_a_stop_string_ends_a_completion_before_it(hrm, saved):
    argv = ["generate", saved, "-p", "a", "--max-new-tokens", "8", "--json"]
    (free,) = completions(hrm(*argv)[1])
    stop = free["text"][4:7]
    (stopped,) = completions(hrm(*argv, "--stop", stop)[1])
    assert stopped["finish"] == "stop" and stopped["text"] == free["text"][: free["text"].index(stop)]


def test_steps_are_shown_by_marks_where_there_are_no_colours(hrm, saved):
    argv = ["generate", saved, "-p", "a", "--max-new-tokens", "12"]
    (found,) = completions(hrm(*argv, "--json")[1])
    status, out, err = hrm(*argv, "--show_hrm_steps")
    assert status == 0 and out.startswith(f"{{{found['steps'][0]}}}") and "{n} stands before text" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "there is no prompt; give -p TEXT, or --file FILE"),
        ("-p one -p ", "prompt 2 of 2 is empty; give at least one character"),
        ("-p a\udcffb", "prompt 1 is not UTF-8: byte 0xff at byte 1"),
        ("--file none.txt", "none.txt: No such file or directory"),
        ("--file .", ".: Is a directory"),
        ("--file latin1.txt", r"latin1.txt is not UTF-8: byte 0xe9 at offset 5 of 7; convert it first, e.g. iconv"),
        ("--file wide.txt", "byte 0xff at offset 0 of 8; convert it first, e.g. iconv -f utf-16"),
        ("--file gap.txt", "line 2 of gap.txt is empty; every line is a prompt"),
        ("--file zero.txt", "zero.txt has no text"),
        ("--file zero.txt --whole", "prompt 1 of 1 is empty"),
        ("-p a --whole", "--whole is about a file"),
        (
            "--file long.txt",
            f"prompt 1 has 200 tokens and the model's window holds {WINDOW}; shorten it, or pass --keep",
        ),
        ("-p a --temperature -1", "--temperature -1.0 must be finite and at least 0"),
        ("-p a --top-k 99999", "error: --top-k 99999 is above 50257, the tokens there are; 0 keeps all"),
        ("-p a --top-k -1", "error: --top-k -1 must be an integer of at least 1, or 0 for all"),
        ("-p a --top-p 0", "--top-p 0.0 is outside"),
        ("-p a --max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
        ("-p a --min-new-tokens 101", "--min-new-tokens 101 must be in 0..100"),
        ("-p a --num-samples 0", "--num-samples 0 must be at least 1"),
        ("-p a --batch-size 0", "--batch-size 0 must be at least 1"),
        ("-p a --seed -1", "--seed -1 must be at least 0"),
        ("-p a --stop ", "--stop '' would end every completion at once"),
        ("-p a --force-steps 4", "--force-steps 4 is more than the 3 that this model takes at most; choose 1 to 3"),
        ("-p a --force-steps 0", "--force-steps 0 must be at least 1"),
        ("-p a --max-steps 0", "--max-steps 0 must be at least 1"),
        ("-p a --halt-bias nan", "--halt-bias nan is no number"),
        ("-p a --device warp", "--device 'warp' is not to be had here"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line_with_the_remedy(hrm, saved, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"one\nt\xe9\xe8")
    (tmp_path / "wide.txt").write_text("one", encoding="utf-16")
    (tmp_path / "gap.txt").write_text("one\n\ntwo\n")
    (tmp_path / "zero.txt").write_text("")
    (tmp_path / "long.txt").write_text(" a" * 200 + "\n")
    status, out, err = hrm("generate", saved, *argv.split(" ")[not argv :])
    assert (status, out) == (1, "") and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_keep_last_continues_the_end_of_a_long_prompt(hrm, saved):
    argv = ["generate", saved, "--max-new-tokens", "2", "--json", "-p"]
    (long,) = completions(hrm(*argv, "b" + " a" * 200, "--keep-last")[1])
    (whole,) = completions(hrm(*argv, " a" * WINDOW)[1])
    assert long["tokens"] == whole["tokens"]


def test_deeper_than_the_model_where_both_are_asked_for(hrm, saved):
    argv = ["generate", saved, "-p", "a", "--max-new-tokens", "2", "--json", "--force-steps", "5", "--max-steps", "5"]
    assert completions(hrm(*argv)[1])[0]["steps"] == [5, 5]


def test_bfloat16_generates(hrm, saved):
    status, out, _ = hrm("generate", saved, "-p", "a", "--max-new-tokens", "3", "--dtype", "bfloat16", "--json")
    assert status == 0 and len(completions(out)[0]["tokens"]) == 3


# hrm chat, without anyone typing


def test_prompts_of_a_file_are_conversations_of_their_own(hrm, saved, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("one\ntwo\none\n")
    argv = ["chat", saved, "--seed", "4", "--max-tokens", "5", "--prompts_file", str(path)]
    status, out, _ = hrm(*argv)
    answers = out.split("--- ")[1:]
    assert status == 0 and [a.split("\n")[0] for a in answers] == ["1 of 3: 'one'", "2 of 3: 'two'", "3 of 3: 'one'"]
    assert answers[0].partition("\n")[2] == answers[2].partition("\n")[2]
    assert hrm(*argv)[1] == out
    assert hrm("chat", saved, "--seed", "4", "--max-tokens", "5", "--prompt", "one")[1] == answers[0].partition("\n")[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "word " * 300], "tokens with its instruction, and the window holds 127"),
        (["--prompt", "x", "--human-prefix", ""], "'' is no label for a role"),
        (
            ["--prompt", "x", "--min-tokens", "9", "--max-tokens", "2"],
            "--min-new-tokens 9 is above --max-new-tokens 2; lower",
        ),
        (["--prompt", "x", "--seed", "-1"], "error: --seed -1 must be an integer of at least 0"),
        (["--prompt", "x", "--force_hrm_steps", "4"], "--force-steps 4 is more than the 3"),
        (["--prompt", "x", "--max-history", "-1"], "error: --max-history -1 must be an integer of at least 0"),
        (["--prompt", "x", "--max-steps", "9" * 12], "error: --max-steps 999999999999 needs more memory for a window"),
        (["--prompt", "x", "--human-prefix", "\udcff:"], "error: the label of questions is not UTF-8: byte 0xff"),
        (["--prompts-file", "none.txt"], "none.txt: No such file"),
    ],
)
def test_what_is_wrong_with_a_chat_is_one_line(hrm, saved, argv, message):
    status, out, err = hrm("chat", saved, *argv)
    assert (status, out) == (1, "") and err.count("\n") == 1 and message in err


# hrm info


def test_info_counts_every_parameter_once_and_knows_the_cache(hrm, saved, made):
    status, out, _ = hrm("info", saved, "--json")
    found = json.loads(out)
    parts = found["parameters"]
    assert status == 0 and sum(parts.values()) == 2 * parts["total"] and parts["total"] == made.num_parameters()
    assert parts["output head"] == 0, "tied"
    config, cache = made.config, found["cache"]["float32"]
    blocks = config.n_input_layers + config.hrm_max_steps * (config.blocks_per_step + config.n_output_layers)
    states = (2 + config.hrm_max_steps) * config.n_embd
    assert cache["bytes_per_token"] == 4 * (blocks * 2 * config.kv_heads * config.head_dim + states)
    assert cache["bytes_per_window"] == WINDOW * cache["bytes_per_token"]
    assert found["cache"]["bfloat16"]["bytes_per_token"] * 2 == cache["bytes_per_token"]
    step = found["flops_per_token"]
    assert step["3"] - step["2"] == pytest.approx(step["2"] - step["1"]) and step["1"] > 0
    assert found["config"] == config.to_dict() and found["training"] is None and "2 files" in found["files"]


def test_info_tells_step_and_losses_of_a_training_run(hrm, made, tmp_path):
    save_checkpoint(tmp_path / "run", 7, made, None, {"val_loss": 3.25, "run": {"steps": 9, "recipe": "tiny"}})
    status, out, _ = hrm("info", str(tmp_path / "run"))
    assert status == 0 and "training: step 7 of 9, recipe tiny, val loss 3.2500" in out
    assert "whole: size and sha256 of 4 files are those of manifest.json" in out
    assert f"{made.num_parameters():,} parameters" in out and "halting: head not trained ('published')" in out
    for name in ("embedding", "input blocks", "H level", "L level", "output blocks", "output head", "block_size"):
        assert name in out


def test_info_reads_a_published_file(hrm, made, tmp_path):
    torch.save({"model_state_dict": made.state_dict(), "config": SHAPE}, tmp_path / "model.pt")
    status, out, _ = hrm("info", str(tmp_path / "model.pt"), "--json")
    found = json.loads(out)
    assert status == 0 and found["name"] == "model.pt" and found["files"].startswith("one published file")


def test_what_a_terminal_cannot_show_does_not_end_a_command(saved):
    process = start(
        "generate", saved, "-p", "a", "--max-new-tokens", "40", "--temperature", "9",
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )  # fmt: skip
    assert process.wait(60) == 0 and process.stdout.read().isascii()
