"""A small causal language model of one's own, trained on the standard library's text: what bench/hybrid.py freezes.

A Llama of transformers with 2 million weights and a byte-level BPE of 1,024 tokens, digits single. It is saved as any
model of a hub is, and read back as one.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hrm_model.training.sources import Report, StdlibSource

VOCABULARY = 1024
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rope_theta=10_000.0, tie_word_embeddings=False,
)  # fmt: skip
WINDOW, ROWS = 128, 8
LEARNING_RATE = 1e-3
HELD_OUT = 64
"""Windows of text that nothing is trained on."""
HELD_OUT_FILE = "held_out_windows.json"


def make_tokenizer(texts: list[str]):
    """A transformers tokenizer with a BPE learned from `texts`, with an end-of-text and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def make_language_model(directory: Path, steps: int, seed: int = 0) -> dict[str, Any]:
    """Train tokenizer and model, save both to `directory`; returns losses on held-out text (nats a token), counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    begin = time.perf_counter()
    report = Report()
    texts = [piece.text for piece in StdlibSource(report).pieces(report)]
    torch.manual_seed(seed)
    order = torch.randperm(len(texts)).tolist()
    texts = [texts[i] for i in order]
    tokenizer = make_tokenizer(texts[: len(texts) // 16])
    wanted = (steps * ROWS + HELD_OUT) * WINDOW
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(ids) > wanted:
            break
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    windows = windows[torch.randperm(len(windows))]  # or a batch would be of one file
    held_out, windows = windows[:HELD_OUT], windows[HELD_OUT:]
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        rate = min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        rows = windows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(windows)]
        loss = _loss(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"language model: step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()
    counts = torch.bincount(windows.flatten(), minlength=VOCABULARY) + 1
    unigram = -(counts / counts.sum()).log()[held_out[:, 1:]].mean().item()
    model.save_pretrained(directory)
    (directory / HELD_OUT_FILE).write_text(json.dumps(held_out.tolist()))
    tokenizer.save_pretrained(directory)
    loss = text_loss(model, directory)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "tokens": steps * ROWS * WINDOW,
        "loss": loss, "unigram": unigram, "seconds": time.perf_counter() - begin,
    }  # fmt: skip


@torch.no_grad()
def text_loss(model, directory: Path) -> float:
    """Loss of a model on the text that the one in `directory` was not trained on, nats a token."""
    return _loss(model, torch.tensor(json.loads((directory / HELD_OUT_FILE).read_text()))).item()


def _loss(model, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
