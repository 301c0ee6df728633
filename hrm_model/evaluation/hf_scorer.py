"""Any causal language model of Hugging Face under the same protocol, for comparison.

Where a model takes positions and keeps keys and values, contexts of a batch are computed once: right-padded, their keys
and values repeated for each choice, the padding masked. The first request is scored both ways; a model whose numbers
differ is read row by row instead.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .perplexity import Rolled, windows
from .requests import Continuation, Progress, Request, Score, cut_from_left

EXTRA = "pip install 'hrm-kernels[hf]'"
ALIKE = 1e-3
"""Nats by which a continuation's log-probability may differ between the two ways."""
PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None}
"""Of generation, against what some models' folders set: the likeliest token is asked for."""
LOGIT_ROWS = 64
"""Rows whose logits are there at a time in perplexity."""


class HFScorer:
    """Scores by a model of the hub or a folder.

    Args:
        name: of the hub, such as gpt2, facebook/opt-125m or EleutherAI/pythia-160m, or a folder.
        batch_tokens: tokens at a time. batched: False computes every row by itself.

    Raises:
        ValueError: transformers is missing, or there is no such model; says what helps.
    """

    max_steps = 0
    halt_bias = None

    def __init__(
        self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *,
        batch_tokens: int = 2048, batched: bool = True,
    ):  # fmt: skip
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"comparing with {name} needs transformers: {EXTRA}") from error
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except Exception as error:  # theirs are of many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"cannot load {name} ({reason}); give a folder with config.json, weights and tokenizer, or a name on "
                "the hub and a network that reaches it"
            ) from error
        self.model = model.to(device).eval()
        self.name, self.device = name.rstrip("/").rsplit("/", 1)[-1], torch.device(device)
        config = model.config
        lengths = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
        self.max_length = next((length for length in lengths if length), 1024)
        self.batch_tokens, self.batched = batch_tokens, batched
        takes = inspect.signature(model.forward).parameters
        self._shares: bool | None = None if "position_ids" in takes else False
        self._past = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if first is None:
            raise ValueError(f"{name} has neither a token that begins a text nor one that ends it; take another model")
        self._first = first

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def encode(self, text: str, is_context: bool = False) -> list[int]:
        """Ids; a context begins as the tokenizer has texts begin (OPT: with </s>)."""
        ids = self.tokenizer.encode(text, add_special_tokens=is_context)
        return ids or ([self._first] if is_context else [])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[list[Score]]:
        """A Score for each choice of each request; see requests.Scorer."""
        if requests and self.batched and self._shares is None:
            self._shares = self._agrees(requests[0])
        found: list[list[Score | None]] = [[None] * len(request.choices) for request in requests]
        jobs = []
        for number, request in enumerate(requests):
            by_cut: dict[int, list[int]] = {}
            for choice, ids in enumerate(request.choices):
                kept = len(cut_from_left(request.context, ids, self.max_length, request.where))
                by_cut.setdefault(kept, []).append(choice)
            for kept, choices in by_cut.items():
                jobs.append((number, list(request.context)[len(request.context) - kept :], choices))
        jobs.sort(key=lambda job: -len(job[1]))
        batch: list[tuple] = []
        done: set[int] = set()
        for i, job in enumerate(jobs):
            batch.append(job)
            longest = max(len(context) for _, context, _ in batch)
            longest += max(len(requests[n].choices[c]) for n, _, choices in batch for c in choices)
            rows = sum(len(choices) for _, _, choices in batch)
            if not self.batched or i + 1 == len(jobs) or rows * longest >= self.batch_tokens:
                self._score_batch(batch, requests, found)
                if progress:
                    fresh = {n for n, _, _ in batch} - done
                    done |= fresh
                    progress(len(fresh))
                batch = []
        return found

    def _score_batch(self, batch: list[tuple], requests: Sequence[Request], found: list[list]) -> None:
        rows = [(i, n, c, requests[n].choices[c]) for i, (n, _, choices) in enumerate(batch) for c in choices]
        contexts = [context for _, context, _ in batch]
        if self.batched and self._shares:
            logits = self._shared(contexts, [(i, choice) for i, _, _, choice in rows])
        else:
            groups = [rows] if self.batched else [[row] for row in rows]
            logits = [one for group in groups for one in self._whole([(contexts[i], ids) for i, _, _, ids in group])]
        for (_, n, c, choice), predicted in zip(rows, logits, strict=True):
            found[n][c] = _score(predicted, choice)

    def _whole(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """Of each row, the logits that predict its choice. Right padding comes after every real token."""
        ids = _padded([[*context, *choice] for context, choice in rows], self.device)
        mask = _padded([[1] * (len(context) + len(choice)) for context, choice in rows], self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return [
            logits[i, len(context) - 1 : len(context) + len(choice) - 1] for i, (context, choice) in enumerate(rows)
        ]

    def _shared(self, contexts: Sequence[Sequence[int]], rows: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """The same with each context computed once."""
        sizes = torch.tensor([len(context) for context in contexts], device=self.device)
        mask = _padded([[1] * len(context) for context in contexts], self.device)
        out = self.model(input_ids=_padded(contexts, self.device), attention_mask=mask, use_cache=True)
        ends = out.logits[torch.arange(len(contexts), device=self.device), sizes - 1]
        of = torch.tensor([i for i, _ in rows], device=self.device)
        longest = max(len(choice) for _, choice in rows)
        rest = None
        if longest > 1:  # the last token of a choice predicts nothing that is asked
            read = [list(choice[:-1]) or [0] for _, choice in rows]
            past = copy.deepcopy(getattr(out, self._past))
            past.batch_select_indices(of)
            ids = _padded(read, self.device)
            new = _padded([[1] * len(one) for one in read], self.device)
            places = torch.arange(ids.shape[1], device=self.device) + sizes[of][:, None]
            rest = self.model(
                input_ids=ids, attention_mask=torch.cat((mask[of], new), 1), **{self._past: past},
                position_ids=places.clamp(max=self.max_length - 1), use_cache=True,
            ).logits  # fmt: skip
        found = []
        for row, (i, choice) in enumerate(rows):
            first = ends[i][None]
            found.append(first if len(choice) == 1 else torch.cat((first, rest[row, : len(choice) - 1])))
        return found

    def _agrees(self, request: Request) -> bool:
        """Whether both ways give the same, with a second context beside it that is longer, so that there is padding."""
        # one more token for each: of choices of one token nothing would be read from what was kept
        choices = [[*choice, choice[-1]][: self.max_length - 1] for choice in request.choices]
        context = list(cut_from_left(request.context, max(choices, key=len), self.max_length))
        contexts = [context, context[: max(1, len(context) // 2)]]
        try:
            shared = self._shared(contexts, [(i, choice) for i in (0, 1) for choice in choices])
        except (
            RuntimeError,
            TypeError,
            AttributeError,
            IndexError,
            ValueError,
        ):  # of a cache or positions of its own kind
            return False
        plain = [self._whole([(one, choice)])[0] for one in contexts for choice in choices]
        twice = list(zip(plain, shared, choices * 2, strict=True))
        apart = max(abs(_score(a, ids).logprob - _score(b, ids).logprob) for a, b, ids in twice)
        if apart > ALIKE:
            print(f"{self.name}: contexts are not shared, scores would be off by {apart:.2g} nats", file=sys.stderr)
        return apart <= ALIKE

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str],
        progress: Progress | None = None,
    ) -> list[Continuation]:
        """The likeliest tokens; see requests.Scorer. A prompt that leaves no room keeps its end."""
        ends = {self.tokenizer.eos_token_id, *(token for text in stop for token in self._tokens_of(text))} - {None}
        room = max(1, self.max_length - max_new_tokens)
        found = []
        size = max(1, self.batch_tokens // (max(map(len, prompts), default=1) + max_new_tokens)) if self.batched else 1
        for begin in range(0, len(prompts), size):
            group = [list(prompt)[-room:] for prompt in prompts[begin : begin + size]]
            longest = max(map(len, group))
            ids = torch.tensor([[self._first] * (longest - len(p)) + p for p in group], device=self.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in group], device=self.device)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                eos_token_id=sorted(ends), pad_token_id=self._first, output_logits=True, return_dict_in_generate=True,
                **PLAIN,
            )  # fmt: skip
            logprobs = torch.stack([step.float().log_softmax(-1) for step in out.logits], 1)
            said = out.sequences[:, longest:]
            drawn = logprobs.gather(2, said[..., None])[..., 0]
            for tokens, values in zip(said.tolist(), drawn.tolist(), strict=True):
                text, n = self._ended(tokens, stop)
                found.append(Continuation(text, tokens[:n], values[: n + 1], [], []))
            if progress:
                progress(len(group))
        return found

    def _ended(self, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, int]:
        """(text up to the first of `stop`, number of tokens before the one that ends it): other tokens than those of a
        stop alone can contain it."""
        for n, token in enumerate(tokens):
            text = self.decode(tokens[: n + 1])
            places = [at for at in map(text.find, stop) if at >= 0]
            if places or token == self.tokenizer.eos_token_id:
                return text[: min(places, default=None)], n
        return self.decode(tokens), len(tokens)

    def _tokens_of(self, stop: str) -> list[int]:
        """The tokens that are this text: some tokenizers put another, which is no text, before it."""
        return [token for token in self.encode(stop) if stop in self.tokenizer.decode([token])]

    @torch.no_grad()
    def rolling(self, ids: Sequence[int], stride: int | None = None, progress: Progress | None = None) -> Rolled:
        """The loss of every token; see perplexity.py."""
        losses = []
        for read, n_new in windows([self._first, *ids], self.max_length, stride):
            logits = self.model(input_ids=torch.tensor([read[:-1]], device=self.device)).logits[0, -n_new:]
            targets = torch.tensor(read[-n_new:], device=self.device)
            for part, wanted in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
                losses.append(torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none"))
            if progress:
                progress(n_new)
        return Rolled(torch.cat(losses).double().cpu().numpy(), None)


def _padded(rows: Sequence[Sequence[int]], device: Any) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _score(logits: Tensor, choice: Sequence[int]) -> Score:
    logprobs = logits.float().log_softmax(-1)
    targets = torch.tensor(list(choice), device=logits.device)
    total = logprobs.gather(1, targets[:, None]).sum().item()
    return Score(total, len(choice), bool((logprobs.argmax(-1) == targets).all()), 0.0, 0.0)
