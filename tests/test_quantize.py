"""hrm quantize: what is rounded and what is not, files that load as they were, a report that counts, clear refusals."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from checkpoint_helpers import flip_byte
from safetensors.torch import load_file, save_file
from small_models import thinker

import hrm_kernels
from hrm_kernels.packed import PackedWeights, linear, packed_weights
from hrm_model import HRMConfig, HRMForCausalLM, checkpoint, load_model, save_model
from hrm_model.atomic import CheckpointError
from hrm_model.cli import main
from hrm_model.quantization import Quantization, quantize
from hrm_model.quantized_files import _pack, _unpack
from hrm_model.quantized_report import compare, speeds, weight_bytes

pytest.importorskip("torchao")

EVERY = [
    ("int8", False),
    ("int8", True),
    ("int4", False),
    ("int4", True),
    ("fp8", False),
    ("bf16", False),
    ("fp16", False),
]
NAMES = [f"{to}{'-dynamic' if dynamic else ''}" for to, dynamic in EVERY]
every = pytest.mark.parametrize(("to", "dynamic"), EVERY, ids=NAMES)


def model(**shape):
    return thinker(dtype=torch.float32, **{"n_embd": 32} | shape)


def quantised(to: str, dynamic: bool = False, embedding: str | None = None, **shape):
    made = model(**shape)
    quantize(made, Quantization(to, dynamic, 16 if to == "int4" else None, embedding))
    return made


def ids(rows: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@every
def test_products_are_those_of_torchao(to, dynamic):
    made, x = quantised(to, dynamic), torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 3
    for weight in (made.input_blocks[0].mlp.up.weight, made.hrm_core.H_level.layers[0].attn.k_proj.weight):
        theirs = F.linear(x, weight if hrm_kernels.is_quantized(weight) else weight.float())
        torch.testing.assert_close(linear(x, weight), theirs, rtol=1e-5, atol=1e-5)
        rounding = (linear(x, weight) - F.linear(x, weight.dequantize().float())).abs().max()
        assert (rounding > 1e-3) == dynamic, "dynamic rounds activations, weight-only does not"


@torch.no_grad()
@every
def test_packed_copies_give_the_same_product(to, dynamic):
    weight, x = quantised(to, dynamic).output_blocks[0].mlp.down.weight, torch.randn(3, 128)
    packed = PackedWeights()
    with packed_weights(packed):
        found = [linear(x, weight) for _ in range(5)]
    assert packed.nbytes == 4 * weight.numel(), "from the third use on"
    for y in found:
        torch.testing.assert_close(y, linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@every
def test_only_the_weights_named_are_rounded_and_the_head_stays_float32(to, dynamic, tied):
    before, after = model(tie_embeddings=tied).state_dict(), quantised(to, dynamic, tie_embeddings=tied).state_dict()
    changed = {name for name, t in after.items() if hrm_kernels.is_narrow(t, torch.float32)}
    blocks = {name for name in before if name.endswith("proj.weight") or "mlp" in name}
    assert changed == blocks | {"wte.weight", "lm_head.weight"} and len(blocks) == 4 * 7
    for name in before.keys() - changed:
        assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name]), name
    for name in changed:
        off = (after[name].dequantize().float() - before[name]).norm() / before[name].norm()
        assert 0 < off < {"int8": 0.02, "int4": 0.15, "fp8": 0.05, "bf16": 0.01, "fp16": 0.001}[to], (name, off)


def test_the_embedding_can_be_left_alone():
    made = quantised("int8", embedding="float32")
    assert torch.equal(made.wte.weight, model().wte.weight) and made.wte.weight is made.lm_head.weight


@torch.no_grad()
@every
def test_a_saved_model_loads_with_the_same_logits_and_generates_the_same(to, dynamic, tmp_path):
    made = quantised(to, dynamic)
    save_model(made, tmp_path / "m")
    again, config = load_model(tmp_path / "m")
    assert again.quantization == made.quantization and config == made.config and not again.training
    assert torch.equal(again(ids()).logits, made(ids()).logits)
    cached, whole = (again.generate(ids(2, 4), 6, temperature=0, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)
    save_model(again, tmp_path / "n")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "mn")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_untied_and_learned_positions_survive_a_file(tmp_path):
    made = quantised("int4", tie_embeddings=False, use_rotary=False, use_swiglu=False, bias=True)
    save_model(made, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    assert torch.equal(again(ids()).logits, made(ids()).logits)
    assert not torch.equal(again.wte.weight.dequantize(), again.lm_head.weight.dequantize())


def test_another_dtype_is_that_of_activations_and_not_of_the_head(tmp_path):
    save_model(quantised("int8"), tmp_path / "m")
    narrow, _ = load_model(tmp_path / "m", dtype=torch.bfloat16)
    out = narrow(ids())
    assert out.logits.dtype == torch.bfloat16 and out.q_logits.dtype == torch.float32
    assert narrow.hrm_core.q_head.weight.dtype == torch.float32
    assert narrow.generate(ids(1, 4), 3, temperature=0).shape == (1, 7)


def test_two_numbers_of_four_bits_fill_a_byte():
    q = torch.arange(-8, 8, dtype=torch.int8).view(2, 8)
    assert _pack(q).dtype == torch.uint8 and _pack(q).shape == (2, 4) and torch.equal(_unpack(_pack(q)), q)


def test_the_file_shrinks_as_the_bits_do(tmp_path):
    sizes = {}
    for to in ("int8", "int4", "bf16"):
        save_model(quantised(to, n_embd=64), tmp_path / to)
        sizes[to] = sum(t.nbytes for t in load_file(tmp_path / to / "model.safetensors").values())
    everything = 4 * model(n_embd=64).num_parameters()
    assert sizes["bf16"] < 0.52 * everything and sizes["int8"] < 0.32 * everything
    assert sizes["int4"] < 0.25 * everything, "4 bits, 5 bytes a group of 16"
    assert weight_bytes(quantised("int8", n_embd=64)) < 0.32 * everything


def test_a_model_agrees_with_itself_and_the_report_counts_positions():
    same, made = model(), quantised("int4")
    windows = [ids(1, 20)[0].tolist(), ids(1, 9)[0].tolist()]
    done = []
    found = compare(same, model(), windows, done.append).to_dict()
    assert done == [19, 8] and found["positions"] == 27
    assert found["top1_agreement"] == found["step_agreement"] == 1 and abs(found["kl_nats"]) < 1e-9
    assert found["perplexity"][0] == found["perplexity"][1] and 1 < found["mean_steps"][0] < 5
    found = compare(same, made, windows, done.append).to_dict()
    assert found["kl_nats"] > 1e-3 and found["top1_agreement"] < 1


@torch.no_grad()
def test_the_report_is_what_each_prefix_run_alone_says():
    a, b = model(), quantised("int4")  # rounded activations would make a step of 1e-3 of a difference of 1e-7
    window = ids(1, 10)[0].tolist()
    found = compare(a, b, [window], lambda n: None).to_dict()
    outs = [[m(torch.tensor([window[:t]])) for t in range(1, 10)] for m in (a, b)]
    p, q = (torch.stack([o.logits[0, -1] for o in of]).log_softmax(-1).double() for of in outs)
    steps = [torch.tensor([int(o.executed_steps) for o in of]) for of in outs]
    assert found["kl_nats"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found["step_agreement"] == float((steps[0] == steps[1]).double().mean())
    nll = -p.gather(1, torch.tensor(window[1:])[:, None]).mean()
    assert found["perplexity"][0] == pytest.approx(math.exp(nll), rel=1e-5)


def test_speeds_are_of_both_and_copies_are_counted():
    times = speeds([model(), quantised("int8")], ids(1, 6)[0].tolist(), 4, 2, rounds=1)
    assert all(one["decode_tokens_per_s"] > 0 and one["prefill_tokens_per_s"] > 0 for one in times)
    assert times[0]["copy_bytes"] == 0, "float32 matrices this small are not packed"
    assert times[1]["copy_bytes"] > 0


@pytest.fixture
def source(tiny_model, tiny_dataset, tmp_path):
    """A model of 61 ids in float32, on disk, and the dataset that it may be measured on."""
    save_model(model(block_size=16), tmp_path / "m")
    return str(tmp_path / "m"), str(tiny_dataset)


def command(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments)])


def test_the_command_writes_a_folder_and_reports_on_the_validation_split(source, capsys):
    path, data = source
    assert command(path, "--to", "int8", "--data", data, "--windows", 2, "--new-tokens", 4) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert told["out"] == f"{path}-int8" and told["positions"] == 32 and told["bytes"][1] < told["bytes"][0]
    assert "perplexity" in printed and "halting head float32" in printed
    assert main(["info", f"{path}-int8"]) == 0
    printed = capsys.readouterr().out
    assert "quantised: int8, weight-only" in printed and "whole: size and sha256 of 2 files" in printed
    assert command(path, "--to", "int8", "--data", data) == 1
    assert "already exists" in capsys.readouterr().err


def test_text_can_be_held_out_instead(small_model, tmp_path, capsys):
    torch.manual_seed(0)
    save_model(HRMForCausalLM(HRMConfig.from_dict(json.loads(small_model.read_text()))), tmp_path / "m")
    text = tmp_path / "text"
    text.write_text("Some text that nobody trained on, in two windows of sixteen tokens each, or three at most.")
    asked = tmp_path / "m", "--to", "bf16", "--new-tokens", 2, "--text", text
    assert command(*asked) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["positions"] > 16
    text.write_text("a")
    assert command(*asked, "--overwrite") == 1
    assert "give at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "fp8", "--dynamic"], "CUDA GPU of compute capability 8.9"),
        (["--to", "bf16", "--dynamic"], "which bf16 weights do not"),
        (["--to", "int4", "--group-size", "64"], "--group-size 16 or 32"),
        (["--to", "int4", "--group-size", "7"], "none of 16, 32"),
        (["--to", "int8", "--group-size", "32"], "is for int4"),
        (["--to", "int8", "--embedding", "bf16"], "none of int8, float32"),
        (["--to", "int8", "--windows", "0"], "--windows 0 must be at least 1"),
    ],
)
def test_what_there_is_not_is_named_and_nothing_is_written(source, tmp_path, capsys, arguments, message):
    if "fp8" in arguments and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        arguments = [*arguments, "--device", "cpu"]
    assert command(source[0], *arguments, "--no-report") == 1
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert command(tmp_path / "notes", "--to", "int8") == 1
    assert "is no model" in capsys.readouterr().err
    assert command(tmp_path / "nowhere", "--to", "int8") == 1
    assert "there is no checkpoint" in capsys.readouterr().err


def test_weights_that_do_not_fit_the_type_are_named():
    broken = model()
    with torch.no_grad():
        broken.input_blocks[0].mlp.up.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"mlp\.up\.weight holds numbers that are not finite"):
        quantize(broken, Quantization("int8"))
    large = model()
    with torch.no_grad():
        large.output_blocks[0].attn.c_proj.weight[0, 0] = 7e4
    with pytest.raises(ValueError, match=r"over float16's 65504; take bf16"):
        quantize(large, Quantization("fp16"))
    assert not any(hrm_kernels.is_narrow(p, torch.float32) for p in large.parameters())


def test_twice_is_refused_and_so_are_converting_and_training(source, tiny_dataset, tmp_path, capsys):
    assert command(source[0], "--to", "int8", "--no-report") == 0
    path = f"{source[0]}-int8"
    assert command(path, "--to", "int4", "--no-report", "--group-size", 16) == 1
    assert "quantised already (int8, weight-only" in capsys.readouterr().err
    assert main(["convert", path, str(tmp_path / "c")]) == 1
    assert "stays so" in capsys.readouterr().err and not (tmp_path / "c").exists()
    from train.pretrain import main as pretrain

    run = ["--recipe", "tiny", "--init-from", path, "--data", str(tiny_dataset), "--out", str(tmp_path / "run")]
    assert pretrain([*run, "--steps", "1", "--device", "cpu"]) == 1
    assert "cannot be trained" in capsys.readouterr().err


def test_damage_another_layout_and_an_unknown_quantisation_are_seen(tmp_path):
    save_model(quantised("int8"), tmp_path / "m")
    flip_byte(tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match="its bytes were changed"):
        load_model(tmp_path / "m")
    save_model(quantised("int8"), tmp_path / "m", overwrite=True)
    (tmp_path / "m" / "manifest.json").unlink()
    weights, name = load_file(tmp_path / "m" / "model.safetensors"), "wte.weight.q"
    save_file({k: v.clone() for k, v in weights.items() if k != name}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: wte\.weight\.q"):
        load_model(tmp_path / "m")
    changed = {k: v.clone() for k, v in weights.items()} | {name: weights[name].float()}
    save_file(changed, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wte\.weight\.q is torch\.float32, its config wants torch\.int8"):
        load_model(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization"]["to"] = "int3"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no quantisation to 'int3'"):
        load_model(tmp_path / "m")


WITHOUT = """
import sys
sys.modules["torchao"] = None
from hrm_model import load_model
try:
    load_model(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_without_torchao_the_extra_is_named_and_bf16_needs_none(tmp_path):
    for to, message in (("int8", 'pip install "hrm-kernels[quant]"'), ("bf16", "")):
        save_model(quantised(to), tmp_path / to)
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, tmp_path / to], capture_output=True, text=True, check=True
        )
        assert message in done.stdout and bool(message) == bool(done.stdout)


