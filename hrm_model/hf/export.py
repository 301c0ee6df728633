"""A folder that transformers reads: config.json, model.safetensors, tokenizer, generation_config.json, README.md, and
the model's own source if that is wanted. And its way to the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..atomic import read_json, write_json
from ..config import END_OF_TEXT
from ..model import HRMForCausalLM
from ..sampling import N_GPT2_IDS
from .card import model_card
from .carry import AUTO_MAP, carried_files
from .configuration import CosmicFishHRMConfig
from .modeling import CosmicFishHRMForCausalLM
from .tokenizer import make_tokenizer


@torch.no_grad()
def wrapped(model: HRMForCausalLM, dtype: torch.dtype | None = None) -> CosmicFishHRMForCausalLM:
    """The same model with Hugging Face's interface, with weights of its own of type `dtype` (default: as they are)."""
    with torch.random.fork_rng(devices=[]):
        made = CosmicFishHRMForCausalLM(CosmicFishHRMConfig.of(model.config))
    made = made.to(model.device, dtype or model.wte.weight.dtype)
    for name, target in made.state_dict().items():
        target.copy_(model.state_dict()[name])
    return made.train(model.training)


def write_folder(
    model: HRMForCausalLM, directory: Path, name: str, dtype: torch.dtype | None = None, with_code: bool = False
) -> None:
    """Write a model's folder into a directory that is there.

    Args:
        name: what the model card calls it. dtype: of the weights. with_code: carry the source too (carry.py).
    """
    made = wrapped(model, dtype)
    config = model.config
    if config.vocab_size > END_OF_TEXT:
        padded = list(range(N_GPT2_IDS, config.vocab_size)) or None
        made.generation_config = GenerationConfig(
            bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT, suppress_tokens=padded
        )
        make_tokenizer(config.block_size).save_pretrained(directory)
        # version 5 writes a name that version 4 does not know, and both know this one
        _change(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    made.save_pretrained(directory)
    if with_code:
        for file, source in carried_files().items():
            (directory / file).write_text(source, encoding="utf-8", newline="\n")
        _change(directory / "config.json", auto_map=AUTO_MAP)
    stored = str(made.dtype).removeprefix("torch.")
    card = model_card(name, config, model.num_parameters(), stored, with_code)
    (directory / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _change(path: Path, **values) -> None:
    write_json(path, read_json(path) | values)


def push_folder(directory: str | Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the hub, as one commit; returns its address. The repository is made if need be.

    Raises:
        OSError: no network, no permission, an impossible name: what the hub's client says, and how to try again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        found = api.create_repo(repository, private=private, exist_ok=True).repo_id
        told = api.upload_folder(
            repo_id=found, folder_path=str(directory), commit_message="Model, tokenizer and card",
            ignore_patterns=["manifest.json"],
        )  # fmt: skip
    except Exception as error:  # of several families: without a network it is the HTTP library's own
        raise OSError(
            f"{directory} is written and was not uploaded to {repository}: {error}; once that is mended: "
            f"hf upload {repository} {directory} --exclude manifest.json"
        ) from error
    return str(told.commit_url)
