"""A checkpoint becomes any other form, for transformers with tokenizer, card and source, and stays the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import same_bits

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hrm_model.hf
from hrm_model import HRMConfig, HRMForCausalLM, checkpoint, get_tokenizer, load_model, save_model
from hrm_model.cli import main
from hrm_model.hf.carry import carried_files

ROOT = Path(__file__).parents[1]
SHAPE = dict(n_embd=8, block_size=48, n_head=2, n_kv_head=1, n_input_layers=1, n_output_layers=1, hrm_H_layers=1)
SHAPE |= dict(hrm_L_layers=1, hrm_H_cycles=1, hrm_L_cycles=1, hrm_max_steps=3, halt_bias=0.0)
TEXT = "def main(argv):\n    return"

# As in a fresh machine: no checkout and no installed package of ours is found.
ALONE = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
try:
    import hrm_model
except ImportError:
    pass
else:
    raise SystemExit("hrm_model can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
batch = tokenizer([text, "x"], return_tensors="pt", padding=True)
said = model.generate(**batch, max_new_tokens=6, do_sample=False)
torch.save({"logits": model(**batch).logits, "said": said, "ids": batch["input_ids"]}, path + ".out")
"""


def with_vocabulary() -> HRMForCausalLM:
    torch.manual_seed(0)
    model = HRMForCausalLM(HRMConfig(**SHAPE)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.dim() > 1 else 1)  # so that logits differ and rounding shows
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_model(with_vocabulary(), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def exported(source) -> Path:
    """The Hugging Face folder, with code."""
    out = source.parent / "my-model"
    assert main(["convert", str(source), str(out), "--to", "hf", "--with-code"]) == 0
    return out


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(("safetensors", "hf", "pt"), "float32"), (("hf", "safetensors"), "bfloat16"), (("pt", "hf"), "float16")],
)
def test_every_form_becomes_every_other_and_keeps_its_weights(source, way, dtype, tmp_path, capsys):
    at = source
    for number, form in enumerate(way):
        out = tmp_path / (f"{number}.pt" if form == "pt" else str(number))
        assert main(["convert", str(at), str(out), "--to", form, "--dtype", dtype]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["form"] == form and told["dtype"] == dtype
        assert (told["logits_off"] == 0) is (number > 0 or dtype == "float32") and told["same_top"] > 0.9
        assert ("computed_logits_off" in told) is (dtype != "float32")
        at = out
    rounded = {name: t.to(getattr(torch, dtype)).float() for name, t in load_model(source)[0].state_dict().items()}
    assert same_bits(load_model(at)[0].state_dict(), rounded)


def test_transformers_reads_the_folder_without_running_what_it_carries(exported, source):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert type(theirs) is hrm_model.hf.CosmicFishHRMForCausalLM
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == get_tokenizer().encode(TEXT)
    ours, _ = load_model(source)
    with torch.no_grad():
        assert theirs(input_ids=ids).logits.equal(ours(ids).logits)
    found = theirs.generate(ids, max_new_tokens=8, do_sample=False)
    assert found[0].tolist() == ours.generate(ids, 8, temperature=0)[0].tolist()
    assert json.loads((exported / "config.json").read_text())["dtype"] == "float32"


def test_the_folder_works_where_the_package_is_not(exported, source):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"HF_HOME": str(exported.parent / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported), TEXT], cwd="/", env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(f"{exported}.out")
    ours, _ = load_model(source)
    n = int((found["ids"][1] == get_tokenizer().eot).sum())
    assert n == found["ids"].shape[1] - 1
    with torch.no_grad():
        expected = ours(found["ids"][:1]).logits
    torch.testing.assert_close(found["logits"][:1], expected, rtol=0, atol=1e-5)
    for row, start in ((0, 0), (1, n)):
        alone = ours.generate(found["ids"][row : row + 1, start:], 6, temperature=0)
        assert found["said"][row, start:].tolist() == alone[0].tolist()


def test_carried_code_is_ours_but_for_its_imports():
    files = carried_files()
    assert not any("kernels_kernels" in name for name in files)
    for name, flat in files.items():
        module = name.removesuffix(".py").replace("hrm_model_hf_", "hrm_model/hf/")
        module = module.replace("hrm_model_", "hrm_model/").replace("hrm_kernels_", "hrm_kernels/")
        known = {"hrm_kernels": "hrm_kernels/__init__", "configuration_cosmicfish_hrm": "hrm_model/hf/configuration"}
        known["modeling_cosmicfish_hrm"] = "hrm_model/hf/modeling"
        text = (ROOT / f"{known.get(module, module)}.py").read_text(encoding="utf-8")
        foreign = [
            line for line in flat.splitlines()
            if line not in text and "import" not in line.lower() and not line.startswith("_TRITON_INSTALLED")
        ]  # fmt: skip
        assert foreign in ([], ["if TYPE_CHECKING:  # by these lines transformers finds the files to copy"]), name


