"""The baseline without a language model: the same levels over the tokens themselves, with an embedding and a head of
their own. It is the project's HRMForCausalLM, with one block before and one after the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import HRMConfig
from ..model import IGNORE, HRMForCausalLM
from ..sampling import Sampling
from .config import HybridConfig
from .model import Learned
from .tasks.collate import AnswerBatch, Collator

LONGEST_HRM = 512
"""Tokens of a row that it takes in training."""


class HRMOnly(nn.Module):
    """Learns and answers as HybridModel does; every row runs all segments, the last of them with gradient.

    Args:
        vocab_size: of the tokenizer. window: the longest row, tokens.
    """

    def __init__(self, config: HybridConfig, vocab_size: int, window: int, device: torch.device | str = "cpu"):
        super().__init__()
        if config.use_act or config.lora_rank:
            raise ValueError(
                "--system hrm runs all segments and has no language model: leave out --use-act and --lora-rank"
            )
        self.segments = config.segments
        of_tokens = replace(
            config.core_config(vocab_size), block_size=window, n_input_layers=1, n_output_layers=1,
            tie_embeddings=False, use_rotary=(config.d_h // config.n_heads) % 2 == 0,
        )  # fmt: skip
        self.model = HRMForCausalLM(of_tokens).to(device)

    @property
    def config(self) -> HRMConfig:
        """Of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    def num_parameters(self) -> int:
        """Of what is trained: everything."""
        return self.model.num_parameters()

    def learn(self, batch: AnswerBatch, scale: float, controller: bool = True) -> Learned:
        """Forward and backward of one micro-batch; as HybridModel.learn."""
        out = self.model(
            batch.ids, _shifted(batch), batch.mask.sum(1), force_steps=self.segments, reduction="sum",
        )  # fmt: skip
        (out.loss * scale).backward()
        loss = float(out.loss.detach()) * scale
        return Learned(loss, [loss], 0.0, None)

    @torch.no_grad()
    def row_losses(self, batch: AnswerBatch, segments: int) -> tuple[Tensor, Tensor]:
        """As HybridModel.row_losses, of the last segment alone: [B, 1]."""
        model = self.model
        lengths = batch.mask.sum(1)
        logits = model(batch.ids, lengths=lengths, force_steps=segments, max_steps=segments).logits
        targets = _shifted(batch)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(targets)
        return (losses.sum(1) / (targets != IGNORE).sum(1))[:, None], torch.zeros(
            len(lengths), 1, 2, device=self.device
        )

    @torch.no_grad()
    def answers(
        self, collator: Collator, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, segments: int,
        batch_size: int = 64, **_,
    ) -> tuple[list[str], list[int]]:  # fmt: skip
        """(the likeliest answer, segments run) of each prompt; greedy whatever `sampling` says."""
        texts = []
        for start in range(0, len(prompts), batch_size):
            rows = [collator.prompt_ids(prompt) for prompt in prompts[start : start + batch_size]]
            begins, open_rows = [len(row) for row in rows], set(range(len(rows)))
            for _ in range(max_new_tokens):
                chosen = sorted(row for row in open_rows if len(rows[row]) < collator.window)
                if not chosen:
                    break
                tokens = self._next([rows[row] for row in chosen], segments)
                for row, token in zip(chosen, tokens, strict=True):
                    if token == collator.tokenizer.eos_token_id:
                        open_rows.discard(row)
                    else:
                        rows[row].append(token)
            texts += [
                collator.tokenizer.decode(row[begin:], skip_special_tokens=True)
                for row, begin in zip(rows, begins, strict=True)
            ]
        return texts, [segments] * len(texts)

    def _next(self, rows: list[list[int]], segments: int) -> list[int]:
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        logits = self.model(ids.to(self.device), lengths=lengths, force_steps=segments, max_steps=segments).logits
        return logits[torch.arange(len(rows)), lengths.to(self.device) - 1].argmax(-1).tolist()


def _shifted(batch: AnswerBatch) -> Tensor:
    """[B, T] the next position's label, -1 where no loss looks."""
    labels = torch.where(batch.labels < 0, IGNORE, batch.labels)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
