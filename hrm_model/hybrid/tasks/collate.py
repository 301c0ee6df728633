"""From prompts and answers to a batch: tokenised apart, put together, the prompt masked out of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .example import Example


@dataclass
class AnswerBatch:
    """B rows of T tokens, padded on the right. A is the longest answer, end of text included."""

    ids: Tensor
    """[B, T] int64: prompt, answer, end of text, padding."""
    mask: Tensor
    """[B, T] int64, 0 on padding."""
    labels: Tensor
    """[B, T] int64, of each position its own token; ignore_index on prompt and padding."""
    prompt_lengths: Tensor
    """[B] int64."""
    examples: list[Example]
    """As they came, for verifiers."""
    positions: Tensor
    """[B, A] int64: where the tokens of an answer are predicted from; 0 where a row has fewer."""
    targets: Tensor
    """[B, A] int64: what is predicted there; -1 where a row has fewer."""

    @property
    def prompt(self) -> Tensor:
        """[B, T] bool, true on each row's prompt."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.prompt_lengths[:, None]


class Collator:
    """Makes batches of examples.

    Args:
        tokenizer: of transformers, with an end-of-text and a padding token. window: the longest row that the language
            model takes. ignore_index: label of what no loss looks at.
    """

    def __init__(self, tokenizer, window: int, device: torch.device | str = "cpu", ignore_index: int = -100):
        self.tokenizer, self.window, self.device, self.ignore_index = tokenizer, window, device, ignore_index

    def prompt_ids(self, prompt: str) -> list[int]:
        """Raises ValueError for a prompt without a token, or one that fills the window."""
        ids = self.tokenizer(prompt).input_ids
        eos = self.tokenizer.eos_token_id
        if ids and ids[-1] == eos:  # some tokenizers end every text
            ids = ids[:-1]
        if not prompt.strip() or not ids:
            raise ValueError(f"the prompt {prompt!r} is empty; a prompt needs at least one token")
        if len(ids) >= self.window:
            raise ValueError(
                f"a prompt of {len(ids)} tokens does not fit the language model's window of {self.window}, with room "
                f"for an answer; shorten it: {prompt[:60]!r}..."
            )
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens and the end of text."""
        return [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def count_targets(self, examples: Sequence[Example]) -> int:
        """Tokens that the loss looks at."""
        return sum(len(self.answer_ids(e.answer)) for e in examples)

    def __call__(self, examples: Sequence[Example]) -> AnswerBatch:
        """Raises ValueError where a row does not fit the window."""
        if not examples:
            raise ValueError("a batch needs at least one example")
        prompts, answers = [self.prompt_ids(e.prompt) for e in examples], [self.answer_ids(e.answer) for e in examples]
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            if len(prompt) + len(answer) > self.window:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and an answer of {len(answer)} are over the language model's "
                    f"window of {self.window}; choose shorter tasks: {example.prompt[:60]!r}..."
                )
        n_rows, longest = len(examples), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((n_rows, longest), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, self.ignore_index)
        positions = torch.zeros(n_rows, max(map(len, answers)), dtype=torch.int64)
        targets = torch.full_like(positions, -1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            n, m = len(prompt), len(answer)
            ids[row, : n + m] = torch.tensor(prompt + answer)
            mask[row, : n + m] = 1
            labels[row, n : n + m] = ids[row, n : n + m]
            positions[row, :m] = torch.arange(n - 1, n + m - 1)
            targets[row, :m] = labels[row, n : n + m]
        lengths = torch.tensor([len(p) for p in prompts])
        tensors = (t.to(self.device) for t in (ids, mask, labels, lengths))
        return AnswerBatch(*tensors, list(examples), positions.to(self.device), targets.to(self.device))

    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """([B, T] ids padded on the left, [B, T] mask), for generation. Raises ValueError as `prompt_ids`."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.device), mask.to(self.device)