def test_pipelines_take_the_folder(exported, source):
    say = pipeline("text-generation", model=str(exported), device="cpu")
    ours, tokenizer = load_model(source)[0], get_tokenizer()
    found = say([TEXT, "x"], max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for text, one in zip((TEXT, "x"), found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        new = ours.generate(ids, 5, temperature=0)[0, ids.shape[1] :].tolist()
        assert one[0]["generated_text"] == tokenizer.decode([i for i in new if i != tokenizer.eot])
    chat = say([{"role": "user", "content": "Hi"}], max_new_tokens=2, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_ids_that_no_text_has_are_never_drawn(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model.lm_head.weight[50257:] = 10 * model.lm_head.weight[:47]
    for config in (model.generation_config, None):
        if config is None:
            model.generation_config.suppress_tokens = None  # as of a published folder
        ids = model.generate(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=True, eos_token_id=None)
        assert ids.max() < 50257


def test_the_folder_is_a_checkpoint_for_every_command(exported, capsys):
    assert main(["info", str(exported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["n_embd"] == 8
    assert main(["generate", str(exported), "-p", "def", "--max-new-tokens", "3"]) == 0
    assert main(["chat", str(exported), "--prompt", "Hi", "--instruction", "", "--max-new-tokens", "3"]) == 0


def test_the_card_says_what_is_known(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    parameters = load_model(exported)[0].num_parameters()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"{parameters:,}, stored as float32" in card
    assert "48 tokens" in card and "trust_remote_code" in card and "# my-model" in card


def test_a_large_model_in_parts_loads(source, tmp_path):
    model = hrm_model.hf.CosmicFishHRMForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 1
    assert same_bits(load_model(tmp_path / "parts")[0].state_dict(), load_model(source)[0].state_dict())


def test_push_uploads_the_folder(exported, source, monkeypatch, capsys, tmp_path):
    import huggingface_hub

    class Hub:
        seen: dict = {}  # noqa: RUF012

        def create_repo(self, repo_id, **options):
            self.seen["create"] = (repo_id, options)
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, **options):
            self.seen["upload"] = options
            self.seen["files"] = sorted(os.listdir(options["folder_path"]))
            return type("Commit", (), {"commit_url": "https://hub/me/mine/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--to", "hf", "--push", "mine", "--private"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pushed"] == "https://hub/me/mine/commit/1"
    assert Hub.seen["create"] == ("mine", {"private": True, "exist_ok": True})
    assert Hub.seen["upload"]["repo_id"] == "me/mine" and Hub.seen["upload"]["ignore_patterns"] == ["manifest.json"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(Hub.seen["files"])


def test_a_hub_that_cannot_be_reached_is_named_and_the_folder_stays(source, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none", "HF_HOME": str(tmp_path / "h")}
    code = "import sys; from hrm_model.hf.export import push_folder; push_folder(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), "me/mine"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: ") and "was not uploaded to me/mine" in last and "hf upload me/mine" in last, last


def test_push_to_hub_of_the_model_itself(exported, monkeypatch):
    """transformers' own method, the hub's client replaced: it asks for a repository and sends what save_pretrained
    writes."""
    import huggingface_hub
    import transformers.utils.hub as hub

    seen: dict = {}

    def create_repo(repo_id, **options):
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(repo_id, operations, **options):
        seen[repo_id] = {operation.path_in_repo for operation in operations}

    for name, function in (("create_repo", create_repo), ("create_commit", create_commit)):
        if hasattr(hub, name):  # version 4
            monkeypatch.setattr(hub, name, function)
        else:
            monkeypatch.setattr(
                huggingface_hub.HfApi,
                name,
                lambda self, *args, function=function, **options: function(*args, **options),
            )
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *_, **__: huggingface_hub.ModelCard("# mine"))
    AutoModelForCausalLM.from_pretrained(exported).push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "generation_config.json"} <= seen["me/mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{tmp}/out", "--with-code"], "--with-code is for --to hf, not --to safetensors"),
        (["{model}", "{tmp}/out", "--push", "a/b", "--to", "pt"], "--push is for --to hf, not --to pt"),
        (["{model}", "{tmp}/out", "--to", "hf", "--private"], "--private is for --push"),
        (["{model}", "{tmp}", "--to", "pt"], "is a directory and a .pt a file"),
        (["{model}", "{tmp}/there.pt", "--to", "pt"], "there.pt already exists"),
        (["{tmp}/empty", "{tmp}/out", "--to", "hf"], "is no model: it has neither config.json"),
        (["{tmp}/other", "{tmp}/out"], "config.json is of model_type 'gpt2'"),
        (["{tmp}/there.pt", "{tmp}/out", "--to", "hf"], "is no .pt file that can be read"),
        (["{tmp}/broken", "{tmp}/out", "--to", "hf"], "cannot be read as safetensors"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_left(source, arguments, message, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, config in (
        ("other", {"model_type": "gpt2"}),
        ("broken", json.loads((source / "config.json").read_text())),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"no weights")
    before = sorted(tmp_path.rglob("*"))
    filled = [a.format(model=source, tmp=tmp_path) for a in arguments]
    assert main(["convert", *filled]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and len(err.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.pt").read_text() == "mine"


def test_a_weight_beyond_float16_is_named(tmp_path, capsys):
    model = with_vocabulary()
    with torch.no_grad():
        model.ln_f.weight[3] = 1e5
    save_model(model, tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "float16"]) == 1
    assert "ln_f.weight has a weight of 1e+05, beyond float16's 6.55e+04; use bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_gives_other_logits_is_not_put_in_place(source, tmp_path, monkeypatch, capsys):
    save = checkpoint.save_file

    def faulty(tensors, path, **options):  # a disk that changes a number
        tensors["ln_f.weight"][0] += 1
        save(tensors, path, **options)

    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", faulty)
    for arguments in (["new"], ["out", "--overwrite"]):
        assert main(["convert", str(source), str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        assert "gives logits that are off by up to" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_without_transformers_the_extra_is_named(source, tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None; from hrm_model.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out"), "--to", "hf"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "pip install 'hrm-kernels[hf]'" in done.stderr, done.stderr
