"""Language models of a few thousand weights of each family, and a tokenizer of single characters, all made here."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hrm_model.hybrid import HybridConfig, HybridModel, LanguageModel
from hrm_model.hybrid.tasks.collate import Collator

CHARACTERS = "0123456789+-=*/?.,: \n" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'()$%"
V = len(CHARACTERS) + 2
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=1)
FAMILIES = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "Mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, num_key_value_heads=2)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
    ),
    "GPTNeoX": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=1
        )
    ),
}
SHAPE = dict(d_h=16, h_layers=1, l_layers=1, n_heads=2)


def language_model(family: str = "Llama", seed: int = 0) -> LanguageModel:
    """A model whose states are of ordinary size."""
    torch.manual_seed(seed)
    made = FAMILIES[family]()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() == 2:
                p.normal_(0.0, 0.3)
    return LanguageModel(made)


def hybrid(family: str = "Llama", seed: int = 0, **shape) -> HybridModel:
    """A hybrid of it. Matrices that end in the language model's space are large, so that z_H makes a difference."""
    language = language_model(family, seed)
    made = HybridModel(language, HybridConfig(**SHAPE | shape))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() == 2 and ("project" in name or "out." in name):
                p.normal_(0.0, 0.5)
            if "q_head" in name:
                p.normal_()
    return made.eval()


def tokenizer(eos: bool = True, pad: bool = True):
    """One token a character; <eos> is 0 and <pad> 1."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    names = ({"eos_token": "<eos>"} if eos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def collator(window: int = 64) -> Collator:
    """Of that tokenizer."""
    return Collator(tokenizer(), window)


def save_language_model(directory: Path, **shape) -> Path:
    """A Llama and the tokenizer as a hub has them."""
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | shape, num_key_value_heads=2))
    made.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def rows(n: int = 3, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids padded on the right, mask, prompts), of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (n, length), generator=generator)
    lengths = torch.randint(length - 3, length + 1, (n, 1), generator=generator)
    prompts = torch.randint(2, length - 4, (n, 1), generator=generator)
    positions = torch.arange(length)
    return torch.where(positions < lengths, ids, 1), (positions < lengths).long(), positions < prompts