@torch.no_grad()
def test_kernels_leave_quantised_weights_to_the_reference_or_refuse_by_name():
    made, given = quantised("int8"), ids()
    expected = made(given, given, return_logits=True)
    with hrm_kernels.use_backend("reference", rms_norm="triton", attention="triton", linear_cross_entropy="triton"):
        found = made(given, given, return_logits=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    with hrm_kernels.use_backend("triton"), pytest.raises(hrm_kernels.BackendError, match="quantised"):
        made(given)
    assert "quantised" in made.hrm_core.why_not_plain() and model().hrm_core.why_not_plain() is None


def test_generate_and_depth_read_a_quantised_folder(tmp_path, capsys):
    from small_models import speaker

    from hrm_model import get_tokenizer

    says = get_tokenizer().encode("Hello there.")
    made = speaker(says)
    quantize(made, Quantization("int8"))
    save_model(made, tmp_path / "m")
    assert main(["generate", str(tmp_path / "m"), "-p", "a", "--temperature", "0", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == "Hello there."
    page = str(tmp_path / "page.html")
    assert main(["depth", str(tmp_path / "m"), "--text", "b", "--out", page, "--no-png"]) == 0
    assert "mean steps" in capsys.readouterr().out


def test_what_is_read_back_otherwise_is_not_put_in_place(source, tmp_path, monkeypatch, capsys):
    save = checkpoint.save_file

    def faulty(tensors, path, **options):  # a disk that changes a number
        tensors["ln_f.weight"][0] += 1
        save(tensors, path, **options)

    assert command(source[0], "--to", "int8", "--no-report") == 0
    before = (tmp_path / "m-int8" / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", faulty)
    for arguments in (["--out", tmp_path / "new"], ["--overwrite"]):
        assert command(source[0], "--to", "int8", "--no-report", *arguments) == 1
        assert "read again, gives logits that are off by up to" in capsys.readouterr().err
    assert (tmp_path / "m-int8" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m-int8"}


def test_a_run_that_goes_on_is_compared_with_its_own_quantised_weights(small_model, tmp_path, monkeypatch, capsys):
    config = HRMConfig.from_dict(json.loads(small_model.read_text()))
    torch.manual_seed(0)
    first, second = (HRMForCausalLM(config) for _ in range(2))
    for each in (first, second):
        for p in each.parameters():
            p.data *= 20 if p.dim() > 1 else 1
    checkpoint.save_checkpoint(tmp_path / "run", 1, first, None, {})

    class Standard:  # the run saves while the text is read
        @property
        def buffer(self):
            checkpoint.save_checkpoint(tmp_path / "run", 2, second, None, {})
            return io.BytesIO(b"Some text that nobody trained on, of a few tokens.")

    monkeypatch.setattr(sys, "stdin", Standard())
    assert command(tmp_path / "run", "--to", "fp16", "--text", "-", "--new-tokens", 2) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kl_nats"] < 1e-3
    assert load_model(tmp_path / "run-fp16")[0].wte.weight.equal(first.wte.weight.half())


@pytest.mark.parametrize("written", ["m/", ".", "m/model.safetensors"])
def test_the_folder_to_write_is_beside_its_source_however_that_is_written(source, tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path / "m" if written == "." else tmp_path)
    assert command(written, "--to", "bf16", "--no-report") == 0
    out = tmp_path / "m" / "model-bf16" if written.endswith("safetensors") else tmp_path / "m-bf16"
    assert load_model(out)[0].quantization.to == "bf16"


@torch.no_grad()
@every
def test_rows_of_zeros_and_of_one_number_stay_what_they_are(to, dynamic):
    made = model()
    weight = made.input_blocks[0].mlp.up.weight
    weight[0], weight[1], weight[2] = 0, 3, -2
    made.hrm_core.H_level.layers[0].mlp.down.weight.zero_()
    quantize(made, Quantization(to, dynamic, 16 if to == "int4" else None))
    found = made.input_blocks[0].mlp.up.weight.dequantize().float()[:3, :1]
    torch.testing.assert_close(found, torch.tensor([[0.0], [3.0], [-2.0]]), rtol=0.01, atol=0)
    assert (
        not made.hrm_core.H_level.layers[0].mlp.down.weight.dequantize().any() and made(ids()).logits.isfinite().all()
    )


def test_a_source_that_diverged_is_not_written(tmp_path, capsys):
    broken = model()
    with torch.no_grad():
        broken.ln_f.weight[0] = math.nan
    save_model(broken, tmp_path / "m")
    assert command(tmp_path / "m", "--to", "int8", "--no-report") == 1
    assert "logits are not finite" in capsys.readouterr().err and not (tmp_path / "m-int8").exists()


def test_a_model_of_characters_is_refused(tmp_path, capsys):
    config = HRMConfig.preset("characters-tiny")
    save_model(HRMForCausalLM(config), tmp_path / "m")
    assert command(tmp_path / "m", "--to", "int8", "--no-report") == 1
    assert "is one of characters" in capsys.readouterr().err and not (tmp_path / "m-int8").exists()


@torch.no_grad()
@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.float16), ("fp16", torch.bfloat16), ("bf16", torch.float64)])
def test_half_weights_compute_in_any_other_type(to, dtype, tmp_path):
    save_model(quantised(to), tmp_path / "m")
    made, wide = (load_model(tmp_path / "m", dtype=each)[0] for each in (dtype, torch.float32))
    out = made(ids(), ids(), force_steps=2, return_logits=True)
    assert out.logits.dtype == dtype
    torch.testing.assert_close(out.logits.float(), wide(ids(), force_steps=2).logits, rtol=0.1, atol=0.5)
    assert made.generate(ids(1, 4), 3, temperature=0).shape == (1, 7)


def test_a_report_on_a_model_that_is_all_wrong_says_so():
    wrong = model()
    with torch.no_grad():
        wrong.ln_f.weight *= 1e4
    found = compare(wrong, model(), [ids(1, 20)[0].tolist()], lambda n: None).to_dict()
    assert found["perplexity"][0] == math.inf and found["nats_per_token"][0] > 700


def test_other_cycles_of_a_quantised_model_stay_quantised(tmp_path):
    made = quantised("int8")
    other = made.with_cycles(1, 3)
    save_model(other, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    assert again.quantization == made.quantization and again(ids()).logits.equal(other(ids()).logits)


def test_transformers_refuses_a_quantised_folder_instead_of_new_weights(tmp_path):
    hf = pytest.importorskip("hrm_model.hf", exc_type=ImportError)
    save_model(quantised("int8"), tmp_path / "m")
    with pytest.raises(ValueError, match=r"written by hrm quantize .*take hrm_model\.load_model"):
        hf.CosmicFishHRMForCausalLM.from_pretrained(tmp_path / "m")
